"""Measuring: `run.py` for decoders, `network.py` for networks.

A worker process (`worker.py`, `network_worker.py`) holds the engine and speaks JSON lines with
`worker_process.py`; `gates.py` and `accounting.py` tell whether something disturbed a sample,
`traffic.py` counts the bytes that a token reads, `record.py` holds the results, `tables.py` and
`network_tables.py` show them.
"""

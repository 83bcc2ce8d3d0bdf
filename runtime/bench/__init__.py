"""Measuring: one loop (`run.py`); what it takes is in `decoder.py` and in `network.py`.

A worker process (`worker.py`, which says the protocol) holds the engine, on any host;
`worker_process.py` asks it and `replies.py` checks what it answers. `gates.py` and `accounting.py`
tell whether something disturbed a sample, `traffic.py` counts the bytes that a token reads,
`record.py` holds the results, `tables.py` shows them.
"""

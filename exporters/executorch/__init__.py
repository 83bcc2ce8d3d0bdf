"""ExecuTorch programs (`.pte`).

In reading order: `layout.py` (what a program can hold), `edgekit/models/decoder.py` (the wiring),
`blocks.py` (its operators), `ops.py` (operators of our own) and `nodes.py` (their nodes in
XNNPACK's graph), `lowering.py` (trace, cut into delegates, plan memory), `sharing.py` (no byte
twice); `decoder.py` calls them in turn. `network.py` writes a traced network, `readback.py` reads
weights back, `inspect.py` reports.
"""

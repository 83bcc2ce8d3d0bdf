"""ExecuTorch programs read back from bytes, for `inspect`, verification and the tests.

`header.py` is what an engine needs, `flatbuffer.py` reads tables, `program.py` the program in them,
`xnnpack_graph.py` the graph inside a delegate.
"""

"""ONNX files for ONNX Runtime, onnxruntime-genai and Transformers.js.

In reading order: `layout.py` (what a file can hold), `wiring.py` (the model), `contrib.py` and
`plain.py` (its operators, those of ONNX Runtime and of ONNX), `states.py` (names by ABI),
`packing.py` (codes into blocks), `graph.py` (nodes, and the file of the constants); `decoder.py`
calls them in turn. `network.py`, `network_graph.py` and `network_operators.py` write a traced
network. `optimised.py` finds what ONNX Runtime makes of a file, `readback.py` reads weights back,
`inspect.py` reports.
"""

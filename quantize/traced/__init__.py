"""Quantization of any module that `torch.export` traces: one graph, from calibration to export.

In reading order: `trace.py` (a graph of ATen operators), `results.py` (what it returns, by name),
`fold.py` (batch norms), `schemes.py` (recipes), `placement.py` (where codes are), `calibrate.py`,
`constants.py` (what no input reaches), `arithmetic.py` (what kernels compute, to the last bit),
`network.py` (codes, parameters, the simulation that engines must equal). An operator: its class in
`operators.py`, its ONNX form in `exporters/onnx/network_operators.py`, a net in
`tests/support/operator_nets.py`, which says where each engine runs it in float.
"""

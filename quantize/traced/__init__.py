"""Quantization of any module that `torch.export` traces: one graph, from calibration to export."""

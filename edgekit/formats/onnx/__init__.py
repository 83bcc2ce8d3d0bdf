"""ONNX without its library, for untrusted files.

In reading order: `model.py` (nodes and constants), `protobuf.py` (fields of untrusted bytes),
`messages.py` (the messages of onnx.proto), `checks.py` (order, names, external data), all behind
`file.py`, which exporters and engines share. `genai_config.py` reads onnxruntime-genai's folders.
"""

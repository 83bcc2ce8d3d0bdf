"""ONNX Runtime: `graph.py` finds tokens, states and logits in a file, `decoder.py` runs it."""

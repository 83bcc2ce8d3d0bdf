"""GGUF files for llama.cpp.

In reading order: `decoder.py` (keys, names, which type holds which scheme), `blocks.py` (codes into
ggml's blocks), `names.py`, `tokenizer.py` and `tokenizer_check.py` (its ids against Hugging Face's
over `corpus.py`). `readback.py` reads weights back, `inspect.py` reports; `llama/` is for formats
of llama.cpp's own.
"""

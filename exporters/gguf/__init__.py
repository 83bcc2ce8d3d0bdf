"""GGUF files for llama.cpp.

In reading order: `layout.py` (what a file can hold), `block_types.py`, `planned.py` (tensors and
keys), `decoder.py` (writes them), `blocks.py` (codes into ggml's blocks), `names.py`,
`row_orders.py`, `tokenizer.py` and `tokenizer_check.py` (its ids against Hugging Face's over
`corpus.py`). `readback.py` reads weights back, `inspect.py` reports; `own_formats.py` and `llama/`
are for formats of llama.cpp's own.
"""

"""llama.cpp's own formats (`--scheme Q4_K_M`), which llama.cpp itself quantizes.

`formats.py` has their names, `quantize.py` and `process.py` run llama.cpp's quantizer in its own
process, `imatrix.py` reads and writes importance matrices.
"""

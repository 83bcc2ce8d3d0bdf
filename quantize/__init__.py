"""Quantization: codes, schemes and recipes. Imports torch, numpy and safetensors.

What may be stored, without torch: `schemes/`, `recipe.py`, `table.py`. Codes, in reading order:
`tensor.py`, `super_blocks.py` (scales of 6-bit codes), `affine.py` (rounding to nearest),
`by_scheme.py`, `storage.py` (the file); `gptq.py` chooses better ones, a matrix at a time. Other
folders are for codebooks, traced networks and training.
"""

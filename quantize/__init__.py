"""Quantization: codes, schemes and recipes. Imports torch, numpy and safetensors.

Codes, in reading order: `tensor.py`, `super_blocks.py` (scales of 6-bit codes), `affine.py`
(rounding to nearest), `storage.py` (the file); `gptq.py` chooses better ones, a matrix at a time.
Folders are for codebooks, traced networks and training.
"""

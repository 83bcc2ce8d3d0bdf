"""Schemes: what a weight may be stored as, without torch.

Three kinds, `Float` (`floats.py`), `Affine` (`affine.py`), `Codebook` (`codebook.py`), behind one
grammar of names (`names.py`, `parse_scheme`); `sizes.py` and `super_blocks.py` count the bytes of
what they make. `edgekit.quantize.by_scheme` quantizes by a scheme.
"""

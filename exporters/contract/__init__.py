"""What a target offers and what it is given.

For language models `layout.py` says what a file can hold, without torch, `writer.py` what writes it
and `own_formats.py` what the engine quantizes to; `network_target.py` is for networks. `weights.py`
gives a writer its tensors, `stored.py` says what a file without codebooks holds, `stored_size.py`
counts bytes.
"""

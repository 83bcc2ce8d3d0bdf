"""What a target offers and what it is given.

`target.py` is for language models, `network_target.py` for networks; `weights.py` gives a writer
its tensors, `stored.py` says what a file without codebooks holds, `stored_size.py` counts bytes.
"""

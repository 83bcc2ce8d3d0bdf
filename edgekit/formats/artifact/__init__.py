"""An artifact's folder and its manifest, `edgekit.json`: `read.py` opens one, `write.py` makes one.

The folder is complete or absent: it is written beside its place and renamed.
"""

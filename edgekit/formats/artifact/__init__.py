"""An artifact's folder and its manifest, `edgekit.json`.

`fields.py` takes entries of JSON with their types, `parts.py` and `manifest.py` are what the
manifest says, `older.py` adds what older ones lack; `read.py` opens a folder, `write.py` makes one.
The folder is complete or absent: it is written beside its place and renamed.
"""

"""Exporters: a folder for each target, what they share, verification and reports.

`registry.py` names the targets; `readback.py` compares weights across files, `read_codes.py` takes
codes back out of a model file.
"""

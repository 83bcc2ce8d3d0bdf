"""What joins the rooms: the functions behind the commands, `edgekit.export` and the others.

An export: `plan.py` (without torch), `target_schemes.py` where a budget chooses, `export.py`,
`verify.py`. Codes: `codes_file.py` plans and writes them; `quantize.py` calls in turn
`calibrate.py` (texts, what is kept of a run), `gains.py` (what it gained) and
`mixed_precision.py`, which chooses schemes by `sensitivity.py`.
`importance.py` measures the matrix that llama.cpp's own formats are chosen by.
"""

"""Codebooks: weights as indices into a few learned numbers, and how those are found.

In reading order: `kmeans.py`, `snap.py` (entries on an int8 grid), `fit.py` (from a weight alone),
`output.py` (the error of a layer's output), `learn.py` (the gradients of JLCM), `settle.py`
(coordinate descent), `jlcm.py` (all of it for one layer), `grouping.py` (like neurons together).
"""

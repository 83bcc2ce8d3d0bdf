"""Checkpoints, configurations, tokenizers, and what a family's models are made of.

In reading order: `source.py` (from a name to a model), `kinds.py` (what a path is instead),
`config.py` with `families/` (a config.json, by family), `architecture.py` (blocks as data),
`decoder.py` (the torch wiring that walks them), `checkpoint.py` (safetensors), `adapter.py` (LoRA
merged into them), `codes.py` (a file of codes as the source of an export), `layerwise.py` (codes of
all layers), `reorder.py` (like neurons beside each other).
"""

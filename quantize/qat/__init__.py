"""Quantization-aware training: an ordinary loop whose result is codes.

In reading order: `prepare.py` (which kind), `milestones.py`, `straight_through.py` (the gradients),
`opaque.py` (what `torch.compile` does not look into), `weights.py`, `carried.py` (what
copies of the module take along); then `traced.py` with `forward.py` (the folded graph run on the
module's own tensors), `layers.py` (batch norms), or `weight_only.py`; `training.py` is what
both share, `distill.py` losses. What `eval()` computes is `QuantizedNetwork.simulate`, to the bit:
a change to one is one to the other.
"""

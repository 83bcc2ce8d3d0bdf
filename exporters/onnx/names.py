"""Names of the constants in an ONNX model that edgekit writes: those of the checkpoint.

`a.q_proj+k_proj.weight` holds the rows of `a.q_proj.weight` and `a.k_proj.weight`. The scales of
`x.weight` are `x.weight.scales`, its zero points `x.weight.zero_points`.
"""

from collections.abc import Sequence

WEIGHT = ".weight"
SCALES = ".scales"
ZERO_POINTS = ".zero_points"


def joined(layers: Sequence[str]) -> str:
    """Return the name of layers whose rows stand in one matrix: `a.q_proj+k_proj`."""
    return "+".join([layers[0], *(name.rpartition(".")[2] for name in layers[1:])])


def parts(name: str) -> list[str]:
    """Undo `joined`."""
    first, *others = name.split("+")
    return [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]

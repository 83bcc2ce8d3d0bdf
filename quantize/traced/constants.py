"""Values that no input reaches: those of parameters alone, and products with weights that are 0.

A residual branch whose last factor is still zero, a class token of zeros: what calibration sees of
them is all that there is, while a value that merely was the same in all data may vary in others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from edgekit.quantize.traced.operators import MATRIX_LAYERS, arguments, aten
from edgekit.quantize.traced.trace import TracedModule

_FACTORS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(MATRIX_LAYERS, ("weight",)),
    aten.layer_norm.default: ("weight",),
    aten.group_norm.default: ("weight",),
    aten.mul.Tensor: ("self", "other"),
    aten.matmul.default: ("self", "other"),
}
"""Operands that keep the others from the result where they are 0."""
_SHAPES_ONLY = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
"""Operators that read nothing of their operand but its form."""


def constants(traced: TracedModule) -> set[str]:
    """Return the names of the nodes whose values are the same for all finite inputs."""
    run = _Constants(traced)
    with torch.inference_mode():
        run.run(*traced.example)
    return {node.name for node in run.found}


class _Constants(Interpreter):
    """Runs the example, for the values of the constants."""

    def __init__(self, traced: TracedModule) -> None:
        super().__init__(traced.graph_module, garbage_collect_values=False)
        self.extra_traceback = False  # torch's addition to messages, which are of one line
        self.found: set[Node] = set()

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n.op == "get_attr" or (n.op == "call_function" and self._is_constant(n)):
            self.found.add(n)
        return result

    def _is_constant(self, node: Node) -> bool:
        tensors = [item for item in node.all_input_nodes if isinstance(self.env[item], Tensor)]
        if node.target in _SHAPES_ONLY or self.found.issuperset(tensors):
            return True
        if node.target not in _FACTORS:
            return False
        named = arguments(node)
        return any(self._is_zero(named[name]) for name in _FACTORS[node.target])

    def _is_zero(self, factor: object) -> bool:
        if isinstance(factor, Node):
            return factor in self.found and not bool(self.env[factor].any())
        return factor == 0

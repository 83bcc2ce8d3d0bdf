"""`prepare`: a module becomes one that is trained through quantization."""

from collections.abc import Sequence
from typing import overload

from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.quantize.qat.milestones import Milestones
from edgekit.quantize.qat.traced import TracedTraining
from edgekit.quantize.traced.schemes import LayerRecipe


def prepare(
    model: nn.Module,
    recipe: LayerRecipe | str,
    example_inputs: Sequence[Tensor],
    *,
    steps: int | None = None,
    milestones: Milestones | None = None,
    learn_scales: bool = False,
) -> TracedTraining:
    """Make a module round in training what its export will round."""
    if steps is not None and milestones is not None:
        raise EdgekitError("give steps or milestones, not both")
    when = milestones or (Milestones() if steps is None else Milestones.over(steps))
    layers = LayerRecipe.uniform(recipe) if isinstance(recipe, str) else recipe
    return TracedTraining(model, layers, example_inputs, when, learn_scales)

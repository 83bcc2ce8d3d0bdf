"""`prepare`: a module becomes one that is trained through quantization."""

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.quantize.qat.milestones import Milestones
from edgekit.quantize.qat.traced import TracedTraining
from edgekit.quantize.qat.training import is_prepared, prepared_parts
from edgekit.quantize.qat.weight_only import Rounding, WeightTraining
from edgekit.quantize.recipe import PRESETS, Recipe
from edgekit.quantize.traced.schemes import LayerRecipe, LayerScheme
from edgekit.quantize.wrappers import refuse_wrapped


@overload
def prepare(
    model: nn.Module,
    recipe: LayerRecipe | str,
    example_inputs: Sequence[Tensor],
    *,
    steps: int | None = None,
    milestones: Milestones | None = None,
    learn_scales: bool = False,
) -> TracedTraining: ...


@overload
def prepare(
    model: nn.Module,
    recipe: Recipe | str,
    example_inputs: None = None,
    *,
    milestones: Milestones | None = None,
    learn_scales: bool = False,
    round_inputs: Rounding | None = None,
) -> WeightTraining: ...


def prepare(
    model: nn.Module,
    recipe: LayerRecipe | Recipe | str,
    example_inputs: Sequence[Tensor] | None = None,
    *,
    steps: int | None = None,
    milestones: Milestones | None = None,
    learn_scales: bool = False,
    round_inputs: Rounding | None = None,
) -> TracedTraining | WeightTraining:
    """Make a module round in training what its export will round; it stays the same object.

    With `example_inputs` the module is traced and activations have static ranges: `recipe` is a
    scheme such as w8a8 or a `LayerRecipe`, the result ends in a `QuantizedNetwork`. Without, only
    weights are rounded, those of linear layers and embeddings: `recipe` is a preset (int8, int4),
    a scheme such as w4g32 or a `Recipe`, the result ends in codes by name.

    Convolutions are quantized with `example_inputs` only. Ranges are those of the weights as they
    are, but without `example_inputs` one that is searched for (the default at 4 bits) costs some
    ten roundings of a large matrix: in `train()` it is renewed every tenth step, in `eval()` each
    time.

    After each step of the optimizer, and before its `zero_grad()`, `step()` is called on what is
    returned: by the gradients it finds weights that training does not round. At the end comes
    `finalize()`. `steps`, the length of the training, gives static ranges their usual `milestones`.
    Start from a trained float model and train some hundreds of steps at least: ranges are averages
    over batches, which do not fit weights that still move far.
    With `learn_scales` the model is on its device already, and the optimizer must also get
    `parameters()` of what is returned. Raises EdgekitError for a module that cannot be traced or
    stands around another one (compiled, parallel), and for a recipe that matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise EdgekitError(f"expected a torch.nn.Module, got {type(model).__name__}")
    refuse_wrapped(model, "; compile or wrap it afterwards")
    if is_prepared(model):
        raise EdgekitError("the module is prepared already: finalize() or remove() that first")
    if isinstance(example_inputs, Tensor):
        raise EdgekitError("example_inputs must be a tuple of tensors: got one tensor")
    if example_inputs is None:
        chosen = _weight_recipe(recipe, model)
        if steps is not None:
            raise EdgekitError("steps are for recipes with static ranges: give milestones instead")
        when = milestones or Milestones()
        return WeightTraining(model, chosen, when, learn_scales, round_inputs)
    if round_inputs is not None:
        raise EdgekitError("round_inputs is for recipes of weights alone: leave it out")
    return TracedTraining(
        model, _layer_recipe(recipe), example_inputs, _when(steps, milestones), learn_scales
    )


def training_of(model: nn.Module) -> TracedTraining | WeightTraining:
    """Return the training of a prepared module: what `prepare` returned, or a copy's own.

    `copy.deepcopy` of a prepared module copies its training too, and so does an `AveragedModel`
    of it, whose `module` is such a copy: it evaluates and finalizes to codes of its own weights,
    ranges and learned scales. The model may be around the prepared one, compiled or parallel.
    EdgekitError where nothing in it is prepared.
    """
    found = {id(part.training): part.training for part in prepared_parts(model)}
    if len(found) != 1:
        what = "is not prepared" if not found else "holds several that are: give one of them"
        raise EdgekitError(f"{type(model).__name__}: {what}")
    (training,) = found.values()
    assert isinstance(training, TracedTraining | WeightTraining)
    return training


def _when(steps: int | None, milestones: Milestones | None) -> Milestones:
    if steps is not None and milestones is not None:
        raise EdgekitError("give steps or milestones, not both")
    return milestones or (Milestones() if steps is None else Milestones.over(steps))


def _layer_recipe(recipe: LayerRecipe | Recipe | str) -> LayerRecipe:
    if isinstance(recipe, Recipe):
        raise EdgekitError(f"{recipe.name}: is a recipe of weights alone: give no example_inputs")
    if recipe in PRESETS and recipe != "float":
        raise EdgekitError(f"{recipe}: rounds weights alone: give no example_inputs, or give w8a8")
    return LayerRecipe.uniform(recipe) if isinstance(recipe, str) else recipe


def _weight_recipe(recipe: LayerRecipe | Recipe | str, model: nn.Module) -> Recipe:
    if isinstance(recipe, LayerRecipe):
        raise EdgekitError(f"{recipe.name}: its static ranges need example_inputs")
    if isinstance(recipe, Recipe):
        return recipe
    if LayerScheme.has_name(recipe):
        raise EdgekitError(f"{recipe}: its static ranges need example_inputs")
    found = Recipe.named(recipe)
    # What these have before the last rule is for a language model's vocabulary: other modules
    # have none, and a rule that takes nothing is an error.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    *special, last = found.rules
    kept = [rule for rule in special if any(map(rule.matches, names))]
    return replace(found, rules=(*kept, last))

"""Training of the weights alone: linear layers and embeddings of any module, untraced.

The forward pass of each module that owns a quantized weight sees the rounded weight in its place;
nothing else of the model is touched. Parameters that two modules share stay one parameter: each
module rounds it as its own rule says.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from edgekit.errors import EdgekitError
from edgekit.quantize.by_scheme import grid_of
from edgekit.quantize.qat.milestones import Milestones
from edgekit.quantize.qat.straight_through import rounded
from edgekit.quantize.qat.training import Prepared, Training
from edgekit.quantize.qat.weights import WeightQuantizer
from edgekit.quantize.recipe import Recipe, Resolved, resolve
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.storage import About, save_quantized
from edgekit.quantize.tensor import Weight

RANGE_EVERY = 10
"""Steps for which a searched range is used in training; minimum and maximum are of each step."""
Rounding = Callable[[Tensor], Tensor]


class WeightTraining(Training):
    """Training towards one `QuantizedTensor` for each weight that the recipe quantizes.

    In `eval()` weights are always rounded, in `train()` from the milestone `start_fake_quant` on;
    the other milestones have no meaning here. `round_inputs` is how the engine rounds what goes
    into a quantized linear layer (`edgekit.models.activations`), None leaves that float.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        milestones: Milestones,
        learn_scales: bool = False,
        round_inputs: Rounding | None = None,
    ) -> None:
        rules = [[rule.pattern, rule.scheme.name, str(rule.range)] for rule in recipe.rules]
        super().__init__(model, recipe.name, rules, milestones)
        weights = dict(model.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        tied = _tied(weights)
        rows = resolve(recipe, shapes, tied)
        _refuse_codebooks(recipe, rows)
        self._rows = {row.tensor: row for row in rows}
        self._shared = rows.shared
        self._is_tied = {*tied, *tied.values()}
        self._layers: list[_Layer] = []
        for row in rows:
            if not row.scheme.is_float:
                self._add(row, weights[row.tensor], learn_scales, round_inputs)
        if not self._layers:
            raise EdgekitError(f"{recipe.name}: leaves every tensor float: nothing is trained")

    def step(self) -> None:
        """Count one step of the optimizer, before its `zero_grad()`.

        EdgekitError, as long as there are gradients to tell by, where a weight got a gradient
        although the module that holds it did not run: another module reads it, past the rounding.
        """
        if self.fake_quantizing:
            for layer in self._layers:
                layer.check_not_bypassed()
        super().step()

    def finalize(self) -> dict[str, Weight]:
        """Return every tensor of the model, codes or float32, and undo what `prepare` did.

        Names are those of `state_dict`. Tied tensors of one scheme are one object. EdgekitError
        names a weight that cannot be quantized, and one whose module training never ran.
        """
        if self.steps:
            for layer in self._layers:
                layer.check_used()
        self.remove()
        found: dict[str, Weight] = {}
        floats: dict[int, Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            source = self._shared.get(name, name)
            if source in found:
                found[name] = found[source]
            elif name in self._quantizers:
                found[name] = self._quantizers[name].codes(tensor)
            else:
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                stored = tensor.detach().to("cpu", dtype, copy=True)
                found[name] = floats.setdefault(id(tensor), stored)
        return found

    def save(self, path: Path | str, model: str, sha256: str, **facts: str | float) -> None:
        """Finalize into a file that `edgekit export MODEL --codes` packs as it is.

        `model` is the model's name and `sha256` that of the float weights that training began
        with (`WeightSource.sha256`); `facts` are kept in the file.
        """
        try:
            about = About(model, sha256, self.recipe, "qat", {"steps": self.steps, **facts})
        except ValueError as error:
            raise EdgekitError(f"{path}: {error}") from error
        save_quantized(Path(path), self.finalize(), about)

    def remove(self) -> None:
        """Give the modules their own forward passes again, codes or none."""
        for layer in self._layers:
            layer.remove()
        for quantizer in self._quantizers.values():
            quantizer.remove()

    def _go_to(self, step: int) -> None:
        super()._go_to(step)
        if step % RANGE_EVERY == 0:
            for quantizer in self._quantizers.values():
                quantizer.renew()

    def _add(
        self, row: Resolved, weight: Tensor, learn: bool, round_inputs: Rounding | None
    ) -> None:
        name, scheme = row.tensor, row.scheme
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        _refuse_computed(name, module, leaf)
        # Tied weights of one scheme are rounded to the same codes: one quantizer, one set of
        # learned scales.
        source = self._shared.get(name, name)
        if source not in self._quantizers:
            assert row.range is not None
            quantizer = WeightQuantizer(
                name, grid_of(scheme), scheme.axis, scheme.group_size, row.range
            )
            if learn and scheme.two_levels:
                raise EdgekitError(
                    f"{name}: the scales of {scheme.name} have a step in common and are not "
                    "learned: leave learn_scales out"
                )
            if learn:
                quantizer.learn(weight, self.model, f"qat_scales_{len(self._quantizers)}")
            self._quantizers[source] = quantizer
        rounding = None if isinstance(module, nn.Embedding) else round_inputs
        layer = _Layer(module, leaf, self._quantizers[source], self, rounding)
        layer.is_tied = name in self._is_tied
        self._layers.append(layer)


def _refuse_codebooks(recipe: Recipe, rows: Sequence[Resolved]) -> None:
    for row in rows:
        if isinstance(row.scheme, Codebook):
            raise EdgekitError(
                f"{recipe.name}: {row.tensor}: {row.scheme.name} is a codebook, which training "
                "through quantization does not take: it takes float, w8, w4, w8gN, w4gN, w4gNa, "
                "w5g32 and w6g16"
            )


def _refuse_computed(name: str, module: nn.Module, leaf: str) -> None:
    """Refuse a tensor that a weight is computed from: the weight itself would not be rounded.

    As torch's parametrizations do, and its older `weight_norm`, `spectral_norm` and `prune`, which
    compute it in a hook before the forward pass.
    """
    hooks = module._forward_pre_hooks.values()
    made = [getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks]
    by_hook = any(isinstance(each, str) and leaf.startswith(f"{each}_") for each in made)
    if by_hook or isinstance(module, ParametrizationList):
        raise EdgekitError(
            f"{name}: the module's weight is computed from it (a parametrization): make it a plain "
            "parameter first, as torch.nn.utils.parametrize.remove_parametrizations does, or give "
            "it float"
        )


def _tied(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of parameters that came under another name before, with that name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(weight), name) for name, weight in weights.items()}
    return {name: source for name, source in names.items() if name != source}


class _Layer(Prepared):
    """A module whose forward pass sees a rounded weight."""

    def __init__(
        self,
        module: nn.Module,
        leaf: str,
        quantizer: WeightQuantizer,
        training: WeightTraining,
        round_inputs: Rounding | None,
    ) -> None:
        self._module, self._leaf = module, leaf
        self._quantizer, self._training = quantizer, training
        self._round_inputs = round_inputs
        self.is_tied = False
        self._used = False
        self._instances_own = vars(module).get("forward")
        self._inner = module.forward
        module.forward = self.forward

    @property
    def training(self) -> WeightTraining:
        """The training of which this is a part."""
        return self._training

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the module's own
        """Run the module's own forward pass with the rounded weight in place of its parameter."""
        training = self._module.training
        if training:
            self._used = True
        if training and not self._training.fake_quantizing:
            return self._inner(*args, **kwargs)
        if self._round_inputs is not None and args:
            args = (rounded(args[0], self._round_inputs), *args[1:])
        weight = getattr(self._module, self._leaf)
        # In inference ranges are always of the weight as it is now: no counter of torch's sees all
        # that may be written into it, such as an average of weights that is swapped in.
        values, _ = self._quantizer.fake(weight, keep=training)
        # What stands in the instance's own dictionary hides the parameter of that name.
        vars(self._module)[self._leaf] = values
        try:
            return self._inner(*args, **kwargs)
        finally:
            del vars(self._module)[self._leaf]

    def remove(self) -> None:
        if vars(self._module).get("forward") != self.forward:
            return
        if self._instances_own is None:
            del self._module.forward
        else:
            self._module.forward = self._instances_own

    def check_not_bypassed(self) -> None:
        """Raise EdgekitError where the weight has a gradient from elsewhere alone."""
        weight = getattr(self._module, self._leaf)
        if not self._used and not self.is_tied and weight.grad is not None:
            self.check_used()

    def check_used(self) -> None:
        """Raise EdgekitError where the module's own forward pass never ran in training."""
        if not self._used:
            raise EdgekitError(
                f"{self._quantizer.name}: training never ran the module that holds it "
                f"({type(self._module).__name__}), so it was not rounded: give it float"
            )

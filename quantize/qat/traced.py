"""Training of a traced module with static ranges: it rounds where calibrated modules have codes.

The module's graph is run in place of its forward pass. It reads the module's own parameters and
buffers by their names, so the module stays what optimizers, `state_dict`, `train`, `eval` and `to`
know; the forward passes and hooks of its submodules are not called.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.observers import (
    ActivationParameters,
    MovingAverage,
    activation_parameters,
)
from edgekit.quantize.qat.carried import Carried
from edgekit.quantize.qat.forward import Forward, LiveGraph
from edgekit.quantize.qat.milestones import Milestones
from edgekit.quantize.qat.training import Prepared, Training
from edgekit.quantize.qat.weights import WeightQuantizer
from edgekit.quantize.traced.calibrate import unvaried
from edgekit.quantize.traced.constants import constants
from edgekit.quantize.traced.fold import fold_batch_norms
from edgekit.quantize.traced.network import QuantizedNetwork, quantize_module
from edgekit.quantize.traced.placement import Placement, place
from edgekit.quantize.traced.schemes import LayerRecipe
from edgekit.quantize.traced.trace import TracedModule, trace

LARGEST_BATCH = 1 << 16
"""Largest batch in training where the module can be traced for any."""

_NOT_COMPILED = (
    "a module that was prepared with example_inputs keeps its ranges as numbers, which a compiled "
    "graph cannot: it runs as it is where fullgraph is not asked for"
)


class TracedTraining(Training, Prepared):
    """Training towards a `QuantizedNetwork`.

    In `train()` the module observes and rounds as the milestones say; in `eval()` it computes what
    `finalize().simulate` does. Dropout modules stay; other code that depends on `self.training`,
    `functional.dropout` too, is traced as in inference.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: LayerRecipe,
        example_inputs: Sequence[Tensor],
        milestones: Milestones,
        learn_scales: bool = False,
    ) -> None:
        rules = [[rule.pattern, rule.scheme.name, str(rule.range)] for rule in recipe.rules]
        super().__init__(model, recipe.name, rules, milestones)
        self._layer_recipe = recipe
        self._example = tuple(example_inputs)
        traced = _trace(model, self._example)
        placement = place(fold_batch_norms(traced), recipe)
        if not placement.layers:
            raise EdgekitError(f"{recipe.name}: leaves every layer float: nothing is trained")
        self._graph = LiveGraph(model, traced, placement)
        self._observers = {node.name: MovingAverage() for node in placement.values()}
        self._members = placement.members()
        self._edges = placement.edges
        self._of_softmax = placement.of_softmax()
        self._samples = 0
        self._batches = 0
        device = next((item.device for item in model.parameters()), torch.device("cpu"))
        self._ranges = Carried(model, "qat_ranges", self._observed().to(device))
        self._add_quantizers(placement, learn_scales)
        # As a function of the training: a copy's is the copy's.
        self._uncompiled = torch.compiler.disable(TracedTraining._run, reason=_NOT_COMPILED)
        self._signature = inspect.signature(model.forward)
        model.forward = self._forward

    def finalize(self, max_batch: int | None = None) -> QuantizedNetwork:
        """Return the codes, and give the module its own forward pass again.

        The network takes batches like the example's, or of 1 to `max_batch`. EdgekitError names a
        tensor whose range was never observed, or a weight that cannot be quantized.
        """
        self.remove()
        model = self.model
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            model = copy.deepcopy(model).cpu()
        example = tuple(item.cpu() for item in self._example)
        traced = fold_batch_norms(trace(model, example, max_batch))
        placement = place(traced, self._layer_recipe)
        codes = {}
        for layer, _ in placement.layers.values():
            weight = str(layer.weight.target)
            codes[weight] = self._quantizers[weight].codes(traced.parameter(layer.weight))
        calibration = self.calibration() if placement.edges else None
        return quantize_module(replace(placement, codes=codes), calibration)

    def calibration(self) -> Calibration:
        """Return the observed ranges; EdgekitError names a tensor that has none."""
        self._read_ranges()
        names = self._graph.placement.traced.names
        ranges = {}
        for node, observer in self._observers.items():
            try:
                ranges[names[node]] = observer.range()
            except EdgekitError as error:
                raise EdgekitError(f"training: tensor {names[node]!r} {error}") from error
        found = Calibration(ranges, "moving-average", self._samples, self._batches)
        for node in unvaried(self._graph.placement, found):
            least, _ = ranges[names[node]]
            raise EdgekitError(f"training: tensor {names[node]!r} is {least:g} everywhere")
        return found

    def remove(self) -> None:
        """Give the module its own forward pass again, codes or none."""
        if vars(self.model).get("forward") == self._forward:
            del self.model.forward
        self._ranges.remove()
        for quantizer in self._quantizers.values():
            quantizer.remove()

    @property
    def training(self) -> Training:
        """Itself."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the state beside the model's and the optimizer's: tensors and plain values."""
        self._read_ranges()
        names = self._graph.placement.traced.names
        observed = {names[node]: observer.state() for node, observer in self._observers.items()}
        counts = {"samples": self._samples, "batches": self._batches}
        return {**super().state_dict(), "observers": observed, **counts}

    def _restore(self, state: Mapping[str, Any]) -> None:
        names = self._graph.placement.traced.names
        observed: Mapping[str, list[float]] = state.get("observers", {})
        if set(observed) != {names[node] for node in self._observers}:
            raise EdgekitError("the checkpoint is of another module: its activations differ")
        for node, observer in self._observers.items():
            observer.restore([float(number) for number in observed[names[node]]])
        self._samples, self._batches = int(state["samples"]), int(state["batches"])
        self._ranges.write(self._observed())

    def _observed(self) -> Tensor:
        """Return what the module carries: counts, then what each observer goes on from."""
        counts = [float(self._samples), float(self._batches), 0.0, 0.0, 0.0]
        return torch.tensor([counts, *(item.state() for item in self._observers.values())])

    def _read_ranges(self) -> None:
        """Go on from what the module carries, which may have been averaged or sent meanwhile."""
        counts, *observed = self._ranges.values.tolist()
        self._samples, self._batches = (round(count) for count in counts[:2])
        for observer, state in zip(self._observers.values(), observed, strict=True):
            observer.restore(state)

    def _add_quantizers(self, placement: Placement, learn_scales: bool) -> None:
        for name, (layer, rule) in placement.layers.items():
            weight = str(layer.weight.target)
            if weight in self._quantizers:
                continue
            scheme = rule.scheme
            quantizer = WeightQuantizer(
                weight,
                scheme.grid,
                scheme.axis(layer.channel_axis),
                None,
                rule.range or scheme.default_range,
            )
            self._quantizers[weight] = quantizer
            if learn_scales:
                values = self._graph.layers[name].folded(self._graph.read)[0]
                quantizer.learn(values, self.model, f"qat_scales_{len(self._quantizers)}")

    def _forward(self, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401 - as the module's
        return self._uncompiled(self, self._inputs(args, kwargs))

    def _run(self, inputs: tuple[Tensor, ...]) -> object:
        self._graph.placement.traced.check_inputs(inputs)
        self._read_ranges()
        observing = self.observing
        if observing:
            self._samples += len(inputs[0])
            self._batches += 1
        found = Forward(self._graph, self, inputs[0].device).run(*inputs)
        if observing:
            self._ranges.write(self._observed())
        return self._graph.placement.traced.results.structured(found)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the arguments in order, those given by name too."""
        given = self._signature.bind(*args, **kwargs).args if kwargs else args
        inputs = given[: len(self._example)]
        if not all(isinstance(item, Tensor) for item in inputs):
            raise EdgekitError(f"the prepared module takes {len(self._example)} tensors")
        return inputs

    @property
    def rounding(self) -> bool:
        """Whether the forward pass rounds now."""
        return not self.model.training or self.fake_quantizing

    @property
    def exact(self) -> bool:
        """Whether sums are those of integer kernels now, which takes twice the products."""
        return not self.model.training

    @property
    def observing(self) -> bool:
        """Whether the forward pass observes ranges now."""
        return self.model.training and self.milestones.observing(self.steps)

    @property
    def frozen(self) -> bool:
        """Whether batch norms use their running statistics now, whatever their mode."""
        return self.milestones.batch_norm_frozen(self.steps)

    def observe(self, node: str, values: Tensor) -> None:
        """Take the values of a node; EdgekitError for infinities and NaN."""
        try:
            self._observers[node].observe(values)
        except EdgekitError as error:
            raise self._error(node, error) from error

    def parameters_of(self, node: str) -> ActivationParameters:
        """Return the parameters of a value's edge as they are now."""
        members = self._members[self._edges[node]]
        # In the first batch the later values of an edge were not seen yet.
        seen = [self._range(name) for name in members if self._observers[name].seen]
        if not seen:
            raise self._error(node, EdgekitError("has no range yet: run a batch in train() first"))
        least, most = min(low for low, _ in seen), max(high for _, high in seen)
        if least == most and not self._fixed.issuperset(members):
            raise self._error(node, EdgekitError(f"is {least:g} everywhere"))
        try:
            reciprocal = self._edges[node] in self._of_softmax
            return activation_parameters(least, most, reciprocal)
        except ValueError as error:
            raise self._error(node, error) from error

    def fake_weight(self, weight: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return a folded weight rounded, and its scales [ranges].

        Its range is of now, even where it is searched for: running statistics move folded weights
        more than a step of the optimizer does, and beside activations they are small.
        """
        return self._quantizers[weight].fake(values)

    def _range(self, node: str) -> tuple[float, float]:
        try:
            return self._observers[node].range()
        except EdgekitError as error:
            raise self._error(node, error) from error

    @cached_property
    def _fixed(self) -> set[str]:
        """The values that no input reached when training began."""
        return constants(self._graph.placement.traced)

    def _error(self, node: str, error: Exception) -> EdgekitError:
        name = self._graph.placement.traced.names[node]
        return EdgekitError(f"training step {self.steps}: tensor {name!r} {error}")


def _trace(model: nn.Module, example: Sequence[Tensor]) -> TracedModule:
    """Trace for any batch where that is possible, else for the example's."""
    try:
        return trace(model, example, LARGEST_BATCH, for_training=True)
    except EdgekitError:
        return trace(model, example, for_training=True)

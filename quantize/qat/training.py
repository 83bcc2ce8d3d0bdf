"""What both kinds of quantization-aware training share: steps, and checkpoints of their own."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, Self

from torch import nn

from edgekit.errors import EdgekitError
from edgekit.quantize.qat.milestones import Milestones
from edgekit.quantize.qat.weights import WeightQuantizer

FORMAT_VERSION = 1
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a state raises where something is missing or of another kind."""


class Prepared:
    """What has put its own forward pass in a module's place."""

    @property
    def training(self) -> "Training":
        """The training that it serves."""
        raise NotImplementedError


def prepared_parts(model: nn.Module) -> Iterator[Prepared]:
    """Yield what has put its own forward pass in the place of the module's or of one inside it."""
    for part in model.modules():
        owner = getattr(vars(part).get("forward"), "__self__", None)
        if isinstance(owner, Prepared):
            yield owner


def is_prepared(model: nn.Module) -> bool:
    """Whether a module, or one inside it, is in training through quantization."""
    return any(True for _ in prepared_parts(model))


class Training:
    """A model that is trained through quantization.

    `model` stays the object that it was: its parameters, their names and its optimizers are those
    of the float model; only its forward pass rounds. `recipe` is the recipe's name and `rules` its
    rules as text, by which checkpoints are told apart. A `copy.deepcopy` of the model has a
    training of its own, which `training_of` finds.
    """

    def __init__(
        self, model: nn.Module, recipe: str, rules: list[list[str]], milestones: Milestones
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.milestones = milestones
        self._rules = rules
        self._quantizers: dict[str, WeightQuantizer] = {}
        self._go_to(0)

    def step(self) -> None:
        """Count one step of the optimizer: what `milestones` say begins or ends by itself.

        EdgekitError where learned scales are no longer those that `parameters` gave.
        """
        for quantizer in self._quantizers.values():
            quantizer.check_learned()
        self._go_to(self.steps + 1)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the learned scales, for the optimizer; none unless they are learned.

        The model is on its device by then, as for its own parameters. Of several processes
        (`DistributedDataParallel`) the first one's gradients teach them.
        """
        for quantizer in self._quantizers.values():
            if quantizer.learned is not None:
                yield quantizer.learned.as_parameter()

    def state_dict(self) -> dict[str, Any]:
        """Return the state beside the model's and the optimizer's: tensors and plain values."""
        return {
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe,
            "rules": self._rules,
            "steps": self.steps,
            "weights": {name: item.state() for name, item in self._quantizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        EdgekitError, with nothing changed, for the state of another recipe or model and for one
        that is not whole.
        """
        before = self.state_dict()
        try:
            self._load(state)
        except _MALFORMED as error:
            self._load(before)
            raise EdgekitError(
                f"is no whole training state ({type(error).__name__}: {str(error)[:100]!r}): load "
                "what state_dict() returned"
            ) from error

    def _load(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or state.get("format_version") != FORMAT_VERSION:
            raise EdgekitError(f"is no training state of format {FORMAT_VERSION}")
        if state["rules"] != self._rules:
            raise EdgekitError(
                f"the checkpoint is of recipe {state['recipe']!r} with other rules than "
                f"{self.recipe!r}: prepare the model with the recipe it was trained with"
            )
        weights: Mapping[str, Mapping[str, Any]] = state["weights"]
        if set(weights) != set(self._quantizers):
            raise EdgekitError("the checkpoint is of another module: its weights differ")
        if _learned(weights) != _learned(self.state_dict()["weights"]):
            raise EdgekitError(
                "the checkpoint has other learned scales: prepare the same model with the same "
                "learn_scales"
            )
        self._restore(state)
        self._go_to(int(state["steps"]))
        for name, quantizer in self._quantizers.items():
            quantizer.restore(weights[name])

    def _go_to(self, step: int) -> None:
        """Be at a step.

        What it decides is set here: a compiled forward pass that read the number itself would be
        compiled anew for each.
        """
        self.steps = step
        self.fake_quantizing = self.milestones.fake_quantizing(step)

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over what a kind of training keeps besides."""

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, with the model: forward passes that were replaced would be lost."""
        raise EdgekitError(
            "a prepared model is not pickled: save its state_dict() and that of what prepare() "
            "returned, or finalize() first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy it with its model."""
        result = type(self).__new__(type(self))
        memo[id(self)] = result
        vars(result).update(copy.deepcopy(vars(self), memo))
        return result


def _learned(weights: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of each weight's learned scales, None where they are not learned."""
    return {
        name: tuple(state["learned"].shape) if "learned" in state else None
        for name, state in weights.items()
    }

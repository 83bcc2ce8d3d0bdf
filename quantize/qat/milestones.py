"""When what begins and ends in training, in steps."""

from dataclasses import dataclass, fields

from edgekit.errors import EdgekitError

# Shares of the training. Ranges need some batches before they are used. Batch statistics are
# frozen late (arXiv 1806.08342, 3.2.2), and the ranges after them: they move a little by that.
_FAKE_QUANT = 0.05
_BATCH_NORM = 0.6
_OBSERVERS = 0.8


@dataclass(frozen=True)
class Milestones:
    """The steps from which on something holds, counted by `step()`; None is never.

    start_observers    the ranges of activations are observed
    start_fake_quant   weights and activations are rounded (in `eval()` they always are)
    freeze_batch_norm  batch norms use their running statistics, which no longer change
    freeze_observers   ranges no longer change

    EdgekitError where they contradict each other.
    """

    start_observers: int = 0
    start_fake_quant: int = 0
    freeze_batch_norm: int | None = None
    freeze_observers: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no number of steps, and rounding to ranges that nothing observed."""
        for field in fields(self):
            value = getattr(self, field.name)
            optional = field.name.startswith("freeze")
            if not (type(value) is int and value >= 0) and not (optional and value is None):
                raise EdgekitError(f"{field.name} must be a step, 0 or more, got {value!r}")
        if self.start_fake_quant < self.start_observers:
            raise EdgekitError(
                f"start_fake_quant {self.start_fake_quant} is before start_observers "
                f"{self.start_observers}: there would be no ranges to round to"
            )
        if self.freeze_observers is not None and self.freeze_observers <= self.start_observers:
            raise EdgekitError(
                f"freeze_observers {self.freeze_observers} must be after start_observers "
                f"{self.start_observers}"
            )

    @classmethod
    def over(cls, steps: int) -> "Milestones":
        """Return the milestones of a training of so many steps from a trained float model.

        Some hundreds at least: ranges are averages over batches up to their freeze, too narrow or
        too wide for weights that moved far meanwhile, as random ones do.
        """
        if type(steps) is not int or steps < 1:
            raise EdgekitError(f"steps must be a positive integer, got {steps!r}")
        frozen = max(1, round(_OBSERVERS * steps))
        return cls(0, round(_FAKE_QUANT * steps), round(_BATCH_NORM * steps), frozen)

    def observing(self, step: int) -> bool:
        """Whether ranges are observed in a step."""
        return step >= self.start_observers and not _reached(self.freeze_observers, step)

    def fake_quantizing(self, step: int) -> bool:
        """Whether training rounds in a step."""
        return step >= self.start_fake_quant

    def batch_norm_frozen(self, step: int) -> bool:
        """Whether batch norms use their running statistics in a step."""
        return _reached(self.freeze_batch_norm, step)


def _reached(milestone: int | None, step: int) -> bool:
    return milestone is not None and step >= milestone

"""Calibration: mini-batches run through the float graph, observed where codes will be."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from edgekit.errors import EdgekitError, one_line
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.observers import Observer, observer
from edgekit.quantize.traced.placement import Placement

Batch = Tensor | Sequence[Tensor]


def calibrate(
    placement: Placement,
    batches: Iterable[Batch],
    method: str = "moving-average",
    progress: Callable[[int], None] = lambda batch: None,
) -> Calibration:
    """Return the range of every value that has codes.

    `batches` yields what the module takes: a tensor, or a tuple of several; about a hundred
    mini-batches are what the whitepaper uses. `progress` is told the number of each. EdgekitError
    where there is none, where one is not like the example or the module does not run on it, and
    where a tensor holds infinities or NaN or is the same everywhere.
    """
    traced = placement.traced
    observers = {node.name: observer(method) for node in placement.values()}
    run = _Observation(placement, observers)
    count = samples = 0
    with torch.inference_mode():
        for batch in batches:
            count += 1
            inputs = mini_batch(batch, count)
            try:
                traced.check_inputs(inputs)
                run.run(*inputs)
            except EdgekitError as error:
                raise EdgekitError(f"calibration batch {count}: {error}") from error
            except (IndexError, RuntimeError) as error:  # such as an index beyond a table
                raise EdgekitError(
                    f"calibration batch {count}: the module does not run on it: {one_line(error)}"
                ) from error
            samples += len(inputs[0])
            progress(count)
    if not count:
        raise EdgekitError("calibration data is empty: give at least one batch")
    ranges = {}
    for node, found in observers.items():
        name = traced.names[node]
        try:
            ranges[name] = found.range()
        except EdgekitError as error:
            raise EdgekitError(
                f"calibration: tensor {name!r} {error}: the data does not exercise it; give other "
                "data, or leave the layers around it float"
            ) from error
    return Calibration(ranges, method, samples, count)


def mini_batch(given: object, number: int) -> tuple[Tensor, ...]:
    """Return a mini-batch as one tensor for each input; EdgekitError where it is none."""
    items = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not items or not all(isinstance(item, Tensor) for item in items):
        raise EdgekitError(
            f"calibration batch {number} must be a tensor, or a tuple of one for each input, got "
            f"{type(given).__name__}"
        )
    return items


class _Observation(Interpreter):
    def __init__(self, placement: Placement, observers: dict[str, Observer]) -> None:
        super().__init__(placement.traced.graph_module)
        self.extra_traceback = False  # torch's addition to messages, which are of one line
        self._observers = observers
        self._names = placement.traced.names

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n.name in self._observers:
            try:
                self._observers[n.name].observe(result)
            except EdgekitError as error:
                raise EdgekitError(f"tensor {self._names[n.name]!r} {error}") from error
        return result

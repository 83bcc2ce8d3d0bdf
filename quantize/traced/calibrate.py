"""Calibration: mini-batches run through the float graph, observed where codes will be."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from edgekit.errors import EdgekitError, one_line
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.observers import Observer, observer
from edgekit.quantize.traced.constants import constants
from edgekit.quantize.traced.placement import Placement
from edgekit.quantize.traced.trace import TracedModule

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a module takes: one tensor, one for each input in order, or by the inputs' names."""


def calibrate(
    placement: Placement,
    batches: Iterable[Batch],
    method: str = "moving-average",
    progress: Callable[[int], None] = lambda batch: None,
) -> Calibration:
    """Return the range of every value that has codes.

    `batches` yields what the module takes; about a hundred mini-batches are what the whitepaper
    uses. One with more rows than the module takes runs in parts. `progress` is told the number of
    each. EdgekitError where there is none, where one is not like the example or the module does
    not run on it, and where a tensor holds infinities or NaN or, though inputs reach it, is the
    same everywhere.
    """
    traced = placement.traced
    observers = {node.name: observer(method) for node in placement.values()}
    run = _Observation(placement, observers)
    count = samples = 0
    with torch.inference_mode():
        for batch in batches:
            count += 1
            inputs = mini_batch(batch, count, traced)
            try:
                for number, part in enumerate(parts(inputs, traced)):
                    traced.check_inputs(part)
                    run.observe(part, number == 0)
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
    ranges = {traced.names[node]: found.range() for node, found in observers.items()}
    result = Calibration(ranges, method, samples, count)
    for node in unvaried(placement, result):
        name = traced.names[node]
        raise EdgekitError(
            f"calibration: tensor {name!r} is {ranges[name][0]:g} everywhere: the data does not "
            "exercise it; give other data, or leave the layers around it float"
        )
    return result


def unvaried(placement: Placement, calibration: Calibration) -> list[str]:
    """Return the nodes whose edges have one value in all data, though inputs reach them."""
    names = placement.traced.names
    alike = [
        node
        for members in placement.members().values()
        for node in members
        if len(set(calibration.covering([names[member] for member in members]))) == 1
    ]
    fixed = constants(placement.traced) if alike else set()
    return [node for node in alike if node not in fixed]


def parts(inputs: tuple[Tensor, ...], traced: TracedModule) -> Iterator[tuple[Tensor, ...]]:
    """Cut a mini-batch into what the module takes; the last part may repeat rows of the one before.

    One that the module takes as it is, or that has fewer rows, is one part.
    """
    size = traced.max_batch or len(traced.example[0])
    if any(item.is_nested or item.layout != torch.strided or not item.ndim for item in inputs):
        yield inputs  # to be refused
        return
    rows = {len(item) for item in inputs}
    count = rows.pop() if len(rows) == 1 else 0
    if count <= size or any(len(item) != len(traced.example[0]) for item in traced.example):
        yield inputs
        return
    for start in range(0, count, size):
        first = start if traced.max_batch is not None else min(start, count - size)
        yield tuple(item[first : first + size] for item in inputs)


def mini_batch(given: object, number: int, traced: TracedModule) -> tuple[Tensor, ...]:
    """Return a mini-batch as one tensor for each input; EdgekitError where it is none."""
    if isinstance(given, Mapping):
        names = [node.name for node in traced.inputs]
        if set(given) != set(names):
            raise EdgekitError(
                f"calibration batch {number} must have a tensor for each input, "
                f"{', '.join(names)}: it has {', '.join(map(str, list(given)[:8])) or 'none'}"
            )
        given = [given[name] for name in names]
    items = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not items or not all(isinstance(item, Tensor) for item in items):
        raise EdgekitError(
            f"calibration batch {number} must be a tensor, or a tuple or dict of one for each "
            f"input, got {type(given).__name__}"
        )
    return items


class _Observation(Interpreter):
    def __init__(self, placement: Placement, observers: dict[str, Observer]) -> None:
        super().__init__(placement.traced.graph_module)
        self.extra_traceback = False  # torch's addition to messages, which are of one line
        self._observers = observers
        self._names = placement.traced.names
        self._begins = True

    def observe(self, inputs: tuple[Tensor, ...], begins: bool) -> None:
        """Run a mini-batch, or a part of one; `begins` says that it is the first."""
        self._begins = begins
        self.run(*inputs)

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n.name in self._observers:
            try:
                self._observers[n.name].observe(result, self._begins)
            except EdgekitError as error:
                raise EdgekitError(f"tensor {self._names[n.name]!r} {error}") from error
        return result

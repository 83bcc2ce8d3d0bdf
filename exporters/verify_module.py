"""Does a module's file, run in its engine, compute what the quantized network computes?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.errors import VerificationError
from edgekit.quantize.observers import LEVELS
from edgekit.quantize.traced.network import QuantizedNetwork
from edgekit.tables import markdown_table

MAX_STEPS = 0.5
"""Most steps of an output's codes that an engine may stray, root mean square over the outputs.

Both compute the same sums of the same codes, but round at ties differently, so that here and
there a code differs by one. A scale or a zero point that is lost moves outputs by dozens.
"""
SHARE_OF_QUANTIZATION = 0.5
"""Where quantization itself moves the outputs further than that, the bound is this share of it.

A deep network of 4-bit weights amplifies single codes as it does every other rounding.
"""
LEAST_STEP = 1e-5
"""Step, relative to the largest value, of outputs that have no codes: float32 sums differ."""


class ModuleEngine(Protocol):
    """What verification needs of an engine."""

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the module."""
        ...


@dataclass(frozen=True)
class ModuleVerification:
    """What was compared: differences of the outputs in steps of their codes.

    `rms_steps` and `max_steps` are of the engine against the simulation, `rms_steps_vs_float` of
    the engine and `quantization_rms_steps` of the simulation against the float module. `batches`
    are the sizes that ran.
    """

    outputs: int
    rms_steps: float
    max_steps: float
    rms_steps_vs_float: float
    quantization_rms_steps: float
    batches: list[int]

    @property
    def max_rms_steps(self) -> float:
        """The bound that `rms_steps` was held to."""
        return max(MAX_STEPS, SHARE_OF_QUANTIZATION * self.quantization_rms_steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures and their bound, for the manifest."""
        return {"verified": True, "max_rms_steps": self.max_rms_steps, **asdict(self)}


def verify_module(
    engine: ModuleEngine, network: QuantizedNetwork, inputs: tuple[Tensor, ...]
) -> ModuleVerification:
    """Compare outputs; VerificationError where they differ by more than roundings.

    Every batch size that a caller may rely on runs: the rows given, one alone, and the largest.
    """
    largest = network.traced.max_batch
    sizes = [len(inputs[0])] if largest is None else sorted({1, len(inputs[0]), largest})
    found = [_compare(engine, network, _rows(inputs, size)) for size in sizes]
    differences, from_float, quantization = (torch.cat(parts) for parts in zip(*found, strict=True))
    result = ModuleVerification(
        outputs=differences.numel(),
        rms_steps=_rms(differences),
        max_steps=float(differences.abs().max()),
        rms_steps_vs_float=_rms(from_float),
        quantization_rms_steps=_rms(quantization),
        batches=sizes,
    )
    if not result.rms_steps <= result.max_rms_steps:  # also true for NaN
        raise VerificationError(
            f"verification: the file's outputs differ from the quantized module's by "
            f"{result.rms_steps:.3g} steps (root mean square), the bound is "
            f"{result.max_rms_steps:.3g}"
        )
    return result


def figures_text(found: Mapping[str, Any]) -> str:
    """Return a verification's figures, as the manifest holds them, as a table and a heading."""
    sizes = ", ".join(map(str, found["batches"]))
    rows = [
        ["engine against quantized module", found["rms_steps"], found["max_steps"]],
        ["engine against float module", found["rms_steps_vs_float"], None],
        ["quantized against float module", found["quantization_rms_steps"], None],
    ]
    cells = [
        [name, f"{rms:.3f}", "-" if largest is None else f"{largest:.1f}"]
        for name, rms, largest in rows
    ]
    table = markdown_table(["steps of the outputs' codes", "rms", "largest"], cells, "lrr")
    return f"verified over {found['outputs']:,} outputs, batches of {sizes}\n{table}"


def _compare(
    engine: ModuleEngine, network: QuantizedNetwork, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return engine - simulation, engine - float and simulation - float, in steps."""
    simulated = network.simulate(*inputs)
    with torch.inference_mode():
        exact = network.traced.graph_module(*inputs)
    exact = (exact,) if isinstance(exact, Tensor) else tuple(exact)
    actual = engine.run([item.numpy() for item in inputs])
    shapes = [tuple(item.shape) for item in simulated]
    if [item.shape for item in actual] != shapes:
        raise VerificationError(
            f"verification: the file gives outputs of shapes {[item.shape for item in actual]}, "
            f"the module {shapes}"
        )
    rows = []
    for node, ours, theirs, real in zip(
        network.traced.outputs, simulated, actual, exact, strict=True
    ):
        step = _step(network, node.name, ours)
        engines = torch.from_numpy(np.asarray(theirs)).double()
        rows.append(
            [
                ((a - b).flatten() / step)
                for a, b in (
                    (engines, ours.double()),
                    (engines, real.double()),
                    (ours.double(), real.double()),
                )
            ]
        )
    first, second, third = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return first, second, third


def _step(network: QuantizedNetwork, name: str, values: Tensor) -> float:
    if name in network.edges:
        return network.edges[name].scale
    largest = float(values.abs().max()) or 1.0
    return largest / (LEVELS - 1) if network.edges else largest * LEAST_STEP


def _rows(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """Return so many rows of the inputs, repeated where there are fewer."""
    times = -(-size // len(inputs[0]))
    return tuple(item.repeat(times, *[1] * (item.ndim - 1))[:size].contiguous() for item in inputs)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())

"""Does a module's file, run in its engine, compute what the quantized network computes?"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.fx import Node

from edgekit.common.tables import markdown_table
from edgekit.errors import EdgekitError, VerificationError, one_line
from edgekit.formats.artifact.manifest import NetworkManifest
from edgekit.quantize.observers import LEVELS
from edgekit.quantize.traced.network import TIE, QuantizedNetwork

UNDECIDED = 0.5
"""Steps of an output's codes, root mean square, always allowed: what a code leaves open."""
TIMES = 2.0
"""How much further an engine may stray than the network's own roundings, decided otherwise, do."""
DRAWS = 4
"""In so many ways: each decides what lies near a tie at random (`simulate_otherwise`)."""
_ROWS = 4
"""Rows to measure that on, and to check the codes inside on."""
LARGE_QUANTIZATION = 8.0
"""From how many steps on a user is warned of what quantization itself does to the outputs."""
_MOVED = (
    f"quantization moves the outputs by {{:.1f}} of their {LEVELS - 1} steps rms: measure what "
    "that costs; if the weights have 8 bits, ranges may not fit (calibrate on data like what it "
    "will see, or train from a float checkpoint)"
)
LEAST_STEP = 2e-5
"""Step, relative to the largest value, of outputs that have no codes: float32 sums differ."""

_REFERENCE_BYTES = 1 << 17
"""As many inputs as fit are kept, but one at least."""


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
    are the sizes that ran. `otherwise_rms_steps` is how far the simulation strays from itself where
    ties are decided otherwise. `codes_checked` counts the codes inside the file that were compared,
    each kernel on its own; they lie up to `max_from_rounding` steps from what is rounded.
    """

    outputs: int
    rms_steps: float
    max_steps: float
    rms_steps_vs_float: float
    quantization_rms_steps: float
    otherwise_rms_steps: float
    batches: list[int]
    codes_checked: int = 0
    max_from_rounding: float = 0.0

    @property
    def max_rms_steps(self) -> float:
        """The bound that `rms_steps` was held to.

        A code that parts at a tie moves later values past their ties: in a deep network the
        roundings of two honest engines have nothing in common any more. How far that moves the
        outputs is a property of the network, which it shows itself.
        """
        return max(UNDECIDED, TIMES * self.otherwise_rms_steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures and their bound, for the manifest."""
        return {"verified": True, "max_rms_steps": self.max_rms_steps, **asdict(self)}


@dataclass(frozen=True)
class Case:
    """Inputs of one batch with what the quantized and the float module make of them.

    `steps` are those of each output's codes, the unit of every figure; `otherwise` is how many the
    network strays from itself where ties are decided otherwise.
    """

    inputs: tuple[Tensor, ...]
    simulated: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]
    steps: tuple[float, ...]
    otherwise: float

    @classmethod
    def of(cls, network: QuantizedNetwork, inputs: tuple[Tensor, ...], otherwise: float) -> "Case":
        """Compute both."""
        simulated = network.simulate(*inputs)
        with torch.inference_mode():
            exact = tuple(item.detach() for item in network.traced.graph_module(*inputs))
        steps = [
            _step(network, node, values)
            for node, values in zip(network.traced.outputs, simulated, strict=True)
        ]
        return cls(inputs, simulated, exact, tuple(steps), otherwise)

    def save(self, path: Path) -> None:
        """Write the case as safetensors."""
        parts = {name: getattr(self, name) for name in _PARTS}
        steps = [torch.tensor(step, dtype=torch.float64) for step in self.steps]
        tensors = {
            f"{name}.{number}": item.clone().contiguous()
            for name, items in {**parts, "steps": steps}.items()
            for number, item in enumerate(items)
        }
        tensors["otherwise"] = torch.tensor(self.otherwise, dtype=torch.float64)
        path.write_bytes(save(tensors))  # `save_file` would leave the mode 0600

    @classmethod
    def load(cls, path: Path) -> "Case":
        """Read what `save` wrote; EdgekitError where the file is anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            inputs, simulated, exact, steps = (
                tuple(_numbered(held, name)) for name in (*_PARTS, "steps")
            )
            if "otherwise" not in held:
                raise ValueError("holds no bound: export it again")
            otherwise = float(held.pop("otherwise"))
            found = cls(inputs, simulated, exact, tuple(float(step) for step in steps), otherwise)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise EdgekitError(f"{path}: cannot be read: {one_line(error)}") from error
        shapes = [[item.shape for item in items] for items in (simulated, exact)]
        fits = shapes[0] == shapes[1] and len(steps) == len(simulated)
        if held or not inputs or not fits or not min(found.steps, default=0) > 0:
            raise EdgekitError(f"{path}: holds no inputs and outputs of a module")
        return found


_PARTS = ("inputs", "simulated", "exact")


def _numbered(held: dict[str, Tensor], name: str) -> Iterator[Tensor]:
    """Take out `name.0`, `name.1` and so on."""
    number = 0
    while f"{name}.{number}" in held:
        yield held.pop(f"{name}.{number}")
        number += 1


@dataclass(frozen=True)
class Probe:
    """An engine with the same file but for further outputs, the codes of values by node name."""

    engine: ModuleEngine
    nodes: Sequence[str]


def verify_module(
    engine: ModuleEngine,
    network: QuantizedNetwork,
    inputs: tuple[Tensor, ...],
    probe: Probe | None = None,
) -> ModuleVerification:
    """Compare outputs; VerificationError where they differ by more than roundings.

    Every batch size that a caller may rely on runs: the rows given, one alone, and the largest.
    With a probe, so is each kernel inside, on its own: what roundings make of a deep network hides
    nothing then.
    """
    checked = (0, 0.0) if probe is None else _check_codes(probe, network, _some(network, inputs))
    largest = network.traced.max_batch
    otherwise = _otherwise(network, inputs)
    sizes = [len(inputs[0])] if largest is None else sorted({1, len(inputs[0]), largest})
    rows = (inputs if largest is None else _rows(inputs, size) for size in sizes)
    found = compare(engine, (Case.of(network, part, otherwise) for part in rows))
    return replace(found, codes_checked=checked[0], max_from_rounding=checked[1])


def reference_case(network: QuantizedNetwork, inputs: tuple[Tensor, ...], otherwise: float) -> Case:
    """Return the case that an artifact keeps: some of the inputs, all where the batch is fixed.

    `otherwise` is what `verify_module` found.
    """
    if network.traced.max_batch is None:
        return Case.of(network, inputs, otherwise)
    size = sum(item[0].numel() * item.element_size() for item in inputs)
    rows = max(1, min(len(inputs[0]), _REFERENCE_BYTES // size))
    return Case.of(network, _rows(inputs, rows), otherwise)


def _some(network: QuantizedNetwork, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return some rows of the inputs, all where the batch is fixed."""
    largest = network.traced.max_batch
    return inputs if largest is None else _rows(inputs, min(_ROWS, len(inputs[0]), largest))


def _otherwise(network: QuantizedNetwork, inputs: tuple[Tensor, ...]) -> float:
    """Return how far the network strays from itself, the most of some draws."""
    if not network.edges:
        return 0.0
    inputs = _some(network, inputs)
    usual = network.simulate(*inputs)
    nodes = network.traced.outputs
    steps = [_step(network, node, item) for node, item in zip(nodes, usual, strict=True)]
    found = []
    for seed in range(DRAWS):
        other = network.simulate_otherwise(seed, *inputs)
        parts = [
            ((a.double() - b.double()) / step).flatten()
            for a, b, step in zip(other, usual, steps, strict=True)
        ]
        found.append(_rms(torch.cat(parts)))
    return max(found)


def _check_codes(
    probe: Probe, network: QuantizedNetwork, inputs: tuple[Tensor, ...]
) -> tuple[int, float]:
    """Return how many codes were compared and the largest distance from what is rounded."""
    outputs = probe.engine.run([item.numpy() for item in inputs])
    held = outputs[len(network.traced.outputs) :]
    codes = {name: torch.from_numpy(item) for name, item in zip(probe.nodes, held, strict=True)}
    distances = network.distances(codes, *inputs)
    for node, distance in distances.items():
        if not distance <= 0.5 + TIE:  # also true for NaN
            raise VerificationError(
                f"verification: tensor {network.traced.names[node]!r}: the file's codes lie up to "
                f"{distance:.3g} steps from what its kernel is to round, the bound is "
                f"{0.5 + TIE:.3g}"
            )
    return sum(item.numel() for item in codes.values()), max(distances.values(), default=0.0)


def compare(engine: ModuleEngine, cases: Iterable[Case]) -> ModuleVerification:
    """Run each case's inputs; VerificationError where outputs differ by more than roundings."""
    sizes, parts, otherwise = [], [], 0.0
    for case in cases:
        sizes.append(len(case.inputs[0]))
        otherwise = max(otherwise, case.otherwise)
        parts.append(_differences(engine, case))
    differences, from_float, quantization = (torch.cat(items) for items in zip(*parts, strict=True))
    if not differences.numel():
        raise VerificationError("verification: every output is empty: there is nothing to compare")
    result = ModuleVerification(
        outputs=differences.numel(),
        rms_steps=_rms(differences),
        max_steps=float(differences.abs().max()),
        rms_steps_vs_float=_rms(from_float),
        quantization_rms_steps=_rms(quantization),
        otherwise_rms_steps=otherwise,
        batches=sizes,
    )
    if not result.rms_steps <= result.max_rms_steps:  # also true for NaN
        raise VerificationError(
            f"verification: the file's outputs differ from the quantized module's by "
            f"{result.rms_steps:.3g} steps (root mean square), the bound is "
            f"{result.max_rms_steps:.3g}: {_why(result.max_rms_steps)}"
        )
    return result


def warnings(manifest: NetworkManifest) -> list[str]:
    """Return what a user should know of a module that is verified, by its manifest."""
    steps = manifest.verification["quantization_rms_steps"]
    if not manifest.activations or steps <= LARGE_QUANTIZATION:  # without codes no steps
        return []
    return [_MOVED.format(steps)]


def figures_text(found: Mapping[str, Any]) -> str:
    """Return a verification's figures, as the manifest holds them, as a table and a heading."""
    sizes = ", ".join(map(str, found["batches"]))
    rows = [
        [
            "engine against quantized module",
            f"{found['rms_steps']:.3f}",
            f"{found['max_rms_steps']:.3f}",
            f"{found['max_steps']:.1f}",
        ],
        [
            "quantized module, ties decided otherwise",
            f"{found['otherwise_rms_steps']:.3f}",
            "-",
            "-",
        ],
        ["engine against float module", f"{found['rms_steps_vs_float']:.3f}", "-", "-"],
        ["quantized against float module", f"{found['quantization_rms_steps']:.3f}", "-", "-"],
    ]
    quantized = found["quantization_rms_steps"] > 0
    unit = (
        "steps of the outputs' codes" if quantized else f"in {LEAST_STEP:g} of the largest output"
    )
    table = markdown_table([unit, "rms", "allowed", "largest"], rows, "lrrr")
    head = f"verified over {found['outputs']:,} outputs, batches of {sizes}"
    if found["codes_checked"]:
        head += (
            f"; {found['codes_checked']:,} codes inside, each kernel on its own, lie up to "
            f"{found['max_from_rounding']:.4f} steps from what is rounded"
        )
    return f"{head}\n{table}"


def _why(bound: float) -> str:
    if bound <= UNDECIDED:
        return "what codes leave open"
    return f"{TIMES:g} times what other roundings at ties make of this network"


def _differences(engine: ModuleEngine, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return engine - simulation, engine - float and simulation - float, in steps."""
    actual = engine.run([item.numpy() for item in case.inputs])
    shapes = [tuple(item.shape) for item in case.simulated]
    if [item.shape for item in actual] != shapes:
        raise VerificationError(
            f"verification: the file gives outputs of shapes {[item.shape for item in actual]}, "
            f"the module {shapes}"
        )
    rows = []
    for ours, theirs, real, step in zip(
        case.simulated, actual, case.exact, case.steps, strict=True
    ):
        engines = torch.from_numpy(np.asarray(theirs)).double()
        pairs = ((engines, ours), (engines, real), (ours.double(), real))
        rows.append([((a - b.double()) / step).flatten() for a, b in pairs])
    first, second, third = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return first, second, third


def _step(network: QuantizedNetwork, node: Node, values: Tensor) -> float:
    is_computed = node.op == "call_function"  # a buffer or an input is returned as it is
    if is_computed and node.name in network.edges:
        return network.edges[node.name].scale
    largest = (float(values.double().abs().max()) if values.numel() else 0.0) or 1.0
    return largest / (LEVELS - 1) if is_computed and network.edges else largest * LEAST_STEP


def _rows(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """Return so many rows of the inputs, repeated where there are fewer."""
    times = -(-size // len(inputs[0]))
    return tuple(item.repeat(times, *[1] * (item.ndim - 1))[:size].contiguous() for item in inputs)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())

"""Exporting any module that `torch.export` traces: calibrate, quantize, write, verify."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgekit.common.progress import Progress
from edgekit.common.quiet import quiet_imports
from edgekit.errors import EdgekitError, QuantizationWarning
from edgekit.formats.artifact.manifest import REFERENCE_FILE, NetworkManifest
from edgekit.formats.artifact.parts import Activation, NetworkInput, NetworkOutput, TensorRow
from edgekit.formats.artifact.read import Artifact
from edgekit.version import __version__
from edgekit.workflows.quality import Quality, check_exclusions

with quiet_imports():
    from torch import Tensor, nn

    from edgekit.exporters.contract.network_target import (
        ModuleTarget,
        find_module_target,
        tensor_rows,
    )
    from edgekit.exporters.verify import network as verification
    from edgekit.exporters.verify.network import (
        Probe,
        reference_case,
        verify_module,
    )
    from edgekit.formats.artifact.write import check_output, new_artifact, write_manifest
    from edgekit.networks.codes import place_codes
    from edgekit.networks.data import open_data
    from edgekit.quantize.calibration import Calibration
    from edgekit.quantize.qat.training import is_prepared
    from edgekit.quantize.traced.calibrate import Batch, calibrate, mini_batch, parts
    from edgekit.quantize.traced.fold import fold_batch_norms
    from edgekit.quantize.traced.network import QuantizedNetwork, quantize_module
    from edgekit.quantize.traced.placement import Placement, place
    from edgekit.quantize.traced.schemes import LayerRecipe
    from edgekit.quantize.traced.trace import Inputs, TracedModule, trace
    from edgekit.runtime.engines.network_engine import load_module

CALIBRATION_FILE = "calibration.json"
Data = Iterable[Batch] | Calibration | Path | str | None
"""Mini-batches of inputs, a calibration, what `edgekit.networks.data` reads by its name, or None
where none is needed."""


@dataclass(frozen=True)
class Quantized:
    """A quantized network, and inputs to verify it with.

    `sample` is the first mini-batch, or the traced example where there was none.
    """

    network: QuantizedNetwork
    sample: tuple[Tensor, ...]


def export_module(
    module: nn.Module,
    example_inputs: Inputs,
    output: Path | str,
    *,
    target: str = "executorch",
    recipe: LayerRecipe | str | None = None,
    codes: Path | str | None = None,
    calibration: Data = None,
    method: str = "moving-average",
    max_batch: int | None = None,
    name: str | None = None,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Artifact:
    """Export a module, verify the file in its engine, and return the artifact at `output`.

    `example_inputs` are the module's arguments, a tuple or, by their names, a dict of tensors whose
    first axis is the batch; `max_batch` lets it vary up to that. `recipe` is a scheme (w8a8, the
    default, w4a8-tensor, float, ...) or a `LayerRecipe`; `codes`, instead of it, a file of
    `edgekit quantize`, whose codes are packed as they are. `calibration` gives mini-batches of
    inputs, of any size from the example's on, is a `Calibration`, or names what the command's
    --calibrate takes: a file or folder of inputs, `FILE.py:FUNCTION`, or a saved calibration (the
    artifact holds `calibration.json`); `method` is how ranges are found. `name` is what the
    manifest calls the module, by default its class; its `outputs` name the tensors that the file
    returns, in order, `constant_outputs` what else the module returns, the same in every call.
    Raises `EdgekitError` for a mistake and `VerificationError` for a file that does not compute
    what the quantized module computes; both leave nothing at `output`.
    """
    check_exclusions(Quality(), None if recipe is None else "recipe", codes=codes is not None)
    check_output(Path(output), force)
    writer = find_module_target(target)
    progress("tracing")
    placement = place_module(
        module,
        example_inputs,
        recipe or "w8a8",
        max_batch,
        codes=None if codes is None else Path(codes),
    )
    writer.check_layers(placement.traced, placement.schemes())
    found = quantize_placement(placement, calibration, method, progress)
    return export_network(
        found.network,
        found.sample,
        output,
        target=target,
        name=name or type(module).__name__,
        recipe=placement.recipe,
        force=force,
        progress=progress,
    )


def place_module(
    module: nn.Module,
    example_inputs: Inputs,
    recipe: LayerRecipe | str = "w8a8",
    max_batch: int | None = None,
    *,
    codes: Path | None = None,
) -> Placement:
    """Trace a module, fold its batch norms and decide what is quantized; no data is needed.

    A file of `codes` decides that instead of the recipe.
    """
    if isinstance(module, nn.Module) and is_prepared(module):
        raise EdgekitError(
            "the module is prepared for training: export what its finalize() returns, with "
            "export_network"
        )
    traced = fold_batch_norms(trace(module, example_inputs, max_batch))
    if codes is not None:
        return place_codes(traced, codes)
    return place(traced, LayerRecipe.uniform(recipe) if isinstance(recipe, str) else recipe)


def export_network(
    network: QuantizedNetwork,
    sample: tuple[Tensor, ...],
    output: Path | str,
    *,
    target: str = "executorch",
    name: str,
    recipe: str,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Artifact:
    """Write a quantized network, verify the file in its engine, and return the artifact.

    `sample` gives the inputs to verify with: real ones where there are any, since random ones
    exercise a network less. `name` and `recipe` are what the manifest calls the module and its
    schemes. The ranges of its activations, observed in training or by a calibration, lie in the
    artifact as `calibration.json`, and some of the sample with the outputs it must give as
    `reference.safetensors`. Warns (`QuantizationWarning`) where quantization moves outputs far.
    Raises as `export_module`.
    """
    folder = Path(output)
    check_output(folder, force)
    writer = find_module_target(target)
    writer.check_network(network)
    with new_artifact(folder, force) as staging:
        path = staging / writer.MODEL_FILE
        writer.write_module(network, path, progress)
        progress(f"verifying in {writer.ENGINE}")
        figures = _verify(writer, target, network, path, sample)
        kept = reference_case(network, sample, figures["otherwise_rms_steps"])
        kept.save(staging / REFERENCE_FILE)
        if network.calibration is not None:
            network.calibration.save(staging / CALIBRATION_FILE)
        manifest = NetworkManifest(
            model_id=name,
            target=target,
            file=writer.MODEL_FILE,
            recipe=recipe,
            versions={"edgekit": __version__, **writer.versions()},
            verification=figures,
            **_graph_facts(network),
        )
        write_manifest(staging, manifest)
    artifact = Artifact.open(folder)
    for text in verification.warnings(artifact.network):
        warnings.warn(text, QuantizationWarning, stacklevel=2)
    return artifact


def _verify(
    writer: ModuleTarget,
    target: str,
    network: QuantizedNetwork,
    path: Path,
    sample: tuple[Tensor, ...],
) -> dict[str, Any]:
    """Run the file, and what shows the codes inside it where the engine can; return the figures."""
    with ExitStack() as stack:
        engine = stack.enter_context(load_module(target, path))
        extra = Path(stack.enter_context(TemporaryDirectory()), path.name)
        nodes = writer.write_probe(network, path, extra)
        probe = Probe(stack.enter_context(load_module(target, extra)), nodes) if nodes else None
        return verify_module(engine, network, sample, probe).to_dict()


def quantize_placement(
    placement: Placement,
    calibration: Data = None,
    method: str = "moving-average",
    progress: Progress = lambda stage: None,
) -> Quantized:
    """Calibrate and quantize; EdgekitError where activations have codes and no data are given."""
    progress("calibrating")
    ranges, sample = _calibrate(placement, calibration, method)
    progress("quantizing")
    network = quantize_module(placement, ranges)
    return Quantized(network, sample or placement.traced.example)


def _calibrate(
    placement: Placement, given: Data, method: str
) -> tuple[Calibration | None, tuple[Tensor, ...] | None]:
    """Return the ranges, and the first mini-batch where there was one."""
    if not placement.edges:
        return None, None
    if given is None:
        raise EdgekitError(
            "quantized activations need calibration data: give mini-batches of inputs, or a "
            "saved calibration"
        )
    if isinstance(given, Path | str):
        given = open_data(str(given), placement.traced)
    if isinstance(given, Calibration):
        return given, None
    if isinstance(given, Tensor):
        raise EdgekitError("calibration must be mini-batches, as a list: got one tensor")
    first: list[tuple[Tensor, ...]] = []
    ranges = calibrate(placement, _remember_first(given, placement.traced, first), method)
    return ranges, first[0]


def _remember_first(
    batches: Iterable[Batch], traced: TracedModule, first: list[tuple[Tensor, ...]]
) -> Iterator[Batch]:
    for batch in batches:
        if not first:
            first.append(next(parts(mini_batch(batch, 1, traced), traced)))
        yield batch


def _graph_facts(network: QuantizedNetwork) -> dict[str, Any]:
    """Return what the manifest says of tensors, inputs, outputs and the parameters of each value.

    Sizes of outputs that vary with the batch are None.
    """
    traced = network.traced
    inputs = [
        NetworkInput(node.name, _dtype(item), tuple(item.shape))
        for node, item in zip(traced.inputs, traced.example, strict=True)
    ]
    outputs = [
        NetworkOutput(
            name,
            _dtype(node.meta["val"]),
            tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape),
        )
        for name, node in zip(traced.results.names, traced.outputs, strict=True)
    ]
    activations = [
        Activation(traced.names[node], edge.scale, edge.zero_point)
        for node, edge in network.edges.items()
    ]
    return {
        "tensors": tuple(map(TensorRow.from_json, tensor_rows(traced, network.schemes()))),
        "inputs": tuple(inputs),
        "outputs": tuple(outputs),
        "constant_outputs": traced.results.constants,
        "max_batch": traced.max_batch,
        "activations": tuple(activations),
    }


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

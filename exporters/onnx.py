"""Target `onnx`: a model for ONNX Runtime, in the folder that onnxruntime-genai loads."""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.exporters.target import Job
from edgekit.quantize.recipe import Resolved, shared_rows

MODEL_FILE = "model.onnx"
ENGINE = "ONNX Runtime"
OPTIONS = frozenset({"abi", "portable"})
PACKAGES = ("onnx", "onnxruntime")


def check_rows(rows: Sequence[Resolved]) -> None:
    """Refuse, before any work, what ONNX Runtime's operators cannot hold."""


def stored_once(rows: Sequence[Resolved], tied: Mapping[str, str]) -> list[str]:
    """Return the tensors whose bytes the file holds under another's name."""
    return list(shared_rows(rows, tied))


def write(job: Job, folder: Path, progress: Callable[[str], None]) -> None:
    """Write the model, the file of its weights and what the run time wants beside it."""
    import onnx

    from edgekit.exporters.onnx_contrib import ContribBlocks
    from edgekit.exporters.onnx_graph import CONTRIB, OnnxGraph, new_data_file
    from edgekit.exporters.onnx_lfm2 import build
    from edgekit.exporters.onnx_states import NAMES

    progress("writing the weights")
    data = folder / f"{MODEL_FILE}.data"
    with new_data_file(data) as file:
        graph = OnnxGraph(file, data.name, {"": 21, CONTRIB: 1})
        twins = shared_rows(job.rows, job.tied)
        blocks = ContribBlocks(graph, job.weights, twins, job.config, job.context)
        build(graph, blocks, job.config, NAMES["genai"])
    job.weights.clear()
    onnx.save_model(graph.model({}), folder / MODEL_FILE)


def versions() -> dict[str, str]:
    """Return the versions that decided the file's bytes."""
    return {name: metadata.version(name) for name in PACKAGES}

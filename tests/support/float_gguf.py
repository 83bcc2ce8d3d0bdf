"""A float GGUF of a model folder, as `edgekit export --target gguf --float` writes it."""

from pathlib import Path

from torch import Tensor

from edgekit.exporters.contract.weights import Weights
from edgekit.exporters.contract.writer import Job
from edgekit.exporters.gguf import decoder as gguf
from edgekit.exporters.gguf import layout
from edgekit.exporters.gguf.names import gguf_names
from edgekit.models.source import resolve_model
from edgekit.models.weights import floats
from edgekit.quantize.recipe import preset, resolve


def write_float_gguf(model: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write a model into a folder; return the file, and float32 values by GGUF name."""
    source = resolve_model(model)
    shapes, tied = source.config.tied_shapes()
    rows = resolve(preset("float"), shapes, tied)
    weights = Weights(rows, source.checkpoint)
    context = source.config.default_context
    job = Job(source.id, source.config, rows, weights, context, source.folder)
    gguf.write(job, folder, lambda _stage: None)
    names = gguf_names(source.config)
    values = {
        # a depthwise kernel [width, 1, taps] is stored without its middle axis
        names[name]: floats(source.checkpoint.tensor(name)).squeeze()
        for name in source.checkpoint.shapes()
    }
    return folder / layout.MODEL_FILE, values

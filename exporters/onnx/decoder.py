"""Target `onnx`: a model for ONNX Runtime, in a folder for onnxruntime-genai or Transformers.js."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from edgekit.exporters.contract.writer import Job
from edgekit.exporters.onnx.layout import OPSET, block_size, dtype_names, model_file
from edgekit.models.activations import per_block
from edgekit.quantize.tensor import QuantizedTensor

if TYPE_CHECKING:
    from edgekit.exporters.onnx.graph import OnnxGraph
    from edgekit.exporters.onnx.wiring import Blocks

MAX_CHECK_TOKENS = 4096
PACKAGES = ("onnx", "onnxruntime")


def fake_quantize(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """Round the inputs of a linear as MatMulNBits does at accuracy level 4: by its blocks."""
    return per_block(x, block_size(weight.shape[1], weight.group_size))


def write(job: Job, folder: Path, progress: Callable[[str], None]) -> None:
    """Write the model, the file of its weights and what the runtime wants beside them."""
    import onnx

    from edgekit.exporters.onnx.graph import CONTRIB, OnnxGraph, new_data_file
    from edgekit.exporters.onnx.states import NAMES
    from edgekit.exporters.onnx.wiring import build

    progress("writing the weights")
    options = job.options
    path = folder / model_file(job.table, options)
    path.parent.mkdir(exist_ok=True)
    # each runtime has its own idea of how that file's name ends
    data = path.with_name(path.name + (".data" if options.abi == "genai" else "_data"))
    opsets = {"": OPSET} if options.portable else {"": OPSET, CONTRIB: 1}
    with new_data_file(data) as file:
        graph = OnnxGraph(file, data.name, opsets)
        build(graph, _blocks(graph, job), job.config.architecture, NAMES[options.abi])
    job.weights.clear()
    onnx.save_model(graph.model(job.config.family.upper()), path)
    if not options.portable:
        from edgekit.exporters.onnx.optimised import check_fast

        progress("opening it in ONNX Runtime")
        check_fast(path)
    if options.abi == "genai":
        _describe_for_genai(job, path)
    else:
        _describe_for_transformers_js(job, folder, path.name, data.exists())


def check_tokenizer(path: Path, folder: Path) -> dict[str, int]:
    """Return nothing: the runtimes read tokenizer.json beside the model."""
    return {}


def versions() -> dict[str, str]:
    """Return the versions that decided the file's bytes."""
    return {name: metadata.version(name) for name in PACKAGES}


def _blocks(graph: "OnnxGraph", job: Job) -> "Blocks":
    from edgekit.exporters.onnx.contrib import ContribBlocks
    from edgekit.exporters.onnx.plain import PlainBlocks

    if job.options.portable:
        return PlainBlocks(graph, job.weights, job.config, job.context)
    twins = job.table.shared
    fused_conv = job.options.abi == "genai"
    return ContribBlocks(graph, job.weights, twins, job.config, job.context, fused_conv)


def _describe_for_genai(job: Job, path: Path) -> None:
    from edgekit.exporters.onnx.genai import write_genai_config

    in_place = not job.options.portable  # Concat makes a longer cache each time
    write_genai_config(
        path.with_name("genai_config.json"), job.config, job.context, path.name, in_place
    )


def _describe_for_transformers_js(job: Job, folder: Path, name: str, external: bool) -> None:
    """Add to config.json what `AutoModelForCausalLM.from_pretrained` would have to be told."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["transformers.js_config"] = {
        "dtype": dtype_names(job.table)[0],
        "use_external_data_format": {name: 1} if external else False,
    }
    path.write_text(json.dumps(config, indent=1) + "\n")

"""Target `onnx`: a model for ONNX Runtime, in a folder for onnxruntime-genai or Transformers.js."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.target import Job, Options
from edgekit.models.activations import per_block
from edgekit.models.architecture import Attention, GatedMlp, ShortConv
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import Resolved, shared_rows
from edgekit.quantize.tensor import QuantizedTensor

if TYPE_CHECKING:
    from edgekit.exporters.onnx.graph import OnnxGraph
    from edgekit.exporters.onnx.wiring import Blocks

NAME = "onnx"
ENGINE = "ONNX Runtime"
LONGEST_CHECK = 4096
OPTIONS = frozenset({"abi", "portable"})
HELD_AS_SUCH: frozenset[str] = frozenset()
PACKAGES = ("onnx", "onnxruntime")
BLOCK_KINDS = (Attention, ShortConv, GatedMlp)
SCHEMES = "float, w8, w4, w8gN, w4gN and w4gNa"
OPSET = 21
"""ONNX 1.16: the first with types of 4 bits and scales of blocks."""
ROTATED = 16
"""CheckRotaryCaches in contrib_ops/cpu/bert/group_query_attention_helper.h of onnxruntime."""
COLUMNS = 32
"""The operators take blocks from 16 on; below 32 they were not tested here."""


def check_config(config: ModelConfig, options: Options) -> None:
    """Refuse heads that ONNX Runtime's attention does not rotate."""
    if options.portable or not config.architecture.attentions():
        return
    if config.head_dim % ROTATED:
        raise EdgekitError(
            f"config: head_dim is {config.head_dim}; ONNX Runtime's GroupQueryAttention rotates "
            f"heads of multiples of {ROTATED}: give --portable, or another target"
        )


def check_rows(rows: Sequence[Resolved]) -> None:
    """Refuse, before any work, what ONNX Runtime's operators cannot hold."""
    for row in rows:
        if row.scheme.bits not in (None, 4, 8):
            raise EdgekitError(
                f"{row.tensor}: target onnx cannot hold {row.scheme.name}; it holds {SCHEMES}"
            )
        if row.scheme.bits is not None and row.shape[-1] % COLUMNS:
            raise EdgekitError(
                f"{row.tensor}: target onnx cannot hold {row.scheme.name} in rows of "
                f"{row.shape[-1]}; their length must be a multiple of {COLUMNS}, else only float"
            )


def stored_once(rows: Sequence[Resolved], tied: Mapping[str, str]) -> list[str]:
    """Return the tensors whose bytes the file holds under another's name."""
    return list(shared_rows(rows, tied))


def model_file(rows: Sequence[Resolved], options: Options) -> str:
    """Return the name that the run time looks for, with its folder."""
    if options.abi == "genai":
        return "model.onnx"
    return f"onnx/model{_dtype(rows)[1]}.onnx"


def requires(options: Options) -> dict[str, str]:
    """Return what runs the file; the oldest release that was tried and computes it rightly."""
    if options.portable:
        return {"opset": str(OPSET), "onnxruntime": ">=1.20"}
    # GatherBlockQuantized of uint8 comes with 1.23, CausalConvWithState with 1.25.1.
    least = "1.25.1" if options.abi == "genai" else "1.23"
    return {"opset": str(OPSET), "com.microsoft": "1", "onnxruntime": f">={least}"}


def stored_bytes(row: Resolved) -> int:
    """Return the bytes of a tensor in the file: a block has a scale of float32 of its own.

    And a zero point where the scheme has one.
    """
    if row.scheme.bits is None:
        return row.nbytes
    from edgekit.exporters.onnx.packing import block_size

    count = math.prod(row.shape)
    blocks = count // block_size(row.shape[1], row.scheme.group_size)
    zero_points = 0 if row.scheme.symmetric else blocks * row.scheme.bits // 8
    return count * row.scheme.bits // 8 + 4 * blocks + zero_points


def fake_quantize(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """Round the inputs of a linear as MatMulNBits does at accuracy level 4: by its blocks."""
    from edgekit.exporters.onnx.packing import block_size

    return per_block(x, block_size(weight.shape[1], weight.group_size))


def write(job: Job, folder: Path, progress: Callable[[str], None]) -> None:
    """Write the model, the file of its weights and what the run time wants beside them."""
    import onnx

    from edgekit.exporters.onnx.graph import CONTRIB, OnnxGraph, new_data_file
    from edgekit.exporters.onnx.states import NAMES
    from edgekit.exporters.onnx.wiring import build

    progress("writing the weights")
    options = job.options
    path = folder / model_file(job.rows, options)
    path.parent.mkdir(exist_ok=True)
    # each run time has its own idea of how that file's name ends
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
    """Return nothing: the run times read tokenizer.json beside the model."""
    return {}


def versions() -> dict[str, str]:
    """Return the versions that decided the file's bytes."""
    return {name: metadata.version(name) for name in PACKAGES}


def _blocks(graph: "OnnxGraph", job: Job) -> "Blocks":
    from edgekit.exporters.onnx.contrib import ContribBlocks
    from edgekit.exporters.onnx.plain import PlainBlocks

    if job.options.portable:
        return PlainBlocks(graph, job.weights, job.config, job.context)
    twins = shared_rows(job.rows, job.tied)
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
        "dtype": _dtype(job.rows)[0],
        "use_external_data_format": {name: 1} if external else False,
    }
    path.write_text(json.dumps(config, indent=1) + "\n")


def _dtype(rows: Sequence[Resolved]) -> tuple[str, str]:
    """Return Transformers.js's name of the smallest type, and how its file's name ends.

    src/utils/dtypes.js, DEFAULT_DTYPE_SUFFIX_MAPPING.
    """
    bits = min((row.scheme.bits for row in rows if row.scheme.bits), default=None)
    return {4: ("q4", "_q4"), 8: ("q8", "_quantized"), None: ("fp32", "")}[bits]

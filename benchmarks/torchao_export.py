"""What lfm2-tiny, quantized by torchao, can be exported to: ExecuTorch, ONNX, GGUF.

    python -m benchmarks.torchao_export [--llama-cpp SOURCE] [--work FOLDER]
        [-o benchmarks/results/torchao-export.json]

transformers' Lfm2ForCausalLM by torchao's `quantize_`, by the recipe of `--int4` and as
ExecuTorch's guides have it: linears int4 in groups of 32 with activations in int8 per token, the
head so with int8 weights, the embedding int8 per row. Each way out is tried as it is documented,
and what it gives, or its error, is kept. A file is run in its engine on the tokens that it was
traced with, against the same quantized model in torch. Ways that are in the output already are not
tried again.

ONNX needs onnxscript (`pip install onnxscript`). GGUF is llama.cpp's converter on what
`save_pretrained` wrote; SOURCE is a tree of llama.cpp, such as the one in llama-cpp-python's sdist.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import facts
from benchmarks.report import table
from edgekit.errors import one_line
from edgekit.exporters.inspect.report import inspect
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.models.source import ModelSource, resolve_model
from edgekit.models.tokenizer import Tokenizer

MODEL = "lfm2-tiny"
TOKENS = 64
LONGEST = 512
_LONGEST_ERROR = 400


class Logits(nn.Module):
    """Token ids `[1, n]` to logits `[1, n, vocabulary]`, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def quantized(source: ModelSource) -> Any:  # noqa: ANN401  transformers' model is untyped here
    """Return transformers' model with torchao's tensors; its head is untied, as torchao needs."""
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import Lfm2ForCausalLM

    model = Lfm2ForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    table_of = model.get_input_embeddings().weight
    model.lm_head.weight = nn.Parameter(table_of.detach().clone())
    model.config.tie_word_embeddings = False
    embedding = IntxWeightOnlyConfig(torch.int8, PerAxis(0))
    head = Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))
    linear = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))
    quantize_(model, embedding, lambda one, _: isinstance(one, nn.Embedding))
    quantize_(model, head, lambda _, name: name == "lm_head")
    quantize_(model, linear, lambda one, name: isinstance(one, nn.Linear) and name != "lm_head")
    return model


def agreement(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return how logits `[1, n, vocabulary]` agree: mean KLD in nats, share of the same top-1."""
    one, other = (torch.log_softmax(each[0].double(), -1) for each in (wanted, found))
    return {
        "kld": float((one.exp() * (one - other)).sum(-1).mean()),
        "same_top": float((one.argmax(-1) == other.argmax(-1)).double().mean()),
        "largest_difference": float((found - wanted).abs().max()),
        "largest_logit": float(wanted.abs().max()),
    }


def to_executorch(module: nn.Module, ids: Tensor, wanted: Tensor, path: Path) -> dict[str, Any]:
    """Lower to XNNPACK as ExecuTorch's guide does, run the file."""
    import executorch.kernels.quantized  # noqa: F401  registers the embedding operators
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib

    if not path.exists():
        exported = torch.export.export(module, (ids,))
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        settings = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True)
        program = edge.to_executorch(settings)
        path.write_bytes(program.buffer)
    loaded: Any = portable_lib._load_for_executorch(str(path))
    report = inspect(path).to_dict()
    return {
        "file_bytes": path.stat().st_size,
        "agreement": agreement(loaded.forward((ids,))[0], wanted),
        "delegates": report["delegates"],
        "nodes": report["nodes"],
        "operators_outside": report["operators"],
        "components": report["components"],
    }


def with_cache(model: Any) -> str:  # noqa: ANN401
    """Trace with a cache, by transformers' own module for it."""
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    wrapped = TorchExportableModuleForDecoderOnlyLM(
        model, batch_size=1, max_cache_len=LONGEST, device=torch.device("cpu")
    )
    wrapped.export(input_ids=torch.zeros(1, 1).long(), cache_position=torch.zeros(1).long())
    return "traced"


def with_length(module: nn.Module, ids: Tensor) -> str:
    """Trace with a number of tokens that is open."""
    length = torch.export.Dim("n", min=2, max=LONGEST)
    torch.export.export(module, (ids,), dynamic_shapes={"ids": {1: length}})
    return "traced"


def to_onnx(module: nn.Module, ids: Tensor, wanted: Tensor, path: Path) -> dict[str, Any]:
    """Export by torch's exporter, run the file."""
    import onnx
    import onnxruntime

    program = torch.onnx.export(module, (ids,), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    nodes = Counter(node.op_type for node in onnx.load(path).graph.node)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    return {
        "file_bytes": sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")),
        "agreement": agreement(torch.from_numpy(np.asarray(found)), wanted),
        "nodes": dict(nodes.most_common()),
    }


def loaded_quantized(source: ModelSource) -> Any:  # noqa: ANN401
    """Return transformers' model as its own loader quantizes it, the linears alone."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import Lfm2ForCausalLM, TorchAoConfig

    linear = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))
    return Lfm2ForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32, quantization_config=TorchAoConfig(linear)
    )


def to_gguf(model: Any, source: ModelSource, folder: Path, tree: Path | None) -> str:  # noqa: ANN401
    """Save as transformers does, convert as llama.cpp does."""
    model.save_pretrained(folder)
    assert source.folder is not None
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((source.folder / name).read_bytes())
    if tree is None:
        return "saved; not converted, for want of --llama-cpp"
    command = [
        *(sys.executable, "-m", "benchmarks.peers.convert_hf", "convert", str(folder)),
        *("--llama-cpp", str(tree), "-o", str(folder / "model.gguf")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"convert_hf_to_gguf.py: {done.stderr.strip().splitlines()[-1]}")
    return f"converted, {(folder / 'model.gguf').stat().st_size} bytes"


def attempt(name: str, work: Callable[[], object]) -> dict[str, Any]:
    """Try one way; what it gave, or its error."""
    start = time.process_time()
    row: dict[str, Any] = {"way": name}
    try:
        row["result"] = work()
    except Exception as error:  # noqa: BLE001  whatever it is, it is the result
        row["error"] = f"{type(error).__name__}: {one_line(error, _LONGEST_ERROR)}"
    row["cpu_seconds"] = round(time.process_time() - start, 1)
    print(f"{name}: {row.get('error', 'done')}", file=sys.stderr, flush=True)
    return row


def markdown(record: dict[str, Any]) -> str:
    """Return what each way gave."""
    cells = []
    for row in record["rows"]:
        found = row.get("error") or row["result"]
        if isinstance(found, dict):
            fit = found["agreement"]
            found = (
                f"{found['file_bytes'] / 1e6:.1f} MB, mean KLD {fit['kld']:.6f} from torch's, "
                f"same top-1 {fit['same_top']:.1%}"
            )
        cells.append([row["way"], found, f"{row['cpu_seconds']:.0f}"])
    return table(("way", "what came of it", "CPU s"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCE")
    parser.add_argument("--work", type=Path, help="Folder for the files, kept and reused")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    source = resolve_model(MODEL)
    assert source.folder is not None
    ids = torch.tensor([Tokenizer.load(source.folder).encode(TEXT)[:TOKENS]])
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = arguments.work or Path(scratch)
        folder.mkdir(exist_ok=True)
        model = quantized(source)
        module = Logits(model)
        wanted = module(ids)

        def without_padding() -> dict[str, Any]:
            # aten.embedding with a padding index is no pattern of QuantFusionPass
            other = quantized(source)
            other.get_input_embeddings().padding_idx = None
            return to_executorch(Logits(other), ids, wanted, folder / "torchao-no-padding.pte")

        def saved(one: Any, name: str) -> str:  # noqa: ANN401
            return to_gguf(one, source, folder / name, arguments.llama_cpp)

        ways: dict[str, Callable[[], object]] = {
            "ExecuTorch, XNNPACK, 64 tokens, no cache": lambda: to_executorch(
                module, ids, wanted, folder / "torchao.pte"
            ),
            "the same, the embedding's padding_idx removed": without_padding,
            "torch.export with an open length": lambda: with_length(module, ids),
            "torch.export with a cache, transformers' module": lambda: with_cache(model),
            "ONNX, torch.onnx.export": lambda: to_onnx(
                module, ids, wanted, folder / "torchao.onnx"
            ),
            "GGUF, save_pretrained": lambda: saved(model, "saved"),
            "GGUF, quantized by transformers' TorchAoConfig": lambda: saved(
                loaded_quantized(source), "loaded"
            ),
        }
        rows = []
        if arguments.output is not None and arguments.output.exists():
            rows = json.loads(arguments.output.read_text())["rows"]
        done = {row["way"]: row for row in rows}
        rows = [done.get(way) or attempt(way, work) for way, work in ways.items()]
    record = {"machine": facts(), "transformers": version("transformers"), "rows": rows}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(record))


if __name__ == "__main__":
    main()

"""ExecuTorch's own export_llm at an LFM2 shape with random weights: the incumbent.

    python -m benchmarks.peers.export_llm lfm2-350m -o FOLDER

The wheel ships the YAML files of LFM2 but not the parameter files that its documentation names, so
these are written here; a random bf16 checkpoint is converted by the example's own key mapping and
stored under Meta's names, as its convert_weights would. Everything else is the documented command
with the shipped 8da4w YAML: groups of 128, HQQ scales, float32 embedding.

Writes FOLDER/NAME-export_llm-8da4w.pte and, beside it, a .json with cost and facts.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import Cost, run
from benchmarks.peers.shapes import (
    KV_HEADS,
    LAYERS,
    NORM_EPS,
    ROPE_THETA,
    SHAPES,
    VOCAB,
    Shape,
    random_weight,
)

YAML = "examples/models/lfm2/config/lfm2_xnnpack_q8da4w.yaml"
CONTEXT = 2048


def parameters(shape: Shape) -> dict[str, object]:
    """Return the parameter file of Meta's transformer for this shape."""
    return {
        "dim": shape.hidden,
        "hidden_dim": shape.feed_forward,
        "ffn_dim_multiplier": 1,
        "n_heads": shape.heads,
        "n_kv_heads": KV_HEADS,
        "n_layers": LAYERS,
        "norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "use_scaled_rope": False,
        "vocab_size": VOCAB,
        "use_hf_rope": True,
        "use_qk_norm": True,
        "qk_norm_before_rope": True,
        "layer_types": shape.layer_types,
    }


def inputs(shape: Shape, folder: Path) -> tuple[Path, Path]:
    """Return the paths of the parameter file and of the checkpoint."""
    return folder / f"{shape.name}-params.json", folder / f"{shape.name}-meta-bf16.pth"


def prepare(shape: Shape, folder: Path) -> None:
    """Write the parameter file and the checkpoint that export_llm reads."""
    import torch
    from executorch.examples.models.lfm2.convert_weights import lfm_2_to_meta

    params, checkpoint = inputs(shape, folder)
    folder.mkdir(parents=True, exist_ok=True)
    params.write_text(json.dumps(parameters(shape), indent=2) + "\n")
    weights = {
        name: torch.from_numpy(random_weight(name, size)).bfloat16()
        for name, size in shape.tensors()
    }
    partial = checkpoint.with_suffix(".partial")
    torch.save(lfm_2_to_meta(weights), partial)
    partial.rename(checkpoint)


def command(shape: Shape, params: Path, checkpoint: Path, output: Path, context: int) -> list[str]:
    """Return the export_llm command line."""
    spec = find_spec("executorch")
    assert spec is not None and spec.submodule_search_locations
    yaml = Path(spec.submodule_search_locations[0]) / YAML
    model_class = shape.name.replace("-", "_").replace(".", "_")
    return [
        *(sys.executable, "-m", "executorch.extension.llm.export.export_llm"),
        *("--config", str(yaml)),
        f"+base.model_class={model_class}",
        f"+base.params={params}",
        f"+base.checkpoint={checkpoint}",
        f"+export.max_seq_length={context}",
        f"+export.max_context_length={context}",
        f"+export.output_dir={output.parent}",
        f"+export.output_name={output.name}",
    ]


@dataclass(frozen=True)
class Exported:
    path: Path
    cost: Cost


def export(shape: Shape, folder: Path, context: int) -> Exported:
    """Run export_llm; the checkpoint is made before the clock starts."""
    folder = folder.resolve()
    params, checkpoint = inputs(shape, folder)
    if not checkpoint.exists():
        # in a process of its own: a child's peak memory would begin at ours
        this = ("-m", "benchmarks.peers.export_llm")
        run([sys.executable, *this, shape.name, "-o", str(folder), "--prepare"])
    path = folder / f"{shape.name}-export_llm-8da4w.pte"
    # hydra leaves an `outputs` folder where it runs
    finished = run(
        command(shape, params, checkpoint, path, context),
        cwd=folder,
        log=path.with_suffix(".log"),
        watch_tree=True,
    )
    exported = Exported(path, finished.cost)
    beside = path.with_name(path.name + ".json")
    beside.write_text(json.dumps(facts(shape, exported, context), indent=2) + "\n")
    return exported


def facts(shape: Shape, exported: Exported, context: int) -> dict[str, object]:
    """Return what the comparison prints about the file."""
    size = exported.path.stat().st_size
    return {
        "file": exported.path.name,
        "made_by": f"executorch {version('executorch')} export_llm, 8da4w",
        "head": "int4 g128",
        "embedding": "float32",
        "file_bytes": size,
        # of the embedding table, which the head does not share, a token reads one row
        "bytes_per_token": size - 4 * shape.embedding_values,
        "context": context,
        "cost": {**asdict(exported.cost), "peak_bytes": exported.cost.peak_bytes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--prepare", action="store_true", help="only write what it reads")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(SHAPES[arguments.shape], arguments.output)
        return
    exported = export(SHAPES[arguments.shape], arguments.output, arguments.context)
    print(exported.path.with_name(exported.path.name + ".json").read_text(), end="")


if __name__ == "__main__":
    main()

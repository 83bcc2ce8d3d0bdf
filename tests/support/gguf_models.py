"""Small models as GGUF files, for tests of what reads and runs them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgekit.exporters.contract.layout import Options
from edgekit.exporters.contract.weights import Weights
from edgekit.exporters.contract.writer import Job
from edgekit.exporters.gguf import decoder as gguf
from edgekit.exporters.gguf import layout
from edgekit.models.config import ModelConfig
from edgekit.models.source import ModelSource, resolve_model
from edgekit.quantize.recipe import Recipe, preset, resolve, uniform
from edgekit.quantize.schemes.names import parse_scheme

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SMALL: dict[str, Any] = {
    "model_type": "lfm2",
    "vocab_size": 4100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 12345.0,
    "eos_token_id": [7, 2],
}


def small_model(
    folder: Path, dtype: torch.dtype = torch.bfloat16, tokenizer: bool = True, **changes: object
) -> Path:
    """Make a model folder with random weights and the bundled model's tokenizer."""
    folder.mkdir(exist_ok=True)
    raw = SMALL | changes
    bundled = resolve_model("lfm2-tiny").folder
    assert bundled is not None
    for name in TOKENIZER if tokenizer else ():
        shutil.copyfile(bundled / name, folder / name)
    (folder / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)
        for name, shape in ModelConfig.from_dict(raw).tensor_shapes().items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def recipe_of(scheme: str | Recipe) -> Recipe:
    """Return a recipe as it is, a preset by its name, or one scheme for every linear."""
    if isinstance(scheme, Recipe):
        return scheme
    return preset(scheme) if scheme in ("int8", "int4", "float") else uniform(parse_scheme(scheme))


def job_of(source: ModelSource, scheme: str | Recipe) -> Job:
    """Quantize a model for the target, as `edgekit export` does."""
    shapes, tied = source.config.tied_shapes()
    rows = resolve(recipe_of(scheme), shapes, tied)
    layout.check_config(source.config, Options())
    layout.check_rows(rows)
    weights = Weights(rows, source.checkpoint)
    return Job(source.id, source.config, rows, weights, 64, source.folder)


def write_gguf_of(
    source: ModelSource,
    scheme: str | Recipe,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Path, Job]:
    """Write a model's file into a folder; return it with what it was made of."""
    job = job_of(source, scheme)
    folder.mkdir(exist_ok=True)
    gguf.write(job, folder, progress)
    return folder / layout.MODEL_FILE, job


def small_model_file(folder: Path, scheme: str = "int4") -> Path:
    """Write `model.gguf` of a model of two layers and return its path."""
    source = resolve_model(str(small_model(folder / "small")))
    return write_gguf_of(source, scheme, folder)[0]

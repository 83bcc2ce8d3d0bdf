"""Tensors and keys of a model's GGUF, known before any weight is read."""

from collections.abc import Mapping, Sequence

from edgekit.exporters.gguf.architectures import find_architecture, model_keys
from edgekit.exporters.gguf.block_types import block_type
from edgekit.exporters.gguf.names import ROPE_DIVISORS
from edgekit.formats.gguf.writer import PlannedTensor, Value
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import Resolved


def planned_tensor(row: Resolved, name: str, kinds: Mapping[str, str]) -> PlannedTensor:
    """Return what holds a row; `kinds` are the types of float tensors by their checkpoint name."""
    kind = kinds[row.tensor] if row.scheme.is_float else block_type(row.scheme)
    # a depthwise kernel [width, 1, taps] is stored without its middle axis
    shape = tuple(n for i, n in enumerate(row.shape) if len(row.shape) < 3 or i != 1)
    return PlannedTensor(name, kind, shape)


def rope_divisors(config: ModelConfig) -> list[float]:
    """Return by what each frequency of the rotation is divided, nothing where none is."""
    return config.rope.divisors(config.head_dim) or []


def divisor_tensors(config: ModelConfig) -> list[PlannedTensor]:
    """Return the tensor that slows the rotation down, none where nothing does."""
    count = len(rope_divisors(config))
    return [PlannedTensor(ROPE_DIVISORS, "F32", (count,))] if count else []


def model_metadata(config: ModelConfig, tensors: Sequence[PlannedTensor]) -> dict[str, Value]:
    """The feed-forward length is that of the weights: the rule in config.json is easily misread."""
    return {
        "general.architecture": find_architecture(config).name,
        **model_keys(config, next(t.shape[0] for t in tensors if "ffn_gate" in t.name)),
    }

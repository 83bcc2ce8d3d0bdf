"""What is known of one model without its weights, read from any spelling of its config.json.

How a family spells it, and of which blocks its models are made, is in `edgekit.models.families`.
Where transformers silently prefers one of two contradicting keys, the file is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgekit.common.files import load_json_object
from edgekit.errors import EdgekitError
from edgekit.models.architecture import Architecture, Rope
from edgekit.models.config_keys import (
    MAX_CONTEXT,
    MAX_LAYERS,
    MAX_PARAMETERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Keys,
    check_range,
    missing,
    show,
    token_ids,
)
from edgekit.models.families import find_family


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of one dense text model.

    What a family adds to them is in a class of its own. `intermediate_size` is the effective
    feed-forward width; `max_context` is the file's position limit in tokens.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_context: int
    bos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int | None
    norm_eps: float
    rope: Rope
    tie_embeddings: bool

    def __post_init__(self) -> None:
        """Refuse values that no model can have, naming the config.json key."""
        check_range("vocab_size", self.vocab_size, 1, MAX_VOCAB)
        check_range("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        check_range("intermediate_size", self.intermediate_size, 1, MAX_WIDTH)
        check_range("num_attention_heads", self.num_heads, 1, MAX_WIDTH)
        check_range("num_key_value_heads", self.num_kv_heads, 1, self.num_heads)
        check_range("head_dim", self.head_dim, 2, MAX_WIDTH)
        check_range("max_position_embeddings", self.max_context, 1, MAX_CONTEXT)
        check_range("number of layers", self.num_layers, 1, MAX_LAYERS)
        self._check_heads()
        self._check_numbers()
        self._check_ids()
        if self.parameter_count > MAX_PARAMETERS:
            raise EdgekitError(f"config: {self.parameter_count:,} parameters is not an edge model")

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise EdgekitError(
                f"config: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise EdgekitError(f"config: head_dim {self.head_dim} is odd; RoPE needs an even one")

    def _check_numbers(self) -> None:
        for key, value, low, high in (
            ("norm_eps", self.norm_eps, 0.0, 1.0),
            ("rope_theta", self.rope.theta, 1.0, 1e15),
        ):
            if not low < value < high:
                raise EdgekitError(f"config: {key} must lie between {low:g} and {high:g}: {value}")

    def _check_ids(self) -> None:
        if not self.eos_ids:
            raise EdgekitError("config: eos_token_id is missing or empty")
        ids = (("bos", self.bos_id), ("pad", self.pad_id), *(("eos", i) for i in self.eos_ids))
        for name, token in ids:
            if token is not None and not 0 <= token < self.vocab_size:
                raise EdgekitError(
                    f"config: {name}_token_id {token} lies outside the vocabulary "
                    f"of {self.vocab_size}"
                )

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Read a config.json, or the one inside a folder.

        In a folder, bos and eos are those of generation_config.json where it names them, as in
        transformers' `generate`.
        """
        file = path / "config.json" if path.is_dir() else path
        raw = load_json_object(file)
        ids = _generation_ids(path / "generation_config.json", raw.get("vocab_size"))
        try:
            return cls.from_dict(raw | ids)
        except EdgekitError as error:
            raise EdgekitError(f"{file}: {str(error).removeprefix('config: ')}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Normalise the content of a Hugging Face config.json; refuse contradictions by key."""
        keys = Keys(raw)
        if raw.get("model_type") is None:
            missing("model_type")
        family = find_family(raw["model_type"])
        if raw.get("quantization_config") is not None:
            raise EdgekitError(
                f"config: quantization_config says the weights are already quantized{_by(raw)}; "
                "give the original bf16, fp16 or fp32 checkpoint"
            )
        config: ModelConfig = family.read(keys)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return a config.json that `from_dict` and transformers read back to this model."""
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids)
        ids = {"bos_token_id": self.bos_id, "eos_token_id": eos, "pad_token_id": self.pad_id}
        return {**find_family(self.family).write(self), **ids}

    @cached_property
    def architecture(self) -> Architecture:
        """The blocks that the model is made of."""
        made: Architecture = find_family(self.family).architecture(self)
        return made

    @property
    def default_context(self) -> int:
        """Positions to make room for where nobody says how many: state takes memory for each."""
        return min(self.max_context, 2048)

    @property
    def parameter_count(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor of the checkpoint by its Hugging Face name, in model order."""
        return self.architecture.shapes()

    def tied_shapes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Return the shapes with a tied head's at the end, and the names of tied tensors.

        So that a recipe can give a tied head a scheme of its own; the names come each with that of
        the tensor whose values it has.
        """
        shapes = {tensor.name: tensor.shape for tensor in self.architecture.table()}
        return shapes, dict(self.architecture.ties())


def _by(raw: Mapping[str, Any]) -> str:
    """Return who quantized the weights, as transformers names methods."""
    table = raw["quantization_config"]
    method = table.get("quant_method") if isinstance(table, dict) else None
    return f" by {show(method)}" if isinstance(method, str) else ""


def _generation_ids(file: Path, vocab_size: object) -> dict[str, Any]:
    """Return the bos and eos ids that a generation_config.json names, none where there is none."""
    if not file.is_file():
        return {}
    raw, found = load_json_object(file), dict[str, Any]()
    for key in ("bos_token_id", "eos_token_id"):
        try:
            ids = token_ids(raw.get(key), key)
        except EdgekitError as error:
            raise EdgekitError(f"{file}: {str(error).removeprefix('config: ')}") from error
        for token in ids:
            if isinstance(vocab_size, int) and token >= vocab_size:
                raise EdgekitError(
                    f"{file}: {key} {token} is outside the vocabulary of {vocab_size}"
                )
        if ids:
            found[key] = list(ids) if key == "eos_token_id" else ids[0]
    return found

"""One normalised architecture description, read from any public spelling of an LFM2 config.json.

The spellings and the feed-forward rule follow transformers' `Lfm2Config` and `Lfm2MLP`
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/lfm2). Where
transformers silently prefers one of two contradicting keys, the file is refused here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgekit.common.files import load_json_object
from edgekit.errors import EdgekitError

LAYER_TYPES = ("conv", "full_attention")

# Sanity bounds, far beyond any edge model: they keep a corrupt file from asking for terabytes.
_MAX_WIDTH = 1 << 20
_MAX_VOCAB = 1 << 22
_MAX_LAYERS = 1024
_MAX_CONTEXT = 1 << 30
_MAX_PARAMETERS = 1 << 40


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one dense text model.

    `intermediate_size` is the effective feed-forward width (after the auto-adjust rule);
    `layer_types` has one entry a layer; `max_context` is the file's position limit in tokens.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_context: int
    bos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int | None = 0
    conv_kernel: int = 3
    conv_bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        """Refuse values that no model can have, naming the config.json key."""
        _check_range("vocab_size", self.vocab_size, 1, _MAX_VOCAB)
        _check_range("hidden_size", self.hidden_size, 1, _MAX_WIDTH)
        _check_range("intermediate_size", self.intermediate_size, 1, _MAX_WIDTH)
        _check_range("num_attention_heads", self.num_heads, 1, _MAX_WIDTH)
        _check_range("num_key_value_heads", self.num_kv_heads, 1, self.num_heads)
        _check_range("head_dim", self.head_dim, 2, _MAX_WIDTH)
        _check_range("conv_L_cache", self.conv_kernel, 2, 64)
        _check_range("max_position_embeddings", self.max_context, 1, _MAX_CONTEXT)
        _check_range("number of layers", len(self.layer_types), 1, _MAX_LAYERS)
        self._check_layers()
        self._check_numbers()
        self._check_ids()
        if self.parameter_count > _MAX_PARAMETERS:
            raise EdgekitError(f"config: {self.parameter_count:,} parameters is not an edge model")

    def _check_layers(self) -> None:
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                allowed = ", ".join(LAYER_TYPES)
                raise EdgekitError(
                    f"config: layer_types[{index}] is {_show(kind)}; supported: {allowed}"
                )
        if self.num_heads % self.num_kv_heads:
            raise EdgekitError(
                f"config: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise EdgekitError(f"config: head_dim {self.head_dim} is odd; RoPE needs an even one")
        if self.conv_bias:
            raise EdgekitError("config: conv_bias true is not supported (no public LFM2 has it)")

    def _check_numbers(self) -> None:
        for key, value, low, high in (
            ("norm_eps", self.norm_eps, 0.0, 1.0),
            ("rope_theta", self.rope_theta, 1.0, 1e15),
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
        keys = _Keys(raw)
        _check_model_type(keys)
        hidden = keys.integer("hidden_size", high=_MAX_WIDTH)
        heads = keys.integer("num_attention_heads", high=_MAX_WIDTH)
        return cls(
            family="lfm2",
            vocab_size=keys.integer("vocab_size", high=_MAX_VOCAB),
            hidden_size=hidden,
            layer_types=_layer_types(keys),
            num_heads=heads,
            num_kv_heads=keys.integer("num_key_value_heads", high=_MAX_WIDTH),
            head_dim=_head_dim(keys, hidden, heads),
            intermediate_size=_feed_forward_width(keys),
            max_context=keys.integer("max_position_embeddings", default=128_000, high=_MAX_CONTEXT),
            bos_id=keys.integer("bos_token_id", default=1, low=0, high=_MAX_VOCAB),
            eos_ids=token_ids(raw.get("eos_token_id"), "eos_token_id"),
            pad_id=_pad_id(keys),
            conv_kernel=keys.integer("conv_L_cache", default=3, high=64),
            conv_bias=keys.flag("conv_bias", default=False),
            norm_eps=keys.number("norm_eps", "block_norm_eps", default=1e-5),
            rope_theta=_rope_theta(keys),
            tie_embeddings=keys.flag("tie_word_embeddings", "tie_embedding", default=True),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a config.json that `from_dict` and transformers read back to this model."""
        return {
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": self.num_layers,
            "layer_types": list(self.layer_types),
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_context,
            "norm_eps": self.norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "conv_L_cache": self.conv_kernel,
            "conv_bias": self.conv_bias,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids),
            "pad_token_id": self.pad_id,
        }

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

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
        width, shapes = self.hidden_size, dict[str, tuple[int, ...]]()
        shapes["model.embed_tokens.weight"] = (self.vocab_size, width)
        for index, kind in enumerate(self.layer_types):
            layer = _LAYER_SHAPES[kind](self) | _feed_forward_shapes(self)
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes["model.embedding_norm.weight"] = (width,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, width)
        return shapes


def _conv_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width = config.hidden_size
    return {
        "conv.in_proj.weight": (3 * width, width),
        "conv.conv.weight": (width, 1, config.conv_kernel),
        "conv.out_proj.weight": (width, width),
    }


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, head = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    return {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.q_layernorm.weight": (head,),
        "self_attn.k_layernorm.weight": (head,),
        "self_attn.out_proj.weight": (width, queries),
    }


def _feed_forward_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, inner = config.hidden_size, config.intermediate_size
    return {
        "feed_forward.w1.weight": (inner, width),
        "feed_forward.w3.weight": (inner, width),
        "feed_forward.w2.weight": (width, inner),
        "operator_norm.weight": (width,),
        "ffn_norm.weight": (width,),
    }


_LAYER_SHAPES: dict[str, Callable[[ModelConfig], dict[str, tuple[int, ...]]]] = {
    "conv": _conv_shapes,
    "full_attention": _attention_shapes,
}


class _Keys:
    """Typed access to a config.json; several names of one key must agree."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def find(self, *names: str) -> tuple[str, Any]:
        """Return the name and value of the first spelling present; (first name, None) if none."""
        given = [(name, self.raw[name]) for name in names if self.raw.get(name) is not None]
        for name, value in given[1:]:
            if value != given[0][1]:
                raise EdgekitError(
                    f"config: {given[0][0]} {_show(given[0][1])} contradicts "
                    f"{name} {_show(value)}; they mean the same thing"
                )
        return given[0] if given else (names[0], None)

    def integer(self, *names: str, high: int, low: int = 1, default: int | None = None) -> int:
        name, value = self.find(*names)
        if value is None:
            return default if default is not None else _missing(*names)
        if type(value) is not int:
            raise EdgekitError(f"config: {name} must be an integer, not {_show(value)}")
        _check_range(name, value, low, high)
        return value

    def number(self, *names: str, default: float) -> float:
        name, value = self.find(*names)
        return default if value is None else _number(name, value)

    def flag(self, *names: str, default: bool) -> bool:
        name, value = self.find(*names)
        if value is None:
            return default
        if type(value) is not bool:
            raise EdgekitError(f"config: {name} must be true or false, not {_show(value)}")
        return value


def _check_model_type(keys: _Keys) -> None:
    kind = keys.raw.get("model_type")
    if kind is None:
        _missing("model_type")
    if kind == "lfm2_moe":
        raise EdgekitError(
            "config: model_type 'lfm2_moe' is a mixture of experts; "
            "only dense text models (model_type lfm2) are supported"
        )
    if kind != "lfm2":
        raise EdgekitError(
            f"config: model_type {_show(kind)} is not supported; supported: lfm2, dense text "
            "models. Of others a torch module can be exported: edgekit export FILE.py:FUNCTION"
        )
    if keys.raw.get("quantization_config") is not None:
        raise EdgekitError(
            f"config: quantization_config says the weights are already quantized{_by(keys)}; "
            "give the original bf16, fp16 or fp32 checkpoint"
        )


def _by(keys: _Keys) -> str:
    """Return who quantized the weights, as transformers names methods."""
    table = keys.raw["quantization_config"]
    method = table.get("quant_method") if isinstance(table, dict) else None
    return f" by {_show(method)}" if isinstance(method, str) else ""


def _layer_types(keys: _Keys) -> tuple[str, ...]:
    types, indices = keys.raw.get("layer_types"), keys.raw.get("full_attn_idxs")
    if types is None and indices is None:
        _missing("layer_types", "full_attn_idxs")
    count = keys.integer(
        "num_hidden_layers",
        high=_MAX_LAYERS,
        default=len(types) if isinstance(types, list) else None,
    )
    from_indices = None if indices is None else _types_of_indices(indices, count)
    if types is None:
        assert from_indices is not None
        return from_indices
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise EdgekitError(f"config: layer_types must be a list of names, not {_show(types)}")
    if len(types) != count:
        raise EdgekitError(
            f"config: layer_types has {len(types)} entries but num_hidden_layers is {count}"
        )
    if from_indices is not None and from_indices != tuple(types):
        raise EdgekitError("config: layer_types contradicts full_attn_idxs; keep only one of them")
    return tuple(types)


def _types_of_indices(indices: object, count: int) -> tuple[str, ...]:
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise EdgekitError(
            f"config: full_attn_idxs must be a list of integers, not {_show(indices)}"
        )
    for index in indices:
        if not 0 <= index < count:
            raise EdgekitError(
                f"config: full_attn_idxs names layer {_show(index)}; "
                f"the model has layers 0 to {count - 1}"
            )
    if len(set(indices)) != len(indices):
        raise EdgekitError("config: full_attn_idxs names a layer twice")
    return tuple("full_attention" if i in set(indices) else "conv" for i in range(count))


def _head_dim(keys: _Keys, hidden: int, heads: int) -> int:
    if keys.raw.get("head_dim") is not None:
        return keys.integer("head_dim", high=_MAX_WIDTH)
    if hidden % heads:
        raise EdgekitError(
            f"config: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, "
            "and head_dim is absent"
        )
    return hidden // heads


def _feed_forward_width(keys: _Keys) -> int:
    """Effective width: transformers' Lfm2MLP, where the adjustment is on unless switched off."""
    width = keys.integer("intermediate_size", "block_ff_dim", high=_MAX_WIDTH)
    if not keys.flag("block_auto_adjust_ff_dim", default=True):
        return width
    width = int(2 * width / 3)
    if "block_ffn_dim_multiplier" in keys.raw and keys.raw["block_ffn_dim_multiplier"] is None:
        return width  # there, a null multiplier also switches the rounding off
    multiplier = keys.number("block_ffn_dim_multiplier", default=1.0)
    if not 0 < multiplier <= 1024:
        raise EdgekitError(
            f"config: block_ffn_dim_multiplier must lie above 0 and up to 1024, not {multiplier:g}"
        )
    multiple = keys.integer("block_multiple_of", default=256, high=_MAX_WIDTH)
    return multiple * math.ceil(int(multiplier * width) / multiple)


def _rope_theta(keys: _Keys) -> float:
    top = keys.raw.get("rope_theta")
    nested = None
    for name in ("rope_parameters", "rope_scaling"):
        table = keys.raw.get(name)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise EdgekitError(f"config: {name} must be a table, not {_show(table)}")
        _check_rope_type(name, table)
        if table.get("rope_theta") is not None:
            nested = _number(f"{name}.rope_theta", table["rope_theta"])
    if top is None:
        return nested if nested is not None else 1_000_000.0
    theta = _number("rope_theta", top)
    if nested is not None and nested != theta:
        raise EdgekitError(
            f"config: rope_theta {theta:g} contradicts rope_parameters.rope_theta {nested:g}"
        )
    return theta


def _check_rope_type(name: str, table: Mapping[str, Any]) -> None:
    for key in ("rope_type", "type"):
        if table.get(key, "default") != "default":
            raise EdgekitError(
                f"config: {name}.{key} {_show(table[key])} is not supported; supported: default"
            )
    if table.get("partial_rotary_factor", 1.0) != 1.0:
        raise EdgekitError(f"config: {name}.partial_rotary_factor must be 1")


def token_ids(value: object, key: str) -> tuple[int, ...]:
    """Read a token id that may be absent (empty), one integer, or a list of them."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < _MAX_VOCAB:
            raise EdgekitError(f"config: {key} must be a token id or a list, not {_show(value)}")
    return tuple(dict.fromkeys(ids))


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


def _pad_id(keys: _Keys) -> int | None:
    if keys.raw.get("pad_token_id", 0) is None:
        return None
    return keys.integer("pad_token_id", default=0, low=0, high=_MAX_VOCAB)


def _number(name: str, value: object) -> float:
    if (
        isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300
    ):  # also refuses NaN
        raise EdgekitError(f"config: {name} must be a finite number, not {_show(value)}")
    return float(value)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise EdgekitError(f"config: {name} must lie between {low} and {high}, not {_show(value)}")


def _missing(*names: str) -> NoReturn:
    raise EdgekitError(f"config: {' or '.join(names)} is missing")


def _show(value: object) -> str:
    """Show a value from a file on one short line, whatever it is."""
    text = "a huge integer" if isinstance(value, int) and value.bit_length() > 256 else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Preconditions that llama.cpp asserts: a file that breaks one would abort the process.

What it merely cannot load, it refuses with a reason. But some numbers it asserts (GGML_ASSERT
in src/llama-model.cpp, src/llama-vocab.cpp and the operators of ggml), and those are looked at here
before it sees the file. Each check says which.
"""

import math
from collections.abc import Iterator
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.formats.gguf.file import STRING, GgufArray, GgufFile

_MOST_LAYERS, _MOST_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_NOT_FOR_MATRICES = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
_TOKENS = "tokenizer.ggml.tokens"


def check_model(file: GgufFile) -> None:
    """Refuse, in one line, a file that llama.cpp would not survive."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise EdgekitError(f"{file.path}: is no model: it names no general.architecture")
    values = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    checks = [_split(file.metadata), _sizes(values), _experts(values), _constants(values)]
    if architecture in ("lfm2", "lfm2moe"):
        checks.append(_lfm2(file, values))
    for problems in (*checks, _matrices(file), _tokens(file)):
        for problem in problems:
            raise EdgekitError(f"{file.path}: {problem}")


def _split(metadata: dict[str, Any]) -> Iterator[str]:
    """Of several files llama.cpp would open the others by their names, unchecked."""
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        yield (
            f"is one of {parts!r:.20} parts; make one file of them with llama-gguf-split --merge"
        )


def _sizes(values: dict[str, Any]) -> Iterator[str]:
    """llama_model_base::load_hparams; head counts are divisors in many places."""
    layers = values.get("block_count", 0)
    if not _is_count(layers, _MOST_LAYERS) or layers == 0:
        yield f"its block_count is {layers!r:.20}; llama.cpp takes 1 to {_MOST_LAYERS} layers"
        return
    extra = values.get("nextn_predict_layers", 0)
    if not _is_count(extra, layers):
        yield f"its nextn_predict_layers is {extra!r:.20}, more than its {layers} layers"
    width, heads = values.get("embedding_length"), values.get("attention.head_count", 0)
    if type(width) is not int or width < 1:
        yield f"its embedding_length is {width!r:.20}"
    elif type(heads) is int and not 0 <= heads <= width:
        yield f"its attention.head_count is {heads}, more than its width of {width}"


def _experts(values: dict[str, Any]) -> Iterator[str]:
    """llama_model_base::load_hparams."""
    experts, groups = values.get("expert_count", 0), values.get("expert_group_count", 0)
    if not _is_count(experts, _MOST_EXPERTS):
        yield f"its expert_count is {experts!r:.20}; llama.cpp takes up to {_MOST_EXPERTS}"
        return
    used = max(_numbers(values.get("expert_used_count", 0)), default=0)
    if not (1 <= used <= experts if experts else used == 0):
        yield f"it uses {used} of {experts} experts"
    group_used = values.get("expert_group_used_count", 0)
    if not _is_count(groups, max(0, experts - 1)) or (
        groups > 1 and (experts % groups or not _is_count(group_used, groups - 1) or not group_used)
    ):
        yield f"it has {groups!r:.20} groups of experts, of which {group_used!r:.20} are used"


def _constants(values: dict[str, Any]) -> Iterator[str]:
    """ggml_rms_norm and ggml_norm (eps >= 0); llama_model_base::load_hparams."""
    for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"):
        epsilon = values.get(f"attention.{key}", 0.0)
        if not isinstance(epsilon, float) or not 0 <= epsilon < math.inf:
            yield f"its attention.{key} is {epsilon!r:.20}"
    scaling = values.get("rope.scaling.type", "linear")
    if scaling not in _ROPE_SCALINGS:
        yield f"its rope.scaling.type is {scaling!r:.40}; llama.cpp has {', '.join(_ROPE_SCALINGS)}"


def _lfm2(file: GgufFile, values: dict[str, Any]) -> Iterator[str]:
    """llama_model_lfm2: the reshapes, RoPE and products of attention, the types of ssm_conv.

    Of its two memories, of keys and values and of states, both must have a layer.
    """
    width, heads = values["embedding_length"], values.get("attention.head_count", 0)
    if not _is_count(heads, width) or heads == 0 or width % heads:
        yield f"its attention.head_count is {heads!r:.20}, which does not divide its width {width}"
        return
    for own in _numbers(values.get("attention.head_count_kv", heads)):
        if own < 0 or (own and heads % own):
            yield f"it has {own} heads for keys and values, which do not divide its {heads} heads"
    each = values.get("attention.head_count_kv")
    if isinstance(each, GgufArray) and len({own > 0 for own in _numbers(each)}) == 1:
        kind = "attention" if max(_numbers(each)) else "convolutions"
        yield f"its layers are all {kind}; llama.cpp runs an LFM2 with layers of both kinds only"
    size = width // heads
    for key in ("attention.key_length", "attention.value_length"):
        if values.get(key, size) != size:
            yield f"its {key} is {values[key]!r:.20}, not {size}"
    rotated = values.get("rope.dimension_count", size)
    if not _is_count(rotated, size) or rotated % 2:
        yield f"its rope.dimension_count is {rotated!r:.20}, no even number up to {size}"
    for tensor in file.tensors.values():
        stem = tensor.name.removesuffix(".weight")
        if stem.endswith(("_norm", "shortconv.conv")) and tensor.type != "F32":
            yield f"tensor {tensor.name} is of type {tensor.type}; llama.cpp takes F32 alone there"


def _matrices(file: GgufFile) -> Iterator[str]:
    """ggml_compute_forward_mul_mat: types without a product."""
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1 and tensor.type in _NOT_FOR_MATRICES:
            yield f"tensor {tensor.name!r:.80} is of type {tensor.type}, which no product takes"


def _tokens(file: GgufFile) -> Iterator[str]:
    """llama_vocab::impl::load: no text may stand for two tokens; ids of tokens that are added."""
    tokens = file.metadata.get(_TOKENS)
    if not isinstance(tokens, GgufArray) or tokens.type != STRING:
        return  # llama.cpp refuses it itself
    # llama.cpp reads each up to its first zero byte
    read = (text.partition(b"\0")[0] for text in tokens.raw_strings())
    texts = {text or b"[EMPTY_%d]" % i for i, text in enumerate(read)}
    if len(texts) != tokens.count:
        yield f"{tokens.count - len(texts)} of its {_TOKENS} stand there twice"
    for name in ("bos", "eos"):
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id", 0)
        if not _is_count(token, tokens.count - 1):
            yield f"its tokenizer.ggml.{name}_token_id is {token!r:.20}, of {tokens.count} tokens"


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _numbers(value: object) -> list[int]:
    """Return a value for each layer, or the one for all, as a list."""
    if isinstance(value, GgufArray) and value.type != STRING:
        # a float is none of them, and NaN no whole number either
        return [int(number) for number in value.numbers() if number == number // 1]
    return [value] if type(value) is int else []

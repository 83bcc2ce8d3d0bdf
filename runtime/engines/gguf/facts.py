"""What a GGUF file says of itself, read without llama.cpp."""

from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.formats.gguf.file import STRING, GgufArray, GgufFile
from edgekit.formats.gguf.sampling import stated_sampling
from edgekit.runtime.decode_bytes import Traffic
from edgekit.runtime.engines.gguf.checks import check_model
from edgekit.runtime.engines.stated import Stated

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_CACHE_BYTES = 2  # float16, as the engine has it


def stated(path: Path) -> Stated:
    """Return what a file says; EdgekitError for one that llama.cpp must not be given."""
    file = open_checked(path)
    return Stated(
        model_name(file),
        count_types(file),
        file_traffic(file),
        stated_context(file),
        stated_sampling(file),
    )


def open_checked(path: Path) -> GgufFile:
    """Read a file's head; EdgekitError for one that llama.cpp cannot or must not be given."""
    file = GgufFile.open(path)
    check_model(file)
    return file


def stated_context(file: GgufFile) -> int:
    """Return the positions that a file's model was made for."""
    key = f"{_architecture(file)}.context_length"
    stated = file.metadata.get(key)
    if not isinstance(stated, int) or not 1 <= stated < 1 << 31:
        raise EdgekitError(f"{file.path}: its {key} must be a number of positions, not {stated!r}")
    return stated


def model_name(file: GgufFile) -> str | None:
    """Return the name that a file gives its model."""
    name = file.metadata.get("general.name")
    return name if isinstance(name, str) and name else None


def count_types(file: GgufFile) -> dict[str, dict[str, int]]:
    """Return tensors and bytes per type of ggml's, in the file's order."""
    counts: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        count = counts.setdefault(tensor.type, {"tensors": 0, "bytes": 0})
        count["tensors"] += 1
        count["bytes"] += tensor.nbytes
    return counts


def file_traffic(file: GgufFile) -> Traffic | None:
    """Return the bytes per decoded token, None for a model whose bytes depend on more than depth.

    Experts and sliding windows are not predicted.
    """
    cache = _cache_bytes_per_position(file)
    if cache is None or _EMBEDDING not in file.tensors:
        return None
    return Traffic(token_weight_bytes(file), cache)


def token_weight_bytes(file: GgufFile) -> int:
    """Return the bytes of weights that a token reads, experts that it leaves out included.

    Every tensor is read once per token; of an embedding that is not the head as well, one row.
    """
    weights = sum(tensor.nbytes for tensor in file.tensors.values())
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is not None and _HEAD in file.tensors:
        weights -= embedding.nbytes - embedding.nbytes // embedding.shape[0]
    return weights


def _cache_bytes_per_position(file: GgufFile) -> int | None:
    if _number(file, "expert_count") or _number(file, "attention.sliding_window"):
        return None
    heads, width = _number(file, "attention.head_count"), _number(file, "embedding_length")
    cached = _heads_in_cache(file)
    if heads is None or width is None or cached is None:
        return None
    key = _number(file, "attention.key_length") or width // heads
    value = _number(file, "attention.value_length") or width // heads
    return cached * (key + value) * _CACHE_BYTES


def _heads_in_cache(file: GgufFile) -> int | None:
    """Return the heads of keys in all layers together; 0 of them mark a layer without attention."""
    stated = file.metadata.get(f"{_architecture(file)}.attention.head_count_kv")
    if isinstance(stated, GgufArray) and stated.type != STRING:
        return int(stated.numbers().sum())
    each, layers = _number(file, "attention.head_count_kv"), _number(file, "block_count")
    return None if each is None or layers is None else each * layers


def _number(file: GgufFile, key: str) -> int | None:
    stated = file.metadata.get(f"{_architecture(file)}.{key}")
    return stated if type(stated) is int and stated > 0 else None


def _architecture(file: GgufFile) -> str:
    return str(file.metadata.get("general.architecture"))

"""Quantized tensors in a safetensors file.

For a tensor `name` the file holds `name.codes` (packed, see `edgekit.quantize.packing`),
`name.scales` (bfloat16 where one per group and exact so, else float32) and, where it has them,
`name.steps` (float16; scales of two levels are uint8 multiples of them), `name.zero_points` and
`name.codebook` (int8 where all entries are such numbers); a float tensor is held under its own
name. The metadata `edgekit` is JSON: a format version and, per quantized tensor,
shape, bits, group_size, axis and signed. A tensor that is another one's object under a second name
is `{"same_as": first}`. Files of whole models also say what they are `about`; older ones do not.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgekit.common.files import check_file, new_file
from edgekit.errors import EdgekitError, one_line
from edgekit.quantize import super_blocks
from edgekit.quantize.methods import RECORDED
from edgekit.quantize.packing import pack, unpack
from edgekit.quantize.schemes.sizes import scales_shape
from edgekit.quantize.schemes.super_blocks import BITS, GROUPS
from edgekit.quantize.tensor import QuantizedTensor, Weight

FORMAT_VERSION = 1
PARTS = ("codes", "scales", "steps", "zero_points", "codebook")
"""What a quantized tensor may consist of in the file."""
_MOST_FACTS = 64
_LONGEST = 200

Contents = dict[str, Weight]


@dataclass(frozen=True)
class About:
    """Where a model's codes come from.

    model   what the manifest calls the model
    sha256  of the weights that were quantized (`WeightSource.sha256`)
    recipe  the recipe's name
    method  one of `edgekit.quantize.methods.RECORDED`
    facts   anything else worth keeping: text, numbers, truth values

    Raises ValueError for values of other types, too long, or not printable.
    """

    model: str
    sha256: str
    recipe: str
    method: str
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what could not go into a manifest or a message."""
        for name in ("model", "recipe"):
            if not _is_short_text(getattr(self, name)):
                raise ValueError(f"{name} must be a printable text of at most {_LONGEST} letters")
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError("sha256 must be 64 hexadecimal digits")
        if self.method not in RECORDED:
            raise ValueError(
                f"method must be one of {', '.join(RECORDED)}, got {self.method!r:.40}"
            )
        if not isinstance(self.facts, Mapping) or len(self.facts) > _MOST_FACTS:
            raise ValueError(f"facts must be at most {_MOST_FACTS} names with values")
        for name, value in self.facts.items():
            if not _is_short_text(name) or not _is_fact(value):
                raise ValueError(f"fact {name!r:.40} must be a short text or a finite number")


def short_text(text: str) -> str:
    """Return a name as `About` takes it."""
    return "".join(char if char.isprintable() else "?" for char in text)[:_LONGEST]


def _is_short_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()


def _is_fact(value: object) -> bool:
    if isinstance(value, int | float) and abs(value) < 1 << 64:
        return math.isfinite(value)
    return _is_short_text(value)


@dataclass(frozen=True)
class Document:
    """The metadata of a file: `entries` as they stand there, each to be checked when it is used."""

    entries: Mapping[str, object]
    about: About | None


def save_quantized(path: Path, tensors: Mapping[str, Weight], about: About | None = None) -> None:
    """Write tensors to `path` whole or not at all; an existing file is replaced.

    Raises ValueError where two names would collide in the file and
    EdgekitError where it cannot be written.
    """
    arrays, entries = _flatten(tensors)
    document: dict[str, Any] = {"format_version": FORMAT_VERSION, "tensors": entries}
    if about is not None:
        document["about"] = asdict(about)
    metadata = {"edgekit": json.dumps(document, allow_nan=False)}
    with new_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors leaves 0600
        try:
            save_file(arrays, temporary, metadata=metadata)
        except SafetensorError as error:  # the system's errors too: its Rust code writes
            raise EdgekitError(f"{path}: cannot be written: {one_line(error)}") from error
        temporary.chmod(mode)


def load_quantized(path: Path) -> Contents:
    """Read what `save_quantized` wrote; EdgekitError where the file is anything else."""
    return load_with_about(path)[0]


def load_with_about(path: Path) -> tuple[Contents, About | None]:
    """Do what `load_quantized` does, and return what the file says that it is about."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            document = read_document(path, file.metadata())
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise EdgekitError(f"{path}: cannot be read: {one_line(error)}") from error
    return _assemble(path, document.entries, arrays), document.about


def _flatten(tensors: Mapping[str, Weight]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the file's arrays and the metadata's entries."""
    arrays: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    first_name: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = first_name.setdefault(id(tensor), name)
        if first != name:
            entries[name] = {"same_as": first}
            continue
        for key, array in _arrays(name, tensor).items():
            if key in arrays:
                raise ValueError(f"{name}: {key!r} is already the name of another tensor")
            arrays[key] = array
        if isinstance(tensor, QuantizedTensor):
            entries[name] = _describe(tensor)
    return arrays, entries


def _describe(tensor: QuantizedTensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "bits": tensor.bits,
        "group_size": tensor.group_size,
        "axis": tensor.axis,
        "signed": tensor.signed,
    }


def _arrays(name: str, tensor: Weight) -> dict[str, Tensor]:
    if isinstance(tensor, Tensor):
        return {name: tensor.contiguous()}
    codes = tensor.codes.contiguous()
    if tensor.two_levels:
        steps, scales = super_blocks.split(tensor.scales)
    else:
        steps, scales = None, _narrow(tensor.scales, tensor.group_size)
    arrays = {
        "codes": codes
        if tensor.bits == 8
        else pack(codes.reshape(_rows(tensor.shape)), tensor.bits),
        "scales": scales,
        "steps": steps,
        # A zero point is a code, so one byte holds it.
        "zero_points": None
        if tensor.zero_points is None
        else tensor.zero_points.to(tensor.codes.dtype),
        "codebook": _narrow_codebook(tensor),
    }
    return {f"{name}.{part}": array for part, array in arrays.items() if array is not None}


def _narrow(scales: Tensor, group_size: int | None) -> Tensor:
    """Return scales of groups as bfloat16, unless that would change them."""
    narrow = scales.to(torch.bfloat16)
    exact = group_size is not None and bool((narrow.to(torch.float32) == scales).all())
    return (narrow if exact else scales).contiguous()


def _narrow_codebook(tensor: QuantizedTensor) -> Tensor | None:
    """Return entries that are integers as int8."""
    book = tensor.codebook
    return book.to(torch.int8) if book is not None and tensor.codebook_is_int8 else book


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A scalar packs as a row of one."""
    return shape or (1,)


def read_document(path: Path, metadata: Mapping[str, str] | None) -> Document:
    """Return what a safetensors file's metadata says; EdgekitError where it is not ours."""
    text = (metadata or {}).get("edgekit")
    if text is None:
        raise EdgekitError(f"{path}: holds no quantized tensors (no edgekit metadata)")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EdgekitError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(document, dict) or not isinstance(document.get("tensors"), dict):
        raise EdgekitError(f"{path}: its edgekit metadata lists no tensors")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise EdgekitError(
            f"{path}: format version {version!r:.40}, this edgekit reads {FORMAT_VERSION}"
        )
    return Document(document["tensors"], _about(path, document.get("about")))


def _about(path: Path, value: object) -> About | None:
    if value is None:
        return None
    try:
        return About(**value)  # type: ignore[arg-type]  # which is what is tried here
    except (TypeError, ValueError) as error:
        raise EdgekitError(f"{path}: what it is about: {one_line(error)}") from error


def _assemble(path: Path, entries: Mapping[str, object], arrays: dict[str, Tensor]) -> Contents:
    """Build the tensors; EdgekitError names the one at fault."""
    result: Contents = {}
    aliases: dict[str, str] = {}
    for name, entry in entries.items():
        try:
            known = check_entry(entry)
            if "same_as" in known:
                aliases[name] = known["same_as"]
            else:
                parts = {part: arrays.pop(f"{name}.{part}", None) for part in PARTS}
                result[name] = build_tensor(known, parts)
        except (ValueError, RuntimeError) as error:
            raise EdgekitError(f"{path}: {name}: {one_line(error)}") from error
    result |= arrays  # what is left is float
    for name, first in aliases.items():
        if first not in result or first in aliases:
            raise EdgekitError(f"{path}: {name}: is said to be {first!r}, which is not there")
        result[name] = result[first]
    return result


def check_entry(entry: object) -> dict[str, Any]:
    """Return a tensor's metadata; ValueError where it is not of the types that are written."""
    if not isinstance(entry, dict):
        reason = "is no object"
    elif set(entry) == {"same_as"}:
        reason = "" if isinstance(entry["same_as"], str) else "names no tensor"
    elif set(entry) != {"shape", "bits", "group_size", "axis", "signed"}:
        reason = "has other keys than shape, bits, group_size, axis and signed"
    else:
        shape, signed = entry["shape"], entry["signed"]
        optional = all(type(entry[key]) in (int, type(None)) for key in ("group_size", "axis"))
        is_shape = isinstance(shape, list) and all(type(size) is int for size in shape)
        fits = is_shape and type(signed) is bool and type(entry["bits"]) is int and optional
        reason = "" if fits else "has a value of the wrong type"
    if reason:
        raise ValueError(f"its metadata {reason}")
    assert isinstance(entry, dict)
    return entry


def build_tensor(entry: Mapping[str, Any], parts: Mapping[str, Tensor | None]) -> QuantizedTensor:
    """Put a tensor's parts together (by `PARTS`); ValueError where they contradict its entry."""
    codes, scales, steps, zeros, codebook = (parts.get(part) for part in PARTS)
    if codes is None or scales is None:
        raise ValueError("its codes or scales are missing")
    shape, bits, signed = tuple(entry["shape"]), entry["bits"], entry["signed"]
    if bits != 8:
        codes = unpack(codes, bits, _rows(shape)[-1], signed)
        codes = codes.reshape(shape) if tuple(codes.shape) == _rows(shape) else codes
    if tuple(codes.shape) != shape or (codes.dtype == torch.int8) != signed:
        raise ValueError(f"expected codes of shape {shape}, got {tuple(codes.shape)}")
    expected = scales_shape(shape, entry["axis"], entry["group_size"])
    if (steps is not None) != (bits == BITS):
        raise ValueError(f"codes of 6 bits, and no others, have steps of scales: got {bits} bits")
    if steps is not None:
        scales = _of_two_levels(steps, scales)
    if scales.dtype not in (torch.bfloat16, torch.float32) or tuple(scales.shape) != expected:
        raise ValueError(f"expected scales of shape {expected}, got {tuple(scales.shape)}")
    return QuantizedTensor(
        codes=codes,
        scales=scales.to(torch.float32),
        zero_points=None if zeros is None else zeros.to(torch.int32),
        bits=bits,
        group_size=entry["group_size"],
        axis=entry["axis"],
        codebook=None if codebook is None else _wide_codebook(codebook),
    )


def _of_two_levels(steps: Tensor, multiples: Tensor) -> Tensor:
    """Return float32 scales; that they are ones of 6-bit codes, `QuantizedTensor` sees."""
    groups = GROUPS
    of_blocks = (*multiples.shape[:-1], multiples.shape[-1] // groups) if multiples.ndim else ()
    fits = multiples.dtype == torch.uint8 and multiples.shape[-1:].numel() % groups == 0
    if steps.dtype != torch.float16 or not fits or tuple(steps.shape) != of_blocks:
        raise ValueError(
            f"expected steps of shape {of_blocks} in float16 and uint8 scales, got "
            f"{tuple(steps.shape)} of {steps.dtype} and {multiples.dtype}"
        )
    return super_blocks.join(steps, multiples)


def _wide_codebook(stored: Tensor) -> Tensor:
    if stored.dtype not in (torch.int8, torch.float32):
        raise ValueError(f"a codebook is int8 or float32, got {stored.dtype}")
    return stored.to(torch.float32)

"""The last line of an export: how large the artifact is."""

from pathlib import Path


def size_line(folder: Path, model: str) -> str:
    """Return the bytes of the model file, those of an ONNX model's weights with it, and of all."""
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    path = folder / model
    beside = [file for file in sizes if file.parent == path.parent]
    own = sum(sizes[file] for file in beside if file.name.startswith(path.name))
    return f"{folder}: model {_size(own)}, folder {_size(sum(sizes.values()))}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count:,} bytes"

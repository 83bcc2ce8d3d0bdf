"""Calibration data of modules, as a command names it: files of inputs, a folder, a function.

A `.npy`, `.npz` or `.safetensors` file holds inputs `[N, ...]`, cut into mini-batches; for a module
of several inputs one array for each, under the input's name. A folder holds such files. A function
`path/to/data.py:function` returns or yields mini-batches itself: tensors or arrays, in a tuple or a
dict where there are several inputs. A `.json` is a saved calibration.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekit.common.files import check_file, os_reason
from edgekit.common.quiet import quiet_imports
from edgekit.errors import EdgekitError, one_line
from edgekit.networks.user_code import Factory

with quiet_imports():
    import numpy as np
    import torch
    from safetensors import safe_open
    from torch import Tensor

    from edgekit.quantize.calibration import Calibration
    from edgekit.quantize.traced.calibrate import Batch
    from edgekit.quantize.traced.trace import TracedModule

MINI_BATCH = 32
"""Most inputs of a mini-batch that is cut from a file."""
_ENDS = (".npy", ".npz", ".safetensors")


def open_data(text: str, traced: TracedModule) -> Iterable[Batch] | Calibration:
    """Return the mini-batches, or the saved calibration, that `text` names.

    EdgekitError where there is none; what a file lacks is said when it is its turn.
    """
    factory = Factory.parse(text)
    if factory is not None:
        return _from_function(factory)
    if not text:
        raise EdgekitError("calibration data: the name is empty")
    path = Path(text)
    if path.suffix == ".json":
        return Calibration.load(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _ENDS)
        if not files:
            raise EdgekitError(
                f"{path}: holds no {', '.join(_ENDS)} file; for images or other data give "
                "path/to/data.py:function, which yields mini-batches"
            )
        return (batch for file in files for batch in _from_file(file, traced))
    if path.suffix not in _ENDS:
        raise EdgekitError(
            f"{path}: calibration data are {', '.join(_ENDS)} files or a folder of them, "
            "path/to/data.py:function, or a calibration saved as .json"
        )
    check_file(path)
    return _from_file(path, traced)


def _from_function(factory: Factory) -> Iterator[Batch]:
    found = factory.call()
    if isinstance(found, Tensor | Mapping) or not isinstance(found, Iterable):
        raise EdgekitError(
            f"{factory} must return or yield mini-batches, it returned {type(found).__name__}"
        )
    batches = iter(found)
    end = object()
    number = 0
    while True:
        # A generator's code runs here, call by call.
        batch = factory.guard(lambda: next(batches, end))
        if batch is end:
            return
        number += 1
        yield _batch(factory, number, batch)


def _batch(factory: Factory, number: int, given: Any) -> Batch:  # noqa: ANN401
    named = given if isinstance(given, Mapping) else None
    items = list(named.values()) if named is not None else given
    items = items if isinstance(items, list | tuple) else [items]
    if not items or not all(isinstance(item, Tensor | np.ndarray) for item in items):
        raise EdgekitError(
            f"{factory}: mini-batch {number} must be a tensor, or a tuple or dict of one for each "
            f"input, got {type(given).__name__}"
        )
    where = f"{factory}: mini-batch {number}"
    tensors = tuple(_tensor(item, where).detach() for item in items)
    return tensors if named is None else dict(zip(named, tensors, strict=True))


def _from_file(path: Path, traced: TracedModule) -> Iterator[Batch]:
    arrays = _arrays(path)
    for name, array in arrays.items():
        if not isinstance(array, Tensor | np.ndarray) or not array.ndim:  # npz files hold others
            raise EdgekitError(f"{path}: {name:.80}: is no array [N, ...] of inputs")
    names = [node.name for node in traced.inputs]
    if len(names) == 1 and len(arrays) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    if set(arrays) != set(names):
        raise EdgekitError(
            f"{path}: must hold one array for each input, {', '.join(names)}; it holds "
            f"{', '.join(list(arrays)[:8]) or 'none'}"
        )
    lengths = {name: len(array) for name, array in arrays.items()}
    count = next(iter(lengths.values()))
    if len(set(lengths.values())) > 1:
        raise EdgekitError(f"{path}: its arrays differ in length: {lengths}")
    fewest = 1 if traced.max_batch is not None else len(traced.example[0])
    if 0 < count < fewest:
        raise EdgekitError(
            f"{path}: holds {count} inputs, the module takes batches of {fewest}: give "
            "`max_batch`, or more inputs"
        )
    for start in range(0, count, max(fewest, MINI_BATCH)):
        rows = slice(min(start, count - fewest), start + max(fewest, MINI_BATCH))
        yield tuple(_tensor(arrays[name][rows], str(path)) for name in names)


def _arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of a file, mapped rather than read where its form allows it."""
    check_file(path)  # those of a folder are not checked before
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if path.suffix == ".npy":
            return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
    except Exception as error:  # numpy and zipfile raise what they like for what is no such file
        raise EdgekitError(f"{path}: cannot be read: {one_line(error)}") from error


def _tensor(values: Any, where: str) -> Tensor:  # noqa: ANN401 - a tensor or an array
    if isinstance(values, Tensor):
        return values
    try:
        return torch.from_numpy(np.array(values))  # copied: a mapped file is not writable
    except (TypeError, ValueError) as error:  # of types and byte orders that torch lacks
        raise EdgekitError(f"{where}: {one_line(error)}") from error

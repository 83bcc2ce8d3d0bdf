"""What the commands take for a module: a factory in a file, shapes of its inputs, its weights."""

import re
from collections.abc import Sequence
from pathlib import Path

from edgekit.artifact import MODULE_DTYPES
from edgekit.errors import EdgekitError, one_line
from edgekit.files import check_file
from edgekit.quiet import quiet_imports
from edgekit.user_code import Factory

with quiet_imports():
    import torch
    from safetensors import SafetensorError, safe_open
    from torch import Tensor, nn

_SHAPE = re.compile(r"[1-9]\d{0,8}(x[1-9]\d{0,8}){0,7}")
_MOST_ELEMENTS = 1 << 28
_SEED = 0


def make_module(factory: Factory, weights: Path | None = None) -> nn.Module:
    """Call the factory, and give its module the weights of a safetensors file where one is given.

    EdgekitError where the user's code fails, returns no module or the weights are another's.
    """
    module = factory.call()
    if not isinstance(module, nn.Module):
        raise EdgekitError(
            f"{factory} must return a torch.nn.Module, it returned {type(module).__name__}"
        )
    if weights is not None:
        load_weights(module, weights)
    return module


def example_inputs(shapes: Sequence[str], dtypes: Sequence[str]) -> tuple[Tensor, ...]:
    """Return inputs of the shapes, such as `1x3x32x32`: seeded normal floats, zeros as integers.

    `dtypes` names one for each shape, or none, which is float32 for all.
    """
    if not shapes:
        raise EdgekitError(
            "a module needs --example-shape, such as 1x3x32x32: batch first, one for each input"
        )
    if dtypes and len(dtypes) != len(shapes):
        raise EdgekitError(
            f"--example-dtype is given {len(dtypes)} times, --example-shape {len(shapes)} times: "
            "give one for each input, or none for float32"
        )
    generator = torch.Generator().manual_seed(_SEED)
    return tuple(
        _example(text, dtype, generator)
        for text, dtype in zip(shapes, dtypes or ["float32"] * len(shapes), strict=True)
    )


def _example(text: str, dtype: str, generator: torch.Generator) -> Tensor:
    if _SHAPE.fullmatch(text) is None:
        raise EdgekitError(f"--example-shape {text!r:.60} is no shape such as 1x3x32x32")
    if dtype not in MODULE_DTYPES:
        raise EdgekitError(f"--example-dtype {dtype!r:.60}: allowed are {', '.join(MODULE_DTYPES)}")
    shape, elements = [int(size) for size in text.split("x")], 1
    for size in shape:
        elements *= size
    if elements > _MOST_ELEMENTS:
        raise EdgekitError(f"--example-shape {text}: has more than {_MOST_ELEMENTS:,} elements")
    if dtype == "int64":
        return torch.zeros(shape, dtype=torch.int64)
    return torch.randn(shape, generator=generator)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state dict from safetensors; EdgekitError says what does not fit."""
    state = module.state_dict()
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise EdgekitError(f"{path}: cannot be read: {one_line(error)}") from error
    # safetensors stores tensors that share memory once.
    places = {state[name].data_ptr() for name in held.keys() & state.keys()}
    lacking = [
        name
        for name, value in state.items()
        if name not in held
        and not name.endswith("num_batches_tracked")
        and value.data_ptr() not in places
    ]
    foreign = [name for name in held if name not in state]
    name = type(module).__name__
    if lacking or foreign:
        said = [
            f"{verb} {_some(names)}"
            for verb, names in (("lacks", lacking), ("has", foreign))
            if names
        ]
        raise EdgekitError(f"{path}: is no state dict of {name}: it {' and '.join(said)}")
    for key, value in held.items():
        if value.shape != state[key].shape:
            raise EdgekitError(
                f"{path}: {key} has shape {list(value.shape)}, {name} takes "
                f"{list(state[key].shape)}"
            )
    module.load_state_dict(held, strict=False)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{rest}"

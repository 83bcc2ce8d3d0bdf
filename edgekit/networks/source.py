"""What the commands take for a module: a factory in a file, shapes of its inputs, its weights."""

import re
from collections.abc import Sequence
from pathlib import Path

from edgekit.common.files import check_file
from edgekit.common.quiet import quiet_imports
from edgekit.errors import EdgekitError, one_line
from edgekit.formats.artifact.parts import MODULE_DTYPES
from edgekit.networks.user_code import Factory

with quiet_imports():
    import torch
    from safetensors import SafetensorError, safe_open
    from torch import Tensor, nn

_EXAMPLE = re.compile(
    r"(?:(?P<name>[^\W\d]\w*)=)?(?P<shape>[1-9]\d{0,8}(?:x[1-9]\d{0,8}){0,7})(?::(?P<dtype>\w+))?"
)
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


def example_inputs(
    shapes: Sequence[str], dtypes: Sequence[str]
) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Return inputs of the shapes, such as `1x3x32x32`: seeded values, zeros for int64 and int32.

    A shape may have a name before it and a type behind, `mask=1x16:bool`: with names, which all
    have or none, they are a dict. `dtypes` names one for each shape, or none, which is float32 for
    all.
    """
    if not shapes:
        raise EdgekitError(
            "a module needs `example_shape`, such as 1x3x32x32: batch first, one for each input"
        )
    if dtypes and len(dtypes) != len(shapes):
        raise EdgekitError(
            f"`example_dtype` is given {len(dtypes)} times, `example_shape` {len(shapes)} times: "
            "give one for each input, or none for float32"
        )
    generator = torch.Generator().manual_seed(_SEED)
    said: Sequence[str | None] = dtypes or [None] * len(shapes)
    found = [_example(text, dtype, generator) for text, dtype in zip(shapes, said, strict=True)]
    named = {name: tensor for name, tensor in found if name is not None}
    if not named:
        return tuple(tensor for _, tensor in found)
    if len(named) != len(found):
        raise EdgekitError(
            "`example_shape`: give each input a name of its own, as in mask=1x16:bool, or none one"
        )
    return named


def _example(text: str, dtype: str | None, generator: torch.Generator) -> tuple[str | None, Tensor]:
    """Return the name, if any, and the values that a text and an --example-dtype ask for."""
    match = _EXAMPLE.fullmatch(text)
    if match is None:
        raise EdgekitError(
            f"`example_shape` {text!r:.60} is no shape such as 1x3x32x32 or mask=1x16:bool"
        )
    if match["dtype"] is not None and dtype not in (None, match["dtype"]):
        raise EdgekitError(f"`example_shape` {text}: `example_dtype` says {dtype!r:.60}")
    option = "`example_dtype`" if match["dtype"] is None else f"`example_shape` {text}:"
    dtype = match["dtype"] or dtype or "float32"
    if dtype not in MODULE_DTYPES:
        raise EdgekitError(f"{option} {dtype!r:.60}: allowed are {', '.join(MODULE_DTYPES)}")
    shape, elements = [int(size) for size in match["shape"].split("x")], 1
    for size in shape:
        elements *= size
    if elements > _MOST_ELEMENTS:
        raise EdgekitError(f"`example_shape` {text}: has more than {_MOST_ELEMENTS:,} elements")
    return match["name"], _values(shape, dtype, generator)


def _values(shape: list[int], dtype: str, generator: torch.Generator) -> Tensor:
    if dtype == "float32":
        return torch.randn(shape, generator=generator)
    if dtype == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if dtype == "bool":  # both in each row, whichever of them a module leaves out
        return (torch.arange(shape[-1]) % 2 == 0).expand(shape).clone()
    return torch.zeros(shape, dtype=getattr(torch, dtype))  # an index that every table has


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

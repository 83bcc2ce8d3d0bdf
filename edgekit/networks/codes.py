"""Codes of a module in a file: `edgekit quantize` writes them, `edgekit export --codes` packs them.

The file is one of `edgekit.quantize.storage`: codes of the weights, and float what has none. Of a
module it says what weights they were made of by a digest of the folded ones.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from edgekit.common.files import check_file
from edgekit.errors import EdgekitError
from edgekit.models.checkpoint import shape_problems
from edgekit.quantize.storage import About, load_with_about, save_quantized, short_text
from edgekit.quantize.tensor import QuantizedTensor, Weight
from edgekit.quantize.traced.network import QuantizedNetwork
from edgekit.quantize.traced.placement import Placement, place
from edgekit.quantize.traced.schemes import FORMS, LayerRecipe, LayerRule, LayerScheme
from edgekit.quantize.traced.trace import TracedModule


def save_codes(network: QuantizedNetwork, placement: Placement, name: str, path: Path) -> None:
    """Write the codes of the weights, and float what has none: biases folded, not yet rounded.

    A bias becomes int32 in units of input scale times weight scale when an engine's file is made.
    """
    floats = _parameters(network.traced)
    rules = [rule for _, rule in placement.layers.values()]
    searched = any((rule.range or rule.scheme.default_range) == "mse" for rule in rules)
    about = About(
        short_text(name),
        weights_digest(network.traced),
        short_text(placement.recipe),
        "mse" if searched else "rtn",
    )
    contents: dict[str, Weight] = {**floats, **network.weights}
    save_quantized(path, contents, about)


def place_codes(traced: TracedModule, path: Path) -> Placement:
    """Return what a file of codes makes of a traced and folded module: its layers, their codes.

    EdgekitError where the file was made of another module or of other weights, and for codes that
    no layer's kernel takes.
    """
    check_file(path, "; `edgekit quantize` makes one")
    contents, about = load_with_about(path)
    if about is None:
        raise EdgekitError(
            f"{path}: does not say which weights it was made of: give save_quantized an About, or "
            "quantize again"
        )
    floats = _parameters(traced)
    if about.sha256 != weights_digest(traced):
        raise EdgekitError(
            f"{path}: was made of other weights than the module's: of a model called {about.model}"
        )
    problems = shape_problems(
        {name: tuple(value.shape) for name, value in floats.items()},
        {name: tuple(value.shape) for name, value in contents.items()},
    )
    if problems:
        raise EdgekitError(f"{path}: holds no codes of this module: {problems}")
    codes = {name: each for name, each in contents.items() if isinstance(each, QuantizedTensor)}
    _check_floats(path, contents, floats)
    rules = [LayerRule(re.escape(name), _scheme(path, name, each)) for name, each in codes.items()]
    placement = place(traced, LayerRecipe(tuple(rules), about.recipe))
    for layer, rule in placement.layers.values():
        name = str(layer.weight.target)
        if rule.scheme.axis(layer.channel_axis) != codes[name].axis:
            raise EdgekitError(
                f"{path}: {name}: has a scale for each entry of axis {codes[name].axis}, its "
                f"channels are those of axis {layer.channel_axis}"
            )
    return replace(placement, codes=codes)


def _parameters(traced: TracedModule) -> dict[str, Tensor]:
    """Return what the graph reads, by name."""
    nodes = [node for node in traced.graph_module.graph.nodes if node.op == "get_attr"]
    return {str(node.target): traced.parameter(node) for node in nodes}


def weights_digest(traced: TracedModule) -> str:
    """Return the SHA-256 of a traced and folded module's weights, which `About` takes."""
    digest = hashlib.sha256()
    for name, value in sorted(_parameters(traced).items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_floats(path: Path, contents: Mapping[str, Weight], floats: Mapping[str, Tensor]) -> None:
    """Refuse float tensors that were changed since: those packed are the module's."""
    for name, value in contents.items():
        if isinstance(value, Tensor) and not torch.equal(value, floats[name].cpu()):
            raise EdgekitError(f"{path}: {name}: is float, and not what the module has")


def _scheme(path: Path, name: str, tensor: QuantizedTensor) -> LayerScheme:
    """Return the scheme that codes are of; EdgekitError where they are of none."""
    if tensor.bits not in (4, 8) or tensor.group_size is not None or tensor.codebook is not None:
        raise EdgekitError(f"{path}: {name}: no layer of a module has such codes, only {FORMS}")
    scheme = LayerScheme(
        4 if tensor.bits == 4 else 8,
        "tensor" if tensor.axis is None else "channel",
        tensor.zero_points is None,
    )
    grid = scheme.grid
    least, most = (int(end) for end in tensor.codes.aminmax())
    if tensor.codes.dtype != grid.dtype or least < grid.low or most > grid.high:
        raise EdgekitError(
            f"{path}: {name}: {scheme.name} has codes from {grid.low} to {grid.high}, got {least} "
            f"to {most}"
        )
    return scheme

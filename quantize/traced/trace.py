"""From a module to a graph of ATen operators, in the few forms that the rest reads."""

import copy
import inspect
import linecache
import logging
import operator
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from edgekit.errors import EdgekitError, one_line, text_of
from edgekit.quantize.traced.operators import BATCH_NORM, arguments, aten, numbers, rank
from edgekit.quantize.traced.results import Results
from edgekit.quantize.wrappers import refuse_wrapped

_TORCH = Path(torch.__file__).parent
_OPERATOR = re.compile(r"\b(?:aten|prims|torchvision|torch\.ops\.\w+)[.:]+\w+(?:\.\w+)?")
_FRAME = re.compile(r'File "(.+?)", line (\d+)')
_LEAF = "torch.nn.modules."
_NEVER_BY_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
Inputs = Sequence[Tensor] | Mapping[str, Tensor]
"""A module's arguments, in order or by name."""
DROPOUTS = "dropouts"
"""Key of a node's `meta`: paths of the dropouts that its arguments pass, by their position."""
POOLS_1D: dict[Any, OpOverload] = {
    aten.max_pool1d.default: aten.max_pool2d.default,
    aten.avg_pool1d.default: aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default: aten.adaptive_avg_pool2d.default,
}
_BESIDE = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_size": 1}
"""What the second axis of a pooling over one has."""
SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
)
_SAME = (
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
"""Operators whose result has their operand's values."""
_CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
_FLOAT_MAX = torch.finfo(torch.float32).max
_RESHAPES = (
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.reshape.default,
    aten.flatten.using_ints,
)
"""Operators that leave the elements in their order."""


@dataclass(frozen=True)
class TracedModule:
    """A module in inference form as a graph.

    `graph_module` has the parameters under their names in the module; its nodes call functional
    ATen operators, every batch norm is one `aten.batch_norm`, and padding is in numbers. It takes
    the inputs in order and returns a tuple of tensors, `results` says which.
    `names` gives every tensor a readable, stable name by node name: that of the submodule that
    made it (`features.0.relu`), or submodule and operator (`layer1.0.add`).
    `max_batch` is the largest first axis of the inputs, None where it is the example's.
    """

    graph_module: GraphModule
    names: dict[str, str]
    example: tuple[Tensor, ...]
    max_batch: int | None
    results: Results

    @property
    def inputs(self) -> list[Node]:
        """The inputs, in order."""
        return [node for node in self.graph_module.graph.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> list[Node]:
        """The tensors that are returned, in order, each as often as it is returned.

        Inputs and parameters may be among them.
        """
        return returned(self.graph_module)

    def parameter(self, node: Node) -> Tensor:
        """Return the tensor that a `get_attr` node reads."""
        owner, _, name = str(node.target).rpartition(".")
        found = getattr(self.graph_module.get_submodule(owner), name)
        assert isinstance(found, Tensor)
        return found.detach()

    def check_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Raise EdgekitError for inputs that are not like the example's."""
        if len(inputs) != len(self.example):
            raise EdgekitError(f"the module takes {len(self.example)} inputs, got {len(inputs)}")
        for node, given, like in zip(self.inputs, inputs, self.example, strict=True):
            check_dense(f"input {node.name!r}", given)
            batch = given.shape[0] if given.ndim else 0
            fits = batch == like.shape[0] if self.max_batch is None else batch <= self.max_batch
            same = given.dtype == like.dtype and given.shape[1:] == like.shape[1:]
            if not same or not fits or batch < 1:
                largest = like.shape[0] if self.max_batch is None else f"1 to {self.max_batch}"
                hint = "; `max_batch` lets the batch vary" if same and batch else ""
                raise EdgekitError(
                    f"input {node.name!r} must be {like.dtype} of shape "
                    f"[{', '.join(map(str, [largest, *like.shape[1:]]))}], got {given.dtype} of "
                    f"shape {list(given.shape)}{hint}"
                )


def trace(
    module: nn.Module,
    example_inputs: Inputs,
    max_batch: int | None = None,
    for_training: bool = False,
) -> TracedModule:
    """Trace a module as it runs in inference.

    `example_inputs` are its arguments, in order or by name, tensors whose first axis is the batch.
    With `max_batch` any batch from 1 to that many is traced, else the example's; the traced inputs
    are in the order of the module's signature. `for_training` notes
    under `DROPOUTS` where its dropout modules stand, which in inference are not there. The module
    is left as it was. EdgekitError names the operator and source line that cannot be traced.
    """
    _check_values(module)
    args, kwargs = _example(module, example_inputs, max_batch)
    with _inference(module), _dropouts(module, for_training) as dropouts:
        program = _export(module, args, kwargs, max_batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, GraphModule)
    graph_module, results = _flat(type(module).__name__, program, graph_module)
    _normalise(graph_module, dropouts)
    example = (*args, *kwargs.values())
    return TracedModule(graph_module, _names(graph_module), example, max_batch, results)


def returned(graph_module: GraphModule) -> list[Node]:
    """Return the nodes of the tensors that a traced graph returns, in order."""
    found = graph_module.graph.output_node().args[0]
    assert isinstance(found, tuple)
    nodes = [node for node in found if isinstance(node, Node)]
    assert len(nodes) == len(found)
    return nodes


def copy_graph(module: GraphModule) -> GraphModule:
    """Copy the graph and the tree of modules; tensors are shared."""
    memo = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own trees
        return copy.deepcopy(module, memo)


def source_of(node: Node) -> str:
    """Return where the user's code calls a node's operator: `net.py:12`, or an empty string."""
    frames = [
        (name, int(line)) for name, line in _FRAME.findall(node.meta.get("stack_trace") or "")
    ]
    own = [frame for frame in frames if _TORCH not in Path(frame[0]).parents]
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""


def at(node: Node) -> str:
    """Return `source_of` in brackets after a space, or nothing."""
    place = source_of(node)
    return f" ({place})" if place else ""


def _example(
    module: nn.Module, inputs: Inputs, max_batch: int | None
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the example's arguments, and those given by name in the order of the signature."""
    by_name = isinstance(inputs, Mapping)
    named = (
        {str(name): item for name, item in inputs.items()}
        if isinstance(inputs, Mapping)
        else {f"example_inputs[{number}]": item for number, item in enumerate(inputs)}
    )
    if not named or not all(isinstance(item, Tensor) for item in named.values()):
        raise EdgekitError(
            "example_inputs must be a tuple of at least one tensor, or a dict of them by the names "
            "of the module's arguments"
        )
    for name, item in named.items():
        check_dense(name, item)
        if item.is_floating_point() and item.dtype != torch.float32:
            raise EdgekitError(f"{name} is {item.dtype}, a module takes float32")
        if item.ndim == 0 or 0 in item.shape:
            raise EdgekitError(
                f"{name} has shape {list(item.shape)}: example_inputs must have a batch axis and "
                "no empty axis"
            )
    if max_batch is not None:
        if max_batch < 2:
            raise EdgekitError(f"max_batch must be at least 2, got {max_batch}")
        # torch.export takes a first axis of 1 for a constant.
        named = {
            name: item if len(item) > 1 else torch.cat([item, item]) for name, item in named.items()
        }
    if not by_name:
        return tuple(named.values()), {}
    return (), _in_order(module, named)


def _in_order(module: nn.Module, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sort arguments as the module's signature does; EdgekitError for one that it lacks."""
    try:
        taken = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return named
    kind = type(module).__name__
    takes_any = any(item.kind is item.VAR_KEYWORD for item in taken.values())
    for name in named:
        if not takes_any and (name not in taken or taken[name].kind in _NEVER_BY_NAME):
            raise EdgekitError(f"{kind} takes no input {name!r}: it takes {', '.join(taken)}")
    order = [name for name in taken if name in named]
    return {name: named[name] for name in [*order, *(name for name in named if name not in order)]}


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise EdgekitError for a tensor without values, or whose values lie in no plain array."""
    if tensor.is_meta:
        raise EdgekitError(f"{name} is on the meta device, so it has no values: give it some")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise EdgekitError(f"{name} must be a dense tensor, got one of layout {kind}")


def _check_values(module: nn.Module) -> None:
    """Refuse weights that are not there, and those of types that no engine's kernels have."""
    if not isinstance(module, nn.Module):
        raise EdgekitError(f"expected a torch.nn.Module, got {type(module).__name__}")
    refuse_wrapped(module)
    kind = type(module).__name__
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        check_dense(f"{kind}: {name}", tensor)
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise EdgekitError(
                f"{kind}: {name} is {tensor.dtype}; a module is traced in float32: convert it with "
                "module.float(), and give float32 inputs"
            )


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def _dropouts(module: nn.Module, wanted: bool) -> Iterator[set[str]]:
    """Yield the paths of dropout modules, which leave a copy in the graph meanwhile."""
    found = {
        name: part
        for name, part in module.named_modules()
        if wanted and isinstance(part, nn.modules.dropout._DropoutNd)
    }
    for part in found.values():
        part.forward = torch.clone
    try:
        yield set(found)
    finally:
        for part in found.values():
            del part.forward


def _export(
    module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    max_batch: int | None,
) -> ExportedProgram:
    shapes = None
    if max_batch is not None:
        batch = {0: Dim("batch", min=1, max=max_batch)}
        shapes = _like_arguments(module, [batch] * len(args), dict.fromkeys(kwargs, batch))
    try:
        with torch.no_grad(), _silence():
            program = export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            # No decomposition: this makes in-place operators functional.
            functional: ExportedProgram = program.run_decompositions({})
    except Exception as error:  # whatever the module's own code or a tracer raises
        raise EdgekitError(_why(module, error)) from error
    signature = functional.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise EdgekitError(
            f"{type(module).__name__} changes {changed[0]!r} in its forward: a file keeps nothing "
            "from one call to the next"
        )
    return functional


def _like_arguments(
    module: nn.Module, args: list[dict[int, Dim]], kwargs: dict[str, dict[int, Dim]]
) -> tuple[Any, ...] | dict[str, Any]:
    """Return what belongs to each input in the form of the signature: `*x` takes a tuple."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        # It has no signature, or does not take these: torch.export says so.
        return kwargs or tuple(args)
    return bound if kwargs else tuple(bound.values())


@contextmanager
def _silence() -> Iterator[None]:
    """Keep away what torch warns, logs and, of a graph that it cannot make, prints."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _why(module: nn.Module, error: Exception) -> str:
    """Say in one line which operator of which line of the module could not be traced."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if _TORCH not in Path(frame.filename).parents and Path(frame.filename) != Path(__file__)
    ]
    said = one_line(error, 300)
    if isinstance(error, GuardOnDataDependentSymNode):
        said = (
            "a branch or size depends on the values of a tensor: compute both and choose with "
            "torch.where, which target executorch takes"
        )
    named = _OPERATOR.search(text_of(error))
    parts = [f"{type(module).__name__} cannot be traced"]
    if frames:
        line = frames[-1].line or linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
        parts.append(f"{frames[-1].filename}:{frames[-1].lineno}: {line.strip()}")
    if named and named[0] not in said[:200]:
        parts.append(named[0])
    hint = "; inputs of whole numbers want `example_dtype` int64" if "'indices'" in said else ""
    return ": ".join([*parts, f"{said}{hint}"])


def _flat(
    module: str, program: ExportedProgram, graph_module: GraphModule
) -> tuple[GraphModule, Results]:
    """Make the graph return its tensors as one tuple, and say what they are in the module's form.

    The size of a batch that varies becomes a tensor.
    """
    graph = graph_module.graph
    last = graph.output_node()
    structure = program.call_spec.out_spec
    assert structure is not None
    given = last.args[0] if isinstance(last.args[0], list | tuple) else last.args
    leaves = [_as_tensor(module, item, last) if isinstance(item, Node) else item for item in given]
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    results = Results.of(module, structure, leaves, inputs)
    last.args = (tuple(item for item in leaves if isinstance(item, Node)),)
    graph.set_codegen(CodeGen())
    return GraphModule(graph_module, graph), results


def _as_tensor(module: str, node: Node, last: Node) -> Node:
    """Return a result as a tensor, a size that varies as one of int64."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return node
    if not isinstance(value, torch.SymInt):
        raise EdgekitError(
            f"{module} returns {node.name!r}, a {type(value).__name__} that depends on the batch: "
            "return a tensor instead"
        )
    with last.graph.inserting_before(last):
        found = last.graph.call_function(
            aten.scalar_tensor.default, (node,), {"dtype": torch.int64}
        )
    found.meta["val"] = torch.empty((), dtype=torch.int64, device="meta")
    return found


def _normalise(graph_module: GraphModule, dropouts: set[str]) -> None:
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or _module_path(node) in dropouts:
            continue
        if node.target in _SAME or _passes(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # the copies are gone that made strides fit a view
        elif node.target == aten._native_batch_norm_legit_no_training.default:
            _one_batch_norm(node)
        elif node.target in (aten.conv1d.padding, aten.conv2d.padding):
            _padding_in_numbers(node)
        elif node.target == aten.relu6.default:
            node.target, node.args = aten.hardtanh.default, (node.args[0], 0.0, 6.0)
        elif node.target in _CLAMPS:
            _clamp_as_engines_fuse_it(node)
        elif node.target == aten.pad.default and arguments(node)["mode"] == "constant":
            value = arguments(node)["value"] or 0.0
            node.target, node.args = aten.constant_pad_nd.default, (*node.args[:2], value)
            node.kwargs = {}
        elif node.target == aten.pad.default and arguments(node)["mode"] == "circular":
            _circle_by_joining(node)
        elif node.target == aten.mean.dim and not arguments(node)["keepdim"]:
            _mean_keeps_axes(node)
        elif node.target in POOLS_1D:
            _pool_over_two_axes(node)
        elif node.target == aten.select.int:
            _select_by_slice(node)
        elif node.target == operator.getitem:
            _item_as_tensor(node)
        if node.target in _RESHAPES:
            _parameter_as_it_is(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and _module_path(node) in dropouts:
            _note_dropout(node)
    graph.eliminate_dead_code()
    graph_module.recompile()


def _clamp_as_engines_fuse_it(node: Node) -> None:
    """Spell a clamp of floats as the activation that it is; what no engine fuses stays.

    An end that is not given is float32's own, for files hold no infinity.
    """
    found = arguments(node)
    low, high = found.get("min"), found.get("max")
    ends = [-_FLOAT_MAX if low is None else low, _FLOAT_MAX if high is None else high]
    given = all(isinstance(end, int | float) for end in ends) and ends[0] <= ends[1]
    if not given or node.meta["val"].dtype != torch.float32:
        return
    if low == 0 and high is None:
        node.target, node.args = aten.relu.default, (node.args[0],)
    else:
        node.target, node.args = aten.hardtanh.default, (node.args[0], *map(float, ends))
    node.kwargs = {}


def _passes(node: Node) -> bool:
    """Whether a node is a dropout in inference."""
    is_dropout = node.target in (aten.dropout.default, aten.feature_dropout.default)
    return is_dropout and not arguments(node)["train"]


def _note_dropout(node: Node) -> None:
    """Take a dropout out of the graph; what reads it notes where it passed."""
    before = _notes(node).get(0, [])
    for user in list(node.users):
        for position, argument in enumerate(_flat_arguments(user)):
            if argument is node:
                notes = dict(_notes(user))
                notes[position] = [*before, str(_module_path(node)), *notes.get(position, [])]
                user.meta[DROPOUTS] = notes
    x = node.args[0]
    assert isinstance(x, Node)
    node.replace_all_uses_with(x)


def _notes(node: Node) -> dict[int, list[str]]:
    found: dict[int, list[str]] = node.meta.get(DROPOUTS, {})
    return found


def _flat_arguments(node: Node) -> list[Node]:
    """Return the nodes among the arguments, one for each place, in `map_arg`'s order."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _module_path(node: Node) -> str | None:
    """Return the path of the innermost module that called the operator."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else None


def _one_batch_norm(node: Node) -> None:
    """Inference needs the first of three results alone."""
    (first,) = node.users
    x, weight, bias, mean, variance, momentum, epsilon = node.args
    with node.graph.inserting_before(node):
        call: tuple[Any, ...] = (x, weight, bias, mean, variance, False, momentum, epsilon, False)
        batch_norm = node.graph.call_function(BATCH_NORM, call)
    batch_norm.meta = dict(first.meta)
    first.replace_all_uses_with(batch_norm)


def _padding_in_numbers(node: Node) -> None:
    """Write padding `same` and `valid` as numbers; an uneven one needs an operator of its own."""
    found = arguments(node)
    kernel = found["weight"].meta["val"].shape[2:]
    dilation = numbers(found["dilation"], len(kernel))
    totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if found["padding"] == "valid":
        totals = [0] * len(kernel)
    x = found["input"]
    if any(total % 2 for total in totals):
        # As torch does: the odd one goes behind (torch/nn/modules/conv.py).
        sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        x = _insert(node, aten.constant_pad_nd.default, x, (sides, 0.0))
        totals = [0] * len(kernel)
    plain = aten.conv1d.default if len(kernel) == 1 else aten.conv2d.default
    padding = [total // 2 for total in totals]
    weight, bias, stride = found["weight"], found["bias"], found["stride"]
    node.target = plain
    node.args = (x, weight, bias, stride, padding, dilation, found["groups"])
    node.kwargs = {}


def _circle_by_joining(node: Node) -> None:
    """Join the ends to each axis; what torch makes of it has the example's batch in it."""
    x, sides = arguments(node)["self"], arguments(node)["pad"]
    if not all(isinstance(side, int) and side >= 0 for side in sides):
        return
    for number, (before, behind) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
        axis = rank(x) - 1 - number
        size = x.meta["val"].shape[axis]
        first, last = (
            [_insert(node, aten.slice.Tensor, x, (axis, *end))] if end[0] < end[1] else []
            for end in ((size - before, size), (0, behind))
        )
        if first or last:
            x = _insert(node, aten.cat.default, [*first, x, *last], (axis,))
    node.replace_all_uses_with(x)


def _mean_keeps_axes(node: Node) -> None:
    """Average with the axes kept, which engines have kernels for, then drop them."""
    found = arguments(node)
    if found["dtype"] is not None:
        return
    axes = sorted(axis % rank(found["self"]) for axis in found["dim"])
    mean = _insert(node, aten.mean.dim, found["self"], (axes, True))
    node.target, node.args, node.kwargs = aten.squeeze.dims, (mean, axes), {}


def _pool_over_two_axes(node: Node) -> None:
    """Pool `[..., 1, length]`, which engines have kernels for, then drop the axis."""
    found = arguments(node)
    wide = _insert(node, aten.unsqueeze.default, found.pop("self"), (-2,))
    rest: list[bool | list[int]] = []
    for name, value in found.items():
        if isinstance(value, bool):
            rest.append(value)
        elif not value:  # the stride that is the kernel's size
            rest.append([])
        else:
            (size,) = numbers(value, 1)
            rest.append([_BESIDE[name], size])
    pooled = _insert(node, POOLS_1D[node.target], wide, tuple(rest))
    node.target, node.args, node.kwargs = aten.squeeze.dim, (pooled, -2), {}


def _select_by_slice(node: Node) -> None:
    """Write `x[:, 3]` as a slice of one, whose axis is dropped."""
    found = arguments(node)
    x, axis, index = found["self"], found["dim"], found["index"]
    if not isinstance(index, int):
        return
    end = None if index == -1 else index + 1
    part = _insert(node, aten.slice.Tensor, x, (axis, index, end))
    node.target, node.args, node.kwargs = aten.squeeze.dim, (part, axis), {}


def _parameter_as_it_is(node: Node) -> None:
    """Read a parameter for what has its shape again, such as `weight.squeeze(1).unsqueeze(1)`."""
    first = node
    while first.target in _RESHAPES:
        before = first.args[0]
        assert isinstance(before, Node)
        first = before
    if first.op == "get_attr" and first.meta["val"].shape == node.meta["val"].shape:
        node.replace_all_uses_with(first)


def _item_as_tensor(node: Node) -> None:
    """Write a part of a split as a slice, an adaptive maximum of even windows as a pooling."""
    whole, number = node.args
    assert isinstance(whole, Node) and isinstance(number, int)
    if whole.target in SPLITS:
        found = arguments(whole)
        axis = found["dim"] % rank(found["self"])
        sizes = [part.shape[axis] for part in whole.meta["val"]]
        if all(isinstance(size, int) for size in sizes):
            start = sum(sizes[:number])
            node.target = aten.slice.Tensor
            node.args = (found["self"], axis, start, start + sizes[number])
    elif whole.target == aten.adaptive_max_pool2d.default and number == 0:
        x = arguments(whole)["self"]
        given, wanted = x.meta["val"].shape[2:], node.meta["val"].shape[2:]
        if not any(size % count for size, count in zip(given, wanted, strict=True)):
            kernel = [size // count for size, count in zip(given, wanted, strict=True)]
            node.target, node.args = aten.max_pool2d.default, (x, kernel)


def _insert(before: Node, target: OpOverload, x: Node | list[Node], rest: tuple[Any, ...]) -> Node:
    """Add a call that belongs to the same line and submodule as the node before which it stands."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, (x, *rest))
    kept = ("nn_module_stack", "stack_trace")
    node.meta = {key: before.meta[key] for key in kept if key in before.meta}
    operands = x if isinstance(x, list) else [x]
    values = [item.meta["val"] for item in operands]
    with values[0].fake_mode:
        node.meta["val"] = target(values if isinstance(x, list) else values[0], *rest)
    return node


def _names(graph_module: GraphModule) -> dict[str, str]:
    """Return a unique name for the tensor of every node that computes or receives one."""
    taken: dict[str, int] = {}
    names = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor):
            continue
        name = node.name if node.op == "placeholder" else _path(node)
        taken[name] = taken.get(name, 0) + 1
        names[node.name] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return names


def _path(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    called = str(getattr(node.target, "_schema", node.target)).split("(")[0]
    called = called.removeprefix("aten::").split(".")[0]
    if not stack:
        return called
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    if path and kind.startswith(_LEAF) and ".container." not in kind:
        return str(path)
    return f"{path}.{called}" if path else called

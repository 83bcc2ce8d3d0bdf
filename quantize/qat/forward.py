"""The forward pass in training: the folded graph on the module's own parameters."""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg

from edgekit.errors import EdgekitError
from edgekit.quantize.observers import ActivationParameters
from edgekit.quantize.qat.layers import LiveBatchNorm, LiveLayer
from edgekit.quantize.qat.straight_through import fake_quantize_activation, rounded
from edgekit.quantize.traced.arithmetic import Kernels, LayerCodes, Unrounded
from edgekit.quantize.traced.fold import layer_before
from edgekit.quantize.traced.network import bias_codes, bias_of_codes, bias_scales
from edgekit.quantize.traced.operators import AVERAGES, BATCH_NORM, EMBEDDING, Layer, layer_of
from edgekit.quantize.traced.placement import Placement
from edgekit.quantize.traced.trace import DROPOUTS, TracedModule


class State(Protocol):
    """What a forward pass asks of the training."""

    @property
    def rounding(self) -> bool:
        """Whether weights and values are rounded."""
        ...

    @property
    def exact(self) -> bool:
        """Whether layers and additions are computed as integer kernels do, to the last bit."""
        ...

    @property
    def observing(self) -> bool:
        """Whether ranges are observed."""
        ...

    @property
    def frozen(self) -> bool:
        """Whether batch norms use their running statistics."""
        ...

    def observe(self, node: str, values: Tensor) -> None:
        """Take the values of a node."""
        ...

    def parameters_of(self, node: str) -> ActivationParameters:
        """Return the parameters of a value."""
        ...

    def fake_weight(self, weight: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return a folded weight rounded, and its scales `[ranges]`."""
        ...


class LiveGraph:
    """The folded graph, and what its nodes are in the module.

    layers     layers that are quantized or have a batch norm, by node name
    norms      batch norms that the folded graph has as a product and a sum, by the sum's name
    skipped    the names of those products
    """

    def __init__(self, model: nn.Module, traced: TracedModule, placement: Placement) -> None:
        self.model = model
        self.placement = placement
        self.layers: dict[str, LiveLayer] = {}
        self.norms: dict[str, LiveBatchNorm] = {}
        self.skipped: set[str] = set()
        originals = {node.name: node for node in traced.graph_module.graph.nodes}
        nodes = list(placement.traced.graph_module.graph.nodes)
        folded = _folded_norms(list(originals.values()), {node.name for node in nodes})
        for node in nodes:
            original = originals.get(node.name)
            if original is None or original.op != "call_function":
                continue
            layer = layer_of(node)
            if layer is not None:
                found = _live_layer(layer, original, folded.get(node.name))
                if found.batch_norm is not None or node.name in placement.layers:
                    self.layers[node.name] = found
            elif original.target == BATCH_NORM:
                self.norms[node.name] = LiveBatchNorm.of(original)
                self.skipped.add(node.args[0].name)
        self._names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._names |= {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LiveGraph":
        """Copy the module; the graph, which holds none of its tensors, is shared."""
        result = copy.copy(self)
        memo[id(self)] = result
        result.model = copy.deepcopy(self.model, memo)
        return result

    def has(self, name: str) -> bool:
        """Whether a tensor is one of the module's, and no constant of the graph."""
        return name in self._names

    def read(self, name: str) -> Tensor:
        """Return the module's parameter or buffer as it is now."""
        owner, _, leaf = name.rpartition(".")
        found = getattr(self.model.get_submodule(owner), leaf)
        assert isinstance(found, Tensor)
        return found


def _folded_norms(nodes: list[Node], left: set[str]) -> dict[str, LiveBatchNorm]:
    """Return the batch norms that fold, by the name of the layer's node; `left` are the others'."""
    norms: dict[str, LiveBatchNorm] = {}
    for node in nodes:
        if node.target != BATCH_NORM or node.name in left:
            continue
        before = layer_before(node)
        if before is None:
            raise EdgekitError(
                f"{LiveBatchNorm.of(node).path}: is a batch norm on another one: training through "
                "two that fold into one layer is not possible; take one out"
            )
        if DROPOUTS in node.meta:
            raise EdgekitError(
                f"{before.weight.target}: a dropout stands between this layer and its batch norm: "
                "move it behind them"
            )
        norms[before.node.name] = LiveBatchNorm.of(node)
    return norms


class Forward(Interpreter):
    """One forward pass."""

    def __init__(self, graph: LiveGraph, state: State, device: torch.device) -> None:
        super().__init__(graph.placement.traced.graph_module)
        self.extra_traceback = False  # torch's addition to messages, which are of one line
        self._graph, self._state = graph, state
        self._device = device
        edges = graph.placement.edges
        self._kernels = Kernels(
            lambda node: state.parameters_of(node.name) if node.name in edges else None
        )
        self._given: dict[Node, object] = {}

    def run_node(self, n: Node) -> object:
        """Run a node on the module's tensors, and round its value where it has codes."""
        if n.op == "output":
            nodes = self._graph.placement.traced.outputs
            (found,), _ = self.fetch_args_kwargs_from_env(n)  # behind dropouts
            pairs = zip(nodes, found, strict=True)
            return tuple(self._given.get(node, value) for node, value in pairs)
        if n.op == "get_attr":
            return self._attribute(str(n.target))
        if n.name in self._graph.skipped:
            return self.env[n.args[0]]  # type: ignore[index]
        codes = None
        if n.name in self._graph.norms:
            result: object = self._norm(n, self._graph.norms[n.name])
        elif n.name in self._graph.layers:
            result, codes = self._layer(n, self._graph.layers[n.name])
        else:
            result = super().run_node(n)
        if n.op == "placeholder":  # an input that is returned, too, is what was given
            self._given[n] = result
        found = self._unrounded(n, codes)
        if n.name not in self._graph.placement.edges:
            return result
        assert isinstance(result, Tensor)
        return self._value(n.name, result, found)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a node's arguments, those that pass a dropout module behind it."""
        dropouts = n.meta.get(DROPOUTS)
        if not dropouts:
            return super().fetch_args_kwargs_from_env(n)
        place = -1

        def load(node: Node) -> Any:  # noqa: ANN401 - a tensor where torch has nodes
            nonlocal place
            place += 1
            value = self.env[node]
            for path in dropouts.get(place, ()):
                value = self._graph.model.get_submodule(path)(value)
            return value

        args, kwargs = map_arg((n.args, n.kwargs), load)
        return tuple(args), dict(kwargs)

    def _attribute(self, name: str) -> Tensor:
        if self._graph.has(name):
            return self._graph.read(name)
        found = self.fetch_attr(name)
        assert isinstance(found, Tensor)
        return found.to(self._device)

    def _value(self, node: str, values: Tensor, found: Unrounded | None) -> Tensor:
        values = values.float()  # autocast gives fewer bits than codes need
        if self._state.observing:
            self._state.observe(node, values)
        if not self._state.rounding:
            return values
        parameters = self._state.parameters_of(node)
        result = fake_quantize_activation(values, parameters)
        if found is None:
            return result
        exact = found.codes().sub_(parameters.zero_point).mul_(parameters.scale)
        return rounded(result, lambda _: exact)

    def _unrounded(self, n: Node, codes: LayerCodes | None) -> Unrounded | None:
        """Return what kernels round; of the gradient's values, only averages differ visibly."""
        if not self._state.rounding or not (self._state.exact or n.target in AVERAGES):
            return None
        with torch.no_grad():
            return self._kernels.run(n, self.fetch_args_kwargs_from_env(n)[0], codes)

    def _norm(self, n: Node, norm: LiveBatchNorm) -> Tensor:
        args, _ = self.fetch_args_kwargs_from_env(n)
        values: Tensor = args[0]
        owner = self._graph.model.get_submodule(norm.path)
        if owner.training and not self._state.frozen:
            return norm.normalise(self._graph.read, owner, values)
        factor, offset = norm.factor_and_offset(self._graph.read)
        shape = [-1, *[1] * (values.ndim - 2)]
        return values * factor.float().view(shape) + offset.float().view(shape)

    def _layer(self, n: Node, live: LiveLayer) -> tuple[Tensor, LayerCodes | None]:
        """Return a layer's values, and its parameters on codes where it has those."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        read, norm = self._graph.read, live.batch_norm
        name = str(live.layer.weight.target)
        rounds = n.name in self._graph.placement.layers and self._state.rounding
        owner = None if norm is None else self._graph.model.get_submodule(norm.path)
        if norm is not None and owner is not None and owner.training and not self._state.frozen:
            if not rounds:
                return norm.normalise(read, owner, live.before_norm(args, read)), None
            return live.with_batch_statistics(
                args, read, owner, lambda weight: self._state.fake_weight(name, weight)[0]
            ), None
        weight, bias = live.folded(read)
        if not rounds:
            return live.call(args, weight, bias), None
        weight, scales = self._state.fake_weight(name, weight)
        if n.target == EMBEDDING:
            return live.call(args, weight, bias), None
        given = self._state.parameters_of(live.layer.input.name)
        units = bias_scales(live.layer, scales, given, per_channel=len(scales) > 1)
        whole = None
        if bias is not None:
            whole = bias_codes(bias.detach(), units)
            value = bias_of_codes(whole, units)
            bias = rounded(bias, lambda _: value)
        shape = [1] * weight.ndim
        shape[live.layer.channel_axis] = -1
        steps = (weight.detach() / scales.detach().view(shape)).round_()
        return live.call(args, weight, bias), LayerCodes(steps, whole, units.detach())


def _live_layer(layer: Layer, original: Node, norm: LiveBatchNorm | None) -> LiveLayer:
    """Return a layer with the names that its tensors have in the module."""
    if original.target == BATCH_NORM:
        return LiveLayer(layer, None, None, LiveBatchNorm.of(original))
    before = layer_of(original)
    assert before is not None
    bias = None if before.bias is None else str(before.bias.target)
    return LiveLayer(layer, str(before.weight.target), bias, norm)

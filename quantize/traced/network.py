"""A quantized module: its float graph, the codes of its weights, the parameters of its edges."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from edgekit.errors import EdgekitError
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.observers import ActivationParameters, activation_parameters
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.quantize.traced.operators import AVERAGES, EMBEDDING, Layer
from edgekit.quantize.traced.placement import Placement, end_of_chain
from edgekit.quantize.traced.trace import TracedModule

LARGEST_BIAS = 2**31 - 1


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer on codes.

    `bias` holds int32 codes [channels] in units of `bias_scales`, the input's scale times the
    weight's; None where the layer has none. An embedding has neither `input` nor `output`.
    `output` is the node whose value leaves the engine's kernel: the layer's or its clamp's.
    """

    layer: Layer
    weight: str
    scheme: str
    bias: Tensor | None
    bias_scales: Tensor | None
    output: Node | None


@dataclass(frozen=True)
class QuantizedNetwork:
    """What every exporter of a module packs, verbatim.

    traced      the graph, batch norms folded
    layers      by node name
    weights     codes by the weight's name
    edges       the parameters of each value that has codes, by node name
    calibration the calibration that those come from; None where nothing has codes
    """

    traced: TracedModule
    layers: dict[str, QuantizedLayer]
    weights: dict[str, QuantizedTensor]
    edges: dict[str, ActivationParameters]
    calibration: Calibration | None = None

    def simulate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph in float32 on what the codes stand for; what engines must reproduce.

        Takes the module's inputs in order and returns its tensors, `traced.results` says which.
        EdgekitError for inputs that are not like the example's.
        """
        self.traced.check_inputs(inputs)
        with torch.inference_mode():
            found = _Simulation(self).run(*inputs)
        return tuple(item.detach() for item in found)  # parameters may be among them

    def schemes(self) -> dict[str, tuple[Layer, str]]:
        """Return each quantized layer with its scheme's name, by node name."""
        return {name: (item.layer, item.scheme) for name, item in self.layers.items()}

    def parameters(self, node: Node) -> ActivationParameters:
        """Return the parameters of a value that has codes."""
        return self.edges[node.name]


def quantize_module(placement: Placement, calibration: Calibration | None) -> QuantizedNetwork:
    """Quantize weights and biases and set the parameters of every edge.

    A module whose layers all stay float needs no calibration. Weights that the placement has codes
    of keep those. EdgekitError names a weight or tensor that cannot be quantized, and one that the
    calibration lacks.
    """
    edges = edge_parameters(placement, calibration) if placement.edges else {}
    weights = dict(placement.codes)
    layers = {}
    for name, (layer, rule) in placement.layers.items():
        weight = str(layer.weight.target)
        if weight not in weights:
            values = placement.traced.parameter(layer.weight).float()
            try:
                weights[weight] = rule.scheme.quantize(values, layer.channel_axis, rule.range)
            except ValueError as error:
                raise EdgekitError(f"{weight}: cannot be quantized: {error}") from error
        layers[name] = _layer(placement, layer, rule.scheme.name, weights[weight], edges)
    ranges = calibration if placement.edges else None
    return QuantizedNetwork(placement.traced, layers, weights, edges, ranges)


def edge_parameters(
    placement: Placement, calibration: Calibration | None
) -> dict[str, ActivationParameters]:
    """Return the parameters of each value with codes: its edge's range covers all its values."""
    if calibration is None:
        raise EdgekitError("quantized activations need a calibration: give calibration data")
    names = placement.traced.names
    found = {}
    for edge, members in placement.members().items():
        least, most = calibration.covering([names[node] for node in members])
        try:
            found[edge] = activation_parameters(least, most)
        except ValueError as error:
            raise EdgekitError(f"calibration: tensor {edge!r}: {error}") from error
    return {node: found[edge] for node, edge in placement.edges.items()}


def _layer(
    placement: Placement,
    layer: Layer,
    scheme: str,
    weight: QuantizedTensor,
    edges: dict[str, ActivationParameters],
) -> QuantizedLayer:
    name = str(layer.weight.target)
    if layer.node.target == EMBEDDING:
        return QuantizedLayer(layer, name, scheme, None, None, None)
    output = end_of_chain(layer.node)
    if layer.bias is None:
        return QuantizedLayer(layer, name, scheme, None, None, output)
    per_channel = weight.granularity == "channel"
    scales = bias_scales(layer, weight.scales, edges[layer.input.name], per_channel)
    codes = bias_codes(placement.traced.parameter(layer.bias), scales)
    if not bool((codes.abs() <= LARGEST_BIAS).all()):  # also false for NaN
        raise EdgekitError(
            f"{layer.bias.target}: does not fit 32 bits in units of input scale times weight scale"
        )
    return QuantizedLayer(layer, name, scheme, codes.to(torch.int32), scales, output)


def bias_scales(
    layer: Layer, scales: Tensor, given: ActivationParameters, per_channel: bool
) -> Tensor:
    """Return the units of a layer's bias, float32: its input's scale times each of its weight's."""
    # In float32, as engines multiply them: the codes are then theirs, too.
    found = scales * torch.tensor(given.scale, device=scales.device)
    return found.repeat(layer.groups) if per_channel and layer.channel_axis else found


def bias_codes(bias: Tensor, scales: Tensor) -> Tensor:
    """Return the whole numbers of `scales` that a bias is rounded to, float64 of any size."""
    return (bias.double() / scales.double()).round()


def bias_of_codes(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the bias that codes stand for, float32."""
    return (codes.double() * scales.double()).float()


def average_of_codes(
    node: Node,
    values: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    parameters: ActivationParameters,
) -> Tensor:
    """Run an operator of `AVERAGES` on codes, as what they stand for.

    Integers are averaged: of means of floats, the noise would decide the many ties.
    """
    codes = (values / parameters.scale).round_().double()
    mean = node.target(codes, *args, **kwargs)  # type: ignore[operator]
    # No code leaves the range: an average lies between its operands, padding is 0.
    rounded: Tensor = (mean + parameters.zero_point).round_() - parameters.zero_point
    return rounded.float() * parameters.scale


class _Simulation(Interpreter):
    """Runs the graph with every quantized value replaced by what its code stands for."""

    def __init__(self, network: QuantizedNetwork) -> None:
        super().__init__(network.traced.graph_module)
        self.extra_traceback = False  # torch's addition to messages, which are of one line
        self._network = network
        self._weights = {name: codes.dequantize() for name, codes in network.weights.items()}
        self._given: dict[Node, object] = {}

    def run_node(self, n: Node) -> object:
        if n.op == "output":
            return tuple(self._given.get(node, self.env[node]) for node in n.args[0])  # type: ignore[union-attr]
        if n.target in AVERAGES and n.name in self._network.edges:
            return self._average_of_codes(n)
        layer = self._network.layers.get(n.name)
        result = super().run_node(n) if layer is None else self._layer(n, layer)
        if n.op == "placeholder":  # an input that is returned, too, is what was given
            self._given[n] = result
        parameters = self._network.edges.get(n.name)
        return result if parameters is None else parameters.fake_quantize(result)

    def _average_of_codes(self, node: Node) -> Tensor:
        (values, *args), kwargs = self.fetch_args_kwargs_from_env(node)
        return average_of_codes(node, values, tuple(args), kwargs, self._network.parameters(node))

    def _layer(self, node: Node, layer: QuantizedLayer) -> Tensor:
        """Run a layer on what its codes stand for; what else reads its weight reads floats."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        found = [*args]
        place = 0 if node.target == EMBEDDING else 1
        found[place] = self._weights[layer.weight]
        if layer.bias is not None and layer.bias_scales is not None:
            found[2] = bias_of_codes(layer.bias, layer.bias_scales)
        result = self.call_function(node.target, tuple(found), kwargs)
        assert isinstance(result, Tensor)
        return result

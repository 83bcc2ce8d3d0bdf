"""A quantized module: its float graph, the codes of its weights, the parameters of its edges."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from edgekit.errors import EdgekitError
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.observers import ActivationParameters, activation_parameters
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.quantize.traced.arithmetic import Kernels, LayerCodes, Unrounded, of_floats
from edgekit.quantize.traced.operators import EMBEDDING, Layer
from edgekit.quantize.traced.placement import Placement, end_of_chain
from edgekit.quantize.traced.trace import TracedModule

LARGEST_BIAS = 2**31 - 1
TIE = 2.0**-10
"""How near to a tie, in steps, a value's code may be either neighbour's.

What engines' kernels part by: float32 sums in another order, factors of 20 bits (XNNPACK's and
NEON's additions) and their own sigmoids, each below 2**-11 on codes of 8 bits.
"""


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

    def simulate_otherwise(self, seed: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph as another engine may: what lies within `TIE` of a tie goes either way."""
        with torch.inference_mode():
            found = _Otherwise(self, seed).run(*inputs)
        return tuple(item.detach() for item in found)

    def distances(self, codes: dict[str, Tensor], *inputs: Tensor) -> dict[str, float]:
        """Return how far codes of an engine lie from what is to be rounded, at most, in steps.

        `codes` by node name, uint8. Each node runs on the engine's codes of its operands, so that
        nothing adds up: up to a half is right, `TIE` more is honest.
        """
        with torch.inference_mode():
            run = _OnCodes(self, codes)
            run.run(*inputs)
        return run.distances

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
    found, of_softmax = {}, placement.of_softmax()
    for edge, members in placement.members().items():
        least, most = calibration.covering([names[node] for node in members])
        try:
            found[edge] = activation_parameters(least, most, edge in of_softmax)
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


class _Simulation(Interpreter):
    """Runs the graph with every quantized value replaced by what its code stands for."""

    def __init__(self, network: QuantizedNetwork) -> None:
        super().__init__(network.traced.graph_module)
        self.extra_traceback = False  # torch's addition to messages, which are of one line
        self._network = network
        self._weights = {name: codes.dequantize() for name, codes in network.weights.items()}
        self._given: dict[Node, object] = {}
        self._kernels = Kernels(lambda node: network.edges.get(node.name))

    def run_node(self, n: Node) -> object:
        if n.op == "output":
            nodes = self._network.traced.outputs
            return tuple(self._given.get(node, self.env[node]) for node in nodes)
        parameters = self._network.edges.get(n.name)
        found = self._kernels.run(n, self.fetch_args_kwargs_from_env(n)[0], self._layer(n))
        if found is None:
            result = self._result(n)
            if n.op == "placeholder":  # an input that is returned, too, is what was given
                self._given[n] = result
            if parameters is None:
                return result
            assert isinstance(result, Tensor)
            found = of_floats(result, parameters)
        if parameters is None:
            return found.values  # its clamp has the codes
        return self.settle(n, found).sub_(parameters.zero_point).mul_(parameters.scale)

    def settle(self, node: Node, found: Unrounded) -> Tensor:
        """Return the codes of a value, float32."""
        return found.codes()

    def _result(self, node: Node) -> object:
        """Run a node on floats; what else reads a layer's weight reads floats, too."""
        layer = self._network.layers.get(node.name)
        if layer is None:
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        found = [*args]
        place = 0 if node.target == EMBEDDING else 1
        found[place] = self._weights[layer.weight]
        if layer.bias is not None and layer.bias_scales is not None:
            found[2] = bias_of_codes(layer.bias, layer.bias_scales)
        return self.call_function(node.target, tuple(found), kwargs)

    def _layer(self, node: Node) -> LayerCodes | None:
        layer = self._network.layers.get(node.name)
        if layer is None or layer.output is None:
            return None
        weight = self._network.weights[layer.weight]
        entering = self._network.parameters(layer.layer.input)
        per_channel = weight.granularity == "channel"
        units = bias_scales(layer.layer, weight.scales, entering, per_channel)
        steps = replace(weight, scales=torch.ones_like(weight.scales)).dequantize()
        return LayerCodes(steps, layer.bias, units)


class _Otherwise(_Simulation):
    """Moves what is rounded by up to `TIE`, at random."""

    def __init__(self, network: QuantizedNetwork, seed: int) -> None:
        super().__init__(network)
        self._random = torch.Generator().manual_seed(seed)

    def settle(self, node: Node, found: Unrounded) -> Tensor:
        noise = torch.rand(found.values.shape, generator=self._random)
        return found.moved(noise.mul_(2 * TIE).sub_(TIE)).codes()


class _OnCodes(_Simulation):
    """Goes on from an engine's codes."""

    def __init__(self, network: QuantizedNetwork, codes: dict[str, Tensor]) -> None:
        super().__init__(network)
        self._codes = codes
        self.distances: dict[str, float] = {}

    def settle(self, node: Node, found: Unrounded) -> Tensor:
        if node.name not in self._codes:
            return found.codes()
        codes = self._codes[node.name].float()
        self.distances[node.name] = float(found.distance(codes).max())
        return codes

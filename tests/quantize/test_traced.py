"""Tracing, folding of batch norms, where codes are placed, and the simulation of integers."""

import inspect
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support.integer_reference import run_on_integers
from support.traced_nets import NETS, batch_for, make_net, quantized
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import EdgekitError
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.traced.calibrate import calibrate
from edgekit.quantize.traced.fold import fold_batch_norms
from edgekit.quantize.traced.network import QuantizedNetwork, quantize_module
from edgekit.quantize.traced.operators import BATCH_NORM
from edgekit.quantize.traced.placement import Placement, place
from edgekit.quantize.traced.schemes import LayerRecipe, LayerRule, LayerScheme
from edgekit.quantize.traced.trace import TracedModule, trace

SCHEMES = ["w8a8", "w8a8-affine", "w8a8-tensor", "w8a8-tensor-affine", "w4a8"]


def _outputs(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


@lru_cache
def _traced(name: str) -> TracedModule:
    return fold_batch_norms(trace(make_net(name), (batch_for(name, 4),), 16))


@pytest.mark.parametrize("name", NETS)
def test_folding_leaves_the_outputs_as_they_were(name: str) -> None:
    net = make_net(name)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    traced = trace(net, (batch_for(name, 4),), 16)
    folded = fold_batch_norms(traced)
    for size in (1, 4, 16):
        x = batch_for(name, size)
        for graph in (traced, folded):
            found = zip(_outputs(net(x)), _outputs(graph.graph_module(x)), strict=True)
            for expected, actual in found:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not any(node.target == BATCH_NORM for node in folded.graph_module.graph.nodes)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert set(dict(traced.graph_module.named_parameters())) == set(dict(net.named_parameters()))


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (4, 8, 8)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6), (4, 5, 5)),
        (nn.Linear(5, 6), nn.BatchNorm1d(6), (5,)),
        (nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), (5,)),
        (nn.ReLU(), nn.BatchNorm2d(4), (4, 8, 8)),
        (nn.ReLU(), nn.BatchNorm1d(4), (4,)),
    ],
)
def test_every_kind_of_batch_norm_folds(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(layer, norm, nn.ReLU()).train()
    for _ in range(3):
        net(torch.randn(6, *shape) * 2 + 1)
    x = torch.randn(3, *shape)
    folded = fold_batch_norms(trace(net, (x,)))
    expected = net.eval()(x)
    torch.testing.assert_close(folded.graph_module(x), (expected,), rtol=1e-5, atol=1e-6)
    assert not any(node.target == BATCH_NORM for node in folded.graph_module.graph.nodes)


def test_a_convolution_before_two_batch_norms_is_folded_into_both_uses() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            first: Tensor = self.one(self.conv(x))
            second: Tensor = self.two(self.conv(first))
            return second

    torch.manual_seed(0)
    net = Shared().train()
    for _ in range(3):
        net(torch.randn(4, 3, 5, 5) + 1)
    net.eval()
    x = torch.randn(2, 3, 5, 5)
    folded = fold_batch_norms(trace(net, (x,)))
    torch.testing.assert_close(folded.graph_module(x), (net(x),), rtol=1e-5, atol=1e-6)


def test_a_batch_norm_used_twice_and_a_bias_shared_by_two_layers_fold() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.two.bias = self.one.bias
            self.after = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(torch.relu(self.norm(x)))
            result: Tensor = self.two(self.after(self.one(x)))
            return result

    torch.manual_seed(0)
    net = Twice().train()
    for _ in range(3):
        net(torch.randn(4, 3, 5, 5) * 2 + 1)
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
    net.eval()
    x = torch.randn(2, 3, 5, 5)
    folded = fold_batch_norms(trace(net, (x,)))
    torch.testing.assert_close(folded.graph_module(x), (net(x),), rtol=1e-5, atol=1e-6)


def test_training_mode_is_left_as_it_was() -> None:
    net = make_net("separable").train()
    net.get_submodule("head").eval()
    modes = [part.training for part in net.modules()]
    trace(net, (batch_for("separable", 2),))
    assert [part.training for part in net.modules()] == modes


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        (
            "separable",
            {
                "x": "x",
                "stem.2": "stem.2",
                "depthwise.2": "depthwise.2",
                "pointwise.2": "pointwise.2",
                "pool": "pointwise.2",
                "reshape": "pointwise.2",
                "head": "head",
            },
        ),
        (
            "residual",
            {
                "x": "x",
                "relu": "relu",
                "one": "one",
                "relu#2": "relu#2",
                "skip": "skip",
                "two": "two",
                "relu#3": "relu#3",
                "mean": "relu#3",
                "squeeze": "relu#3",
                "head": "head",
            },
        ),
        (
            "joined",
            {
                "x": "x",
                "relu": "relu",
                "right": "right",
                "hardswish": "relu",
                "cat": "relu",
                "max_pool2d": "relu",
                "last": "last",
                "avg_pool2d": "last",
            },
        ),
    ],
)
def test_codes_are_placed_where_engines_fuse(name: str, edges: dict[str, str]) -> None:
    traced = _traced(name)
    found = place(traced, LayerRecipe.uniform("w8a8")).edges
    named = {traced.names[node]: edge for node, edge in found.items()}
    assert named == edges


def test_edges_share_what_their_values_cover() -> None:
    network = quantized("joined", "w8a8")
    by_name = {network.traced.names[node]: edge for node, edge in network.edges.items()}
    assert by_name["cat"] == by_name["relu"] == by_name["hardswish"] == by_name["max_pool2d"]
    assert by_name["cat"] != by_name["last"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["separable", "residual"])
def test_the_simulation_is_integer_arithmetic(name: str, scheme: str) -> None:
    network = quantized(name, scheme)
    x = batch_for(name, 16, seed=50)
    (simulated,) = network.simulate(x)
    edge = network.edges[network.traced.outputs[0].name]
    codes = run_on_integers(network, x.numpy())
    difference = np.abs(edge.codes(simulated).numpy().astype(int) - codes)
    # A sum near a tie may be rounded the other way somewhere inside, which moves several outputs.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.2


@pytest.mark.parametrize("name", NETS)
def test_eight_bits_stay_close_to_the_float_module(name: str) -> None:
    x = batch_for(name, 8, seed=60)
    with torch.no_grad():
        exact = _outputs(make_net(name)(x))
    errors = {
        scheme: max(
            float((actual - expected).norm() / expected.norm())
            for actual, expected in zip(quantized(name, scheme).simulate(x), exact, strict=True)
        )
        for scheme in ("w8a8", "w4a8", "float")
    }
    assert errors["float"] < 1e-5
    assert 1e-5 < errors["w8a8"] < 0.05
    assert errors["w8a8"] < errors["w4a8"]


@pytest.mark.parametrize(
    ("scheme", "low", "high", "scales"),
    [("w8a8", -127, 127, 8), ("w4a8", -8, 7, 8), ("w8a8-tensor", -127, 127, 1)],
)
def test_codes_and_scales_are_the_schemes(scheme: str, low: int, high: int, scales: int) -> None:
    network = quantized("separable", scheme)
    weight = network.weights["stem.0.weight"]
    assert low <= int(weight.codes.min()) < int(weight.codes.max()) <= high
    assert weight.scales.numel() == scales
    layer = next(item for item in network.layers.values() if item.weight == "stem.0.weight")
    assert layer.bias is not None
    assert layer.bias_scales is not None
    expected = network.edges["x"].scale * weight.scales
    torch.testing.assert_close(layer.bias_scales, expected, rtol=1e-6, atol=0)


def test_transposed_convolutions_have_scales_of_output_channels() -> None:
    weight = quantized("upsampling", "w8a8").weights["up.weight"]
    assert (weight.axis, tuple(weight.scales.shape)) == (1, (4,))


def test_the_first_rule_that_matches_wins_and_the_rest_stays_float() -> None:
    recipe = LayerRecipe(
        (
            LayerRule(r"depthwise\..*", LayerScheme.parse("w8a8-tensor-affine")),
            LayerRule(r"(stem|depthwise|pointwise)\..*", LayerScheme.parse("w8a8")),
        )
    )
    placement = place(_traced("separable"), recipe)
    found = {
        str(layer.weight.target): rule.scheme.name for layer, rule in placement.layers.values()
    }
    assert found == {
        "stem.0.weight": "w8a8",
        "depthwise.0.weight": "w8a8-tensor-affine",
        "pointwise.0.weight": "w8a8",
    }
    assert "linear" not in placement.edges


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ([r"nothing\.weight"], r"rule 1: pattern 'nothing.* takes no layer.*stem\.0\.weight"),
        ([".*", "head.weight"], "rule 2: pattern 'head.weight' takes no layer, or earlier rules"),
    ],
)
def test_a_rule_that_takes_no_layer_is_an_error(patterns: list[str], said: str) -> None:
    recipe = LayerRecipe(tuple(LayerRule(item, LayerScheme()) for item in patterns))
    with pytest.raises(EdgekitError, match=said):
        place(_traced("separable"), recipe)


@pytest.mark.parametrize(
    "name", ["w8a8", "w4a8-tensor", "w8a8-affine", "w4a8-tensor-affine", "float"]
)
def test_schemes_have_names(name: str) -> None:
    assert LayerScheme.parse(name).name == name


@pytest.mark.parametrize("name", ["w8", "w2a8", "w8a8-affine-tensor", "W8A8", "", "w8a8 "])
def test_an_unknown_scheme_is_refused(name: str) -> None:
    with pytest.raises(EdgekitError, match="allowed are float, w8a8"):
        LayerScheme.parse(name)


@pytest.mark.parametrize("case", ["data-dependent", "item", "python"])
def test_what_cannot_be_traced_is_named_in_one_line(case: str) -> None:
    class Untraceable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if case == "data-dependent":
                return x if x.sum() > 0 else -x  # the line that is named
            if case == "item":
                return x * float(x.numpy().max())
            raise RuntimeError("on\ntwo lines")

    with pytest.raises(EdgekitError) as caught:
        trace(Untraceable(), (torch.randn(2, 3),))
    said = str(caught.value)
    lines, start = inspect.getsourcelines(Untraceable.forward)
    wanted = {"data-dependent": "x.sum() > 0", "item": "numpy()", "python": "raise"}[case]
    number = next(start + i for i, line in enumerate(lines) if wanted in line)
    assert said.startswith("Untraceable cannot be traced: ")
    assert re.search(rf"test_traced\.py:{number}: ", said), said
    assert wanted in said
    assert ("with torch.where" in said) == (case == "data-dependent")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((), "at least one tensor"),
        ((3,), "at least one tensor"),
        ((torch.zeros(()),), "batch axis"),
        ((torch.zeros(0, 3),), "no empty axis"),
    ],
)
def test_examples_are_tensors_with_a_batch(inputs: tuple[Tensor, ...], said: str) -> None:
    with pytest.raises(EdgekitError, match=said):
        trace(nn.Linear(3, 2), inputs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_values_or_in_pieces_are_refused(separable: Placement) -> None:
    x = torch.ones(2, 3)
    for given, said in (
        (x.to("meta"), "is on the meta device, so it has no values"),
        (x.to_sparse(), "must be a dense tensor, got one of layout sparse_coo"),
        (torch.nested.nested_tensor([x, x]), "must be a dense tensor, got one of layout nested"),
    ):
        with pytest.raises(EdgekitError, match=rf"example_inputs\[0\] {said}"):
            trace(nn.Linear(3, 2), (given,))
        with pytest.raises(EdgekitError, match=f"calibration batch 1: input 'x' {said}"):
            calibrate(separable, [given])
    with pytest.raises(EdgekitError, match="Linear: weight is on the meta device"):
        trace(nn.Linear(3, 2, device="meta"), (x,))
    with pytest.raises(EdgekitError, match="calibration batch 1 must be a tensor, .* got int"):
        calibrate(separable, [3])  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_are_traced_in_float32(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(EdgekitError, match=rf"Linear: weight is {dtype}; .* module\.float\(\)"):
        trace(nn.Linear(3, 2).to(dtype), (x.to(dtype),))
    with pytest.raises(EdgekitError, match=rf"example_inputs\[0\] is {dtype}, .*float32"):
        trace(nn.ReLU(), (x.to(dtype),))


class _Sum(nn.Module):
    def forward(self, first: Tensor, *rest: Tensor) -> Tensor:
        return sum(rest, first) * 2


class _All(nn.Module):
    def forward(self, *x: Tensor) -> Tensor:
        return x[0] - x[-1]


@pytest.mark.parametrize(("module", "count"), [(_Sum(), 1), (_Sum(), 3), (_All(), 1), (_All(), 2)])
def test_any_number_of_arguments_with_a_batch_that_varies(module: nn.Module, count: int) -> None:
    inputs = [torch.randn(1, 3, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    traced = trace(module, inputs, max_batch=4)
    for batch in (1, 4):
        given = [item.repeat(batch, 1) for item in inputs]
        (found,) = QuantizedNetwork(traced, {}, {}, {}).simulate(*given)
        assert torch.equal(found, module(*given))


def test_other_mistakes_in_tracing() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(EdgekitError, match="max_batch must be at least 2"):
        trace(nn.Linear(3, 2), (x,), 1)
    with pytest.raises(EdgekitError, match="expected a torch.nn.Module, got function"):
        trace(lambda: None, (x,))  # type: ignore[arg-type]


class _Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1) * 2


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[None, int]:
        return None, 3


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (_Counting(), "_Counting changes 'calls' in its forward"),
        (_InPlace(), "_InPlace changes 'x' in its forward"),
        (_Nothing(), "_Nothing returns no tensor"),
    ],
)
def test_what_a_file_cannot_do_is_refused(module: nn.Module, said: str) -> None:
    with pytest.raises(EdgekitError, match=said):
        trace(module, (torch.ones(2, 3),))


def test_inputs_unlike_the_example_are_refused() -> None:
    network = quantized("separable", "w8a8")
    for given in (
        batch_for("separable", 17),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(1, 3, 16, 16).double(),
    ):
        with pytest.raises(
            EdgekitError, match=r"must be torch.float32 of shape \[1 to 16, 3, 16, 16\]"
        ):
            network.simulate(given)
    with pytest.raises(EdgekitError, match="takes 1 inputs, got 2"):
        network.simulate(batch_for("separable", 2), batch_for("separable", 2))


@pytest.fixture(scope="module")
def separable() -> Placement:
    return place(_traced("separable"), LayerRecipe.uniform("w8a8"))


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "calibration data is empty"),
        ([torch.zeros(2, 3, 16, 16)], "tensor 'x' is 0 everywhere"),
        ([torch.ones(2, 3, 16, 16)], "tensor 'x' is 1 everywhere"),
        ([torch.full((2, 3, 16, 16), float("nan"))], "batch 1: tensor 'x' holds infinities or NaN"),
        ([torch.zeros(2, 3, 4, 4)], "batch 1: input 'x' must be"),
    ],
)
def test_calibration_data_that_is_no_use(
    separable: Placement, batches: list[Tensor], said: str
) -> None:
    with pytest.raises(EdgekitError, match=said) as caught:
        calibrate(separable, batches)
    assert "\n" not in str(caught.value)


def test_indices_beyond_a_table_are_refused_in_one_line() -> None:
    net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    placement = place(trace(net, (torch.zeros(2, 3).long(),)), LayerRecipe.uniform("w8a8"))
    with pytest.raises(
        EdgekitError, match="batch 1: the module does not run on it: index out of range"
    ) as caught:
        calibrate(placement, [torch.full((2, 3), 8)])
    assert "\n" not in str(caught.value)


def test_a_dead_activation_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        net.get_submodule("0").bias.fill_(-1e3)  # type: ignore[operator]
    placement = place(trace(net, (torch.randn(2, 3, 4, 4),)), LayerRecipe.uniform("w8a8"))
    with pytest.raises(
        EdgekitError, match="tensor '1' is 0 everywhere: the data does not exercise"
    ):
        calibrate(placement, [torch.randn(2, 3, 4, 4)])


def test_larger_mini_batches_run_in_parts() -> None:
    fixed, opened = (
        place(fold_batch_norms(trace(make_net("separable"), (batch_for("separable", 2),), size)),
              LayerRecipe.uniform("w8a8"))
        for size in (None, 8)
    )  # fmt: skip
    batches = [batch_for("separable", 5, seed) for seed in range(3)]
    found, expected = calibrate(fixed, batches), calibrate(opened, batches)
    assert (found.samples, found.batches) == (15, 3)
    for name, ends in expected.ranges.items():
        assert found.ranges[name] == pytest.approx(ends, rel=1e-5, abs=1e-6)
    with pytest.raises(EdgekitError, match=r"batch 1: input 'x' must be .*\[2, 3, 16, 16\]"):
        calibrate(fixed, [batch_for("separable", 1)])


def test_calibration_takes_inputs_by_name() -> None:
    placement = place(trace(_Weighted(), (torch.ones(2, 3), torch.ones(2, 3)), 4), _W8A8)
    x, y = torch.rand(3, 3), torch.rand(3, 3)
    named = calibrate(placement, [{"y": y, "x": x}])
    assert named == calibrate(placement, [(x, y)])
    assert named.ranges["x"][1] == x.max()
    with pytest.raises(EdgekitError, match="batch 1 must have a tensor for each input, x, y: it "):
        calibrate(placement, [{"x": x}])


_W8A8 = LayerRecipe.uniform("w8a8")


class _Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.layer(x) * self.layer(y)
        return result


class _Factor(nn.Module):
    """A layer, times or plus what no input reaches."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.zeros(4))
        if kind == "weight":
            nn.init.zeros_(self.first.weight)
            nn.init.constant_(self.first.bias, 0.7)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.kind == "product":
            y = y * self.scale
        elif self.kind == "norm":
            y = self.norm(y)
        elif self.kind == "number":
            y = y * 0
        elif self.kind == "parameter":
            y = self.scale.expand(x.shape[0], 4)
        result: Tensor = self.last(y)
        return result


@pytest.mark.parametrize("kind", ["weight", "product", "norm", "number", "parameter"])
def test_what_no_input_reaches_is_carried(kind: str) -> None:
    torch.manual_seed(0)
    net = _Factor(kind)
    placement = place(trace(net, (torch.randn(2, 3),), 4), _W8A8)
    network = quantize_module(placement, calibrate(placement, [torch.randn(4, 3)]))
    x = torch.randn(3, 3)
    (found,) = network.simulate(x)
    step = max(edge.scale for edge in network.edges.values() if edge.scale < 0.1)
    assert float((found - net(x)).abs().max()) < 2 * step


def test_a_weight_that_is_read_otherwise_too_is_float_there() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer.weight

    net = Tied()
    placement = place(trace(net, (torch.randn(2, 3),)), _W8A8)
    network = quantize_module(placement, calibrate(placement, [torch.randn(2, 3)]))
    assert torch.equal(network.simulate(torch.randn(2, 3))[1], net.layer.weight)


class _Named(NamedTuple):
    y: Tensor
    size: int


class _Structured(nn.Module):
    def forward(self, x: Tensor) -> object:
        return {"a": [x * 2, _Named(x + 1, x.shape[1])], "b.c": (None, x), 3: x - 1, "x": x.abs()}


def test_results_have_the_names_of_their_places() -> None:
    traced = trace(_Structured(), (torch.ones(2, 3),))
    names = ("a.0", "a.1.y", "b.c.1", "output_3", "output_x")
    assert traced.results.names == names
    assert traced.results.constants == {"a.1.size": 3, "b.c.0": None}
    x = torch.randn(2, 3)
    found = traced.results.structured(QuantizedNetwork(traced, {}, {}, {}).simulate(x))
    expected = _Structured()(x)
    assert torch.equal(found["a"][0], x * 2)
    assert torch.equal(found["a"][1].y, x + 1)
    assert isinstance(found["a"][1], _Named)
    assert found["a"][1].size == 3
    assert list(found) == list(expected)
    assert found["b.c"][0] is None
    assert torch.equal(found["b.c"][1], x)
    assert torch.equal(found[3], x - 1)


def test_names_that_files_cannot_tell_apart_are_made_different() -> None:
    class Alike(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"a/b": x * 2, "a b": x * 3, "a_b": x * 4, "": x}

    names = trace(Alike(), (torch.ones(2, 3),)).results.names
    assert names == ("a_b", "a_b_2", "a_b_3", "_")


def test_calibration_counts_what_it_saw(separable: Placement) -> None:
    seen: list[int] = []
    batches = [batch_for("separable", 3, seed) for seed in range(5)]
    found = calibrate(separable, iter(batches), progress=seen.append)
    assert (found.samples, found.batches, found.method) == (15, 5, "moving-average")
    assert seen == [1, 2, 3, 4, 5]
    expected = np.mean([batch.max() for batch in batches])
    assert found.ranges["x"][1] == pytest.approx(expected, rel=1e-6)


def test_a_calibration_of_another_module_is_refused(separable: Placement) -> None:
    with pytest.raises(EdgekitError, match="no range of 'x'.*calibrate again"):
        quantize_module(separable, Calibration({"y": (0.0, 1.0)}, "mse", 1, 1))
    with pytest.raises(EdgekitError, match="give calibration data"):
        quantize_module(separable, None)


def test_a_bias_beyond_32_bits_is_refused() -> None:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.fill_(1e-6)
        layer.bias.fill_(1e6)
    placement = place(trace(layer, (torch.rand(2, 4),)), LayerRecipe.uniform("w8a8"))
    calibration = Calibration({"input_1": (0.0, 1e-3), "linear": (0.0, 1e6)}, "mse", 1, 1)
    with pytest.raises(EdgekitError, match="bias: does not fit 32 bits"):
        quantize_module(placement, calibration)


def test_weights_that_are_not_finite_are_named() -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        net.get_submodule("0").weight[0, 0] = float("nan")  # type: ignore[operator]
    placement = place(trace(net, (torch.rand(2, 4),)), LayerRecipe.uniform("w8a8"))
    calibration = Calibration({"input_1": (0.0, 1.0), "0": (0.0, 1.0)}, "mse", 1, 1)
    with pytest.raises(EdgekitError, match=r"0\.weight: cannot be quantized: .*NaN"):
        quantize_module(placement, calibration)


def test_additions_of_numbers_and_constants_stay_float() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.shift = nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second(functional.relu(self.first(x) + self.shift) * 2)
            return result

    torch.manual_seed(0)
    net = Shifted()
    x = torch.randn(2, 3, 4, 4)
    placement = place(trace(net, (x,)), LayerRecipe.uniform("w8a8"))
    found = {placement.traced.names[node] for node in placement.edges}
    # The sum and its clamp are float; the product is what the second layer reads.
    assert found == {"x", "first", "mul", "second"}
    (simulated,) = quantize_module(placement, calibrate(placement, [x])).simulate(x)
    with torch.no_grad():
        exact = net(x)
    assert float((simulated - exact).norm() / exact.norm()) < 0.03

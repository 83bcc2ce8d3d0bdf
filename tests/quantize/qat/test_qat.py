"""Training of traced modules: what it rounds, batch norms, milestones, and what it ends in."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support.traced_nets import NETS, batch_for, make_net
from torch import Tensor, nn
from torch.nn import functional

import edgekit
from edgekit.errors import EdgekitError
from edgekit.quantize.affine import quantize
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.grid import Grid
from edgekit.quantize.qat.milestones import Milestones
from edgekit.quantize.qat.prepare import prepare
from edgekit.quantize.qat.traced import TracedTraining
from edgekit.quantize.traced.fold import fold_batch_norms
from edgekit.quantize.traced.schemes import LayerRecipe, LayerRule, LayerScheme
from edgekit.quantize.traced.trace import trace

FROZEN = Milestones(0, 1, 3, 4)
NEVER = 1000


def _outputs(net: nn.Module, *inputs: Tensor) -> list[Tensor]:
    found = net(*inputs)
    return [found] if isinstance(found, Tensor) else list(found)


def _train(
    net: nn.Module, name: str, qat: TracedTraining, steps: int, rate: float = 1e-2
) -> list[float]:
    """Train towards what another net of the kind gives; return the losses."""
    optimizer = torch.optim.SGD([*net.parameters(), *qat.parameters()], lr=rate)
    net.train()
    losses = []
    for step in range(qat.steps, qat.steps + steps):
        x = batch_for(name, 6, seed=step % 5)
        loss = sum((item - 1).square().mean() for item in _outputs(net, x))
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        qat.step()
        losses.append(loss.item())
    return losses


def _trained(
    name: str, recipe: str | LayerRecipe, milestones: Milestones = FROZEN, steps: int = 6
) -> tuple[nn.Module, TracedTraining]:
    net = make_net(name)
    qat = prepare(net, recipe, (batch_for(name, 4),), milestones=milestones)
    _train(net, name, qat, steps)
    return net, qat


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "w8a8") for name in NETS),
        *((name, "w4a8") for name in ("residual", "tokens")),
        *((name, "w8a8-tensor-affine") for name in ("separable", "upsampling")),
    ],
)
def test_what_was_trained_is_what_comes_out(name: str, scheme: str) -> None:
    net, qat = _trained(name, scheme)
    x = batch_for(name, 5, seed=50)
    trained = _outputs(net, x)  # in training, all frozen
    net.eval()
    prepared = _outputs(net, x)
    network = qat.finalize(max_batch=8)
    simulated = network.simulate(x)
    for one, two, three in zip(trained, prepared, simulated, strict=True):
        assert torch.equal(two, three)
        assert torch.equal(one, three)
    # The codes are those of the trained float weights, folded and quantized as after any training.
    folded = fold_batch_norms(trace(net, (batch_for(name, 4),)))
    for item in network.layers.values():
        weight = folded.graph_module.get_parameter(item.weight)
        expected = LayerScheme.parse(scheme).quantize(weight, item.layer.channel_axis)
        assert torch.equal(network.weights[item.weight].codes, expected.codes)
        assert torch.equal(network.weights[item.weight].scales, expected.scales)
    assert len(network.layers) >= 3


@pytest.mark.parametrize("target", ["onnx", pytest.param("executorch", marks=pytest.mark.slow)])
def test_the_file_is_what_was_trained(target: str, tmp_path: Path) -> None:
    net, qat = _trained("separable", "w8a8")
    x = batch_for("separable", 4, seed=60)
    net.eval()
    (prepared,) = _outputs(net, x)
    network = qat.finalize(max_batch=8)
    artifact = edgekit.export_network(
        network,
        (x,),
        tmp_path / "net",
        target=target,
        name="net",
        recipe=qat.recipe,
    )
    assert artifact.manifest.verification["verified"]
    ranges = Calibration.load(artifact.folder / "calibration.json")
    assert ranges == qat.calibration()
    assert ranges.method == "moving-average"
    with edgekit.load_module(target, artifact.model_path, threads=1) as engine:
        (actual,) = engine.run([x.numpy()])
    steps = np.abs(actual - prepared.detach().numpy()) / network.edges["linear"].scale
    assert steps.max() <= 1.01
    assert float(np.sqrt((steps**2).mean())) <= 0.5
    if target == "onnx":
        stored = {
            numpy_helper.to_array(item).tobytes()
            for item in onnx.load(artifact.model_path).graph.initializer
        }
        for weight in network.weights.values():
            assert weight.codes.numpy().tobytes() in stored
            assert weight.scales.numpy().tobytes() in stored


@pytest.mark.parametrize("name", NETS)
def test_without_rounding_the_module_trains_as_the_float_module(name: str) -> None:
    net, twin = make_net(name).train(), make_net(name).train()
    qat = prepare(net, "w8a8", (batch_for(name, 4),), milestones=Milestones(0, NEVER))
    x = batch_for(name, 6, seed=3)
    for one, other in zip(_outputs(net, x), _outputs(twin, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for model in (net, twin):
        sum((item**2).mean() for item in _outputs(model, x)).backward()  # type: ignore[union-attr]
    for (key, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=key)
    statistics = net.state_dict()
    for key, other in twin.named_buffers():
        torch.testing.assert_close(statistics[key], other, rtol=1e-5, atol=1e-6)
    assert qat.calibration().batches == 2


class _Block(nn.Module):
    def __init__(self, bias: bool, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(5, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.conv(x))
        return result


def _block(bias: bool = True, momentum: float | None = 0.1) -> _Block:
    torch.manual_seed(0)
    block = _Block(bias, momentum)
    with torch.no_grad():
        block.norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0, 0.0, 3.0]))
        block.norm.bias.uniform_(-1, 1)
        block.norm.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
        block.norm.running_var.uniform_(0.2, 2)  # type: ignore[union-attr]
    return block


def _by_the_paper(block: _Block, x: Tensor, frozen: bool) -> Tensor:
    """Return what figures 8 and 9 of arXiv 1806.08342 compute, with torch's rounding."""
    norm, conv = block.norm, block.conv
    assert norm.running_mean is not None
    assert norm.running_var is not None
    y = conv(x)
    mu_batch, sigma_batch = y.mean((0, 2, 3)), (y.var((0, 2, 3), correction=0) + norm.eps).sqrt()
    mu, sigma = norm.running_mean.clone(), (norm.running_var + norm.eps).sqrt()
    c = sigma_batch / sigma
    weight = c[:, None, None, None] * (norm.weight / sigma_batch)[:, None, None, None] * conv.weight
    scales = quantize(weight, Grid(8, restricted=True), axis=0).scales
    weight = torch.fake_quantize_per_channel_affine(
        weight, scales, torch.zeros(5, dtype=torch.int32), 0, -127, 127
    )
    z = functional.conv2d(x, weight, padding=1)
    conv_bias = 0.0 if conv.bias is None else conv.bias
    bias = norm.bias - norm.weight * (mu_batch - conv_bias) / sigma_batch
    if not frozen:
        result: Tensor = z / c[:, None, None] + bias[:, None, None]
        return result
    correction = norm.weight * (mu_batch / sigma_batch - mu / sigma)
    correction = correction + norm.weight * conv_bias * (1 / sigma - 1 / sigma_batch)
    return torch.add(z, (bias + correction)[:, None, None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_is_corrected_as_in_the_paper(frozen: bool, bias: bool) -> None:
    block, twin = _block(bias), _block(bias)
    x = torch.randn(4, 3, 6, 6)
    qat = prepare(block.train(), "w8a8", (x,))
    (live,) = qat._graph.layers.values()
    args = (x, *live.layer.node.args[1:])
    read = qat._graph.read
    name = str(live.layer.weight.target)
    if frozen:
        weight, offset = live.folded(read)
        found = live.call(args, qat.fake_weight(name, weight)[0], offset)
    else:
        found = live.with_batch_statistics(
            args, read, block.norm, lambda weight: qat.fake_weight(name, weight)[0]
        )
    expected = _by_the_paper(twin, x, frozen)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (key, one), other in zip(block.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_prepared_module_computes_what_the_paper_does(frozen: bool) -> None:
    block, twin = _block().train(), _block()
    x = torch.randn(4, 3, 6, 6)
    qat = prepare(block, "w8a8", (x,), milestones=Milestones(0, 0, 0 if frozen else NEVER))
    found = block(x)
    edges = [qat.parameters_of(node.name) for node in qat._graph.placement.values()]
    given = edges[0].fake_quantize(x)
    with torch.no_grad():
        exact = [_by_the_paper(twin, given, mode) for mode in (frozen, not frozen)]
    steps = [((found - edges[-1].fake_quantize(one)) / edges[-1].scale).abs() for one in exact]
    assert steps[0].max() < 1.01  # a tie may fall to the other side
    from_tie = ((exact[0].double() / edges[-1].scale) % 1 - 0.5).abs()
    assert bool((from_tie[steps[0] > 0.5] < 1e-3).all())
    assert (steps[1] > 0.5).float().mean() > 0.5
    moved = not torch.equal(block.norm.running_mean, twin.norm.running_mean)  # type: ignore[arg-type]
    assert moved != frozen


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_as_torchs_until_the_freeze(momentum: float | None) -> None:
    block, twin = _block(momentum=momentum).train(), _block(momentum=momentum).train()
    batches = [torch.randn(4, 3, 6, 6) * 2 + 1 for _ in range(4)]
    qat = prepare(block, "w8a8", (batches[0],), milestones=Milestones(0, 0, 2))
    for step, x in enumerate(batches):
        block(x)
        if step < 2:
            twin.norm(twin.conv(x))
        qat.step()
    # The layer sees inputs on codes, so its statistics differ by that.
    for name, other in twin.named_buffers():
        torch.testing.assert_close(block.get_buffer(name), other, rtol=0.02, atol=0.02)
    assert int(block.get_buffer("norm.num_batches_tracked")) == 2


def test_a_batch_norm_in_eval_is_frozen_by_its_user() -> None:
    net = make_net("separable")
    prepare(net, "w8a8", (batch_for("separable", 4),))
    net.train()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(batch_for("separable", 6))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_milestones_say_what_changes() -> None:
    net = make_net("separable").train()
    qat = prepare(net, "w8a8", (batch_for("separable", 4),), milestones=Milestones(1, 2, 3, 4))
    x = batch_for("separable", 6)
    seen = []
    for _ in range(6):
        twin = make_net("separable").train()
        twin.load_state_dict(net.state_dict())
        mean = net.get_buffer("stem.1.running_mean").clone()
        observed = dict(qat.state_dict()["observers"])
        exact = torch.allclose(net(x), twin(x), atol=1e-6)
        moved = not torch.equal(mean, net.get_buffer("stem.1.running_mean"))
        seen.append((qat.state_dict()["observers"] != observed, not exact, not moved))
        qat.step()
    assert [row[0] for row in seen] == [False, True, True, True, False, False]
    assert [row[1] for row in seen] == [False, False, True, True, True, True]
    assert [row[2] for row in seen] == [False, False, False, True, True, True]


def test_milestones_of_a_training() -> None:
    assert Milestones.over(1000) == Milestones(0, 50, 600, 800)
    assert Milestones.over(1) == Milestones(0, 0, 1, 1)
    for steps in range(1, 40):
        found = Milestones.over(steps)
        assert found.freeze_observers is not None
        assert found.start_fake_quant < found.freeze_observers or steps == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Milestones(-1), "start_observers must be a step"),
        (lambda: Milestones(0, None), "start_fake_quant must be a step"),  # type: ignore[arg-type]
        (lambda: Milestones(5, 4), "before start_observers"),
        (lambda: Milestones(3, 3, freeze_observers=3), "must be after start_observers"),
        (lambda: Milestones.over(0), "positive integer"),
    ],
)
def test_milestones_that_contradict_themselves(make: Callable[[], object], said: str) -> None:
    with pytest.raises(EdgekitError, match=said):
        make()


def test_the_module_stays_what_it_was() -> None:
    net = make_net("residual").train()
    keys, parameters = list(net.state_dict()), list(net.parameters())
    modules = [name for name, _ in net.named_modules()]
    qat = prepare(net, "w8a8", (batch_for("residual", 4),))
    _train(net, "residual", qat, 1)
    assert list(net.state_dict()) == keys
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    assert [name for name, _ in net.named_modules()] == modules
    again = make_net("residual")
    again.load_state_dict(net.state_dict())
    with pytest.raises(EdgekitError, match="is prepared already"):
        prepare(net, "w8a8", (batch_for("residual", 4),))
    qat.remove()
    assert "forward" not in vars(net)
    x = batch_for("residual", 3)
    assert torch.equal(net.eval()(x), again.eval()(x))


def test_a_copy_trains_on_its_own() -> None:
    net, _ = _trained("separable", "w8a8")
    twin = copy.deepcopy(net)
    x = batch_for("separable", 4)
    net.eval()
    twin.eval()
    assert torch.equal(net(x), twin(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(net(x), twin(x))


def test_learned_scales_are_trained_and_stored() -> None:
    net = make_net("separable")
    qat = prepare(net, "w4a8", (batch_for("separable", 4),), milestones=FROZEN, learn_scales=True)
    before = [item.detach().clone() for item in qat.parameters()]
    assert len(before) == 4
    losses = _train(net, "separable", qat, 8)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(one, two) for one, two in zip(before, qat.parameters(), strict=True))
    x = batch_for("separable", 4, seed=9)
    trained = net(x)
    net.eval()
    prepared = net(x)
    (simulated,) = qat.finalize().simulate(x)
    assert torch.equal(trained, prepared)
    assert torch.equal(prepared, simulated)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_training_gains_what_rounding_lost(scheme: str) -> None:
    net = make_net("residual")
    teacher = make_net("residual")
    qat = prepare(net, scheme, (batch_for("residual", 4),), milestones=Milestones(0, 0, 0, 60))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    net.train()
    losses = []
    for step in range(60):
        x = batch_for("residual", 16, seed=step)
        loss = (net(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        qat.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < (0.9 if scheme == "w8a8" else 0.5) * sum(losses[:10])


class _Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop, self.last = nn.Dropout(0.5), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = x + self.drop(x)
        result: Tensor = self.last(self.drop(self.two(x)))
        return result


def test_dropout_survives_where_it_stands() -> None:
    torch.manual_seed(0)
    net = _Dropped()
    twin = copy.deepcopy(net)
    x = torch.randn(64, 8)
    qat = prepare(net, "w8a8", (x,), milestones=Milestones(0, NEVER))
    net.train()
    torch.manual_seed(1)
    ours = net(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, twin.train()(x))
    assert 0.4 < float((ours == 0).float().mean()) < 0.85
    net.eval()
    assert torch.equal(net(x), net(x))
    assert float((net(x) == 0).float().mean()) < 0.2
    names = {node.target for node in qat.finalize().traced.graph_module.graph.nodes}
    assert torch.ops.aten.clone.default not in names


def test_a_dropout_before_a_batch_norm_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.1), nn.BatchNorm2d(4))
    with pytest.raises(EdgekitError, match="0.weight: a dropout stands between"):
        prepare(net, "w8a8", (torch.randn(2, 3, 4, 4),))


def test_two_batch_norms_on_one_layer_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    with pytest.raises(EdgekitError, match="^2: is a batch norm on another one"):
        prepare(net, "w8a8", (torch.randn(2, 3, 4, 4),))


class _Shared(nn.Module):
    """A convolution used twice, each time with its own batch norm, and one that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second, self.alone = (nn.BatchNorm2d(4) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.conv(x)))
        x = self.alone(x + x) * self.scale
        result: Tensor = self.second(self.conv(x)).flatten(1)
        return result


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_layers_that_share_a_weight_have_codes_of_their_own(scheme: str) -> None:
    torch.manual_seed(0)
    net, twin = _Shared().train(), _Shared().train()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(8, 4, 5, 5)
    qat = prepare(net, scheme, (x,), milestones=Milestones(0, 1), learn_scales=True)
    torch.testing.assert_close(net(x), twin(x), rtol=1e-5, atol=1e-5)
    qat.step()
    for _ in range(3):
        net(x).square().mean().backward()
    assert all(item.grad is not None for item in [*net.parameters(), *qat.parameters()])
    net.eval()
    prepared = net(x)
    network = qat.finalize(max_batch=8)
    assert torch.equal(network.simulate(x)[0], prepared)
    assert len(network.weights) == 3


def test_schemes_mix_by_pattern() -> None:
    recipe = LayerRecipe(
        (
            LayerRule("head.weight", LayerScheme.parse("float")),
            LayerRule("stem.*", LayerScheme.parse("w4a8"), "minmax"),
            LayerRule(".*", LayerScheme.parse("w8a8-tensor")),
        ),
        name="mixed",
    )
    net, qat = _trained("separable", recipe)
    x = batch_for("separable", 4)
    net.eval()
    prepared = net(x)
    network = qat.finalize()
    assert {name: (item.bits, item.granularity) for name, item in network.weights.items()} == {
        "stem.0.weight": (4, "channel"),
        "depthwise.0.weight": (8, "tensor"),
        "pointwise.0.weight": (8, "tensor"),
    }
    torch.testing.assert_close(network.simulate(x)[0], prepared, rtol=0, atol=0)


def test_a_recipe_that_matches_nothing_is_refused() -> None:
    recipe = LayerRecipe((LayerRule("body.*", LayerScheme.parse("w8a8")),), name="mine.toml")
    net = make_net("separable")
    with pytest.raises(EdgekitError, match=r"mine.toml: rule 1: pattern 'body.\*' takes no layer"):
        prepare(net, recipe, (batch_for("separable", 4),))
    assert "forward" not in vars(net)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, TracedTraining]:
        net = make_net("separable")
        example = (batch_for("separable", 4),)
        return net, prepare(net, "w4a8", example, milestones=FROZEN, learn_scales=True)

    whole, qat = start()
    _train(whole, "separable", qat, 6)
    first, qat_first = start()
    _train(first, "separable", qat_first, 3)
    torch.save([first.state_dict(), qat_first.state_dict()], tmp_path / "checkpoint.pt")
    second, qat_second = start()
    state, training = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second.load_state_dict(state)
    qat_second.load_state_dict(training)
    assert qat_second.steps == 3
    _train(second, "separable", qat_second, 3)
    one, other = qat.finalize(), qat_second.finalize()
    assert one.edges == other.edges
    for name, weight in one.weights.items():
        assert torch.equal(weight.codes, other.weights[name].codes)
        assert torch.equal(weight.scales, other.weights[name].scales)


@pytest.mark.parametrize(
    ("name", "recipe", "learn", "said"),
    [
        ("separable", "w4a8", False, "of recipe 'w8a8' with other rules than 'w4a8'"),
        ("residual", "w8a8", False, "of another module: its weights differ"),
        ("separable", "w8a8", True, "other learned scales"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    name: str, recipe: str, learn: bool, said: str
) -> None:
    _, qat = _trained("separable", "w8a8")
    other = prepare(make_net(name), recipe, (batch_for(name, 4),), learn_scales=learn)
    with pytest.raises(EdgekitError, match=said):
        other.load_state_dict(qat.state_dict())
    assert other.steps == 0
    with pytest.raises(EdgekitError, match="no training state"):
        other.load_state_dict({"step": 4})


def test_a_checkpoint_that_is_not_whole_changes_nothing() -> None:
    net, x = make_net("separable").train(), batch_for("separable", 4)
    qat = prepare(net, "w4a8", (x,), learn_scales=True)
    net(x)
    qat.step()
    state = copy.deepcopy(qat.state_dict())
    with torch.no_grad():
        for scales in qat.parameters():
            scales.mul_(2)
    net(2 * x)
    qat.step()
    before = repr(qat.state_dict())
    missing = [
        {name: value for name, value in state.items() if name != key}
        for key in ("rules", "steps", "weights", "observers", "samples")
    ]
    short = {name: item[:2] for name, item in state["observers"].items()}
    changes = ({"weights": 3}, {"steps": "many"}, {"observers": short}, {"samples": None})
    for broken in [*missing, *({**state, **change} for change in changes)]:
        with pytest.raises(EdgekitError, match="no whole training state|another module") as caught:
            qat.load_state_dict(broken)
        assert "\n" not in str(caught.value)
        assert repr(qat.state_dict()) == before
    qat.load_state_dict(state)
    assert repr(qat.state_dict()) == repr(state)


def test_what_was_never_seen_has_no_range() -> None:
    net = make_net("separable")
    qat = prepare(net, "w8a8", (batch_for("separable", 4),))
    with pytest.raises(EdgekitError, match="tensor 'x' has no range yet"):
        net(batch_for("separable", 4))
    with pytest.raises(EdgekitError, match="tensor 'x' was never seen"):
        qat.finalize()


def test_values_that_are_not_finite_are_named() -> None:
    net = make_net("separable").train()
    prepare(net, "w8a8", (batch_for("separable", 4),))
    with pytest.raises(EdgekitError, match="step 0: tensor 'x' holds infinities or NaN") as caught:
        net(torch.full((2, 3, 16, 16), float("nan")))
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        net.get_parameter("head.weight")[0, 0] = float("inf")
    with pytest.raises(EdgekitError, match=r"head\.weight: cannot be quantized"):
        net(batch_for("separable", 4))


def test_a_value_that_is_the_same_everywhere_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).train()
    nn.init.constant_(net.get_parameter("0.bias"), -1e3)
    x = torch.randn(4, 3, 6, 6)
    prepare(net, "w8a8", (x,))
    with pytest.raises(EdgekitError, match="^training step 0: tensor '1' is 0 everywhere$"):
        net(x)


def test_a_residual_branch_may_begin_at_zero() -> None:
    block = _block().train()
    with torch.no_grad():
        block.norm.weight.zero_()
        block.norm.bias.zero_()
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    qat = prepare(block, "w8a8", (x,))
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (block(x) - 1).square().mean().backward()
        optimizer.step()
        qat.step()
    assert float(block.norm.weight.abs().max()) > 0
    expected = block.eval()(x)
    (found,) = qat.finalize().simulate(x)
    assert torch.equal(found, expected)


def test_results_keep_the_modules_form() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"y": self.layer(x), "x": x, "none": None, "bias": self.layer.bias}

    net = Two().train()
    x = torch.randn(4, 3)
    prepare(net, "w8a8", (x,))
    found = net(x)
    assert list(found) == ["y", "x", "none", "bias"]
    assert torch.equal(found["x"], x)
    assert found["bias"] is net.layer.bias
    found["y"].sum().backward()
    assert net.layer.weight.grad is not None


def test_inputs_come_by_name_and_in_any_number() -> None:
    net = make_net("separable").train()
    prepare(net, "w8a8", (batch_for("separable", 1),))
    assert net(x=batch_for("separable", 3)).shape == (3, 5)
    assert net(batch_for("separable", 7)).shape == (7, 5)
    with pytest.raises(EdgekitError, match="takes 1 tensors"):
        net([1.0])
    with pytest.raises(EdgekitError, match="input 'x' must be torch.float32"):
        net(torch.zeros(2, 3, 8, 8))


class _OneBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 3:
            raise ValueError("three rows only")
        result: Tensor = self.linear(x)
        return result


def test_a_module_of_one_batch_size_trains_at_that() -> None:
    net = _OneBatch()
    prepare(net, "w8a8", (torch.randn(3, 4),))
    net.train()
    assert net(torch.randn(3, 4)).shape == (3, 4)
    with pytest.raises(EdgekitError, match="must be"):
        net(torch.randn(4, 4))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"recipe": "w8a8"}, "w8a8: its static ranges need example_inputs"),
        ({"recipe": "int4", "example_inputs": (torch.ones(1),)}, "give no example_inputs"),
        ({"recipe": "w8a8", "example_inputs": torch.ones(1)}, "must be a tuple of tensors"),
        ({"recipe": LayerRecipe.uniform("w8a8")}, "need example_inputs"),
        ({"recipe": edgekit.Recipe(()), "example_inputs": (torch.ones(1),)}, "of weights alone"),
        ({"recipe": "w8a8", "steps": 9, "milestones": FROZEN, "example_inputs": (1,)}, "not both"),
        ({"recipe": "int4", "steps": 9}, "static ranges"),
        (
            {"recipe": "w8a8", "example_inputs": (torch.ones(1),), "round_inputs": abs},
            "weights alone",
        ),
        ({"recipe": "float", "example_inputs": (batch_for("separable", 2),)}, "nothing is trained"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(EdgekitError, match=said):
        prepare(make_net("separable"), **arguments)


def test_what_is_no_module_or_cannot_be_traced_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(EdgekitError, match="expected a torch.nn.Module, got int"):
        prepare(3, "w8a8", (torch.ones(2, 3),))  # type: ignore[call-overload]
    with pytest.raises(EdgekitError, match="Branches cannot be traced"):
        prepare(Branches(), "w8a8", (torch.ones(2, 3),))

"""Copies of prepared modules, what stands around them, and how they compile."""

import copy
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.qat_models import make_lm, tokens
from support.traced_nets import batch_for, make_net
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import edgekit
from edgekit.errors import EdgekitError
from edgekit.models.activations import per_token
from edgekit.quantize.affine import quantize
from edgekit.quantize.grid import Grid
from edgekit.quantize.qat.milestones import Milestones
from edgekit.quantize.qat.traced import TracedTraining
from edgekit.quantize.qat.training import Training
from edgekit.quantize.qat.weight_only import WeightTraining
from edgekit.quantize.tensor import QuantizedTensor, Weight

NET = "separable"
DECAY = 0.5


def step(model: nn.Module, qat: Training, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model(batch_for(NET, 6, seed=seed)).square().mean().backward()
    optimizer.step()
    qat.step()
    optimizer.zero_grad()


def floats_of(value: Weight) -> Tensor:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def optimizer_of(model: nn.Module, qat: Training) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.parameters(), *qat.parameters()], lr=0.05)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_evaluates_and_finalizes_by_itself(use_buffers: bool, learn: bool) -> None:
    net, x = make_net(NET), batch_for(NET, 4)
    qat = edgekit.prepare(net, "w4a8", (x,), milestones=Milestones(0, 1), learn_scales=learn)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=use_buffers)
    optimizer = optimizer_of(net, qat)
    net.train()
    means: dict[str, Tensor] = {}
    ranges: dict[str, list[tuple[float, float]]] = {}
    scales: list[list[Tensor]] = []
    for seed in range(5):
        step(net, qat, optimizer, seed)
        average.update_parameters(net)
        for name, value in net.named_parameters():  # the definition, beside torch's
            now = value.detach().clone()
            means[name] = now if seed == 0 else means[name].lerp(now, 1 - DECAY)
        for name, ends in qat.calibration().ranges.items():
            ranges.setdefault(name, []).append(ends)
        scales.append([item.detach().clone() for item in qat.parameters()])
    kept = copy.deepcopy(qat.state_dict())
    average.eval()
    prepared = average(x)
    training = edgekit.training_of(average)
    assert isinstance(training, TracedTraining)
    assert training is not qat and training.model is average.module
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, means[name], rtol=1e-5, atol=1e-7)
    found = training.calibration()
    for name, each in ranges.items():
        both = torch.tensor(each[0])
        for later in each[1:]:
            now = torch.tensor(later)
            both = both.lerp(now, 1 - DECAY) if use_buffers else now
        torch.testing.assert_close(torch.tensor(found.ranges[name]), both, rtol=1e-5, atol=1e-6)
    for place, item in enumerate(training.parameters()):
        wanted = scales[0][place]
        for seen in scales[1:]:
            wanted = wanted.lerp(seen[place], 1 - DECAY) if use_buffers else seen[place]
        torch.testing.assert_close(item.detach(), wanted, rtol=1e-5, atol=1e-7)
    assert found.batches > 0
    network = training.finalize(max_batch=8)
    assert torch.equal(network.simulate(x)[0], prepared)
    if not learn:  # the head has no batch norm: its codes are those of its own average
        codes = quantize(means["head.weight"], Grid(4), axis=0, method="mse").codes
        assert torch.equal(network.weights["head.weight"].codes, codes)
    # Nothing of that has touched the original.
    assert repr(qat.state_dict()) == repr(kept)
    trained = net.eval()(x)
    assert not torch.equal(trained, prepared)
    assert torch.equal(qat.finalize().simulate(x)[0], trained)


def test_a_copy_goes_on_with_ranges_of_its_own() -> None:
    net, x = make_net(NET), batch_for(NET, 4)
    qat = edgekit.prepare(net, "w8a8", (x,), milestones=Milestones(0, 1), learn_scales=True)
    net.train()
    step(net, qat, optimizer_of(net, qat), 0)
    twin = copy.deepcopy(net)
    training = edgekit.training_of(twin)
    assert isinstance(training, TracedTraining)
    assert training.steps == qat.steps == 1
    assert repr(training.state_dict()) == repr(qat.state_dict())
    ours = {id(item) for item in [*net.parameters(), *net.buffers(), *qat.parameters()]}
    theirs = [*twin.parameters(), *twin.buffers(), *training.parameters()]
    assert not ours & {id(item) for item in theirs}
    before = repr(qat.state_dict())
    step(twin, training, optimizer_of(twin, training), 1)
    assert repr(qat.state_dict()) == before
    assert qat.calibration().batches == 1
    assert training.calibration().batches == 2
    assert edgekit.training_of(copy.copy(net)) is qat  # a shallow copy shares all


@pytest.mark.parametrize("learn", [False, True])
def test_an_average_of_a_language_model_has_codes_of_its_own(learn: bool) -> None:
    model = make_lm()
    qat = edgekit.prepare(model, "int4", learn_scales=learn)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    optimizer = optimizer_of(model, qat)
    model.train()
    for seed in range(4):
        ids = tokens(seed)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        qat.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    average.eval()
    with torch.no_grad():
        prepared = average(input_ids=tokens(9), use_cache=False).logits
    training = edgekit.training_of(average)
    assert isinstance(training, WeightTraining)
    codes = training.finalize()
    floats = {name: floats_of(value) for name, value in codes.items()}
    plain = make_lm(tied=False).eval()
    plain.load_state_dict(floats)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=tokens(9), use_cache=False).logits, prepared)
    own = qat.finalize()
    pairs = [(own[name], codes[name]) for name in qat._quantizers]
    for one, other in pairs:
        assert isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor)
    assert any(not torch.equal(floats_of(one), floats_of(other)) for one, other in pairs)


def test_the_module_is_what_it_was_when_all_is_done() -> None:
    for net, arguments in (
        (make_net(NET), (("w8a8", (batch_for(NET, 4),)))),
        (make_lm(), ("int4",)),
    ):
        buffers = [name for name, _ in net.named_buffers()]
        keys = list(net.state_dict())
        qat = edgekit.prepare(net, *arguments, learn_scales=True)
        assert list(net.state_dict()) == keys
        assert len(list(net.buffers())) > len(buffers)
        qat.remove()
        assert [name for name, _ in net.named_buffers()] == buffers
        with pytest.raises(EdgekitError, match="is not prepared"):
            edgekit.training_of(net)


def test_a_prepared_model_is_not_pickled(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    edgekit.prepare(net, "int8")
    traced = make_net(NET)
    edgekit.prepare(traced, "w8a8", (batch_for(NET, 4),))
    for each in (net, traced):
        with pytest.raises(EdgekitError, match="not pickled: save its state_dict"):
            torch.save(each, tmp_path / "model.pt")


def test_scales_that_moved_after_the_optimizer_was_made_are_named() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    qat = edgekit.prepare(net, "int8", learn_scales=True)
    optimizer_of(net, qat)
    net.double()
    with pytest.raises(EdgekitError, match="0.weight: the model was moved or converted after"):
        qat.step()
    net.float()
    optimizer = optimizer_of(net, qat)
    net(torch.randn(4, 8)).square().mean().backward()
    before = [item.detach().clone() for item in qat.parameters()]
    optimizer.step()
    qat.step()
    assert all(not torch.equal(one, two) for one, two in zip(before, qat.parameters(), strict=True))


@pytest.fixture
def process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [DistributedDataParallel, DataParallel])
def test_a_prepared_module_trains_inside_a_parallel_one(
    kind: Callable[[nn.Module], nn.Module], process_group: None
) -> None:
    net, x = make_net(NET), batch_for(NET, 4)
    twin = copy.deepcopy(net)
    qat, plain = (
        edgekit.prepare(each, "w8a8", (x,), milestones=Milestones(0, 1)) for each in (net, twin)
    )
    around = kind(net)
    assert edgekit.training_of(around) is qat
    for model, training in ((around, qat), (twin, plain)):
        model.train()
        optimizer = optimizer_of(model, training)
        for seed in range(3):
            step(model, training, optimizer, seed)
        model.eval()
    assert torch.equal(around(x), twin(x))
    network = qat.finalize()
    assert network.edges == plain.finalize().edges
    with pytest.raises(EdgekitError, match=f"is wrapped in {kind.__name__}: give .* model.module"):
        edgekit.prepare(around, "int8")
    with pytest.raises(EdgekitError, match=r"give the module inside, model\.module$"):
        edgekit.export(around, (x,), Path("nowhere"), target="onnx")


def _compiled(net: nn.Module) -> nn.Module:
    found = torch.compile(net)
    assert isinstance(found, nn.Module)
    return found


def average_of(net: nn.Module) -> nn.Module:
    return AveragedModel(net)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (torch.compile, "is compiled by torch.compile: give the module inside, model._orig_mod;"),
        (lambda net: nn.Sequential(_compiled(net)), "0: is compiled .* model.0._orig_mod;"),
        (average_of, "is an average of models: give the module inside, model.module;"),
        (lambda net: torch.jit.trace(net, torch.ones(2, 4)), "is TorchScript.* that it was made"),
    ],
)
def test_what_is_around_a_module_is_refused_by_name(
    wrap: Callable[[nn.Module], nn.Module], said: str
) -> None:
    around, x = wrap(nn.Linear(4, 4)), torch.ones(2, 4)
    for arguments in (("int8",), ("w8a8", (x,))):
        with pytest.raises(EdgekitError, match=said) as caught:
            edgekit.prepare(around, *arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(EdgekitError, match=said.rstrip(";")):
        edgekit.export(around, (x,), Path("nowhere"), target="onnx")


def test_a_prepared_module_is_not_exported() -> None:
    net = nn.Linear(4, 4)
    edgekit.prepare(net, "int8")
    with pytest.raises(EdgekitError, match="is prepared for training: export what its finalize"):
        edgekit.export(net, (torch.ones(2, 4),), Path("nowhere"), target="onnx")


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_a_weight_that_is_computed_is_refused(change: Callable[[nn.Module], Any]) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    change(net[0])
    with pytest.raises(EdgekitError, match="the module's weight is computed from it"):
        edgekit.prepare(net, "int8")


class _Own(nn.Module):
    """A table, a head tied to it, linears, and a matrix that torch has no module for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.mixing = _Mixing()
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        result: Tensor = self.head(self.mixing(x + self.down(torch.relu(self.up(x)))))
        return result


class _Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("int4", {}),  # searched ranges, which are kept for some steps
        ("w4g32a", {"learn_scales": True}),
        ("int8", {"round_inputs": lambda x: per_token(x, x)}),
    ],
)
def test_weights_train_in_one_compiled_graph(recipe: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = _Own()
    compiled = copy.deepcopy(plain)
    when = Milestones(0, 2)
    trainings = [
        edgekit.prepare(each, recipe, milestones=when, **options) for each in (plain, compiled)
    ]
    torch._dynamo.reset()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    optimizers = [optimizer_of(*each) for each in zip((plain, compiled), trainings, strict=True)]
    for seed in range(23):  # beyond two renewals of searched ranges
        ids = torch.randint(0, 48, (3, 8), generator=torch.Generator().manual_seed(seed))
        for forward in (plain.train(), run):
            forward(ids).square().mean().backward()
        pairs = [
            [*m.parameters(), *t.parameters()]
            for m, t in zip((plain, compiled), trainings, strict=True)
        ]
        for one, other in zip(*pairs, strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
        for training, optimizer in zip(trainings, optimizers, strict=True):
            optimizer.step()
            training.step()
            optimizer.zero_grad()
    plain.eval(), compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(ids), plain(ids))
    one, other = (training.finalize() for training in trainings)
    for name, value in one.items():
        if isinstance(value, QuantizedTensor):
            assert torch.equal(value.codes, other[name].codes)
            assert torch.equal(value.scales, other[name].scales)


def test_a_compiled_step_names_a_weight_that_cannot_be_quantized() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    edgekit.prepare(net, "int8")
    torch._dynamo.reset()
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    run(torch.ones(2, 8))
    with torch.no_grad():
        net.get_parameter("0.weight")[0, 0] = float("nan")
    with pytest.raises(EdgekitError, match=r"0\.weight: cannot be quantized: .* infinities or NaN"):
        run(torch.ones(2, 8))


def test_static_ranges_run_uncompiled_where_that_is_allowed() -> None:
    net, x = make_net(NET).train(), batch_for(NET, 4)
    edgekit.prepare(net, "w8a8", (x,))
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net, backend="aot_eager")(x), twin(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="keeps its ranges as numbers"):
        torch.compile(net, fullgraph=True, backend="aot_eager")(x)

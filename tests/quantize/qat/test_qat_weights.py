"""Training of the weights of untraced models: what is rounded, tied tensors, and codes in files."""

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support.gguf_models import small_model
from support.qat_models import make_lm, tokens
from torch import Tensor, nn
from transformers import Lfm2ForCausalLM

import edgekit
from edgekit.errors import EdgekitError
from edgekit.exporters.readback import read_weights
from edgekit.models.activations import per_token
from edgekit.models.checkpoint import Checkpoint
from edgekit.models.config import ModelConfig
from edgekit.quantize.by_scheme import grid_of, quantize_weight
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.qat.milestones import Milestones
from edgekit.quantize.qat.weight_only import WeightTraining
from edgekit.quantize.recipe import Recipe, Rule, preset
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.storage import load_quantized
from edgekit.quantize.tensor import QuantizedTensor, Weight
from edgekit.workflows.api import export_model

MIXED = Recipe(
    (
        Rule(r"lm_head\.weight", parse_scheme("w4g32")),
        Rule(r"model\.embed_tokens\.weight", parse_scheme("w8")),
        Rule(r".*feed_forward\.w2\.weight", parse_scheme("w8g32")),
        Rule(r".*\.(q|k)_proj\.weight", parse_scheme("float")),
        Rule(r".*", parse_scheme("w4g64a")),
    ),
    name="mixed.toml",
)


def train(
    model: Lfm2ForCausalLM, qat: WeightTraining, steps: int, rate: float = 3e-3
) -> list[float]:
    parameters = [*model.parameters(), *qat.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    model.train()
    losses = []
    for step in range(qat.steps, qat.steps + steps):
        ids = tokens(step % 3)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        qat.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: Lfm2ForCausalLM) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens(9), use_cache=False).logits
    return found


def floats(value: Weight) -> Tensor:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def with_codes(codes: dict[str, Weight], seed: int = 0) -> Lfm2ForCausalLM:
    """Return a float model whose weights are what the codes stand for, the head its own."""
    model = make_lm(seed, tied=False)
    model.load_state_dict({name: floats(value) for name, value in codes.items()})
    return model


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("recipe", ["int4", "int8", MIXED], ids=["int4", "int8", "mixed"])
def test_what_was_trained_is_what_comes_out(recipe: str | Recipe, learn: bool) -> None:
    model = make_lm()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    qat = edgekit.prepare(model, recipe, learn_scales=learn)
    losses = train(model, qat, 6)
    assert losses[-1] < losses[0]
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    prepared = logits(model)
    codes = qat.finalize()
    assert list(codes) == keys
    assert torch.equal(logits(with_codes(codes)), prepared)
    assert not torch.equal(logits(model), prepared)  # it is the float model again
    given = preset(recipe) if isinstance(recipe, str) else recipe
    for name, value in codes.items():
        rule = next((rule for rule in given.rules if rule.matches(name)), None)
        weight = model.state_dict()[name]
        if rule is None or rule.scheme.is_float or weight.ndim != 2:
            assert isinstance(value, Tensor)
            assert torch.equal(value, weight)
            assert value.data_ptr() != weight.data_ptr()
            continue
        assert isinstance(value, QuantizedTensor)
        expected = quantize_weight(rule.scheme, weight, rule.range)
        assert (value.bits, value.group_size) == (expected.bits, expected.group_size)
        assert torch.equal(value.codes, expected.codes) or learn
        assert torch.equal(grid_of(rule.scheme).scales.round(value.scales), value.scales)


def test_tied_stays_tied() -> None:
    model = make_lm()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    qat = edgekit.prepare(model, "int4", learn_scales=True)
    train(model, qat, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list(qat.parameters())) == 13  # five and seven linears, and one table
    codes = qat.finalize()
    assert codes[HEAD] is codes[EMBEDDING]


def test_a_tied_table_may_have_two_schemes() -> None:
    model = make_lm()
    qat = edgekit.prepare(model, MIXED)
    train(model, qat, 2)
    codes = qat.finalize()
    table, head = codes[EMBEDDING], codes[HEAD]
    assert isinstance(table, QuantizedTensor)
    assert isinstance(head, QuantizedTensor)
    assert (table.bits, table.granularity, head.bits, head.group_size) == (8, "channel", 4, 32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rounding_begins_when_the_milestone_says() -> None:
    model, twin = make_lm(), make_lm()
    qat = edgekit.prepare(model, "int4", milestones=Milestones(0, 2))
    ids = tokens()
    same = []
    for _ in range(4):
        model.train()
        same.append(torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits))
        assert not torch.equal(logits(model), logits(twin))
        qat.step()
    assert same == [True, True, False, False]


def test_the_gradient_is_the_rounded_models() -> None:
    """Straight through: what the weights of the float model of the codes would get."""
    model = make_lm()
    recipe = Recipe((Rule(".*", parse_scheme("w8")),))  # minimum and maximum: nothing is clipped
    edgekit.prepare(model, recipe)
    twin = with_codes(edgekit.prepare(copy_of(model), recipe).finalize())
    ids = tokens()
    for one in (model, twin):
        one.train()(input_ids=ids, labels=ids).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        assert expected is not None
        if name == EMBEDDING:
            assert theirs[HEAD].grad is not None
            expected = expected + theirs[HEAD].grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def copy_of(model: Lfm2ForCausalLM) -> Lfm2ForCausalLM:
    twin = make_lm(1)
    twin.load_state_dict(model.state_dict())
    return twin


def test_a_copy_trains_on_its_own() -> None:
    model = make_lm()
    edgekit.prepare(model, "int4")
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        twin.model.layers[0].feed_forward.w1.weight.mul_(3)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_gradient_checkpointing_and_autocast_work() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_lm()
        edgekit.prepare(model, "int4")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = tokens()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([item.grad for item in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    model = make_lm()
    qat = edgekit.prepare(model, "int4")
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, qat, 3)
        assert losses[-1] < losses[0]
    assert all(item.dtype == torch.float32 for item in model.parameters())
    half = make_lm().to(torch.bfloat16)
    qat = edgekit.prepare(half, "int4")
    prepared = logits(half)
    assert torch.equal(logits(with_codes(qat.finalize()).to(torch.bfloat16)), prepared)


def test_inputs_are_rounded_as_the_engine_does() -> None:
    model, twin = make_lm(), make_lm()
    weight = torch.empty(0)

    def rounding(x: Tensor) -> Tensor:
        return per_token(x, weight)  # type: ignore[arg-type]  # which it does not look at

    edgekit.prepare(model, "int8", round_inputs=rounding)
    edgekit.prepare(twin, "int8")
    found, plain = logits(model), logits(twin)
    assert not torch.equal(found, plain)
    assert float((found - plain).norm()) < 0.05 * float(plain.norm())
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(item.grad is not None for item in model.parameters())
    layer = nn.Linear(32, 4)
    linear = nn.Sequential(layer)
    edgekit.prepare(linear, "w8", round_inputs=rounding)
    x = torch.randn(3, 32)
    expected = nn.functional.linear(
        rounding(x),
        quantize_weight(parse_scheme("w8"), layer.weight).dequantize(),
        layer.bias,
    )
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_padding_in_a_batch_changes_no_other_token(training: bool) -> None:
    """A prepared model heeds `attention_mask` as the model does; inputs are rounded by token."""
    model, weight = make_lm(), torch.empty(0)
    edgekit.prepare(
        model,
        "int8",
        round_inputs=lambda x: per_token(x, weight),  # type: ignore[arg-type]
    )
    model.train(training)
    ids, mask = tokens(), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        whole = model(input_ids=ids[:1]).logits[0]
        alone = model(input_ids=ids[1:, 5:]).logits[0]
        unmasked = model(input_ids=ids).logits
    # a code that rounds the other way moves logits a little
    assert float((found[0] - whole).norm()) < 0.01 * float(whole.norm())
    assert float((found[1, 5:] - alone).norm()) < 0.01 * float(alone.norm())
    assert float((unmasked[1, 5:] - alone).norm()) > 0.1 * float(alone.norm())


def test_the_optimizer_may_call_step() -> None:
    model = make_lm()
    qat = edgekit.prepare(model, "int4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: qat.step())
    for _ in range(3):
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert qat.steps == 3


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate"
)
def test_hugging_faces_trainer_trains_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = make_lm()
    qat = edgekit.prepare(model, "int4")
    before = logits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer.register_step_post_hook(lambda *_: qat.step())
    rows = [{"input_ids": row, "labels": row} for row in tokens(rows=16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule)).train()
    assert qat.steps == 5
    prepared = logits(model)
    assert not torch.equal(prepared, before)
    torch.testing.assert_close(logits(with_codes(qat.finalize())), prepared, rtol=0, atol=0)


def test_a_recipe_that_matches_nothing_is_refused() -> None:
    recipe = Recipe((Rule(".*experts.*", parse_scheme("w4g32")),), name="moe.toml")
    model = make_lm()
    with pytest.raises(EdgekitError, match=r"moe.toml: rule 1: .* matches no tensor of the model"):
        edgekit.prepare(model, recipe)
    convolution = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    recipe = Recipe((Rule("0.weight", parse_scheme("w8")),))
    with pytest.raises(EdgekitError, match=r"only convolutions, such as 0\.weight.*example_inputs"):
        edgekit.prepare(convolution, recipe)
    with pytest.raises(EdgekitError, match="float: leaves every tensor float"):
        edgekit.prepare(model, "float")
    with pytest.raises(EdgekitError, match="w4g256 cannot hold it"):
        edgekit.prepare(model, "w4g256")
    qat = edgekit.prepare(model, "int4")
    with pytest.raises(EdgekitError, match="is prepared already"):
        edgekit.prepare(model, "int4")
    qat.remove()
    edgekit.prepare(model, "int8")


@pytest.mark.parametrize(
    ("recipe", "bits", "group"), [("int4", 4, 32), ("w4g64", 4, 64), ("w4", 4, None)]
)
def test_a_module_without_a_vocabulary_takes_every_recipe(
    recipe: str, bits: int, group: int | None
) -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    codes = edgekit.prepare(net, recipe).finalize()
    weight = codes["0.weight"]
    assert isinstance(weight, QuantizedTensor)
    assert (weight.bits, weight.group_size) == (bits, group)


@pytest.mark.parametrize("recipe", ["cb3", "cb4nl", Recipe((Rule(".*", parse_scheme("cb2")),))])
def test_codebooks_are_refused_in_one_line(recipe: str | Recipe) -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(EdgekitError, match=r"0\.weight: cb\w+ is a codebook.* it takes float") as e:
        edgekit.prepare(net, recipe)
    assert "\n" not in str(e.value)
    assert "forward" not in vars(net[0])


@pytest.mark.parametrize("recipe", ["w4g32", "w8"])
def test_inference_rounds_the_weights_of_now(recipe: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 64, bias=False)).eval(), torch.randn(3, 64)
    qat = edgekit.prepare(net, recipe)
    before = net(x)
    net.get_parameter("0.weight").data.mul_(5)  # which torch's version counter does not see
    after = net(x)
    assert not torch.equal(before, after)
    weight = qat.finalize()["0.weight"]
    assert isinstance(weight, QuantizedTensor)
    assert torch.equal(after, nn.functional.linear(x, weight.dequantize()))


def test_rounding_may_begin_after_the_end() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64))
    qat = edgekit.prepare(net, "int4", milestones=Milestones(0, 9))
    net(torch.randn(3, 64)).sum().backward()
    qat.step()
    assert isinstance(qat.finalize()["0.weight"], QuantizedTensor)


def test_a_weight_that_another_module_reads_is_found() -> None:
    model = nn.MultiheadAttention(32, 4)
    qat = edgekit.prepare(model, Recipe((Rule(r"out_proj\.weight", parse_scheme("w8")),)))
    x = torch.randn(5, 2, 32)
    model.train()(x, x, x)[0].sum().backward()
    with pytest.raises(EdgekitError, match=r"out_proj\.weight: training never ran the module"):
        qat.step()
    for parameter in model.parameters():
        parameter.grad = None
    qat.step()
    with pytest.raises(EdgekitError, match=r"out_proj\.weight: training never ran"):
        qat.finalize()


def test_training_goes_on_from_a_checkpoint_of_the_same_recipe() -> None:
    model, qat = make_lm(), None
    qat = edgekit.prepare(model, "int4", learn_scales=True)
    train(model, qat, 2)
    other = make_lm(1)
    again = edgekit.prepare(other, "int4", learn_scales=True)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(qat.state_dict())
    assert again.steps == 2
    assert torch.equal(logits(other), logits(model))
    for recipe in ("int8", MIXED):
        wrong = edgekit.prepare(make_lm(), recipe, learn_scales=True)
        with pytest.raises(EdgekitError, match="of recipe 'int4' with other rules"):
            wrong.load_state_dict(qat.state_dict())
        assert wrong.steps == 0


# --- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "small", num_hidden_layers=2)


@pytest.mark.parametrize(
    "target", ["gguf", "onnx", pytest.param("executorch", marks=pytest.mark.slow)]
)
def test_the_file_of_an_engine_is_what_was_trained(
    folder: Path, tmp_path: Path, target: str
) -> None:
    model = Lfm2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    qat = edgekit.prepare(model, "int4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(20, 4000, (2, 16), generator=torch.Generator().manual_seed(0))
    model.train()
    for _ in range(3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        qat.step()
        optimizer.zero_grad()
    path = tmp_path / "codes.safetensors"
    qat.save(path, "small", Checkpoint.open(folder).sha256(), loss="cross-entropy")
    codes = load_quantized(path)
    assert codes[HEAD] is codes[EMBEDDING]
    artifact = export_model(str(folder), tmp_path / "out", target=target, codes=path, context=64)
    manifest = artifact.decoder
    assert manifest.verification["verified"]
    assert (manifest.method, manifest.recipe) == ("qat", "int4")
    assert manifest.facts == {"steps": 3, "loss": "cross-entropy"}
    found = dict(read_weights(target, artifact.model_path, ModelConfig.load(folder)))
    assert set(found) | {HEAD} == set(codes)
    for name, value in found.items():
        assert torch.equal(value.reshape(floats(codes[name]).shape), floats(codes[name])), name


def test_a_file_says_what_it_is_about(tmp_path: Path) -> None:
    qat = edgekit.prepare(make_lm(), "int4")
    with pytest.raises(EdgekitError, match="sha256 must be"):
        qat.save(tmp_path / "codes.safetensors", "small", "none")
    assert list(tmp_path.iterdir()) == []


# --- the example --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    path = Path(__file__).parents[3] / "examples" / "qat_lfm2_tiny.py"
    spec = importlib.util.spec_from_file_location("qat_lfm2_tiny", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["qat_lfm2_tiny"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["qat_lfm2_tiny"]


def test_the_example_resumes_and_refuses(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = "Once upon a time there was a little dog. He liked to play in the park with a ball. "
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text(story * 20)
    monkeypatch.setattr(example, "SAVE_EVERY", 2)
    arguments = ["--data", str(tmp_path), "--steps", "4", "--rows", "1", "--context", "32"]

    def run(work: str, *more: str) -> Result:
        options = [*arguments, "--work", str(tmp_path / work), "--chunks", "2", *more]
        return CliRunner().invoke(example.main, options)

    whole = run("whole")
    assert whole.exit_code == 0, whole.output
    step = example.Run.step

    def killed(self: Any, ids: Tensor) -> float:  # noqa: ANN401
        if self.qat.steps == 3:
            raise KeyboardInterrupt
        return float(step(self, ids))

    monkeypatch.setattr(example.Run, "step", killed)
    assert run("parts").exit_code == 1
    monkeypatch.setattr(example.Run, "step", step)
    parts = run("parts")
    assert parts.exit_code == 0, parts.output
    assert "goes on from step 2" in parts.output
    one, other = (
        (tmp_path / work / "codes.safetensors").read_bytes() for work in ("whole", "parts")
    )
    assert one == other
    refused = run("parts", "--recipe", "int8")
    assert refused.exit_code == 1
    assert "checkpoint.pt: the checkpoint is of recipe 'int4'" in refused.output
    figures = json.loads((tmp_path / "whole" / "figures.json").read_text())
    assert figures["trained"]["float_perplexity"] > 1

"""LoRA adapters: merged by the definition, and refused where they are not the model's."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import run
from torch import Tensor

import edgekit
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.parts import AdapterFacts
from edgekit.models.adapter import Adapter
from edgekit.models.config import ModelConfig
from edgekit.models.source import resolve_model

QUERY = "model.layers.2.self_attn.q_proj"
W1 = "model.layers.0.feed_forward.w1"
EMBEDDING = "model.embed_tokens"
NORM = "model.layers.0.operator_norm.weight"
RANK, ALPHA = 4, 12.0

Tensors = dict[str, Tensor]


def config() -> ModelConfig:
    return resolve_model("lfm2-tiny").config


def factors(module: str, rank: int = RANK) -> Tensors:
    """Random factors of a linear, by PEFT's names."""
    rows, columns = config().tensor_shapes()[f"{module}.weight"]
    make = torch.Generator().manual_seed(len(module) + rank)
    return {
        f"base_model.model.{module}.lora_A.weight": torch.randn(rank, columns, generator=make) / 9,
        f"base_model.model.{module}.lora_B.weight": torch.randn(rows, rank, generator=make) / 9,
    }


def save(folder: Path, tensors: Tensors, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    usual = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    base = {"base_model_name_or_path": "someone/lfm2-tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(usual | base | settings))
    return folder


def product(tensors: Tensors, module: str) -> Tensor:
    name = f"base_model.model.{module}"
    return tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()


def check(folder: Path, expected: dict[str, Tensor]) -> None:
    """Compare the merged weights with float64 ones; all others are the model's own."""
    own, merged = resolve_model("lfm2-tiny"), resolve_model("lfm2-tiny", adapter=folder)
    for name in own.config.tensor_shapes():
        before, after = own.checkpoint.tensor(name), merged.checkpoint.tensor(name)
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        if name not in expected:
            assert torch.equal(after, before), name
            continue
        assert not torch.equal(after, before), name
        torch.testing.assert_close(after.double(), expected[name], rtol=2**-7.9, atol=1e-6)


def base(module: str) -> Tensor:
    return resolve_model("lfm2-tiny").checkpoint.tensor(f"{module}.weight").double()


@pytest.mark.parametrize(
    ("settings", "ranks", "scales"),
    [
        ({}, (4, 4), (3.0, 3.0)),
        ({"use_rslora": True}, (4, 4), (6.0, 6.0)),
        (
            {"rank_pattern": {r"layers\.\d\.self_attn.q_proj": 2}, "alpha_pattern": {"w1": 7}},
            (2, 4),
            (6.0, 7 / 4),
        ),
        ({"use_rslora": True, "rank_pattern": {"w1": 9}}, (4, 9), (6.0, 4.0)),
        ({"fan_in_fan_out": True}, (4, 4), (3.0, 3.0)),  # as PEFT: of a Linear it has no meaning
    ],
)
def test_an_update_is_added(
    tmp_path: Path, settings: dict[str, Any], ranks: tuple[int, int], scales: tuple[float, float]
) -> None:
    tensors, expected = Tensors(), {}
    for module, rank, scale in zip((QUERY, W1), ranks, scales, strict=True):
        tensors |= factors(module, rank)
        expected[f"{module}.weight"] = base(module) + scale * product(tensors, module)
    check(save(tmp_path / "lora", tensors, **settings), expected)


def test_dora_scales_each_row_to_its_magnitude(tmp_path: Path) -> None:
    tensors = factors(QUERY)
    rows = config().tensor_shapes()[f"{QUERY}.weight"][0]
    magnitude = torch.linspace(0.5, 2, rows)
    tensors[f"base_model.model.{QUERY}.lora_magnitude_vector"] = magnitude
    summed = base(QUERY) + 3 * product(tensors, QUERY)
    norms = summed.square().sum(1, keepdim=True).sqrt()
    expected = magnitude.double()[:, None] * summed / norms
    check(save(tmp_path / "dora", tensors, use_dora=True), {f"{QUERY}.weight": expected})


def test_an_embedding_and_tensors_that_are_saved_whole(tmp_path: Path) -> None:
    rows, width = config().tensor_shapes()[f"{EMBEDDING}.weight"]
    make = torch.Generator().manual_seed(0)
    a, b = torch.randn(RANK, rows, generator=make), torch.randn(width, RANK, generator=make)
    norm = torch.rand(width, generator=make) + 2
    name = f"base_model.model.{EMBEDDING}"
    own = resolve_model("lfm2-tiny").checkpoint.tensor(f"{EMBEDDING}.weight")
    tensors = {
        f"{name}.lora_embedding_A": a,
        f"{name}.lora_embedding_B": b,
        f"{name}.base_layer.weight": own,  # which PEFT saves with it
        f"base_model.model.{NORM}": norm,
    }
    summed = own.double() + ALPHA / RANK * (b.double() @ a.double()).T
    check(save(tmp_path / "lora", tensors), {f"{EMBEDDING}.weight": summed, NORM: norm.double()})


def _with(**settings: object) -> Callable[[Path], object]:
    return lambda folder: save(folder, factors(QUERY), **settings)


def _tensors(**tensors: Tensor) -> Callable[[Path], object]:
    named = {key.replace("__", "."): value for key, value in tensors.items()}
    return lambda folder: save(folder, factors(QUERY) | named)


def _half(folder: Path) -> None:
    tensors = factors(QUERY)
    del tensors[f"base_model.model.{QUERY}.lora_A.weight"]
    save(folder, tensors)


def _convolution(folder: Path) -> None:
    name = "base_model.model.model.layers.0.conv.conv"
    parts = {
        f"{name}.lora_A.weight": torch.ones(4, 1, 3),
        f"{name}.lora_B.weight": torch.ones(9, 4, 1),
    }
    save(folder, parts)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder.mkdir(), "holds no adapter_config.json: `adapter` takes the folder"),
        (
            lambda folder: (save(folder, {}), (folder / "adapter_model.safetensors").unlink()),
            "holds no adapter_model.safetensors: save the adapter with save_pretrained",
        ),
        (_with(peft_type="IA3"), "peft_type 'IA3' is not merged: only LORA is"),
        (_with(init_lora_weights="pissa_niter_4"), "changed the model's own weights: merge it"),
        (_with(bias="lora_only"), "trained biases"),
        (_with(use_dora=True), "magnitudes (lora_magnitude_vector) lack"),
        (_with(r=8), "the factors of model.layers.2.self_attn.q_proj have shapes [4, 256] and"),
        (_with(r=0), "the rank of model.layers.2.self_attn.q_proj must be 1 or more: 0"),
        (_with(alora_invocation_tokens=[1, 2]), "an activated LoRA"),
        (
            _with(lora_alpha=10**400),
            "lora_alpha of model.layers.2.self_attn.q_proj must be finite",
        ),
        (_with(lora_alpha="x"), "lora_alpha of model.layers.2.self_attn.q_proj must be finite"),
        (_with(rank_pattern={"(": 2}), "rank_pattern: "),
        (_half, "q_proj has one of lora_A.weight and lora_B.weight only"),
        (_convolution, "adapts model.layers.0.conv.conv, which is no linear and no embedding"),
        (
            _tensors(base_model__model__other=torch.ones(1)),
            "LoRA can be merged into, such as 'other'",
        ),
        (
            _tensors(lm_head__weight=torch.ones(4096, 256)),
            "adapts lm_head, which is the embedding's",
        ),
    ],
)
def test_what_is_no_lora_of_the_model_is_refused(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "lora")
    with pytest.raises(EdgekitError) as caught:
        Adapter.open(tmp_path / "lora", config())
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_factors_that_are_not_finite_are_named(tmp_path: Path) -> None:
    tensors = factors(QUERY)
    tensors[f"base_model.model.{QUERY}.lora_A.weight"][0, 0] = math.nan
    found = resolve_model("lfm2-tiny", adapter=save(tmp_path / "lora", tensors))
    with pytest.raises(EdgekitError, match=f"{QUERY}.weight holds NaN"):
        found.checkpoint.tensor(f"{QUERY}.weight")


def test_an_export_of_an_adapted_model_says_so_and_is_verified_anew(tmp_path: Path) -> None:
    lora = save(
        tmp_path / "my-lora", factors(QUERY) | factors(W1), base_model_name_or_path="x/other"
    )
    out, said = tmp_path / "out", "my-lora was trained on 'x/other', and is merged into lfm2-tiny"
    with pytest.warns(UserWarning, match=said):
        made = edgekit.export("lfm2-tiny", out, target="gguf", adapter=lora, context=64)
    assert made.manifest.verification["verified"]
    facts = made.decoder.model
    adapter = resolve_model("lfm2-tiny", adapter=lora).adapter
    assert adapter is not None
    assert facts.adapter == AdapterFacts("my-lora", adapter.sha256, "x/other")
    plain = resolve_model("lfm2-tiny")
    assert facts.sha256 != plain.checkpoint.sha256()
    again = run("verify", out)
    assert again.exit_code == 2
    assert (
        "the adapter 'my-lora' is merged into it: `edgekit verify` takes its folder" in again.stderr
    )
    assert run("verify", out, "--adapter", lora).exit_code == 0
    done = run(
        "quantize", "lfm2-tiny", "--adapter", lora, "-o", tmp_path / "q.safetensors", "--json"
    )
    assert done.exit_code == 0
    assert json.loads(done.stdout)["model"]["adapter"]["name"] == "my-lora"
    assert said in done.stderr
    codes = run("export", "lfm2-tiny", "--codes", tmp_path / "q.safetensors", "--target", "gguf")
    assert codes.exit_code == 2
    assert "was made of other weights than those of lfm2-tiny" in codes.stderr


def test_an_adapter_is_for_language_models() -> None:
    done = run("export", "net.py:make", "--target", "onnx", "--adapter", "lora")
    assert done.exit_code == 2
    assert "--adapter is for language models" in done.stderr

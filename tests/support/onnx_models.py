"""Small LFM2s written by the ONNX target, and a plain loop over the states of a session."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from edgekit.exporters.contract.layout import Options
from edgekit.exporters.contract.weights import Weights
from edgekit.exporters.contract.writer import Job
from edgekit.exporters.onnx import decoder as target
from edgekit.exporters.onnx.layout import model_file
from edgekit.models.config import ModelConfig
from edgekit.models.eager import build_eager
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.recipe import Recipe, resolve
from edgekit.quantize.tensor import Weight

Abi = Literal["genai", "transformersjs"]
Logits = NDArray[np.float32]
CONTEXT = 48
C, A = "conv", "full_attention"


class Session(Protocol):
    """What is needed of ONNX Runtime's session, and of ONNX's reference evaluator."""

    def run(self, names: None, feeds: Mapping[str, Any]) -> list[Any]: ...


def small_config(layers: tuple[str, ...] = (C, A, C), tied: bool = True) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "lfm2",
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "block_auto_adjust_ff_dim": False,
            "layer_types": list(layers),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "bos_token_id": 3,
            "eos_token_id": [7, 9],
            "tie_word_embeddings": tied,
        }
    )


def random_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """bf16; norms are near one, so that a norm that is left out shows."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            1 + 0.3 * torch.randn(shape, generator=generator)
            if len(shape) == 1
            else torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        ).bfloat16()
        for name, shape in config.tensor_shapes().items()
    }


@dataclass(frozen=True)
class Written:
    """A model's folder and the weights that it was made of."""

    folder: Path
    path: Path
    config: ModelConfig
    weights: dict[str, Weight]


def write(
    folder: Path,
    config: ModelConfig,
    recipe: Recipe,
    abi: Abi = "genai",
    portable: bool = False,
) -> Written:
    options = Options(abi=abi, portable=portable)
    tensors = random_weights(config)
    shapes, tied = config.tied_shapes()
    rows = resolve(recipe, shapes, tied)
    weights = dict(quantize_tensors(rows, tensors.__getitem__))
    (folder / "config.json").write_text("{}")
    given = cast(Weights, dict(weights))
    job = Job("small", config, rows, given, CONTEXT, None, options)
    target.write(job, folder, lambda stage: None)
    return Written(folder, folder / model_file(rows, options), config, weights)


def eager_logits(config: ModelConfig, weights: Mapping[str, Weight], tokens: list[int]) -> Logits:
    """Logits `[n, vocab]` of the eager model."""
    model = build_eager(config, weights.__getitem__, CONTEXT)
    with torch.inference_mode():
        return model.all_logits(torch.tensor([tokens]), torch.zeros(1, dtype=torch.long)).numpy()


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Loop:
    """Feeds tokens to a decoder's graph and hands its states back."""

    def __init__(
        self, model: Session, inputs: Mapping[str, list[int | str]], outputs: list[str]
    ) -> None:
        """`inputs` holds the shape of each input that must be given."""
        self._model, self._outputs = model, outputs
        self._asks = "num_logits_to_keep" in inputs
        self._position = 0
        # as Transformers.js begins: each symbol but batch_size is 0
        self._states = {
            name: np.zeros(
                [s if isinstance(s, int) else int(s == "batch_size") for s in shape], "f4"
            )
            for name, shape in inputs.items()
            if name.startswith("past")
        }

    def __call__(self, tokens: list[int], rows: int | None = None) -> Logits:
        """Logits `[rows, vocab]` of the last tokens, of one where nothing is asked for."""
        self._position += len(tokens)
        feeds: dict[str, Any] = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, self._position), np.int64),
            **self._states,
        }
        if rows is not None or self._asks:
            feeds["num_logits_to_keep"] = np.array(1 if rows is None else rows)
        found = dict(zip(self._outputs, self._model.run(None, feeds), strict=True))
        logits: Logits = found.pop("logits")[0]
        self._states = {past_of(name): value for name, value in found.items()}
        return logits


def loop(path: Path) -> Loop:
    model = session(path)
    shapes = {value.name: value.shape for value in model.get_inputs()}
    return Loop(model, shapes, [value.name for value in model.get_outputs()])


def past_of(name: str) -> str:
    if name.startswith("present_conv."):
        return name.replace("present", "past")
    return name.replace("present", "past" if name.endswith("conv") else "past_key_values")

"""A LoRA adapter in PEFT's format, merged into the weights of the model that it was trained on.

`W + s B A` (arXiv 2106.09685) with `s = alpha / r`, or `alpha / sqrt(r)` for a rank-stabilised
one (arXiv 2312.03732); of DoRA (arXiv 2402.09353) each row of that is scaled to its learned norm.
Names, configuration and the transposed pair of an embedding are PEFT's
(https://huggingface.co/docs/peft, checkpoint format). Tensors are merged one by one, as they are
read: sums in float32, rounded once to what the model is stored in.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit.common.files import load_json_object, sha256_of
from edgekit.common.limits import TooCostly, bounded
from edgekit.errors import EdgekitError, one_line
from edgekit.models.checkpoint import TensorEntry, WeightSource, read_header, read_tensor
from edgekit.models.config import ModelConfig
from edgekit.models.kinds import ADAPTER_CONFIG

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PAIRS = {
    ("lora_A.weight", "lora_B.weight"): False,
    ("lora_embedding_A", "lora_embedding_B"): True,
}
"""The two factors by the ends of their names, and whether their product is transposed."""
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin whose adapter belongs to weights that were changed for it."""


@dataclass(frozen=True)
class _Update:
    """What is added to a weight: `scale * b @ a`; `magnitude` is DoRA's, or None."""

    a: TensorEntry
    b: TensorEntry
    scale: float
    transposed: bool
    magnitude: TensorEntry | None


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model; build by `open`.

    `base` is the model that it was trained on, as it says. `updates` are what is added to which
    weight and `replaced` the weights that it holds whole (PEFT's `modules_to_save`).
    """

    folder: Path
    base: str | None
    updates: Mapping[str, _Update]
    replaced: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, folder: Path, config: ModelConfig) -> "Adapter":
        """Read the configuration and the file's head; refuse what is no LoRA of the model.

        EdgekitError names tensors that the model has not, of another shape or rank, and ways of
        adapting that are not merged here.
        """
        if not (folder / ADAPTER_CONFIG).is_file():
            raise EdgekitError(
                f"{folder}: holds no {ADAPTER_CONFIG}: `adapter` takes the folder of a PEFT adapter"
            )
        settings = _Settings(folder / ADAPTER_CONFIG)
        if not (folder / WEIGHTS).is_file():
            raise EdgekitError(
                f"{folder}: holds no {WEIGHTS}: save the adapter with save_pretrained, which "
                "writes safetensors (a pickle is not loaded)"
            )
        found = read_header(folder / WEIGHTS)
        updates, replaced = _matched(folder / WEIGHTS, settings, found, config)
        base = settings.values.get("base_model_name_or_path")
        return cls(folder, base if isinstance(base, str) and base else None, updates, replaced)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @cached_property
    def sha256(self) -> str:
        """Digest of its weights and of its configuration."""
        digests = [sha256_of(self.folder / name) for name in (WEIGHTS, ADAPTER_CONFIG)]
        return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return {"name": self.name, "sha256": self.sha256, "base": self.base}

    def of_another_model(self, *names: str) -> str | None:
        """Say that it was trained on another model than one of these names, where it was."""
        if self.base is None or _last(self.base) in {_last(name) for name in names}:
            return None
        return (
            f"the adapter {self.name} was trained on {self.base!r:.100}, and is merged into "
            f"{names[0]}: measure what comes out"
        )


@dataclass(frozen=True)
class Adapted:
    """The weights of a model with an adapter merged into them."""

    weights: WeightSource
    adapter: Adapter

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        return self.weights.shapes()

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor: the model's."""
        return self.weights.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, merged where the adapter has something for it."""
        whole = self.adapter.replaced.get(name)
        weight = (
            self.weights.tensor(name)
            if whole is None
            else read_tensor(name, whole).to(self.dtype(name))
        )
        update = self.adapter.updates.get(name)
        return weight if update is None else _merged(name, weight, update)

    def sha256(self) -> str:
        """Return a digest of both."""
        return hashlib.sha256(f"{self.weights.sha256()}+{self.adapter.sha256}".encode()).hexdigest()


def _merged(name: str, weight: Tensor, update: _Update) -> Tensor:
    a, b = (read_tensor(name, entry).float() for entry in (update.a, update.b))
    product = (b @ a).mul_(update.scale)
    result = (product.T if update.transposed else product).add(weight)
    if update.magnitude is not None:
        magnitude = read_tensor(name, update.magnitude).float().view(-1, 1)
        result *= magnitude / torch.linalg.vector_norm(result, dim=1, keepdim=True)
    if not bool(result.isfinite().all()):
        raise EdgekitError(f"{name}: is not finite once the adapter is merged")
    return result.to(weight.dtype).contiguous()


_LARGEST_ALPHA = 1e30  # far above any; JSON may hold integers that no float does


class _Settings:
    """What adapter_config.json says of ranks and scales."""

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, load_json_object(path)
        kind = self.values.get("peft_type")
        if kind != "LORA":
            raise EdgekitError(f"{path}: peft_type {kind!r:.60} is not merged: only LORA is")
        begun = self.values.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
            raise EdgekitError(
                f"{path}: init_lora_weights {begun!r:.60} changed the model's own weights: merge "
                "it with PEFT (merge_and_unload) and give what that saves"
            )
        if self.values.get("bias", "none") != "none" or self.values.get("lora_bias"):
            raise EdgekitError(
                f"{path}: trained biases are not merged here: merge with PEFT (merge_and_unload) "
                "and give what that saves"
            )
        if self.values.get("alora_invocation_tokens"):
            raise EdgekitError(
                f"{path}: an activated LoRA (alora_invocation_tokens) acts behind certain tokens "
                "only: it cannot be merged"
            )

    def rank(self, module: str) -> int:
        """Return the rank of a module's update."""
        rank = self._of(module, "rank_pattern", "r", 8)
        if type(rank) is not int or rank < 1:
            raise EdgekitError(f"{self.path}: the rank of {module} must be 1 or more: {rank!r:.60}")
        return rank

    def scale(self, module: str) -> float:
        """Return what the product of the factors is multiplied by."""
        alpha = self._of(module, "alpha_pattern", "lora_alpha", 8)
        if type(alpha) not in (int, float) or not abs(alpha) <= _LARGEST_ALPHA:
            raise EdgekitError(f"{self.path}: lora_alpha of {module} must be finite: {alpha!r:.60}")
        rank = self.rank(module)
        return float(alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank))

    def _of(self, module: str, pattern: str, usual: str, default: int) -> Any:  # noqa: ANN401 - JSON
        table = self.values.get(pattern) or {}
        if not isinstance(table, dict):
            raise EdgekitError(f"{self.path}: {pattern} must be a table: {table!r:.60}")
        try:
            with bounded():
                for key, value in table.items():
                    if re.match(rf"(.*\.)?({key})$", module):
                        return value
        except (re.error, TooCostly) as error:
            raise EdgekitError(f"{self.path}: {pattern}: {one_line(error, 80)}") from error
        return self.values.get(usual, default)


def _matched(
    path: Path, settings: _Settings, found: Mapping[str, TensorEntry], config: ModelConfig
) -> tuple[dict[str, _Update], dict[str, TensorEntry]]:
    """Give each tensor of the file its weight in the model."""
    left = {name.removeprefix(_PREFIX): entry for name, entry in found.items()}
    shapes = config.tensor_shapes()
    updates, replaced = dict[str, _Update](), dict[str, TensorEntry]()
    for weight, shape in shapes.items():
        module = weight.removesuffix(".weight")
        for (first, second), transposed in _PAIRS.items():
            a, b = (left.pop(f"{module}.{end}", None) for end in (first, second))
            if a is None and b is None:
                continue
            if a is None or b is None:
                raise EdgekitError(f"{path}: {module} has one of {first} and {second} only")
            magnitude = next(
                (left.pop(key) for end in _MAGNITUDES if (key := f"{module}.{end}") in left), None
            )
            update = _Update(a, b, settings.scale(module), transposed, magnitude)
            _check_update(path, module, shape, settings.rank(module), update)
            updates[weight] = update
        # An embedding that is adapted comes along whole, as it was before.
        wholes = [left.pop(key, None) for key in (weight, f"{module}.base_layer.weight")]
        whole = next((each for each in wholes if each is not None), None)
        if whole is not None:
            if whole.shape != shape:
                raise EdgekitError(
                    f"{path}: holds {weight} of shape {list(whole.shape)} whole, the model's is "
                    f"{list(shape)}"
                )
            replaced[weight] = whole
    _drop_tied_head(path, left, replaced, shapes)
    if left:
        name = next(iter(left))
        raise EdgekitError(
            f"{path}: {len(left)} of its {len(found)} tensors are for no weight of the model that "
            f"LoRA can be merged into, such as {name!r:.120}: it was trained on another model, or "
            "adapts more than linears and the embedding"
        )
    if settings.values.get("use_dora") and any(one.magnitude is None for one in updates.values()):
        raise EdgekitError(f"{path}: use_dora is set, but magnitudes (lora_magnitude_vector) lack")
    return updates, replaced


def _check_update(
    path: Path, module: str, shape: tuple[int, ...], rank: int, update: _Update
) -> None:
    if len(shape) != 2:
        raise EdgekitError(f"{path}: adapts {module}, which is no linear and no embedding")
    rows, columns = shape
    wanted = (
        ((rank, rows), (columns, rank)) if update.transposed else ((rank, columns), (rows, rank))
    )
    if (update.a.shape, update.b.shape) != wanted:
        raise EdgekitError(
            f"{path}: the factors of {module} have shapes {list(update.a.shape)} and "
            f"{list(update.b.shape)}; rank {rank} of this model's takes {list(wanted[0])} and "
            f"{list(wanted[1])}"
        )
    if update.magnitude is not None and (
        update.transposed or math.prod(update.magnitude.shape) != rows
    ):
        raise EdgekitError(
            f"{path}: DoRA of {module} is not merged here: merge it with PEFT (merge_and_unload) "
            "and give what that saves"
        )


def _drop_tied_head(
    path: Path,
    left: dict[str, TensorEntry],
    replaced: Mapping[str, TensorEntry],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Take out a head that repeats the embedding; refuse one that a tied model cannot have."""
    adapted = [name for name in left if name.startswith("lm_head.")]
    if "lm_head.weight" in shapes or not adapted:
        return
    head, table = left.get("lm_head.weight"), replaced.get("model.embed_tokens.weight")
    if (
        adapted == ["lm_head.weight"]
        and head is not None
        and table is not None
        and torch.equal(read_tensor("lm_head", head), read_tensor("embed_tokens", table))
    ):
        del left["lm_head.weight"]
        return
    raise EdgekitError(
        f"{path}: adapts lm_head, which is the embedding's own weight in this model (tied): it "
        "would change both; untie them in the model first"
    )


def _last(name: str) -> str:
    return Path(name).name.lower().replace("_", "-")

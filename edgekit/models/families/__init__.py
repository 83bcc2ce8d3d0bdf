"""Model families: a file for each, found by the `model_type` of a config.json.

A family's module has `read(keys) -> ModelConfig`, how its config.json is spelled;
`write(config) -> dict`, the spelling that transformers reads; and `architecture(config) ->
Architecture`, the blocks. A new family is a file and a line here, and what llama.cpp calls it in
`exporters/gguf/architectures.py`.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.models.architecture import Architecture
    from edgekit.models.config import ModelConfig
    from edgekit.models.config_keys import Keys

MODEL_TYPES: Mapping[str, str] = {
    "lfm2": "edgekit.models.families.lfm2",
    "llama": "edgekit.models.families.llama",
    "qwen3": "edgekit.models.families.qwen3",
}
_NOT_DENSE = {"lfm2_moe": "lfm2"}
"""Mixtures of experts, each with the dense family beside it."""


class Family(Protocol):
    """What a family's module offers; `Any` is the `ModelConfig` that its own `read` returns."""

    def read(self, keys: "Keys") -> "ModelConfig":
        """Read a config.json; EdgekitError names the key at fault."""
        ...

    def write(self, config: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return the keys of a config.json but for the token ids."""
        ...

    def architecture(self, config: Any) -> "Architecture":  # noqa: ANN401
        """Return the blocks of a model."""
        ...


def find_family(model_type: object) -> Family:
    """Return a family's module; EdgekitError for a type of model that is not known."""
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return cast(Family, importlib.import_module(MODEL_TYPES[model_type]))
    if isinstance(model_type, str) and model_type in _NOT_DENSE:
        raise EdgekitError(
            f"config: model_type {model_type!r} is a mixture of experts; "
            f"only dense text models (model_type {_NOT_DENSE[model_type]}) are supported"
        )
    shown = repr(model_type)
    raise EdgekitError(
        f"config: model_type {shown if len(shown) <= 60 else shown[:57] + '...'} is not supported; "
        f"supported: {', '.join(MODEL_TYPES)}, dense text models. Of others a torch module can be "
        "exported: edgekit export FILE.py:FUNCTION"
    )

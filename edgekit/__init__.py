"""edgekit: quantize once, export to edge engines, prove each file, run it and measure it.

The folders `exporters`, `quantize`, `runtime` and `devices` at the top of the repository are the
packages `edgekit.exporters` and so on: setuptools maps them (pyproject.toml), and the symbolic
links in this folder show them to a bare checkout, mypy and editors.

The names in `__all__` are the public ones. Each is imported when it is first used (PEP 562), so
that `import edgekit` costs nothing.
"""

import importlib
import os
from typing import TYPE_CHECKING

from edgekit.errors import EdgekitError, VerificationError
from edgekit.version import __version__ as __version__

if TYPE_CHECKING:
    from edgekit.formats.artifact.read import Artifact
    from edgekit.models.tokenizer import Tokenizer
    from edgekit.quantize.qat.milestones import Milestones
    from edgekit.quantize.qat.prepare import prepare, training_of
    from edgekit.quantize.recipe import Recipe
    from edgekit.quantize.traced.schemes import LayerRecipe
    from edgekit.runtime.bench.decoder import bench
    from edgekit.runtime.engines.engine import Engine, load_engine
    from edgekit.runtime.engines.network_engine import load_module
    from edgekit.runtime.evaluation.evaluate import evaluate
    from edgekit.runtime.generation.generate import generate
    from edgekit.runtime.generation.sampling import SamplingParams
    from edgekit.workflows.api import export, export_model
    from edgekit.workflows.export_network import export_module, export_network
    from edgekit.workflows.fit import fit

# onnxruntime's wheels report to Microsoft by default, from their import on (its Privacy.md); what
# runs on a user's machine is nobody else's business unless the user says so.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Artifact",
    "EdgekitError",
    "Engine",
    "LayerRecipe",
    "Milestones",
    "Recipe",
    "SamplingParams",
    "Tokenizer",
    "VerificationError",
    "bench",
    "evaluate",
    "export",
    "export_model",
    "export_module",
    "export_network",
    "fit",
    "generate",
    "load_engine",
    "load_module",
    "prepare",
    "training_of",
]

_HOMES = {
    "Artifact": "edgekit.formats.artifact.read",
    "Engine": "edgekit.runtime.engines.engine",
    "LayerRecipe": "edgekit.quantize.traced.schemes",
    "Milestones": "edgekit.quantize.qat.milestones",
    "Recipe": "edgekit.quantize.recipe",
    "SamplingParams": "edgekit.runtime.generation.sampling",
    "Tokenizer": "edgekit.models.tokenizer",
    "bench": "edgekit.runtime.bench.decoder",
    "evaluate": "edgekit.runtime.evaluation.evaluate",
    "export": "edgekit.workflows.api",
    "export_model": "edgekit.workflows.api",
    "export_module": "edgekit.workflows.export_network",
    "export_network": "edgekit.workflows.export_network",
    "fit": "edgekit.workflows.fit",
    "generate": "edgekit.runtime.generation.generate",
    "load_engine": "edgekit.runtime.engines.engine",
    "load_module": "edgekit.runtime.engines.network_engine",
    "prepare": "edgekit.quantize.qat.prepare",
    "training_of": "edgekit.quantize.qat.prepare",
}


def __getattr__(name: str) -> object:
    """Import the module that defines a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names before they are imported, for completion."""
    return sorted({*globals(), *__all__})

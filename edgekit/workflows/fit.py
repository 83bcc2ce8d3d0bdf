"""Will a model fit a device, and how fast can it decode at best: `edgekit fit`, `edgekit.fit`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.common.plural import counted
from edgekit.devices.probe.bandwidth import measure_read_bandwidth
from edgekit.devices.probe.conditions import conditions
from edgekit.devices.probe.machine import probe
from edgekit.devices.profile import LOCAL, find_profile
from edgekit.devices.report import GIB
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Options, find_layout
from edgekit.exporters.contract.stored import stored
from edgekit.formats.artifact.read import MANIFEST
from edgekit.models.source import resolve_model
from edgekit.quantize.recipe import Recipe, resolve
from edgekit.runtime.artifact_fit import predict_artifact
from edgekit.runtime.engines.registry import ENGINES
from edgekit.runtime.fit import Fit, Row, predict
from edgekit.runtime.fit_table import fit_text


@dataclass(frozen=True)
class Prediction:
    """What `fit` predicts, and of what.

    `memory` has every figure in bytes; `ram_bytes` are the sizes that the device is sold with;
    `bandwidth` is GB/s and what kind of figure that is, None where it is unknown.
    """

    model: str
    recipe: str
    target: str
    device: str
    memory: Fit
    ram_bytes: tuple[int, ...]
    bandwidth: tuple[float, str] | None

    @property
    def decode_ceiling(self) -> float | None:
        """Tokens per second that no engine can exceed, where the bandwidth is known."""
        return self.memory.decode_ceiling(self.bandwidth[0]) if self.bandwidth else None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "target": self.target,
            "device": self.device,
            "bytes": self.memory.to_dict(),
            "ram": [
                {"bytes": size, "verdict": self.memory.verdict(size)} for size in self.ram_bytes
            ],
            "bandwidth_gb_per_s": self.bandwidth and self.bandwidth[0],
            "bandwidth_kind": self.bandwidth and self.bandwidth[1],
            "decode_ceiling_tok_per_s": self.decode_ceiling,
        }

    def text(self) -> str:
        """Return it as tables."""
        title = f"{self.model}, {self.recipe}, {self.target}, on {self.device}"
        return fit_text(self.memory, title, self.ram_bytes, self.bandwidth)


def fit(
    model: str | Path,
    *,
    device: str = LOCAL,
    target: str | None = None,
    recipe: Recipe | str | None = None,
    context: int | None = None,
    depth: int = 0,
    ram_bytes: int | None = None,
    bandwidth: float | None = None,
    measure: bool = True,
) -> Prediction:
    """Predict the memory and the decode ceiling of a model on a device, before any export.

    `model` is a name of `edgekit models`, a hub id, a folder, or an artifact, which has its target,
    recipe and context already; no weights are needed. `device` is a name of `edgekit devices`,
    `recipe` a preset, a scheme or a `Recipe` (int8 by default), `target` executorch (the default),
    gguf or onnx, `context` the positions of the caches and `depth` those before the decoded token.
    `ram_bytes` and `bandwidth`, in GB/s, stand instead of what is known of the device. The
    bandwidth of this machine is measured (half a second) unless `measure` is False.

    Raises `EdgekitError` for what is unknown, or what the target cannot hold.
    """
    known, ram, speed = _device(device.lower())
    if (Path(model) / MANIFEST).is_file():
        if (target, recipe, context) != (None, None, None):
            raise EdgekitError(
                f"{model}: is an artifact, which has its target, its recipe and its context already"
            )
        memory, name, label, target = predict_artifact(Path(model), depth)
    elif Path(model).is_file():
        raise EdgekitError(
            f"{model}: is a single file, whose model fit does not know: give the folder that "
            "`edgekit export` wrote, or the model (a name, a hub id or a folder)"
        )
    else:
        target = "executorch" if target is None else target
        chosen = recipe if isinstance(recipe, Recipe) else Recipe.named(recipe or "int8")
        label = "recipe" if isinstance(recipe, Recipe) else recipe or "int8"
        memory, name = _predict(str(model), chosen, target, context, depth)
    if bandwidth is not None:
        speed = (bandwidth, "given")
    elif known == LOCAL and measure:
        speed = _measure()
    sizes = ram if ram_bytes is None else (ram_bytes,)
    return Prediction(name, label, target, known, memory, sizes, speed)


def _predict(
    model: str, recipe: Recipe, target: str, context: int | None, depth: int
) -> tuple[Fit, str]:
    options = Options()
    layout = find_layout(target, options)
    source = resolve_model(model, random_weights=True)
    layout.check_config(source.config, options)
    shapes, tied = source.config.tied_shapes()
    table = stored(replace(resolve(recipe, shapes, tied), native=layout.NATIVE_SCHEMES))
    layout.check_rows(table)
    held = [Row(row.tensor, row.shape, layout.stored_bytes(row)) for row in table]
    memory_model = ENGINES.load(target, "memory").MEMORY_MODEL
    positions = context or source.config.default_context
    shared = layout.stored_once(table)
    return predict(source.config, held, positions, depth, memory_model, shared), source.id


def _device(name: str) -> tuple[str, tuple[int, ...], tuple[float, str] | None]:
    """Return a device's name, its RAM sizes in bytes and its bandwidth."""
    if name == LOCAL:
        ram = probe().ram_bytes
        return LOCAL, () if ram is None else (ram,), None
    profile = find_profile(name)
    return profile.id, tuple(int(size * GIB) for size in profile.ram_gb), profile.bandwidth


def _measure() -> tuple[float, str]:
    """Measure; the load is told because other programs' reading lowers the figure."""
    load = conditions().load_average
    try:
        result = measure_read_bandwidth()
    except EdgekitError as error:
        raise EdgekitError(f"{error}, or leave it unknown (`measure`)") from error
    busy = "" if load is None else f" at load {load[0]:.1f}"
    return result.gb_per_s, f"measured with {counted(result.threads, 'thread')}{busy}"

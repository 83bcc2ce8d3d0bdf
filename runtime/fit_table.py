"""A prediction of `fit` as text for a terminal."""

from collections.abc import Sequence

from edgekit.common.plural import counted
from edgekit.common.tables import markdown_table
from edgekit.devices.report import GIB
from edgekit.runtime.fit import USABLE_RAM, Fit


def fit_text(
    fit: Fit, title: str, ram_bytes: Sequence[int], bandwidth: tuple[float, str] | None
) -> str:
    """Show a prediction: memory by part, a verdict per RAM size, the decode ceiling.

    `ram_bytes` are the sizes to judge; `bandwidth` is GB/s and what kind of figure it is.
    """
    verdicts = [[f"{size / GIB:.4g} GB", fit.verdict(size)] for size in ram_bytes]
    parts = [title, "", _memory_table(fit), ""]
    if verdicts:
        share = f"{USABLE_RAM:.0%} of it may be used"
        parts += [markdown_table([f"RAM ({share})", "verdict"], verdicts, "ll"), ""]
    else:
        parts += ["The device's RAM is unknown: give `ram_bytes` for a verdict.", ""]
    return "\n".join([*parts, _decode_line(fit, bandwidth)])


def _memory_table(fit: Fit) -> str:
    rows = {
        "file": fit.file_bytes,
        "packed copy of the linears": fit.packed_bytes,
        f"KV cache, {fit.context} positions": fit.kv_cache_bytes,
        "conv state": fit.conv_state_bytes,
        "activations (estimate)": fit.activation_bytes,
        "total while loading": fit.peak_bytes,
        "total that must stay": fit.resident_bytes,
    }
    cells = [[label, f"{size / 1e6:,.1f}"] for label, size in rows.items()]
    return markdown_table(["memory", "MB"], cells, "lr")


def _decode_line(fit: Fit, bandwidth: tuple[float, str] | None) -> str:
    depth = counted(fit.depth, "position")
    reads = f"{fit.bytes_per_token / 1e6:,.1f} MB per token after {depth}"
    if bandwidth is None:
        return f"Decoding reads {reads}; its ceiling is unknown without a bandwidth (`bandwidth`)."
    speed, kind = bandwidth
    ceiling = fit.decode_ceiling(speed)
    return f"Decode ceiling: {ceiling:.1f} tok/s ({reads} at {speed:.1f} GB/s, {kind})."

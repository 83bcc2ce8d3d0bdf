"""An evaluation as Markdown."""

from edgekit.common.plural import counted
from edgekit.common.tables import markdown_table
from edgekit.metrics.divergence import Divergence, Estimate
from edgekit.runtime.evaluation.evaluate import Evaluation

_NOTHING = "-"


def render(result: Evaluation) -> str:
    """Return a line on what was run and the table of figures."""
    rows = [["perplexity", *_cells(result.perplexity, 4)]]
    if result.bits_per_byte is not None:
        rows.append(["bits per byte of text", f"{result.bits_per_byte:.4f}", _NOTHING])
    if result.divergence is not None:
        rows += _divergence_rows(result.divergence)
    table = markdown_table([result.name, "value", "error"], rows, align="lrr")
    return f"{_introduction(result)}\n\n{table}"


def _introduction(result: Evaluation) -> str:
    against = ""
    if result.reference is not None:
        against = f" against {result.reference} in {result.reference_engine}"
    return (
        f"{result.name} in {result.engine} {result.engine_version}{against}\n"
        f"{counted(result.tokens, 'token')} scored: second half of "
        f"{counted(result.chunks, 'chunk')} of {result.context} from a text of "
        f"{counted(result.text_tokens, 'token')}"
    )


def _divergence_rows(found: Divergence) -> list[list[str]]:
    kld, delta_p = found.kld_at, found.delta_p_at
    return [
        ["perplexity of the reference", *_cells(found.reference_perplexity, 4)],
        ["ln(PPL / PPL of the reference)", *_cells(found.log_ratio, 6)],
        ["KLD, mean (nats)", *_cells(found.kld, 6)],
        *([f"KLD, {_percent(at)}", f"{kld[at]:.6f}", _NOTHING] for at in ("50", "99", "99.9")),
        ["KLD, maximum", f"{kld['100']:.6f}", _NOTHING],
        ["delta p, mean (%)", *_cells(found.delta_p, 3, 100)],
        ["delta p, RMS (%)", *_cells(found.delta_p_rms, 3, 100)],
        *(
            [f"delta p, {_percent(at)} of tokens (%)", f"{100 * delta_p[at]:.3f}", _NOTHING]
            for at in ("1", "5", "25", "50", "75", "95", "99")
        ),
        ["same top-1 (%)", *_cells(found.same_top, 2, 100)],
    ]


def _percent(at: str) -> str:
    return "median" if at == "50" else f"{at} %"


def _cells(estimate: Estimate, decimals: int, factor: float = 1) -> list[str]:
    error = estimate.error
    return [
        f"{estimate.value * factor:.{decimals}f}",
        _NOTHING if error is None else f"± {error * factor:.{decimals}f}",
    ]

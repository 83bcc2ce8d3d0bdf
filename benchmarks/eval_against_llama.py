"""Holds `edgekit eval` against `llama-perplexity` on the same GGUF files and text.

    python -m benchmarks.eval_against_llama --artifact FOLDER --reference FOLDER --text FILE \\
        --llama-perplexity PATH [--chunks 40] [-t 2]

Both folders are artifacts of target gguf, the reference usually the float one. llama.cpp runs the
reference first and keeps its log-probabilities in 16 bits, none more than 16 nats below the
greatest; edgekit runs both side by side and rounds nothing. So the reference's perplexity, and the
ratio to it, are taken from that first run: what llama.cpp makes of the kept ones ("PPL(base)") is
too low wherever a very improbable token came. Fails where perplexities differ by more than 0.5 %,
or mean divergences by more than their errors.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import run
from edgekit.common.tables import markdown_table

PERPLEXITY_BOUND = 0.005
TRIES = 5
REFERENCE = "the reference alone"


@dataclass(frozen=True)
class Row:
    """One figure of both, and how far they may differ."""

    name: str
    ours: float
    theirs: float
    allowed: float | None

    @property
    def passed(self) -> bool:
        return self.allowed is None or abs(self.ours - self.theirs) <= self.allowed

    def cells(self) -> list[str]:
        verdict = "-" if self.allowed is None else "yes" if self.passed else "NO"
        allowed = "-" if self.allowed is None else f"{self.allowed:.2g}"
        difference = f"{self.ours - self.theirs:+.2g}"
        return [self.name, f"{self.ours:.6g}", f"{self.theirs:.6g}", difference, allowed, verdict]


Figures = dict[str, tuple[float, float | None]]


def theirs(arguments: argparse.Namespace) -> Figures:
    """Return llama.cpp's figures with their errors, shares as it prints them: in per cent."""
    with tempfile.TemporaryDirectory() as folder:
        base = ["--kl-divergence-base", str(Path(folder) / "base.kld")]
        text = ["-f", str(arguments.text), "--chunks", str(arguments.chunks)]
        first = llama_perplexity(arguments, arguments.reference, [*base, *text], "Final estimate")
        last = llama_perplexity(
            arguments, arguments.artifact, [*base, "--kl-divergence"], "Same top p"
        )
    final = re.search(r"PPL = (\d+\.\d+) \+/- (\d+\.\d+)", first)
    assert final is not None, first
    found: Figures = {REFERENCE: (float(final[1]), float(final[2]))}
    for line in last.splitlines():
        match = re.search(
            r"([A-Za-z0-9.%][^:|]*?)\s*:\s+(-?\d+\.\d+)%?(?:\s*±\s*(\d+\.\d+))?", line
        )
        if match:
            name = re.sub(r"\s+", " ", match[1]).strip()
            found[name] = float(match[2]), float(match[3]) if match[3] else None
    return found


def llama_perplexity(
    arguments: argparse.Namespace, folder: Path, more: list[str], last: str
) -> str:
    """Run it and return what it prints, again where the end is missing.

    Its log is written by a thread that does not always finish before the process does.
    """
    command = [str(arguments.llama_perplexity), "-m", str(folder / "model.gguf"), *more]
    command += ["-t", str(arguments.threads)]
    for _ in range(TRIES):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        if last in printed:
            return printed
    raise SystemExit(f"llama-perplexity printed no {last!r} in {TRIES} runs")


def ours(arguments: argparse.Namespace) -> dict:
    """Return `edgekit eval --json`."""
    command = [sys.executable, "-m", "edgekit", "eval", str(arguments.artifact)]
    command += ["--reference", str(arguments.reference), "--text", str(arguments.text)]
    command += ["--chunks", str(arguments.chunks), "-t", str(arguments.threads), "--json"]
    return json.loads(run(command).stdout)


def rows(mine: dict, other: Figures) -> list[Row]:
    """Pair the figures."""
    found = mine["divergence"]
    kld, delta, top = found["kld"], found["delta_p"], found["same_top"]

    def perplexity(name: str, value: float, key: str) -> Row:
        return Row(name, value, other[key][0], PERPLEXITY_BOUND * other[key][0])

    def with_error(name: str, estimate: dict[str, float], key: str, factor: float = 1) -> Row:
        value, error = other[key]
        return Row(
            name, factor * estimate["value"], value, max(factor * estimate["error"], error or 0)
        )

    def only(name: str, value: float, key: str) -> Row:
        return Row(name, value, other[key][0], None)

    return [
        perplexity("perplexity", mine["perplexity"]["value"], "Mean PPL(Q)"),
        only("its error", mine["perplexity"]["error"], "Mean PPL(Q) error"),
        perplexity("reference's", found["reference_perplexity"]["value"], REFERENCE),
        Row(
            "ln(PPL ratio)",
            found["ln_ppl_ratio"]["value"],
            math.log(other["Mean PPL(Q)"][0] / other[REFERENCE][0]),
            found["ln_ppl_ratio"]["error"],
        ),
        with_error("KLD, mean", kld, "Mean KLD"),
        only("its error", kld["error"], "Mean KLD error"),
        only("KLD, median", kld["percentiles"]["50"], "Median KLD"),
        only("KLD, 99 %", kld["percentiles"]["99"], "99.0% KLD"),
        only("KLD, 99.9 %", kld["percentiles"]["99.9"], "99.9% KLD"),
        only("KLD, maximum", kld["percentiles"]["100"], "Maximum KLD"),
        with_error("delta p, RMS (%)", delta["rms"], "RMS Δp", 100),
        with_error("same top-1 (%)", top, "Same top p", 100),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--artifact", "--reference", "--text", "--llama-perplexity"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("-t", "--threads", type=int, default=2)
    arguments = parser.parse_args()
    other = theirs(arguments)
    other |= {f"{name} error": (error, None) for name, (_, error) in other.items() if error}
    found = rows(ours(arguments), other)
    headers = ["figure", "edgekit eval", "llama-perplexity", "difference", "allowed", "within"]
    print(markdown_table(headers, [row.cells() for row in found], align="lrrrrl"))
    if not all(row.passed for row in found):
        raise SystemExit("edgekit eval and llama-perplexity disagree")


if __name__ == "__main__":
    main()

"""Train the bundled lfm2-tiny through int4, distilled from its float self, into a file of codes.

    python examples/qat_lfm2_tiny.py --data FOLDER --work out/qat      # goes on where it was killed
    edgekit export lfm2-tiny --target gguf --codes out/qat/codes.safetensors -o out/qat-gguf

FOLDER holds `train.txt`, and `valid.txt` to measure with. Everything in a step is a function of
the seed and the step, so a run that was killed ends with the weights of one that was not.
"""

import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import Lfm2ForCausalLM

import edgekit
from edgekit.common.files import new_file
from edgekit.errors import EdgekitError
from edgekit.metrics.divergence import divergence, join, perplexity, score_rows
from edgekit.models.source import ModelSource, resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.quantize.qat.distill import kl_divergence, top_k_divergence
from edgekit.quantize.qat.weight_only import WeightTraining
from edgekit.runtime.evaluation.evaluate import cut, tokenize

MODEL = "lfm2-tiny"
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl_divergence,
    "top-k": lambda student, teacher: top_k_divergence(student, teacher, k=32, temperature=2.0),
}
SAVE_EVERY = 20  # steps


@dataclass(frozen=True)
class Settings:
    """What decides the trained weights."""

    recipe: str
    steps: int
    rows: int
    context: int
    rate: float
    loss: str
    learn_scales: bool
    seed: int


class Run:
    """The model in training, its optimizer, and the float model that it is compared with."""

    def __init__(self, settings: Settings, source: ModelSource) -> None:
        """Start at step 0."""
        self.settings = settings
        self.model = Lfm2ForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.qat: WeightTraining = edgekit.prepare(
            self.model, settings.recipe, learn_scales=settings.learn_scales
        )
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
        if settings.learn_scales:  # they are small numbers, so they take small steps
            groups.append({"params": list(self.qat.parameters()), "share": 0.01})
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, weight_decay=0.0)

    def step(self, ids: Tensor) -> float:
        """Take one step on tokens `[rows, context]`; return the loss before it."""
        done = self.qat.steps / self.settings.steps
        share = min(1.0, (self.qat.steps + 1) / 20) * (1 - done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * share * group.get("share", 1.0)
        with torch.no_grad():
            wanted = self.teacher(input_ids=ids, use_cache=False).logits
        loss = LOSSES[self.settings.loss](self.model(input_ids=ids, use_cache=False).logits, wanted)
        loss.backward()
        self.optimizer.step()
        self.qat.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        content = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "qat": self.qat.state_dict(),
        }
        with new_file(path) as file:
            torch.save(content, file)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; EdgekitError for one of other settings or of another recipe."""
        saved = torch.load(path, weights_only=True)
        try:
            self.qat.load_state_dict(saved["qat"])
        except EdgekitError as error:
            raise EdgekitError(f"{path}: {error}") from error
        if saved["settings"] != asdict(self.settings):
            raise EdgekitError(
                f"{path}: is of a run with {saved['settings']}; give those or --work"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])


def batch(tokens: Tensor, settings: Settings, step: int, bos: int) -> Tensor:
    """Return rows of the text from random places, each behind the token that begins a text."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    longest = settings.context - 1
    starts = torch.randint(len(tokens) - longest, (settings.rows, 1), generator=generator)
    rows = tokens[starts + torch.arange(longest)]
    return torch.cat([torch.full((settings.rows, 1), bos), rows], dim=1)


@torch.no_grad()
def measure(
    model: Lfm2ForCausalLM, teacher: Lfm2ForCausalLM, chunks: Sequence[list[int]]
) -> dict[str, float]:
    """Return perplexity, and divergence from the float model, as `edgekit eval` counts them."""
    model.eval()
    scores = []
    for chunk in chunks:
        ids, half = torch.tensor([chunk[:-1]]), len(chunk) // 2
        rows = [net(input_ids=ids, use_cache=False).logits[0, half:] for net in (model, teacher)]
        scores.append(score_rows(rows[0].numpy(), chunk[half + 1 :], rows[1].numpy()))
    model.train()
    joined = join(scores)
    found = divergence(joined)
    assert found is not None
    return {
        "perplexity": perplexity(joined.nll).value,
        "float_perplexity": found.reference_perplexity.value,
        "kld": found.kld.value,
        "same_top": found.same_top.value,
    }


def train(run: Run, tokens: Tensor, bos: int, checkpoint: Path) -> None:
    """Train to the last step, with a checkpoint every few."""
    run.model.train()
    average = 0.0
    while run.qat.steps < run.settings.steps:
        began = time.monotonic()
        loss = run.step(batch(tokens, run.settings, run.qat.steps, bos))
        average = 0.9 * average + 0.1 * loss if average else loss
        if run.qat.steps % SAVE_EVERY == 0:
            run.save(checkpoint)
            took = time.monotonic() - began
            click.echo(
                f"step {run.qat.steps}/{run.settings.steps}  loss {average:.5f}  "
                f"{took:.1f} s a step",
                err=True,
            )


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="train.txt, valid.txt")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="checkpoint and codes")
@click.option("--recipe", default="int4", show_default=True, help="a preset or a scheme")
@click.option("--steps", default=200, show_default=True)
@click.option("--rows", default=4, show_default=True, help="rows in a batch")
@click.option("--context", default=512, show_default=True, help="tokens in a row")
@click.option("--rate", default=2e-4, show_default=True, help="peak learning rate of AdamW")
@click.option("--loss", type=click.Choice(list(LOSSES)), default="kl", show_default=True)
@click.option("--learn-scales", is_flag=True, help="learned step size")
@click.option("--seed", default=0, show_default=True)
@click.option("--chunks", default=60, show_default=True, help="chunks of valid.txt to measure on")
@click.option("--threads", default=1, show_default=True)
def main(data: Path, work: Path, chunks: int, threads: int, **values: Any) -> None:  # noqa: ANN401
    """Train lfm2-tiny through quantization and write its codes."""
    try:
        _main(data, work, chunks, threads, Settings(**values))
    except EdgekitError as error:
        raise click.ClickException(str(error)) from error


def _main(data: Path, work: Path, chunks: int, threads: int, settings: Settings) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(settings.seed)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, codes = work / "checkpoint.pt", work / "codes.safetensors"
    source = resolve_model(MODEL)
    assert source.folder is not None
    tokenizer = Tokenizer.load(source.folder)
    bos = source.config.bos_id
    run = Run(settings, source)
    text = cut(tokenize(tokenizer, _read(data / "valid.txt")), settings.context, chunks, bos)
    figures = {"before training": measure(run.model, run.teacher, text)}
    if checkpoint.is_file():
        run.load(checkpoint)
        click.echo(f"goes on from step {run.qat.steps}", err=True)
    tokens = torch.tensor(tokenize(tokenizer, _read(data / "train.txt")))
    train(run, tokens, bos, checkpoint)
    figures["trained"] = measure(run.model, run.teacher, text)
    for name, found in figures.items():
        click.echo(f"{name}: " + ", ".join(f"{key} {value:.5f}" for key, value in found.items()))
    run.qat.save(codes, MODEL, source.checkpoint.sha256(), rate=settings.rate, loss=settings.loss)
    (work / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    click.echo(f"wrote {codes}")


def _read(path: Path) -> str:
    if not path.is_file():
        raise EdgekitError(f"{path}: is missing; point --data at a folder with it")
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

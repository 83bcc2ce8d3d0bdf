"""Train `lfm2-tiny`, the small LFM2 bundled with edgekit, on short English stories.

    python examples/train_lfm2_tiny.py --work out/lfm2-tiny           # train, then write the folder
    python examples/train_lfm2_tiny.py --work out/lfm2-tiny --resume   # go on after an interruption
    python examples/train_lfm2_tiny.py --work out/lfm2-tiny --export   # write the last checkpoint

Half of the stories are plain text, half are the answer of a chat whose request is made from the
story by fixed rules; the loss covers the stories only. Every batch is a pure function of the
seed and the step, and nothing else in a step is random, so a checkpoint needs no generator
state and a resumed run computes what an uninterrupted one does.
"""

import json
import math
import platform
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import GenerationConfig, Lfm2Config, Lfm2ForCausalLM

REPOSITORY = Path(__file__).resolve().parents[1]
SEPARATOR = "<|endoftext|>"  # after every story of the data files
PAD, BOS, EOS = 0, 1, 7
IGNORE = -100  # label of the positions that the loss leaves out

# The order gives the ids; the first fourteen stand at the ids that they have in LFM2.
SPECIAL_TOKENS = (
    *("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>"),
    *("<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>"),
    *("<|tool_response_end|>", "<|reserved_0|>", "<|reserved_1|>"),
)
VOCABULARY = 4096
MINUTES = 600.0  # the default time budget: far more than the default steps need
# How Llama 3 and LFM2 cut text into words before byte-pair merging.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPTS = {  # as the model card shows them -> as the model gets them
    "Once upon a time": "<|startoftext|>Once upon a time",
    "Tell me a story about a cat and a ball.": (
        "<|startoftext|><|im_start|>user\nTell me a story about a cat and a ball.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}
LAYERS = ("conv", "conv", "full_attention") + ("conv", "full_attention") * 2 + ("conv",)
CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "block_auto_adjust_ff_dim": False,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "num_hidden_layers": len(LAYERS),
    "layer_types": list(LAYERS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Settings:
    """What decides the trained weights (with `minutes` only where it cuts the run short)."""

    steps: int
    minutes: float
    rows: int
    context: int
    seed: int
    warmup: int
    matrix_rate: float
    other_rate: float
    bfloat16: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What matrices are multiplied in; weights and their gradients are float32 always."""
        return torch.bfloat16 if self.bfloat16 else torch.float32

    def share(self, step: int, seconds: float) -> float:
        """Share of the peak learning rate: linear warm-up, then linear decay to zero.

        Where the machine is too slow for the planned steps, the time used drives the decay,
        so that a run that has to stop after `minutes` still ends at a rate of zero.
        """
        done = max(step / self.steps, seconds / (60 * self.minutes))
        return min((step + 1) / self.warmup, 1.0) * max(1.0 - done, 0.0)


# --- data ---------------------------------------------------------------------------------------


def read_stories(path: Path) -> list[str]:
    """Return the stories of a data file, paragraphs parted by single line ends."""
    if not path.is_file():
        raise click.ClickException(f"{path} is missing: point --data at the folder of stories")
    parts = path.read_text(encoding="utf-8").split(SEPARATOR)
    return [story for story in (part.strip() for part in parts) if story]


def train_tokenizer(stories: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE; with the full byte alphabet any UTF-8 text comes back unchanged."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    start = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start}:1 $B:1", special_tokens=[(start, BOS)]
    )
    return tokenizer


NAMED = re.compile(
    r"\b(?:an?|the) (?:[a-z]+ )?(boy|girl|man|woman|dog|cat|bear|bird) named ([A-Z]\w+)"
)
THING = re.compile(r"\b(an?|the) ([a-z]{3,})(?=[.!?]| (?:was|who|to|in|on|with|from|of)\b)")
NO_THINGS = {"same", "other", "one", "day", "end", "lot", "rest", "top", "way", "time", "first"}
SENTENCE = re.compile(r'[^.!?\n]+[.!?]"?')
OPEN_REQUESTS = (
    "Tell me a story.",
    "Write a short story.",
    "Can you tell me a story?",
    "Please tell me a bedtime story.",
    "I would like to hear a story.",
    "Hello! Do you know a nice story?",
)
TOPIC_REQUESTS = (
    "Tell me a story about {}.",
    "Write a short story about {}.",
    "Can you write a story about {}?",
    "Please tell me a story about {}.",
)


def topics(story: str) -> list[str]:
    """Return what a story is about, the most frequent things first: `a dog`, `the park`."""
    determiners: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for determiner, thing in THING.findall(story):
        if thing not in NO_THINGS:
            determiners.setdefault(thing, determiner)
            counts[thing] += 1
    return [f"{determiners[thing]} {thing}" for thing, _ in counts.most_common(2)]


def make_request(story: str, rng: random.Random) -> tuple[str, str]:
    """Return a user's request that the story answers, and the answer."""
    named, things, kind = NAMED.search(story), topics(story), rng.random()
    first = SENTENCE.match(story)
    if kind < 0.15 and first and len(story) - first.end() > 100:
        return f"Continue this story: {first.group()}", story[first.end() :].lstrip()
    if kind < 0.4 and named:
        about = f"a {named.group(1)} named {named.group(2)}"
        return rng.choice(TOPIC_REQUESTS).format(about), story
    if kind < 0.85 and things:
        chosen = things[: rng.randint(1, 2)]
        rng.shuffle(chosen)
        return rng.choice(TOPIC_REQUESTS).format(" and ".join(chosen)), story
    return rng.choice(OPEN_REQUESTS), story


@dataclass(frozen=True)
class Document:
    """Token ids with a label each: the same id, or IGNORE where the loss leaves it out."""

    ids: list[int]
    labels: list[int]

    def __add__(self, other: "Document") -> "Document":
        """Put another document behind this one."""
        return Document(self.ids + other.ids, self.labels + other.labels)

    def cut(self, length: int) -> "Document":
        """Keep the first `length` tokens."""
        return Document(self.ids[:length], self.labels[:length])


def documents(stories: list[str], tokenizer: Tokenizer, seed: int, epoch: int) -> list[Document]:
    """Return every story once, in the epoch's order; its form changes from epoch to epoch."""
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(stories)), len(stories))
    prompts, answers = [], []
    for index in order:
        if (index + epoch) % 2:
            prompts.append("<|startoftext|>")
            answers.append(stories[index])
        else:
            request, answer = make_request(stories[index], rng)
            prompts.append(
                f"<|startoftext|><|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
            )
            answers.append(answer)
    heads = tokenizer.encode_batch(prompts, add_special_tokens=False)
    bodies = tokenizer.encode_batch(answers, add_special_tokens=False)
    return [
        Document(head.ids + body.ids + [EOS], [IGNORE] * len(head.ids) + body.ids + [EOS])
        for head, body in zip(heads, bodies, strict=True)
    ]


def pack(items: Iterable[Document], length: int, open_rows: int = 64) -> Iterator[Document]:
    """Fill rows of `length` tokens with whole documents (best fit), cutting only longer ones.

    Later documents of a row see the earlier ones, as the later turns of a chat do; it also
    takes the model to positions that few stories reach.
    """
    rows: list[Document] = []
    for item in items:
        document = item.cut(length)
        fitting = [i for i, row in enumerate(rows) if len(row.ids) + len(document.ids) <= length]
        best = max(fitting, key=lambda i: len(rows[i].ids), default=None)
        if best is None:
            rows.append(document)
        else:
            rows[best] += document
        if len(rows) > open_rows:
            yield rows.pop(max(range(len(rows)), key=lambda i: len(rows[i].ids)))
    yield from rows


def batches(
    stories: list[str], tokenizer: Tokenizer, settings: Settings, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, labels), int64 [rows, context], from step `start` on, without end."""
    length, step, epoch = settings.context + 1, 0, 0
    while True:
        rows = list(pack(documents(stories, tokenizer, settings.seed, epoch), length))
        random.Random(f"{settings.seed}/{epoch}/rows").shuffle(rows)
        for first in range(0, len(rows) - settings.rows + 1, settings.rows):
            if step >= start:
                yield collate(rows[first : first + settings.rows], length)
            step += 1
        epoch += 1


def collate(rows: list[Document], length: int) -> tuple[Tensor, Tensor]:
    """Pad rows on the right to `length` and shift: the label of a position is the next token."""
    ids = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), IGNORE)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labels[index, : len(row.labels)] = torch.tensor(row.labels)
    return ids[:, :-1].contiguous(), labels[:, 1:].contiguous()


# --- model and optimisers -----------------------------------------------------------------------


def build_model(seed: int) -> Lfm2ForCausalLM:
    """Return a fresh model in float32."""
    torch.manual_seed(seed)
    model = Lfm2ForCausalLM(Lfm2Config(**{**CONFIG, "torch_dtype": "float32"}))
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            # Normal with 0.02 would make the product B * x * kernel * C all but vanish.
            module.reset_parameters()
    return model


def token_loss(model: Lfm2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over the positions that have a label.

    No attention mask is needed: padding stands on the right, and both the attention and the
    convolution look only to the left.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1))
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) for matrices.

    `torch.optim.Muon` iterates in bfloat16, which a CPU without bf16 units only emulates, and
    one matrix at a time; here `dtype` is the caller's choice and matrices of one shape go through
    the iteration together.
    """

    def __init__(
        self, matrices: list[nn.Parameter], lr: float, dtype: torch.dtype, momentum: float = 0.95
    ) -> None:
        """Take matrices [rows, columns] only."""
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update, W <- W - lr * sqrt(max(1, rows / columns)) * orthogonal(momentum)."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                updates = torch.stack([self._direction(m, group["momentum"]) for m in matrices])
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                directions = orthogonalize(updates.to(self._dtype))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.add_(direction, alpha=-rate)

    def _direction(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if "average" not in state:
            state["average"] = torch.zeros_like(matrix)
        average: Tensor = state["average"]
        average.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)  # Nesterov


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Push the singular values of [n, rows, columns] towards 1 (quintic Newton-Schulz)."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x if wide else x.mT
    return result


def make_optimizers(model: Lfm2ForCausalLM, settings: Settings) -> tuple[Muon, torch.optim.AdamW]:
    """Return Muon for the projections and AdamW for embedding, kernels and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # The convolution kernels are [d, 1, 3]; the tied head is the embedding.
        projection = parameter.ndim == 2 and not name.startswith("model.embed_tokens")
        (matrices if projection else others).append(parameter)
    return (
        Muon(matrices, settings.matrix_rate, settings.dtype),
        torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    )


# --- training -----------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0  # wall clock, all parts of a resumed run together
    cpu_seconds: float = 0.0
    tokens: int = 0  # that the loss covered
    documents: int = 0


class Run:
    """A training run: model, optimisers and how far they have come."""

    def __init__(self, settings: Settings) -> None:
        """Start at step 0."""
        self.settings = settings
        self.progress = Progress()
        self.model = build_model(settings.seed)
        self.optimizers = make_optimizers(self.model, settings)

    @classmethod
    def load(cls, path: Path, minutes: float | None) -> "Run":
        """Go on from a checkpoint under its settings, with another time budget where one is given.

        A longer budget raises the learning rate again; a shorter one ends the run sooner.
        """
        saved = load_checkpoint(path)
        settings = Settings(**saved["settings"])
        run = cls(settings if minutes is None else replace(settings, minutes=minutes))
        run.progress = Progress(**saved["progress"])
        run.model.load_state_dict(saved["model"])
        for optimizer, state in zip(run.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        return run

    def save(self, path: Path) -> None:
        """Write a checkpoint under a temporary name and rename it: none is ever half written."""
        content = {
            "settings": asdict(self.settings),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        temporary = path.with_suffix(".partial")
        torch.save(content, temporary)
        temporary.replace(path)

    @property
    def share(self) -> float:
        """Share of the peak learning rate for the next step; 0 at the end of the run."""
        return self.settings.share(self.progress.step, self.progress.seconds)

    def step(self, loss_of: Callable[..., Tensor], ids: Tensor, labels: Tensor) -> float:
        """Take one step; return the batch's loss before it, in nats per token."""
        share = self.share
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            loss = loss_of(self.model, ids, labels)
        if not math.isfinite(loss.item()):
            raise click.ClickException(f"the loss is {loss.item()} at step {self.progress.step}")
        loss.backward()
        rates = (self.settings.matrix_rate, self.settings.other_rate)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += int((labels != IGNORE).sum())
        self.progress.documents += int((labels == EOS).sum())
        return loss.item()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are accepted from it."""
    if not path.is_file():
        raise click.ClickException(f"{path} is missing: there is no run to go on with")
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def train(
    run: Run, stories: list[str], tokenizer: Tokenizer, checkpoint: Path, save_every: float
) -> None:
    """Train to the end of the schedule, saving a checkpoint every `save_every` minutes."""
    loss_of = torch.compile(token_loss, dynamic=False)
    progress, average = run.progress, 0.0
    clock = saved_at = time.monotonic()
    cpu_clock = time.process_time()
    for ids, labels in batches(stories, tokenizer, run.settings, progress.step):
        if run.share == 0.0:
            break
        loss = run.step(loss_of, ids, labels)
        now, cpu_now = time.monotonic(), time.process_time()
        progress.seconds += now - clock
        progress.cpu_seconds += cpu_now - cpu_clock
        average = 0.95 * average + 0.05 * loss if average else loss
        if progress.step % 10 == 0:
            report(run.settings, progress, average, ids.numel() / (now - clock))
        clock, cpu_clock = now, cpu_now
        if now - saved_at > 60 * save_every:
            run.save(checkpoint)
            saved_at = now
    run.save(checkpoint)


def report(settings: Settings, progress: Progress, loss: float, speed: float) -> None:
    """Print one line about the run on stderr: the running mean of the loss, tokens/s, times."""
    left = progress.seconds / progress.step * (settings.steps - progress.step)
    left = min(left, 60 * settings.minutes - progress.seconds)
    click.echo(
        f"step {progress.step}/{settings.steps}  loss {loss:.3f}  "
        f"{speed:.0f} tokens/s  {progress.seconds / 60:.1f} min, {left / 60:.1f} min left",
        err=True,
    )


# --- evaluation and output ----------------------------------------------------------------------


def stored_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the folder holds: bfloat16, and the tied head once, as the embedding."""
    return {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in state.items()
        if name != "lm_head.weight"
    }


@torch.no_grad()
def validate(model: Lfm2ForCausalLM, stories: list[str], tokenizer: Tokenizer) -> tuple[float, int]:
    """Return (mean nats per token, tokens): each story alone, bos given, its eos counted."""
    encoded = tokenizer.encode_batch(stories, add_special_tokens=False)
    rows = sorted(([BOS, *item.ids, EOS] for item in encoded), key=len)
    total, tokens = 0.0, 0
    for first in range(0, len(rows), 16):
        part = rows[first : first + 16]
        items = [Document(ids, ids) for ids in part]
        ids, labels = collate(items, max(map(len, part)))
        count = int((labels != IGNORE).sum())
        total += token_loss(model, ids, labels).item() * count
        tokens += count
    return total / tokens, tokens


@torch.no_grad()
def sample(model: Lfm2ForCausalLM, tokenizer: Tokenizer, prompt: str, seed: int) -> str:
    """Continue `prompt` (special tokens written out) at temperature 0.7."""
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    settings = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=0,
        max_new_tokens=250,
        eos_token_id=EOS,
        bos_token_id=BOS,
        pad_token_id=PAD,
    )
    made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return str(tokenizer.decode(made[0, ids.shape[1] :].tolist())).strip()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's files as transformers and ExecuTorch's runner read them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "pad_token": SPECIAL_TOKENS[PAD],
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": CONFIG["max_position_embeddings"],
            "added_tokens_decoder": {
                str(index): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for index, token in enumerate(SPECIAL_TOKENS)
            },
        },
    )
    write_json(folder / "special_tokens_map.json", named)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def export(output: Path, checkpoint: Path, tokenizer: Tokenizer, data: Path) -> None:
    """Write the Hugging Face folder, with its figures measured on the weights as stored."""
    saved = load_checkpoint(checkpoint)
    weights = stored_weights(saved["model"])
    model = build_model(0)
    rounded = {name: tensor.float() for name, tensor in weights.items()}
    model.load_state_dict({**rounded, "lm_head.weight": rounded["model.embed_tokens.weight"]})
    model.eval()
    stories = read_stories(data / "valid.txt")
    loss, tokens = validate(model, stories, tokenizer)
    click.echo(f"validation: {loss:.4f} nats a token over {tokens} tokens", err=True)
    train_stories = len(read_stories(data / "train.txt"))
    facts = {
        **run_facts(saved, weights, train_stories),
        "loss": loss,
        "perplexity": math.exp(loss),
        "valid_tokens": tokens,
        "valid_stories": len(stories),
    }
    samples = {shown: sample(model, tokenizer, prompt, seed=1) for shown, prompt in PROMPTS.items()}

    temporary = output.with_name(output.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    (temporary / "model.safetensors").chmod(0o644)  # safetensors: for the owner alone
    write_json(temporary / "config.json", CONFIG)
    write_json(
        temporary / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
    )
    write_tokenizer(temporary, tokenizer)
    (temporary / "README.md").write_text(model_card(facts, samples), encoding="utf-8")
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(temporary.iterdir()):
        path.replace(output / path.name)
    temporary.rmdir()


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
datasets: roneneldan/TinyStories
tags: [lfm2, edgekit]
---

# lfm2-tiny

A {parameters:,}-parameter model of the LFM2 architecture that writes short children's stories in
simple English. It is bundled with edgekit so that export, verification, generation and
measurement run without a download. It knows nothing but such stories, in English, and is of no
use as an assistant. It is not a model of Liquid AI; only the architecture and the chat format
are LFM2's.

| | |
| --- | --- |
| layers | {layers}: {kinds} |
| hidden size, FFN | {hidden_size}, {intermediate_size} |
| heads, KV heads, head size | {num_attention_heads}, {num_key_value_heads}, 64 |
| vocabulary | {vocab_size:,}, byte-level BPE, embedding tied to the head |
| context | {max_position_embeddings:,} by its configuration, trained on {context} |
| weights | bfloat16 safetensors |

## Quality

| `stories/valid.txt` | |
| --- | ---: |
| loss, mean nats per token | {loss:.4f} |
| perplexity | {perplexity:.3f} |
| tokens counted | {valid_tokens:,} |

Measured with transformers in float32 on the weights as stored (rounded to bfloat16): each of the
{valid_stories:,} stories alone and in full, `<|startoftext|>` given, every token of the story and
its closing `<|im_end|>` counted. The figure is for this tokenizer; it does not compare with that of
a model with another one.

At temperature 0.7, seed 1:

{samples}

## Training

    {command}

| | |
| --- | --- |
| steps | {steps:,} of {rows} rows of {context} tokens |
| tokens under the loss | {tokens:,} ({epochs:.2f} passes over the training stories) |
| time | {minutes:.0f} minutes of wall clock, {cpu_minutes:.0f} minutes of CPU time |
| machine | {threads} threads, {machine}, {arithmetic} |

The projections are trained by Muon, embedding, norms and convolution kernels by AdamW, with a
linear warm-up and a linear decay to zero. Half of the stories are plain text, half answer a chat
request made from the story by fixed rules; the loss covers stories only.
{ending}

## Data

TinyStories (Eldan and Li, 2023, arXiv:2305.07759; data set `roneneldan/TinyStories`), licence
CDLA-Sharing-1.0 (https://cdla.dev/sharing-1-0/), written by GPT-3.5 and GPT-4: a part of less than
1 %, {train_stories:,} stories to train and {valid_stories:,} to validate, cleaned and reduced to
ASCII, split by story. The stories are not part of this folder. The licence puts no conditions on
results computed from the data, which includes trained models. The training part contains text of
the official TinyStories validation file, so do not report a figure on that file.
"""


def model_card(facts: dict[str, Any], samples: dict[str, str]) -> str:
    """Return the text of the folder's README.md from the figures and samples of the run."""
    quotes = [
        "\n".join([f"`{title}`", ">", *(f"> {line}" for line in text.splitlines())])
        for title, text in samples.items()
    ]
    return CARD.format(**facts, samples="\n\n".join(f"> {quote}" for quote in quotes))


def run_facts(
    saved: dict[str, Any], weights: dict[str, Tensor], train_stories: int
) -> dict[str, Any]:
    """Return what the card says about the model and its training."""
    settings, progress = saved["settings"], saved["progress"]
    numbers = {name: value for name, value in settings.items() if name != "bfloat16"}
    flags = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in numbers.items())
    flags += " --bfloat16" if settings["bfloat16"] else ""
    return {
        **CONFIG,
        **settings,
        "steps": progress["step"],
        "tokens": progress["tokens"],
        "minutes": progress["seconds"] / 60,
        "cpu_minutes": progress["cpu_seconds"] / 60,
        "command": f"python examples/train_lfm2_tiny.py --work out/lfm2-tiny {flags}",
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "train_stories": train_stories,
        "epochs": progress["documents"] / train_stories,
        "threads": torch.get_num_threads(),
        "machine": machine_name(),
        "arithmetic": "bfloat16 products, float32 weights" if settings["bfloat16"] else "float32",
        "layers": len(LAYERS),
        "kinds": ", ".join("attention" if kind != "conv" else kind for kind in LAYERS),
        "ending": ending(settings, progress),
    }


def ending(settings: dict[str, Any], progress: dict[str, Any]) -> str:
    """Say what ended the run, and so whether its command gives the same weights again."""
    if progress["step"] >= settings["steps"]:
        return "The same command repeats the run."
    if progress["seconds"] >= 60 * settings["minutes"]:
        return (
            "The time budget ended the run before its planned steps. The learning rate fell with\n"
            "the clock then, so the same command takes other steps on a faster or slower machine."
        )
    return "The weights are those of a checkpoint: the run had not ended."


def machine_name() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=REPOSITORY.parent / "shared/data/stories",
    help="folder with train.txt and valid.txt",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    required=True,
    help="folder for the tokenizer and the checkpoint",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=REPOSITORY / "edgekit/models/lfm2_tiny",
    help="folder to write the model to",
)
@click.option("--steps", default=1600, show_default=True)
@click.option(
    "--minutes",
    type=float,
    help="wall clock, all parts of a resumed run together, after which the run ends with its "
    f"learning rate decayed [default: {MINUTES:g}, or the checkpoint's]",
)
@click.option("--rows", default=8, show_default=True, help="rows in a batch")
@click.option("--context", default=512, show_default=True, help="tokens in a row")
@click.option("--seed", default=0, show_default=True)
@click.option("--warmup", default=30, show_default=True, help="steps")
@click.option("--matrix-rate", default=0.02, show_default=True, help="peak learning rate of Muon")
@click.option("--other-rate", default=0.003, show_default=True, help="peak learning rate of AdamW")
@click.option(
    "--bfloat16", is_flag=True, help="multiply matrices in bfloat16: faster where the CPU has it"
)
@click.option("--threads", default=2, show_default=True)
@click.option("--save-every", default=3.0, show_default=True, help="minutes between checkpoints")
@click.option(
    "--resume", is_flag=True, help="go on from the checkpoint in --work, under its settings"
)
@click.option(
    "--export", "export_only", is_flag=True, help="only write the checkpoint in --work to --output"
)
def main(
    data: Path,
    work: Path,
    output: Path,
    threads: int,
    save_every: float,
    minutes: float | None,
    resume: bool,
    export_only: bool,
    **values: float,
) -> None:
    """Train lfm2-tiny and write it in Hugging Face layout."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    stories = read_stories(data / "train.txt")
    vocabulary, checkpoint = work / "tokenizer.json", work / "checkpoint.pt"
    if not vocabulary.is_file():
        train_tokenizer(stories).save(str(vocabulary))
    tokenizer = Tokenizer.from_file(str(vocabulary))
    if not export_only:
        if resume:
            run = Run.load(checkpoint, minutes)
        else:
            run = Run(Settings(minutes=minutes or MINUTES, **values))  # type: ignore[arg-type]
        train(run, stories, tokenizer, checkpoint, save_every)
    export(output, checkpoint, tokenizer, data)


if __name__ == "__main__":
    sys.exit(main())

"""Will a model fit a device, and how fast can it decode at best: predicted from bytes alone.

Nothing here needs weights, an export or the device. What is predicted, and on which assumptions:

- The file holds each row of the scheme table, a tied head that shares the embedding's int8 codes
  not a second time; the program around them is not counted.
- ExecuTorch maps the file, and XNNPACK copies each linear weight into its own packed layout when
  the program is loaded, of about the same size; the file's pages of it are then given back. So
  `resident_bytes` counts the linears once, `peak_bytes` both the mapped file and the packed copy.
  Of a table that is shared, the file's pages stay, for the embedding, beside the head's copy.
  Checked with executorch 1.5.1 on four linears of 4096 x 4096: at 64 MiB of int8 and at 256 MiB
  of float32, the peak lay one file's size above the memory held after loading, and what was held
  grew by the difference of the two files. Mapped pages are clean: short of memory, the system can
  drop them while loading, which is what the verdict `tight` relies on.
- The KV cache is float32, allocated for the full context: [1, context, KV heads, head_dim], for
  keys and for values, per attention layer. The conv state is float32: kernel - 1 positions.
- Activations are float32: the residual stream plus the widest pair of intermediate results alive at
  once in a layer, for each position of the longest prompt, the logits of one, and the attention
  scores of the last chunk of that prompt, heads x chunk x context. Checked with executorch 1.5.1 on
  prompts of 2,048 tokens: the peak rose by 128 MB at LFM2-350M (predicted: 151) and by 302 MB at
  LFM2-1.2B (predicted: 285).
- llama.cpp maps the file, or reads it where it repacks weights, so that they are held once. Its KV
  cache is float16, and its activations are those of a pass, at most 512 positions. Checked with
  llama-cpp-python 0.3.36 on LFM2-350M in Q4_0 with a context of 2,048: the peak rose by 298 MB
  (predicted: 282), the library's own code and vocabulary included.
- onnxruntime is taken to hold weights and caches as ExecuTorch does, and activations of a pass.
- The process itself (interpreter, libraries) is not counted; `USABLE_RAM` leaves room for it.
- To decode a token, an engine reads all weights once, except that it looks up one row of the
  embedding, and the keys and values of the positions before it and its own. No engine can decode
  faster than the memory delivers those bytes: the ceiling. Arithmetic may keep it lower.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from edgekit.errors import EdgekitError
from edgekit.models.architecture import Block
from edgekit.models.config import ModelConfig
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.runtime.engines.memory_model import FLOAT_BYTES, MemoryModel

PREFILL_CHUNK = 512  # tokens that attend at once, as the exported programs state
USABLE_RAM = 0.75  # of what is installed; the rest is the operating system's and other programs'

Verdict = Literal["fits", "tight", "does not fit"]


_MOST = MemoryModel()


class WeightRow(Protocol):
    """One row of a resolved scheme table; `edgekit.quantize.recipe.Resolved` is one."""

    @property
    def tensor(self) -> str:
        """Checkpoint name; tied models have rows for the embedding and for `lm_head.weight`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    def nbytes(self) -> int:
        """Stored size with scales."""


@dataclass(frozen=True)
class Row:
    """A `WeightRow` of which no more is known."""

    tensor: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Fit:
    """A prediction, in bytes.

    `weight_bytes` are those read per decoded token, `kv_bytes_per_position` those of one position
    of all KV caches together.
    """

    context: int
    depth: int
    file_bytes: int
    packed_bytes: int
    kv_cache_bytes: int
    conv_state_bytes: int
    activation_bytes: int
    resident_bytes: int
    peak_bytes: int
    weight_bytes: int
    kv_bytes_per_position: int

    @property
    def bytes_per_token(self) -> int:
        """Return what decoding the token after `depth` others must read."""
        return self.weight_bytes + self.kv_bytes_per_position * (self.depth + 1)

    def decode_ceiling(self, gb_per_s: float) -> float:
        """Return the tokens per second that memory of `gb_per_s` (1e9 bytes) allows at most."""
        return gb_per_s * 1e9 / self.bytes_per_token

    def verdict(self, ram_bytes: int) -> Verdict:
        """Judge against RAM of which the model may use the share `USABLE_RAM`.

        `tight`: only while the system drops pages of the mapped file, so loading may be slow.
        """
        usable = ram_bytes * USABLE_RAM
        if self.peak_bytes <= usable:
            return "fits"
        return "tight" if self.resident_bytes <= usable else "does not fit"

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON's types."""
        return {**asdict(self), "bytes_per_token": self.bytes_per_token}


def predict(
    model: ModelConfig,
    rows: Sequence[WeightRow],
    context: int,
    depth: int = 0,
    memory_model: MemoryModel = _MOST,
    shared: Collection[str] = (),
    file_bytes: int | None = None,
) -> Fit:
    """Predict for a context of `context` positions, decoding after `depth` of them.

    `memory_model` is the engine's, by default the one that takes most; `shared` names rows whose
    bytes the file holds under another row; `file_bytes` is the size of a file that is there, by
    default that of its rows.
    Raises `EdgekitError` for a context that the model cannot take or a depth outside of it, and
    `ValueError` for a table without embedding or head.
    """
    _check_positions(model, context, depth)
    embedding_row = _embedding_row_bytes(rows)
    weights = sum(row.nbytes for row in rows)
    repeated = sum(row.nbytes for row in rows if row.tensor in shared)
    file_bytes = weights - repeated if file_bytes is None else file_bytes
    embedding = sum(row.nbytes for row in rows if row.tensor == EMBEDDING)
    packed = sum(row.nbytes for row in rows if is_linear(row)) if memory_model.packs_linears else 0
    kv = kv_bytes_per_position(model, memory_model.cache_bytes)
    conv = conv_state_bytes(model)
    prompt = context if memory_model.whole_prompt else min(PREFILL_CHUNK, context)
    activations = activation_bytes(model, prompt)
    state = kv * context + conv + activations
    return Fit(
        context=context,
        depth=depth,
        file_bytes=file_bytes,
        packed_bytes=packed,
        kv_cache_bytes=kv * context,
        conv_state_bytes=conv,
        activation_bytes=activations,
        # The linears once: packed, or in the file.
        resident_bytes=(weights if memory_model.packs_linears else file_bytes) + state,
        peak_bytes=file_bytes + packed + state,
        weight_bytes=weights - embedding + embedding_row,
        kv_bytes_per_position=kv,
    )


def is_linear(row: WeightRow) -> bool:
    """Tell matrices that are multiplied from the embedding, norms and convolutions."""
    return len(row.shape) == 2 and row.tensor != EMBEDDING


def kv_bytes_per_position(model: ModelConfig, number_bytes: int = FLOAT_BYTES) -> int:
    """Return the keys and values of one position in all attention layers, float32 by default."""
    blocks = model.architecture.attentions()
    return sum(2 * block.kv_heads * block.head_dim for block in blocks) * number_bytes


def conv_state_bytes(model: ModelConfig) -> int:
    """Return the last kernel - 1 inputs of all short convolutions, float32."""
    blocks = model.architecture.short_convs()
    return sum((block.kernel - 1) * block.width for block in blocks) * FLOAT_BYTES


def activation_bytes(model: ModelConfig, prompt: int) -> int:
    """Estimate the activations of a prompt: see the assumptions above.

    The widest moment of a convolution holds B, C and x (3 d), that of a feed-forward both of its
    products (2 F), that of attention queries, keys and values.
    """
    layers = model.architecture.layers
    widest = max(_widest(block) for layer in layers for _, block in layer.halves)
    heads = max((block.heads for block in model.architecture.attentions()), default=0)
    scores = heads * min(PREFILL_CHUNK, prompt) * prompt
    return FLOAT_BYTES * (prompt * (model.hidden_size + widest) + model.vocab_size + scores)


def _widest(block: Block) -> int:
    return sum(linear.weight.shape[0] for linear in block.entering)


def _embedding_row_bytes(rows: Sequence[WeightRow]) -> int:
    table = {row.tensor: row for row in rows}
    if EMBEDDING not in table or HEAD not in table:
        raise ValueError(f"the scheme table needs the rows {EMBEDDING} and {HEAD}")
    return table[EMBEDDING].nbytes // table[EMBEDDING].shape[0]


def _check_positions(model: ModelConfig, context: int, depth: int) -> None:
    if not 1 <= context <= model.max_context:
        raise EdgekitError(f"context is {context}; this model takes 1 to {model.max_context}")
    if not 0 <= depth < context:
        raise EdgekitError(f"depth is {depth}; a context of {context} allows 0 to {context - 1}")

"""A decoder as data: the blocks it is made of, each with its tensors.

A family (`edgekit.models.families`) says what a model's blocks are; what has to know how a model is
wired walks them: shapes and ties, the torch module (`decoder.py`), the ONNX graph, the order of a
`.pte`, the names of a GGUF, calibration, memory. A mechanism is a block or a field of one. A block
has `name`, the checkpoint's prefix; `entering`, the linears that see what it is given, `leaving`,
the one whose output is added to the residual, and `tensors`, in the checkpoint's order.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from edgekit.quantize.names import EMBEDDING, HEAD

Role = Literal[
    "embedding",
    "head",
    "final_norm",
    "mixer_norm",
    "mlp_norm",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.out",
    "attention.q_norm",
    "attention.k_norm",
    "conv.in",
    "conv.kernel",
    "conv.out",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
]
"""What a tensor is for, whatever a checkpoint calls it; a bias has its linear's."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of the checkpoint, by its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def stem(self) -> str:
        """The name without `.weight` or `.bias`, after which a graph's nodes are named."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`; weight `[out, in]`, bias `[out]`."""

    weight: Parameter
    bias: Parameter | None = None

    @classmethod
    def of(cls, name: str, rows: int, columns: int, role: Role, bias: bool = False) -> "Linear":
        """Make one by its checkpoint name without `.weight`."""
        return cls(
            Parameter(f"{name}.weight", (rows, columns), role),
            Parameter(f"{name}.bias", (rows,), role) if bias else None,
        )

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """Weight and bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Norm:
    """RMSNorm of the last axis."""

    weight: Parameter
    eps: float

    @classmethod
    def of(cls, name: str, width: int, eps: float, role: Role) -> "Norm":
        """Make one by its checkpoint name without `.weight`."""
        return cls(Parameter(f"{name}.weight", (width,), role), eps)


@dataclass(frozen=True)
class BandScaling:
    """Rotation slowed down by the length of a wave, as transformers' rope_type `llama3`.

    Waves longer than `original_context / low` positions turn `factor` times more slowly, those
    shorter than `original_context / high` as they did; between, the two are blended.
    """

    factor: float
    low: float
    high: float
    original_context: int

    def divisors(self, frequencies: list[float]) -> list[float]:
        """Return by what each frequency, in radians a position, is divided."""
        return [self._divisor(2 * math.pi / frequency) for frequency in frequencies]

    def _divisor(self, wave: float) -> float:
        if wave < self.original_context / self.high:
            return 1.0
        if wave > self.original_context / self.low:
            return self.factor
        share = (self.original_context / wave - self.low) / (self.high - self.low)
        return 1 / ((1 - share) / self.factor + share)


@dataclass(frozen=True)
class Rope:
    """Rotary positions in the rotate-half form, over the whole head."""

    theta: float
    scaling: BandScaling | None = None

    def frequencies(self, head_dim: int) -> list[float]:
        """Return radians a position of each pair of dimensions, before scaling."""
        return [self.theta ** -(2 * i / head_dim) for i in range(head_dim // 2)]

    def divisors(self, head_dim: int) -> list[float] | None:
        """Return by what each frequency is divided, None where all stay as they are."""
        if self.scaling is None:
            return None
        return self.scaling.divisors(self.frequencies(head_dim))


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention; the norms, of each head, come before the rotation."""

    name: str
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope

    @property
    def entering(self) -> tuple[Linear, ...]:
        """Queries, keys, values."""
        return self.q, self.k, self.v

    @property
    def leaving(self) -> Linear:
        """The output's projection."""
        return self.out

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """All of them, the output's last."""
        norms = [norm.weight for norm in (self.q_norm, self.k_norm) if norm is not None]
        linears = [each for linear in self.entering for each in linear.tensors]
        return (*linears, *norms, *self.out.tensors)


@dataclass(frozen=True)
class ShortConv:
    """`out(C * conv(B * x))` with `B, C, x = into(h)`, conv depthwise, causal, `kernel` long."""

    name: str
    into: Linear
    conv: Parameter
    out: Linear

    @property
    def kernel(self) -> int:
        """Taps of a channel."""
        return self.conv.shape[-1]

    @property
    def width(self) -> int:
        """Channels."""
        return self.conv.shape[0]

    @property
    def entering(self) -> tuple[Linear, ...]:
        """The three gates as one matrix."""
        return (self.into,)

    @property
    def leaving(self) -> Linear:
        """The output's projection."""
        return self.out

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """All of them."""
        return (*self.into.tensors, self.conv, *self.out.tensors)


@dataclass(frozen=True)
class GatedMlp:
    """SwiGLU: `down(silu(gate x) * up x)`."""

    name: str
    gate: Linear
    up: Linear
    down: Linear

    @property
    def entering(self) -> tuple[Linear, ...]:
        """Gate and up."""
        return self.gate, self.up

    @property
    def leaving(self) -> Linear:
        """Down."""
        return self.down

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """All of them."""
        return (*self.gate.tensors, *self.up.tensors, *self.down.tensors)


Mixer = Attention | ShortConv
Block = Mixer | GatedMlp


@dataclass(frozen=True)
class Layer:
    """A pre-norm residual layer: what mixes positions, then what mixes channels."""

    name: str
    mixer_norm: Norm
    mixer: Mixer
    mlp_norm: Norm
    mlp: GatedMlp

    @property
    def halves(self) -> tuple[tuple[Norm, Block], ...]:
        """The two residual branches in order, each with the norm before it."""
        return (self.mixer_norm, self.mixer), (self.mlp_norm, self.mlp)

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """Those of the blocks, then the norms before them."""
        norms = self.mixer_norm.weight, self.mlp_norm.weight
        return (*self.mixer.tensors, *self.mlp.tensors, *norms)


@dataclass(frozen=True)
class Architecture:
    """A whole decoder; a tied head multiplies by the embedding."""

    embedding: Parameter
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    tied: bool

    def __post_init__(self) -> None:
        """Refuse what nothing computes: a decoder has one table of rotations."""
        if len({(each.rope, each.head_dim) for each in self.attentions()}) > 1:
            raise ValueError("all attentions of a decoder must rotate alike")

    @classmethod
    def of(
        cls, vocab_size: int, width: int, layers: tuple[Layer, ...], norm: Norm, tied: bool
    ) -> "Architecture":
        """Make one whose embedding and head have the names that they have in every family."""
        return cls(
            Parameter(EMBEDDING, (vocab_size, width), "embedding"),
            layers,
            norm,
            Linear(Parameter(HEAD, (vocab_size, width), "head")),
            tied,
        )

    def tensors(self) -> Iterator[Parameter]:
        """Yield every tensor of the checkpoint in model order; a tied head has none of its own."""
        yield self.embedding
        for layer in self.layers:
            yield from layer.tensors
        yield self.norm.weight
        if not self.tied:
            yield from self.head.tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the checkpoint by name."""
        return {tensor.name: tensor.shape for tensor in self.tensors()}

    def table(self) -> Iterator[Parameter]:
        """Yield every tensor, a tied head too: the rows of a table of schemes."""
        yield from self.tensors()
        if self.tied:
            yield from self.head.tensors

    def ties(self) -> Mapping[str, str]:
        """Return the tensors that have another's values, each with that other."""
        return {self.head.weight.name: self.embedding.name} if self.tied else {}

    def attentions(self) -> list[Attention]:
        """Return the mixers that are attention, in order."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention)]

    def short_convs(self) -> list[ShortConv]:
        """Return the mixers that are short convolutions, in order."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, ShortConv)]

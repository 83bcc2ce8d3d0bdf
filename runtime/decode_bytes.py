"""A test of the bench, and the bytes that decoding must read in it."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Shape:
    """One test in llama-bench's sense: `pp` prefills, `tg` decodes `tokens` at a `depth`."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0

    def __post_init__(self) -> None:
        """Refuse a test that would measure nothing."""
        if self.kind not in ("pp", "tg"):
            raise ValueError(f"kind must be pp or tg: {self.kind!r}")
        if self.tokens < 1 or self.depth < 0:
            raise ValueError(f"tokens >= 1 and depth >= 0: {self.tokens}, {self.depth}")

    @property
    def name(self) -> str:
        """llama-bench's name of the test: `pp512`, `tg128 @ d1024`."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def positions(self) -> int:
        """Positions of the context that the test fills."""
        return self.depth + self.tokens


@dataclass(frozen=True)
class Traffic:
    """Bytes that decoding one token must read: weights, and the KV cache per position."""

    weight_bytes: int
    kv_bytes_per_position: int

    def bytes_per_token(self, shape: Shape) -> float:
        """Mean bytes read per token over a `tg` test.

        Token i (from 0) attends to `depth + i + 1` positions, its own included, so the mean over
        n tokens is `depth + (n + 1) / 2` positions.
        """
        positions = shape.depth + (shape.tokens + 1) / 2
        return self.weight_bytes + self.kv_bytes_per_position * positions

    def to_dict(self) -> dict[str, Any]:
        """Return both figures as JSON data."""
        return {
            "weight_bytes_per_token": self.weight_bytes,
            "kv_bytes_per_position": self.kv_bytes_per_position,
        }

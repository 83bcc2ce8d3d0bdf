"""How many bytes a model file stores its weights in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredSize:
    """`nbytes` of codes, scales, zero points and floats, shared ones once, for `weights` weights.

    What else a file holds (metadata, a tokenizer, the program, tables of positions) is not in it.
    A head that is the embedding counts once.
    """

    nbytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, its share of the scales included; 0 of a file without weights."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0

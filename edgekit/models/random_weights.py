"""Random weights of a model's exact shapes, for measuring speed and fit without a download."""

import hashlib
import json
import math
from dataclasses import dataclass

import torch

from edgekit.errors import EdgekitError
from edgekit.models.config import ModelConfig

_BLOCK = 1 << 18
_STEP = 7919  # odd, so that the turns of a block of 2^18 only recur after 2^18 repetitions


@dataclass(frozen=True)
class RandomCheckpoint:
    """bf16 weights that depend on the seed and the tensor's name alone.

    Norms are ones, biases zeros; a matrix [out, in] is normal with deviation 1/sqrt(in), so
    activations keep their size through the layers. To be quick (1.2B weights in seconds) a tensor
    draws one block of at most 2^18 numbers and repeats it, turned by another amount each time, so
    no two rows of a weight are equal although the values recur.
    """

    config: ModelConfig
    seed: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by its Hugging Face name."""
        return self.config.tensor_shapes()

    def tensor(self, name: str) -> torch.Tensor:
        """Make one tensor, bf16; the same at every call."""
        shape = self.shapes().get(name)
        if shape is None:
            raise EdgekitError(f"random weights: the model has no tensor {name}")
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=torch.bfloat16)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        fan_in = math.prod(shape[1:])
        return _repeat(self._block(name, math.prod(shape)) / math.sqrt(fan_in), shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return bfloat16: what public checkpoints are stored in."""
        return torch.bfloat16

    def sha256(self) -> str:
        """Digest of the seed and the configuration, which determine every weight."""
        text = json.dumps(["random weights 1", self.seed, self.config.to_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _block(self, name: str, count: int) -> torch.Tensor:
        seed = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        return torch.randn(min(count, _BLOCK), generator=generator)


def _repeat(block: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    size = block.numel()
    twice = block.to(torch.bfloat16).repeat(2)  # any turn of the block is one slice of this
    out = torch.empty(math.prod(shape), dtype=torch.bfloat16)
    for turn, begin in enumerate(range(0, out.numel(), size)):
        target, start = out[begin : begin + size], turn * _STEP % size
        target.copy_(twice[start : start + target.numel()])
    return out.view(shape)

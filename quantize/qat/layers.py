"""A layer and its batch norm in training, folded as inference will fold them.

arXiv 1806.08342, section 3.2.2. Quantized is always `gamma W / sigma` with the running sigma, which
is what inference has. While batch statistics are in use the layer's output is divided by
`c = sigma_B / sigma` and gets the bias `beta - gamma mu_B / sigma_B`. After the freeze nothing is
divided and `gamma (mu_B / sigma_B - mu / sigma)` is added: with the bias before that is
`beta - gamma mu / sigma`, in which the batch no longer appears.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from edgekit.quantize.traced import fold
from edgekit.quantize.traced.operators import EMBEDDING, Layer, arguments

Read = Callable[[str], Tensor]
"""From a name to the model's parameter or buffer as it is now."""


@dataclass(frozen=True)
class LiveBatchNorm:
    """A batch norm of the model, by the names of its tensors."""

    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float
    momentum: float

    @classmethod
    def of(cls, node: Node) -> "LiveBatchNorm":
        """Return the batch norm of an `aten.batch_norm` node."""
        found = arguments(node)
        weight, bias = (
            None if found[name] is None else str(found[name].target) for name in ("weight", "bias")
        )
        mean, variance = str(found["running_mean"].target), str(found["running_var"].target)
        return cls(weight, bias, mean, variance, found["eps"], found["momentum"])

    @property
    def path(self) -> str:
        """The path of the module that holds the statistics."""
        return self.mean.rpartition(".")[0]

    def sigma(self, read: Read) -> Tensor:
        """Return the running standard deviation, float64 [channels]."""
        return fold.sigma_of(read(self.variance), self.eps)

    def scale_and_shift(self, read: Read) -> tuple[Tensor, Tensor]:
        """Return gamma and beta, float64 [channels]."""
        gamma, beta = (None if name is None else read(name) for name in (self.weight, self.bias))
        return fold.scale_and_shift(read(self.mean), gamma, beta)

    def factor_and_offset(self, read: Read) -> tuple[Tensor, Tensor]:
        """Return gamma / sigma and beta - gamma mu / sigma, as `fold_batch_norms` has them."""
        return fold.factor_and_offset(
            read(self.mean), self.sigma(read), *self.scale_and_shift(read)
        )

    def update(self, read: Read, owner: nn.Module, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch, as torch's batch norm does.

        `variance` is the unbiased one.
        """
        with torch.no_grad():
            share = self._share(owner)
            read(self.mean).lerp_(mean.detach().float(), share)
            read(self.variance).lerp_(variance.detach().float(), share)

    def normalise(self, read: Read, owner: nn.Module, values: Tensor) -> Tensor:
        """Return torch's batch norm with batch statistics, and update the running ones."""
        return functional.batch_norm(
            values,
            read(self.mean),
            read(self.variance),
            None if self.weight is None else read(self.weight),
            None if self.bias is None else read(self.bias),
            True,
            self._share(owner),
            self.eps,
        )

    def _share(self, owner: nn.Module) -> float:
        """Return the weight of a new batch, counted where the module counts batches."""
        if not isinstance(owner, nn.modules.batchnorm._BatchNorm):
            return self.momentum
        if owner.num_batches_tracked is not None:
            owner.num_batches_tracked.add_(1)
        if owner.momentum is not None:
            return float(owner.momentum)
        if owner.num_batches_tracked is None:
            return 0.0  # what torch does then
        return 1.0 / float(owner.num_batches_tracked)  # a plain mean of all batches


@dataclass(frozen=True)
class LiveLayer:
    """A layer of the folded graph, by the names that its tensors have in the model.

    `weight` is None for a batch norm that stands alone, which the folded graph has as a depthwise
    convolution.
    """

    layer: Layer
    weight: str | None
    bias: str | None
    batch_norm: LiveBatchNorm | None

    def folded(self, read: Read) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias as inference has them, in float32."""
        bias = None if self.bias is None else read(self.bias)
        if self.batch_norm is None:
            assert self.weight is not None
            return read(self.weight), bias
        factor, offset = self.batch_norm.factor_and_offset(read)
        if self.weight is None:
            taps = self.layer.weight.meta["val"].ndim - 1
            return factor.float().view(-1, *[1] * taps), offset.float()
        return fold.folded(self.layer, read(self.weight), bias, factor, offset)

    def call(self, args: tuple[Any, ...], weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer's operator with other parameters; `args` are its operands."""
        target: Any = self.layer.node.target
        if target == EMBEDDING:
            result: Tensor = target(weight, *args[1:], **self.layer.node.kwargs)
        else:
            result = target(args[0], weight, bias, *args[3:], **self.layer.node.kwargs)
        return result

    def before_norm(self, args: tuple[Any, ...], read: Read) -> Tensor:
        """Return what the batch norm gets in the float model."""
        if self.weight is None:
            result: Tensor = args[0]
            return result
        return self.call(args, read(self.weight), None if self.bias is None else read(self.bias))

    def with_batch_statistics(
        self, args: tuple[Any, ...], read: Read, owner: nn.Module, fake: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the output before the freeze; `fake` rounds the folded weight.

        The statistics are those of the layer with the float weight, as in the paper's figure 8:
        a second product, which the freeze saves.
        """
        assert self.batch_norm is not None
        values = self.before_norm(args, read)
        axes = [axis for axis in range(values.ndim) if axis != 1]
        variance, mean = torch.var_mean(values, axes, correction=0)
        sigma = self.batch_norm.sigma(read)
        batch_sigma = fold.sigma_of(variance, self.batch_norm.eps)
        correction = (batch_sigma / sigma).float()
        product = self.call(args, fake(self.folded(read)[0]), None)
        gamma, beta = self.batch_norm.scale_and_shift(read)
        bias = 0.0 if self.bias is None else read(self.bias).double()
        offset = (beta + gamma * (bias - mean.double()) / batch_sigma).float()
        count = values.numel() // values.shape[1]
        self.batch_norm.update(read, owner, mean, variance * (count / max(count - 1, 1)))
        shape = [-1, *[1] * (values.ndim - 2)]
        return product / correction.view(shape) + offset.view(shape)

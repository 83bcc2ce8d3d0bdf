"""A transposed convolution as an ordinary one, which onnxruntime has an integer kernel for.

With stride s, output `s m + r` of a transposed convolution sums `w[s u + r] x[m - u]` over u: for
each phase r an ordinary convolution of the input. All s (or s_h s_w) phases are output channels of
one convolution whose results are interleaved and cut to size (the sub-pixel form, as in
arXiv 1609.07009). The products are the same, and taps that a phase lacks get the code of 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from edgekit.quantize.traced.operators import arguments, numbers, rank


@dataclass(frozen=True)
class SubPixel:
    """The ordinary convolution: `codes [out * phases, in / groups, ...]`, padding on both sides.

    Its result `[batch, out * phases, *lengths]` is reshaped to `[batch, out, *strides, *lengths]`,
    interleaved and sliced from `starts` to `ends`.
    """

    codes: Tensor
    padding: list[int]
    strides: list[int]
    groups: int
    lengths: list[int]
    starts: list[int]
    ends: list[int]

    @property
    def phases(self) -> int:
        """Output channels of the convolution per output channel of the layer."""
        return math.prod(self.strides)


def sub_pixel(node: Node, codes: Tensor, zero_point: int) -> SubPixel:
    """Rearrange the codes `[in, out / groups, ...]` of a transposed convolution."""
    found = arguments(node)
    axes = rank(found["weight"]) - 2
    strides, padding, dilation, extra = (
        numbers(found[name], axes) for name in ("stride", "padding", "dilation", "output_padding")
    )
    codes = _dilate(codes, dilation, zero_point)
    sizes = list(codes.shape[2:])
    taps = [
        math.ceil(max(size, size + more - pad) / stride)
        for size, more, pad, stride in zip(sizes, extra, padding, strides, strict=True)
    ]
    shape = [tap * stride for tap, stride in zip(taps, strides, strict=True)]
    codes = _place(codes, shape, [1] * axes, zero_point)
    inputs = [int(size) for size in found["input"].meta["val"].shape[2:]]
    outputs = [int(size) for size in node.meta["val"].shape[2:]]
    return SubPixel(
        _phases(codes, taps, strides, int(found["groups"])),
        [tap - 1 for tap in taps],
        strides,
        int(found["groups"]),
        [size + tap - 1 for size, tap in zip(inputs, taps, strict=True)],
        padding,
        [pad + size for pad, size in zip(padding, outputs, strict=True)],
    )


def _dilate(codes: Tensor, dilation: list[int], zero_point: int) -> Tensor:
    sizes = [step * (size - 1) + 1 for step, size in zip(dilation, codes.shape[2:], strict=True)]
    return _place(codes, sizes, dilation, zero_point)


def _place(codes: Tensor, sizes: list[int], steps: list[int], zero_point: int) -> Tensor:
    """Return a kernel of other sizes, taps at every `steps`-th place, else the code of 0."""
    result = codes.new_full((*codes.shape[:2], *sizes), zero_point)
    places = tuple(
        slice(0, step * (size - 1) + 1, step)
        for step, size in zip(steps, codes.shape[2:], strict=True)
    )
    result[(slice(None), slice(None), *places)] = codes
    return result


def _phases(codes: Tensor, taps: list[int], strides: list[int], groups: int) -> Tensor:
    """`[in, out / groups, s u + r, ...]` to `[out * phases, in / groups, reversed u, ...]`."""
    axes = len(taps)
    inputs, outputs = codes.shape[0] // groups, codes.shape[1]
    pairs = [size for pair in zip(taps, strides, strict=True) for size in pair]
    split = codes.reshape(groups, inputs, outputs, *pairs)
    over_taps, over_phases = range(3, 3 + 2 * axes, 2), range(4, 4 + 2 * axes, 2)
    ordered = split.permute(0, 2, *over_phases, 1, *over_taps)
    flat = ordered.reshape(groups * outputs * math.prod(strides), inputs, *taps)
    return torch.flip(flat, list(range(2, 2 + axes))).contiguous()

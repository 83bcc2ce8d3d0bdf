"""Stacks of LFM2-350M's blocks as files, quantized statically and dynamically, for `lfm2_static`.

A stack is `x + block(x * gain)`, some times. RMSNorm and attention are left out: they are float in
every file here, so their time would only dilute what is compared; `gain` stands for the norm's
weight and keeps the residual float, as it is in the model. Weights are random.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from onnx import TensorProto
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers quantized_decomposed

import edgekit
from edgekit.exporters.executorch.blocks import XnnpackBlocks
from edgekit.exporters.executorch.lowering import delegate, plan_memory, write_program
from edgekit.exporters.onnx.contrib import ContribBlocks
from edgekit.exporters.onnx.graph import CONTRIB, OnnxGraph, new_data_file
from edgekit.exporters.onnx.layout import OPSET
from edgekit.models.architecture import GatedMlp, Linear, Parameter, ShortConv
from edgekit.models.catalogue import find_model
from edgekit.models.decoder import MlpModule
from edgekit.models.weights import ReadWeight, floats, row_block
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.tensor import QuantizedTensor, Weight
from edgekit.quantize.traced.schemes import LayerScheme

CONFIG = find_model("lfm2-350m").config
WIDTH, INNER, KERNEL = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.conv_kernel
KEYS = CONFIG.num_kv_heads * CONFIG.head_dim
COUNTS = {"convolution": 2, "attention": 1, "feed-forward": 1}
"""Blocks in a stack: one call is long beside what a call costs."""
TARGETS = ("executorch", "onnx")
DYNAMIC, STATIC = "dynamic", "static"
STATIC_CONV, NO_CONV = "static conv1d", "no conv1d"
"""Between dynamic linears; without any is the bound of what a faster one could gain."""
PER_TENSOR = "dynamic per tensor"
"""ONNX Runtime's DynamicQuantizeMatMul: the integer product of static layers, a range per call."""
_STATE = (KERNEL - 1, WIDTH)
_decomposed_ops = torch.ops.quantized_decomposed


def contenders(kind: str, target: str) -> tuple[str, ...]:
    """Return what is compared, today's first."""
    found = (DYNAMIC, STATIC)
    found += (STATIC_CONV, NO_CONV) if kind == "convolution" else ()
    return found + ((PER_TENSOR,) if target == "onnx" else ())


def inputs(kind: str, tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return what a stack takes: `[tokens, width]`, and the state of convolutions."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, WIDTH), _STATE] if kind == "convolution" else [(tokens, WIDTH)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Return the weights of one block by their names in the checkpoint, without the layer's."""
    if kind == "convolution":
        return {
            "conv.in_proj.weight": (3 * WIDTH, WIDTH),
            "conv.conv.weight": (WIDTH, 1, KERNEL),
            "conv.out_proj.weight": (WIDTH, WIDTH),
        }
    if kind == "feed-forward":
        names = {"w1": (INNER, WIDTH), "w3": (INNER, WIDTH), "w2": (WIDTH, INNER)}
        return {f"feed_forward.{name}.weight": shape for name, shape in names.items()}
    rows = {"q_proj": WIDTH, "k_proj": KEYS, "v_proj": KEYS, "out_proj": WIDTH}
    return {f"self_attn.{name}.weight": (count, WIDTH) for name, count in rows.items()}


def random_weights(kind: str) -> dict[str, Tensor]:
    """Return float weights whose outputs are as large as their inputs."""
    # Not a seed of the inputs, whose rows would be the first weights' rows.
    generator = torch.Generator().manual_seed(1000)
    return {
        f"{index}.{name}": torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for index in range(COUNTS[kind])
        for name, shape in shapes(kind).items()
    }


def codes_of(weights: dict[str, Tensor]) -> dict[str, Weight]:
    """Return int8 codes of the matrices; short convolutions as they are."""
    eight = parse_scheme("w8")
    return {
        name: quantize_weight(eight, weight) if weight.ndim == 2 else weight
        for name, weight in weights.items()
    }


class Convolution(nn.Module):
    """`edgekit.models.decoder.ConvModule` whose state is an input."""

    def __init__(self, blocks: "TorchBlocks | XnnpackBlocks", prefix: str) -> None:
        super().__init__()
        into = Linear.of(f"{prefix}.in_proj", 3 * WIDTH, WIDTH, "conv.in")
        taps = Parameter(f"{prefix}.conv.weight", (WIDTH, 1, KERNEL), "conv.kernel")
        out = Linear.of(f"{prefix}.out_proj", WIDTH, WIDTH, "conv.out")
        self.b_proj, self.c_proj, self.x_proj = (blocks.linear(into, i, 3) for i in range(3))
        self.conv = blocks.short_conv(ShortConv(prefix, into, taps, out))
        self.out_proj = blocks.linear(out)

    def forward(self, h: Tensor, state: Tensor) -> Tensor:
        gated = self.b_proj(h) * self.x_proj(h)
        mixed = gated if self.conv is None else self.conv(torch.cat([state, gated]))
        return self.out_proj(self.c_proj(h) * mixed)


class Attention(nn.Module):
    """The projections of an attention; a float product stands for what mixes positions."""

    def __init__(self, blocks: "TorchBlocks | XnnpackBlocks", prefix: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            blocks.linear(Linear.of(f"{prefix}.{name}_proj", rows, WIDTH, f"attention.{name}"))
            for name, rows in (("q", WIDTH), ("k", KEYS), ("v", KEYS), ("out", WIDTH))
        )
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        keys_and_values = torch.cat(
            [self.k(h) * self.scale[:KEYS], self.v(h) * self.scale[:KEYS]], 1
        )
        return self.out(self.q(h) * self.scale + keys_and_values)


class Stack(nn.Module):
    """Blocks of one kind behind each other."""

    def __init__(self, kind: str, blocks: "TorchBlocks | XnnpackBlocks") -> None:
        super().__init__()
        make = {
            "convolution": lambda i: Convolution(blocks, f"{i}.conv"),
            "feed-forward": lambda i: MlpModule(blocks, _feed_forward(f"{i}.feed_forward")),
            "attention": lambda i: Attention(blocks, f"{i}.self_attn"),
        }[kind]
        self.blocks = nn.ModuleList(make(i) for i in range(COUNTS[kind]))
        self.gain = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)

    def forward(self, x: Tensor, *state: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x * self.gain, *state)
        return x


def _feed_forward(name: str) -> GatedMlp:
    return GatedMlp(
        name,
        Linear.of(f"{name}.w1", INNER, WIDTH, "mlp.gate"),
        Linear.of(f"{name}.w3", INNER, WIDTH, "mlp.up"),
        Linear.of(f"{name}.w2", WIDTH, INNER, "mlp.down"),
    )


class TorchBlocks:
    """Float layers of torch, for `edgekit.export` to quantize."""

    def __init__(self, read: ReadWeight) -> None:
        self._read = read

    def linear(self, linear: Linear, part: int = 0, parts: int = 1) -> nn.Module:
        weight = floats(row_block(self._read(linear.weight.name), part, parts))
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    def short_conv(self, block: ShortConv) -> nn.Module:
        return _Taps(floats(self._read(block.conv.name)))


class _Taps(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, padded: Tensor) -> Tensor:
        channels = padded.transpose(0, 1).unsqueeze(0)
        mixed = nn.functional.conv1d(channels, self.weight, groups=len(self.weight))
        return mixed.squeeze(0).transpose(0, 1)


class _StaticConvBlocks(XnnpackBlocks):
    """Today's blocks but for convolutions, which are static int8 from codes to codes."""

    def __init__(self, read: ReadWeight) -> None:
        super().__init__(read)
        self._weights = read

    def short_conv(self, block: ShortConv) -> nn.Module:
        codes = LayerScheme.parse("w8a8").quantize(floats(self._weights(block.conv.name)), 0)
        return _StaticTaps(codes)


class _NoConvBlocks(XnnpackBlocks):
    """Today's blocks without convolutions."""

    def short_conv(self, block: ShortConv) -> None:
        return None


class _StaticTaps(nn.Module):
    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", torch.zeros(len(weight.codes), dtype=torch.long))

    def forward(self, padded: Tensor) -> Tensor:
        weight = _decomposed_ops.dequantize_per_channel.default(
            self.codes, self.scales, self.zeros, 0, -127, 127, torch.int8
        )
        # Rounded again after each move, which changes nothing: XNNPACK then moves codes.
        channels = _rounded(_rounded(_rounded(padded).transpose(0, 1)).unsqueeze(0))
        mixed = _rounded(nn.functional.conv1d(channels, weight, groups=len(self.codes)))
        return _rounded(_rounded(mixed.squeeze(0)).transpose(0, 1))


def _rounded(x: Tensor) -> Tensor:
    """Round on a fixed grid: speed does not depend on which."""
    grid = (0.05, 0, -128, 127, torch.int8)
    return _decomposed_ops.dequantize_per_tensor.default(
        _decomposed_ops.quantize_per_tensor.default(x, *grid), *grid
    )


def write(kind: str, contender: str, target: str, tokens: int, folder: Path) -> Path:
    """Write the file of one contender for so many tokens; return what the engine opens."""
    weights = random_weights(kind)
    example = inputs(kind, tokens)
    if contender == STATIC:
        artifact = edgekit.export(
            Stack(kind, TorchBlocks(weights.__getitem__)).eval(),
            example,
            folder,
            target=target,
            recipe="w8a8",
            calibration=[inputs(kind, tokens, seed) for seed in (1, 2)],
        )
        return artifact.model_path
    folder.mkdir()
    codes = codes_of(weights)
    if target == "onnx":
        path = folder / "model.onnx"
        _write_onnx(kind, contender, codes, tokens, path)
        return path
    path = folder / "model.pte"
    blocks = {
        DYNAMIC: XnnpackBlocks,
        STATIC_CONV: _StaticConvBlocks,
        NO_CONV: _NoConvBlocks,
    }[contender](codes.__getitem__)
    program = torch.export.export(Stack(kind, blocks).eval(), example, strict=False)
    if contender == STATIC_CONV:  # ExecuTorch's own passes find integer convolutions
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    else:
        edge = delegate(program, {})
    write_program(plan_memory(edge), path)
    return path


def _write_onnx(
    kind: str, contender: str, weights: dict[str, Weight], tokens: int, path: Path
) -> None:
    """Write a stack in the operators of target `onnx`, activations `[1, tokens, width]`."""
    with new_data_file(path.with_name("model.onnx.data")) as data:
        graph = OnnxGraph(data, "model.onnx.data", {"": OPSET, CONTRIB: 1})
        stack = _OnnxStack(graph, contender, weights, tokens)
        y = getattr(stack, kind.replace("-", "_"))()
        graph.node("Squeeze", [y, graph.integers(0)], "y")
        graph.output("y", TensorProto.FLOAT, [tokens, WIDTH])
    onnx.save_model(graph.model("LFM2"), path)


class _OnnxStack:
    """The wiring of `Stack`, as `onnx_lfm2` writes it."""

    def __init__(
        self, graph: OnnxGraph, contender: str, weights: dict[str, Weight], tokens: int
    ) -> None:
        self._graph, self._contender, self._weights = graph, contender, weights
        self._blocks = ContribBlocks(graph, weights, {}, CONFIG, tokens, fused_conv=True)
        x = graph.input("x", TensorProto.FLOAT, [tokens, WIDTH])
        self._x = graph.node("Unsqueeze", [x, graph.integers(0)], "x.batch")
        self._gain = graph.small("gain", np.full(WIDTH, 0.5, np.float32))

    def convolution(self) -> str:
        graph = self._graph
        state = graph.input("state", TensorProto.FLOAT, list(_STATE))
        state = graph.node("Transpose", [state], "state.turned", perm=[1, 0])
        state = graph.node("Unsqueeze", [state, graph.integers(0)], "state.batch")
        convolve = {
            STATIC_CONV: lambda x, name: self._static_conv(x, name, state),
            NO_CONV: lambda x, name: x,
        }.get(
            self._contender,
            lambda x, name: self._blocks.short_conv(x, name, state, f"{name}.state"),
        )

        def block(h: str, index: int) -> str:
            name = f"{index}.conv"
            (bcx,) = self._linears(h, [f"{name}.in_proj"])
            b, c, x = graph.split(bcx, [WIDTH] * 3, f"{name}.split")
            y = convolve(graph.node("Mul", [b, x], f"{name}.gate_in"), f"{name}.conv")
            gated = graph.node("Mul", [c, y], f"{name}.gate_out")
            return self._linears(gated, [f"{name}.out_proj"])[0]

        return self._stacked("convolution", block)

    def feed_forward(self) -> str:
        graph = self._graph

        def block(h: str, index: int) -> str:
            name = f"{index}.feed_forward"
            gate, up = self._linears(h, [f"{name}.w1", f"{name}.w3"])
            sigmoid = graph.node("Sigmoid", [gate], f"{name}.sigmoid")
            silu = graph.node("Mul", [gate, sigmoid], f"{name}.silu")
            return self._linears(graph.node("Mul", [silu, up], f"{name}.gated"), [f"{name}.w2"])[0]

        return self._stacked("feed-forward", block)

    def attention(self) -> str:
        graph = self._graph

        def block(h: str, index: int) -> str:
            name = f"{index}.self_attn"
            q, k, v = self._linears(h, [f"{name}.{part}_proj" for part in "qkv"])
            both = graph.node("Concat", [k, v], f"{name}.both", axis=-1)
            both = graph.node("Mul", [both, self._gain], f"{name}.both.scaled")
            q = graph.node("Mul", [q, self._gain], f"{name}.q.scaled")
            mixed = graph.node("Add", [q, both], f"{name}.mixed")
            return self._linears(mixed, [f"{name}.out_proj"])[0]

        return self._stacked("attention", block)

    def _stacked(self, kind: str, block: Callable[[str, int], str]) -> str:
        x = self._x
        for index in range(COUNTS[kind]):
            h = self._graph.node("Mul", [x, self._gain], f"{index}.gain")
            x = self._graph.node("Add", [x, block(h, index)], f"{index}.sum")
        return x

    def _linears(self, x: str, names: list[str]) -> list[str]:
        if self._contender != PER_TENSOR:
            return self._blocks.linears(x, names)
        # One product for all that read the same input, as MatMulNBits has them.
        codes = [self._weights[f"{name}.weight"] for name in names]
        matrix = torch.cat([item.codes for item in codes]).t().contiguous()
        scales = torch.cat([item.scales for item in codes])
        graph, name = self._graph, f"{names[0]}.joined"
        constants = [
            graph.constant(f"{name}.codes", TensorProto.INT8, matrix.shape, [matrix.numpy()]),
            graph.small(f"{name}.scales", scales.numpy()),
            graph.small(f"{name}.zero", np.zeros(1, np.int8)),
        ]
        y = graph.contrib("DynamicQuantizeMatMul", [x, *constants], name)
        if len(names) == 1:
            return [y]
        return graph.split(y, [len(item.codes) for item in codes], f"{name}.split")

    def _static_conv(self, x: str, name: str, state: str) -> str:
        graph = self._graph
        weight = floats(self._weights[f"{name}.weight"])
        codes = LayerScheme.parse("w8a8").quantize(weight, 0)
        grid = [
            graph.small("grid.scale", np.float32(0.05)),
            graph.small("grid.zero", np.uint8(128)),
        ]
        stored = [
            graph.small(f"{name}.codes", codes.codes.numpy()),
            graph.small(f"{name}.scales", codes.scales.numpy()),
            graph.small(f"{name}.zeros", np.zeros(WIDTH, np.int8)),
        ]
        kernel = graph.node("DequantizeLinear", stored, f"{name}.weight", axis=0)
        turned = graph.node("Transpose", [x], f"{name}.turned", perm=[0, 2, 1])
        padded = graph.node("Concat", [state, turned], f"{name}.padded", axis=-1)
        padded = graph.node("QuantizeLinear", [padded, *grid], f"{name}.in")
        padded = graph.node("DequantizeLinear", [padded, *grid], f"{name}.in.float")
        y = graph.node("Conv", [padded, kernel], name, group=WIDTH, kernel_shape=[KERNEL])
        y = graph.node("QuantizeLinear", [y, *grid], f"{name}.out")
        y = graph.node("DequantizeLinear", [y, *grid], f"{name}.out.float")
        return graph.node("Transpose", [y], f"{name}.back", perm=[0, 2, 1])

"""The blocks of a decoder in operators that ONNX itself defines, for any runtime.

Weights lie as `[columns, rows]`, so that DequantizeLinear and MatMul are one product in ONNX
Runtime (onnxruntime fuses them to MatMulNBits; an extra Transpose keeps it from doing so).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto
from torch import Tensor

from edgekit.exporters.onnx.constants import store_floats, store_packed, store_turned
from edgekit.exporters.onnx.graph import OnnxGraph
from edgekit.exporters.onnx.packing import pack_matrix
from edgekit.exporters.onnx.padding import Places
from edgekit.models.config import ModelConfig
from edgekit.models.rope import rope_tables
from edgekit.models.weights import floats
from edgekit.quantize.tensor import Weight

_UNSEEN = np.float32(np.finfo(np.float32).min)


class PlainBlocks:
    """`edgekit.exporters.onnx.wiring.Blocks` without any runtime's own operators."""

    def __init__(
        self, graph: OnnxGraph, weights: Mapping[str, Weight], config: ModelConfig, context: int
    ) -> None:
        self._graph, self._weights, self._config = graph, weights, config
        self._context = context
        self._rotations: dict[str, list[str]] = {}
        self._bias = ""

    def begin(self, mask: str, places: Places) -> None:
        """Compute the rotation of the new positions and what each may see.

        A token's position is the number of tokens before it; it sees those up to its own. Keys and
        values are stored in the order of the mask.
        """
        self._places = places
        graph, one = self._graph, self._graph.integers(1)
        queries = graph.node("Add", [places.held, places.index], "positions.queries")
        keys = graph.node("Add", [places.held, places.order], "positions.keys")
        self._rotations = {"q": self._rotation(queries), "k": self._rotation(keys)}
        stored = graph.node("CumSum", [mask, graph.small("one", np.int64(1))], "mask.all_ranks")
        stored = graph.node("Sub", [stored, one], "positions.stored")
        given = graph.node("Cast", [mask], "mask.all_given", to=TensorProto.BOOL)
        stored = graph.node("Where", [given, stored, graph.integers(graph.LAST)], "mask.stored")
        stored = graph.node("Unsqueeze", [stored, one], "mask.columns")
        queries = graph.node("Unsqueeze", [queries, graph.integers(2)], "mask.rows")
        seen = graph.node("LessOrEqual", [stored, queries], "mask.seen")
        choice = [graph.small("mask.zero", np.float32(0)), graph.small("mask.unseen", _UNSEEN)]
        bias = graph.node("Where", [seen, *choice], "mask.bias")
        self._bias = graph.node("Unsqueeze", [bias, graph.integers(1, 2)], "mask.bias_heads")

    def _rotation(self, positions: str) -> list[str]:
        """Return cosines and sines of positions `[batch, n]` as `[batch, 1, n, head_dim]`."""
        graph, found = self._graph, []
        config = self._config
        tables = rope_tables(config.rope, config.head_dim, self._context)
        for name, table in zip(("cos_cache", "sin_cache"), tables, strict=True):
            constant = store_floats(graph, name, table[:, 0])
            rows = graph.node("Gather", [constant, positions], f"{positions}.{name}")
            found.append(graph.node("Unsqueeze", [rows, graph.integers(1)], f"{rows}.heads"))
        return found

    def embedding(self, tokens: str, name: str) -> str:
        """Gather rows of numbers, zero points and scales, and compute the row."""
        graph, weight = self._graph, self._weights[f"{name}.weight"]
        if isinstance(weight, Tensor):
            table = store_floats(graph, f"{name}.weight", weight)
            return graph.node("Gather", [table, tokens], name)
        packed = pack_matrix(weight)
        stored = store_packed(graph, f"{name}.weight", packed, packed.numbers.shape)
        numbers, scales, *points = (
            graph.node("Gather", [table, tokens], f"{name}.{what}")
            for table, what in zip(stored, ("numbers", "scales", "points"), strict=False)
        )
        blocks = packed.scales.shape[1]
        grid = graph.integers(0, 0, blocks, -1)
        values = self._unpacked(numbers, packed.bits, f"{name}.unpacked")
        values = graph.node("Reshape", [values, grid], f"{name}.blocks")
        if points:
            zeros = self._unpacked(points[0], packed.bits, f"{name}.points_unpacked")
            ends = [graph.integers(0), graph.integers(blocks), graph.integers(-1)]
            zeros = graph.node("Slice", [zeros, *ends], f"{name}.points_whole")
            zeros = graph.node("Reshape", [zeros, grid], f"{name}.points_blocks")
        else:
            zeros = graph.small(f"half.{packed.bits}", np.float32(1 << (packed.bits - 1)))
        values = graph.node("Sub", [values, zeros], f"{name}.codes")
        scales = graph.node("Reshape", [scales, grid], f"{name}.scales_blocks")
        values = graph.node("Mul", [values, scales], f"{name}.scaled")
        return graph.node("Reshape", [values, graph.integers(0, 0, self._config.hidden_size)], name)

    def _unpacked(self, numbers: str, bits: int, name: str) -> str:
        """Return uint8 `[batch, tokens, n]` of one or two numbers each as float32."""
        graph = self._graph
        if bits == 4:
            low = graph.node(
                "BitwiseAnd", [numbers, graph.small("nibble", np.uint8(15))], f"{name}.low"
            )
            four = graph.small("nibble.bits", np.uint8(4))
            high = graph.node("BitShift", [numbers, four], f"{name}.high", direction="RIGHT")
            axis = graph.integers(-1)
            pair = [graph.node("Unsqueeze", [part, axis], f"{part}.pair") for part in (low, high)]
            both = graph.node("Concat", pair, f"{name}.both", axis=-1)
            numbers = graph.node("Reshape", [both, graph.integers(0, 0, -1)], f"{name}.flat")
        return graph.node("Cast", [numbers], name, to=TensorProto.FLOAT)

    def linears(self, x: str, names: Sequence[str]) -> list[str]:
        """DequantizeLinear and MatMul for each."""
        return [self._linear(x, name) for name in names]

    def biased(self, x: str, name: str) -> str:
        """Add."""
        return add_bias(self._graph, x, name, self._weights)

    def _linear(self, x: str, name: str) -> str:
        constants, attributes = store_turned(
            self._graph, f"{name}.weight", self._weights[f"{name}.weight"]
        )
        matrix = constants[0]
        if len(constants) > 1:
            matrix = self._graph.node(
                "DequantizeLinear", constants, f"{name}.weight.float", **attributes
            )
        return self._graph.node("MatMul", [x, matrix], name)

    def norm(self, x: str, name: str) -> str:
        """Divide by the root of the mean square."""
        graph = self._graph
        two = graph.small("two", np.float32(2))
        eps = graph.small("epsilon", np.float32(self._config.norm_eps))
        square = graph.node("Pow", [x, two], f"{name}.square")
        mean = graph.node("ReduceMean", [square, graph.integers(-1)], f"{name}.mean", keepdims=1)
        root = graph.node("Sqrt", [graph.node("Add", [mean, eps], f"{name}.eps")], f"{name}.root")
        unit = graph.node("Div", [x, root], f"{name}.unit")
        weight = store_floats(graph, f"{name}.weight", floats(self._weights[f"{name}.weight"]))
        return graph.node("Mul", [unit, weight], name)

    def add_norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        """Add, then normalise."""
        total = self._graph.node("Add", [x, y], f"{name}.sum")
        return self.norm(total, name), total

    def short_conv(self, x: str, name: str, past: str, present: str) -> str:
        """Sum the taps."""
        graph, weight = self._graph, floats(self._weights[f"{name}.weight"])
        padded = causal_state(graph, x, name, past, present, self._places)
        return causal_taps(graph, padded, name, weight, graph.input_dims(past)[-1])

    def attention(
        self, qkv: Sequence[str], name: str, past: Sequence[str], present: Sequence[str]
    ) -> str:
        """Softmax of scaled products, the query heads of one KV head in a batch."""
        graph, config = self._graph, self._config
        size, kv = config.head_dim, config.num_kv_heads
        k, v = (self._places.back(x, f"{x}.given") for x in qkv[1:])
        q = self._heads(qkv[0], config.num_heads, f"{name}.q")
        q = self._rotated(q, f"{name}.q", *self._rotations["q"])
        k = self._rotated(self._heads(k, kv, f"{name}.k"), f"{name}.k", *self._rotations["k"])
        v = self._heads(v, kv, f"{name}.v")
        keys = graph.node("Concat", [past[0], k], present[0], axis=2)
        values = graph.node("Concat", [past[1], v], present[1], axis=2)
        grouped = graph.integers(0, kv, config.num_heads // kv, -1, size)
        q = graph.node("Reshape", [q, grouped], f"{name}.q.grouped")
        scale = graph.small("attention.scale", np.float32(size**-0.5))
        q = graph.node("Mul", [q, scale], f"{name}.q.scaled")
        two = graph.integers(2)
        keys, values = (
            graph.node("Unsqueeze", [cache, two], f"{cache}.batch") for cache in (keys, values)
        )
        keys = graph.node("Transpose", [keys], f"{name}.k.turned", perm=[0, 1, 2, 4, 3])
        scores = graph.node("MatMul", [q, keys], f"{name}.scores")
        scores = graph.node("Add", [scores, self._bias], f"{name}.masked")
        shares = graph.node("Softmax", [scores], f"{name}.softmax", axis=-1)
        mixed = graph.node("MatMul", [shares, values], f"{name}.mixed")
        heads = graph.integers(0, config.num_heads, -1, size)
        mixed = graph.node("Reshape", [mixed, heads], f"{name}.heads")
        mixed = graph.node("Transpose", [mixed], f"{name}.turned", perm=[0, 2, 1, 3])
        width = graph.integers(0, 0, config.num_heads * size)
        return graph.node("Reshape", [mixed, width], name)

    def _heads(self, x: str, heads: int, name: str) -> str:
        """Return `[batch, tokens, width]` as `[batch, heads, tokens, head_dim]`."""
        graph = self._graph
        shape = graph.integers(0, 0, heads, self._config.head_dim)
        x = graph.node("Reshape", [x, shape], f"{name}.cut")
        return graph.node("Transpose", [x], f"{name}.heads", perm=[0, 2, 1, 3])

    def _rotated(self, x: str, name: str, cos: str, sin: str) -> str:
        """Return `x cos + (-x2, x1) sin`, where x1 and x2 are the halves of a head."""
        graph, half = self._graph, self._config.head_dim // 2
        first, second = graph.split(x, [half, half], f"{name}.halves")
        turned = [graph.node("Neg", [second], f"{name}.negative"), first]
        turned = [graph.node("Concat", turned, f"{name}.swapped", axis=-1)]
        parts = [
            graph.node("Mul", [x, cos], f"{name}.cos"),
            graph.node("Mul", [*turned, sin], f"{name}.sin"),
        ]
        return graph.node("Add", parts, f"{name}.rotated")


def add_bias(graph: OnnxGraph, x: str, name: str, weights: Mapping[str, Weight]) -> str:
    """Add the bias of the linear of that name to what it gave."""
    bias = store_floats(graph, f"{name}.bias", floats(weights[f"{name}.bias"]))
    return graph.node("Add", [x, bias], f"{name}.biased")


def causal_state(
    graph: OnnxGraph, x: str, name: str, past: str, present: str, places: Places
) -> str:
    """Return the inputs `x [batch, n, width]` after those of the old state; make the new state.

    States are `[batch, width, m]`: the new one is the last inputs that are none of padding.
    """
    columns = graph.input_dims(past)[-1]
    before = graph.node("Transpose", [past], f"{name}.past", perm=[0, 2, 1])
    padded = graph.node("Concat", [before, x], f"{name}.padded", axis=1)
    state = graph.rows(padded, places.window(columns), f"{name}.state")
    graph.node("Transpose", [state], present, perm=[0, 2, 1])
    return padded


def causal_taps(graph: OnnxGraph, padded: str, name: str, weight: Tensor, columns: int) -> str:
    """Convolve `padded [batch, columns + n, width]` to the last `n` rows.

    `y[t] = sum_j weight[:, 0, j] padded[columns + 1 - kernel + t + j]`: of the old state the last
    `kernel - 1` columns count. A few products of whole rows are faster than Conv, which takes
    channel by channel.
    """
    kernel = weight.shape[-1]
    stored = store_floats(graph, f"{name}.weight", weight)
    turned = graph.node("Transpose", [stored], f"{name}.turned", perm=[2, 1, 0])
    taps = [f"{name}.tap{j}" for j in range(kernel)]
    graph.node("Split", [turned, graph.integers(*[1] * kernel)], *taps, axis=0)
    total = ""
    for j, tap in enumerate(taps):
        start, end = columns + 1 - kernel + j, j + 1 - kernel or graph.LAST
        bounds = [graph.integers(start), graph.integers(end), graph.integers(1)]
        rows = graph.node("Slice", [padded, *bounds], f"{name}.rows{j}")
        part = graph.node("Mul", [rows, tap], f"{name}.part{j}")
        total = part if j == 0 else graph.node("Add", [total, part], f"{name}.sum{j}")
    return total

"""The blocks of a decoder in ONNX Runtime's own operators, those that are fast on a CPU.

docs/ContribOperators.md of onnxruntime says what each computes.
"""

from collections.abc import Mapping, Sequence

from onnx import TensorProto
from torch import Tensor

from edgekit.exporters.onnx.constants import store_floats, store_packed
from edgekit.exporters.onnx.graph import OnnxGraph
from edgekit.exporters.onnx.names import joined
from edgekit.exporters.onnx.packing import Packed, pack_matrix, stack
from edgekit.exporters.onnx.padding import Places
from edgekit.exporters.onnx.plain import add_bias, causal_state, causal_taps
from edgekit.models.config import ModelConfig
from edgekit.models.rope import rope_tables
from edgekit.models.weights import floats
from edgekit.quantize.tensor import Weight

INT8_ACTIVATIONS = 4
"""`accuracy_level` of MatMulNBits: activations are rounded to int8, block by block.

Other levels multiply in float32, at 8 bits a hundred times more slowly.
"""


class ContribBlocks:
    """`edgekit.exporters.onnx.wiring.Blocks` for ONNX Runtime.

    `twins` maps a tensor to the one whose bytes it shares; without `fused_conv` the convolutions
    do without CausalConvWithState, which runtimes before onnxruntime 1.25.1 lack.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        weights: Mapping[str, Weight],
        twins: Mapping[str, str],
        config: ModelConfig,
        context: int,
        fused_conv: bool,
    ) -> None:
        self._graph, self._weights, self._twins = graph, weights, twins
        self._config, self._context, self._fused_conv = config, context, fused_conv
        self._lengths: list[str] = []

    def begin(self, mask: str, places: Places) -> None:
        """Compute how many positions there are, and the tables of the rotation.

        Padding is behind a row's new tokens, as the operator has it; the next ones overwrite it.
        """
        self._places = places
        graph, config = self._graph, self._config
        half = config.head_dim // 2
        end = graph.node("Add", [places.held, places.size], "positions.end")
        last = graph.node("Sub", [end, graph.integers(1)], "positions.last")
        last = graph.node("Squeeze", [last, graph.integers(1)], "positions.last_flat")
        total = graph.node("Shape", [mask], "mask.shape", start=1)
        total = graph.node("Squeeze", [total], "mask.size")
        tables = rope_tables(config.rope, config.head_dim, self._context)
        named = zip(("cos_cache", "sin_cache"), tables, strict=True)
        self._lengths = [
            graph.node("Cast", [last], "positions.last_int32", to=TensorProto.INT32),
            graph.node("Cast", [total], "mask.size_int32", to=TensorProto.INT32),
            *(store_floats(graph, name, table[:, 0, :half]) for name, table in named),
        ]

    def embedding(self, tokens: str, name: str) -> str:
        """GatherBlockQuantized, or Gather of a float table."""
        weight = self._weights[f"{name}.weight"]
        if isinstance(weight, Tensor):
            table = store_floats(self._graph, f"{name}.weight", weight)
            return self._graph.node("Gather", [table, tokens], name)
        packed = pack_matrix(weight)
        table, *more = store_packed(self._graph, f"{name}.weight", packed, packed.numbers.shape)
        return self._graph.contrib(
            "GatherBlockQuantized",
            [table, tokens, *more],
            name,
            bits=packed.bits,
            block_size=packed.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def linears(self, x: str, names: Sequence[str]) -> list[str]:
        """Return one MatMulNBits that is split where the codes are alike, else one for each."""
        packed: list[Packed] = []
        for name in names:
            weight = self._weights[f"{name}.weight"]
            if isinstance(weight, Tensor):
                return [self._linear(x, name) for name in names]
            packed.append(pack_matrix(weight))
        if len({part.layout for part in packed}) > 1:
            return [self._linear(x, name) for name in names]
        name = joined(names)
        y = self._product(x, name, stack(packed))
        if len(names) == 1:
            return [y]
        return self._graph.split(y, [part.shape[0] for part in packed], f"{name}.split")

    def biased(self, x: str, name: str) -> str:
        """Add."""
        return add_bias(self._graph, x, name, self._weights)

    def _linear(self, x: str, name: str) -> str:
        weight = self._weights[f"{name}.weight"]
        if not isinstance(weight, Tensor):
            return self._product(x, name, pack_matrix(weight))
        twin = self._twins.get(f"{name}.weight")
        table = twin or store_floats(self._graph, f"{name}.weight", weight)
        return self._graph.contrib("FusedMatMul", [x, table], name, transB=1)

    def _product(self, x: str, name: str, packed: Packed) -> str:
        rows, columns = packed.shape
        blocks = columns // packed.block_size
        dims = (rows, blocks, packed.numbers.shape[1] // blocks)
        twin = self._twins.get(f"{name}.weight")
        constants = store_packed(self._graph, f"{name}.weight", packed, dims, twin)
        return self._graph.contrib(
            "MatMulNBits",
            [x, *constants],
            name,
            K=columns,
            N=rows,
            bits=packed.bits,
            block_size=packed.block_size,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def norm(self, x: str, name: str) -> str:
        """SimplifiedLayerNormalization, which ONNX Runtime has in ONNX's domain."""
        inputs = [x, self._norm_weight(name)]
        return self._graph.node(
            "SimplifiedLayerNormalization",
            inputs,
            name,
            axis=-1,
            epsilon=self._config.norm_eps,
            stash_type=1,
        )

    def add_norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        """SkipSimplifiedLayerNormalization: its fourth output is the sum."""
        total = f"{name}.sum"
        normed = self._graph.contrib(
            "SkipSimplifiedLayerNormalization",
            [x, y, self._norm_weight(name)],
            name,
            "",
            "",
            total,
            epsilon=self._config.norm_eps,
        )
        return normed, total

    def short_conv(self, x: str, name: str, past: str, present: str) -> str:
        """CausalConvWithState, whose tokens are the last axis, or its parts.

        The new state that it computes would hold a row's padding, so that is made apart.
        """
        graph, taps = self._graph, floats(self._weights[f"{name}.weight"])
        padded = causal_state(graph, x, name, past, present, self._places)
        if not self._fused_conv:
            return causal_taps(graph, padded, name, taps, graph.input_dims(past)[-1])
        weight = store_floats(graph, f"{name}.weight", taps)
        turned = graph.node("Transpose", [x], f"{name}.turned", perm=[0, 2, 1])
        y = graph.contrib(
            "CausalConvWithState",
            [turned, weight, "", past],
            name,
            f"{name}.unused",
            ndim=1,
            activation="none",
        )
        return graph.node("Transpose", [y], f"{name}.back", perm=[0, 2, 1])

    def attention(
        self, qkv: Sequence[str], name: str, past: Sequence[str], present: Sequence[str]
    ) -> str:
        """GroupQueryAttention with the rotation inside."""
        config = self._config
        return self._graph.contrib(
            "GroupQueryAttention",
            [*qkv, *past, *self._lengths],
            name,
            *present,
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            scale=config.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
        )

    def _norm_weight(self, name: str) -> str:
        weight = floats(self._weights[f"{name}.weight"])
        return store_floats(self._graph, f"{name}.weight", weight)

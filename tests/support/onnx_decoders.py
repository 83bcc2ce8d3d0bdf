"""lfm2-tiny as ONNX graphs written by hand, in each form that the engine has to run.

Written from the model's equations with `onnx.helper`, so that neither our exporter nor
onnxruntime-genai's builder is what the engine is tested with.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "edgekit" / "models" / "lfm2_tiny"
CONFIG = json.loads((FOLDER / "config.json").read_text())
VOCAB, HIDDEN, EPS = CONFIG["vocab_size"], CONFIG["hidden_size"], CONFIG["norm_eps"]
HEADS, KV_HEADS, KINDS = 4, 2, CONFIG["layer_types"]
HEAD = HIDDEN // HEADS
CONTEXT = 64  # rows of the rotary tables


@dataclass
class Form:
    """How a graph spells the model.

    `names`: of the states; `fused`: attention and convolution are onnxruntime's own operators,
    else plain ones whose cache grows; `rows`: logits of "all" tokens, the "last", or as "asked";
    `layers`: only the first so many.
    """

    names: str = "genai"
    fused: bool = True
    rows: str = "all"
    layers: int = len(KINDS)


@dataclass
class Writer:
    """Collects nodes, constants, inputs and outputs."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def ints(self, *values: int) -> str:
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, to: Sequence[str] = (), **attributes: object) -> str:
        """Add a node, `domain::type`; the name of its first output."""
        domain, _, kind = kind.rpartition("::")
        outputs = list(to) or [f"{kind}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def input(self, name: str, dtype: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, *shape: int | str) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def slice(self, x: str, begin: int, end: int, axis: int) -> str:
        return self.op("Slice", x, self.ints(begin), self.ints(end), self.ints(axis))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "decoder", self.inputs, self.outputs, [*self.constants.values()]
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def decoder(form: Form) -> onnx.ModelProto:
    """Return the whole model."""
    return _Decoder(form).model()


def save(form: Form, path: Path, external: bool = False) -> Path:
    """Write the model, its constants in `NAME.data` beside it where `external`."""
    onnx.save_model(
        decoder(form),
        path,
        save_as_external_data=external,
        location=path.name + ".data",
        size_threshold=1024,
    )
    return path


class _Decoder:
    def __init__(self, form: Form) -> None:
        self.form, self.w = form, Writer()
        weights = load_file(FOLDER / "model.safetensors")
        self.weights = {name: tensor.float().numpy() for name, tensor in weights.items()}

    def weight(self, name: str, transpose: bool = False) -> str:
        """Add a weight of the checkpoint, for MatMul transposed to [in, out]."""
        value = self.weights[name + ".weight"]
        return self.w.constant(name, np.ascontiguousarray(value.T if transpose else value))

    def linear(self, x: str, name: str) -> str:
        return self.w.op("MatMul", x, self.weight(name, transpose=True))

    def norm(self, x: str, name: str) -> str:
        w = self.w
        two, eps = w.constant("two", np.float32(2)), w.constant("eps", np.float32(EPS))
        mean = w.op("ReduceMean", w.op("Pow", x, two), w.ints(-1))
        scale = w.op("Sqrt", w.op("Add", mean, eps))
        return w.op("Mul", w.op("Div", x, scale), self.weight(name))

    def model(self) -> onnx.ModelProto:
        w, form = self.w, self.form
        ids = w.input("input_ids", TensorProto.INT64, "batch_size", "sequence_length")
        if form.fused:
            mask = w.input("attention_mask", TensorProto.INT64, "batch_size", "total_length")
            count = w.op("ReduceSum", mask, w.ints(1), keepdims=0)
            last = w.op("Sub", count, w.ints(1))
            self.lengths = self._cast(last, "lengths")
            total = w.op("Gather", w.op("Shape", mask), w.constant("one", np.int64(1)))
            self.total = self._cast(total, "total")
        else:
            self.positions = w.input("position_ids", TensorProto.INT64, "batch_size", "sequence")
        self._rotary_tables()
        x = w.op("Gather", self.weight("model.embed_tokens"), ids)
        for number, kind in enumerate(KINDS[: form.layers]):
            x = self._layer(x, number, kind)
        self._head(self.norm(x, "model.embedding_norm"))
        return w.model()

    def _cast(self, x: str, name: str) -> str:
        node = helper.make_node("Cast", [x], [name], to=TensorProto.INT32)
        self.w.nodes.append(node)
        return name

    def _rotary_tables(self) -> None:
        powers = np.arange(0, HEAD, 2) / HEAD
        angles = np.outer(np.arange(CONTEXT), CONFIG["rope_theta"] ** -powers)
        self.cos = self.w.constant("cos_cache", np.cos(angles).astype(np.float32))
        self.sin = self.w.constant("sin_cache", np.sin(angles).astype(np.float32))

    def _head(self, x: str) -> None:
        w, rows = self.w, self.form.rows
        if rows == "last":
            x = w.slice(x, -1, 1 << 40, 1)
        elif rows == "asked":
            asked = w.input("num_logits_to_keep", TensorProto.INT64)
            begin = w.op("Reshape", w.op("Neg", asked), w.ints(1))
            x = w.op("Slice", x, begin, w.ints(1 << 40), w.ints(1))
        head = w.op("Transpose", "model.embed_tokens", perm=[1, 0])
        w.op("MatMul", x, head, to=["logits"])
        dims: dict[str, int | str] = {"all": "sequence_length", "last": 1, "asked": "asked"}
        w.output("logits", TensorProto.FLOAT, "batch_size", dims[rows], VOCAB)

    def _layer(self, x: str, number: int, kind: str) -> str:
        w, name = self.w, f"model.layers.{number}"
        mix = self._conv if kind == "conv" else self._attention
        x = w.op("Add", x, mix(self.norm(x, f"{name}.operator_norm"), number, name))
        h, part = self.norm(x, f"{name}.ffn_norm"), f"{name}.feed_forward"
        gate = self.linear(h, f"{part}.w1")
        gate = w.op("Mul", gate, w.op("Sigmoid", gate))
        h = w.op("Mul", gate, self.linear(h, f"{part}.w3"))
        return w.op("Add", x, self.linear(h, f"{part}.w2"))

    def _conv(self, x: str, number: int, name: str) -> str:
        w = self.w
        length = 2 if self.form.names == "genai" else 3
        spelled = "past.{}.conv" if length == 2 else "past_conv.{}"
        past = w.input(spelled.format(number), TensorProto.FLOAT, "batch_size", HIDDEN, length)
        present = past.replace("past", "present")
        w.output(present, TensorProto.FLOAT, "batch_size", HIDDEN, length)
        x = w.op("Transpose", self.linear(x, f"{name}.conv.in_proj"), perm=[0, 2, 1])
        b, c, h = (w.slice(x, i * HIDDEN, (i + 1) * HIDDEN, 1) for i in range(3))
        bh, kernel = w.op("Mul", b, h), self.weight(f"{name}.conv.conv")
        if self.form.fused and length == 2:
            y = f"conv_{number}"
            w.op("com.microsoft::CausalConvWithState", bh, kernel, "", past, to=[y, present])
            w.nodes[-1].attribute.extend(
                [helper.make_attribute("ndim", 1), helper.make_attribute("activation", "none")]
            )
        else:
            seen = w.op("Concat", past, bh, axis=2)
            ends = (w.ints(-length), w.ints(1 << 40), w.ints(2))
            w.op("Slice", seen, *ends, to=[present])
            y = w.op("Conv", w.slice(seen, length - 2, 1 << 40, 2), kernel, group=HIDDEN)
        y = w.op("Transpose", w.op("Mul", c, y), perm=[0, 2, 1])
        return self.linear(y, f"{name}.conv.out_proj")

    def _attention(self, x: str, number: int, name: str) -> str:
        part = f"{name}.self_attn"
        q = self._heads(self.linear(x, f"{part}.q_proj"), HEADS)
        k = self._heads(self.linear(x, f"{part}.k_proj"), KV_HEADS)
        q, k = self.norm(q, f"{part}.q_layernorm"), self.norm(k, f"{part}.k_layernorm")
        v = self.linear(x, f"{part}.v_proj")
        states = [self._cache(number, what) for what in ("key", "value")]
        mix = self._fused_attention if self.form.fused else self._plain_attention
        return self.linear(mix(q, k, v, states), f"{part}.out_proj")

    def _cache(self, number: int, what: str) -> tuple[str, str]:
        sizes = ("batch_size", KV_HEADS, "past_length", HEAD)
        past = self.w.input(f"past_key_values.{number}.{what}", TensorProto.FLOAT, *sizes)
        present = f"present.{number}.{what}"
        self.w.output(present, TensorProto.FLOAT, "batch_size", KV_HEADS, "total_length", HEAD)
        return past, present

    def _heads(self, x: str, heads: int) -> str:
        return self.w.op("Reshape", x, self.w.ints(0, -1, heads, HEAD))

    def _fused_attention(self, q: str, k: str, v: str, states: list[tuple[str, str]]) -> str:
        w = self.w
        q, k = w.op("Reshape", q, w.ints(0, 0, -1)), w.op("Reshape", k, w.ints(0, 0, -1))
        (past_k, present_k), (past_v, present_v) = states
        return w.op(
            "com.microsoft::GroupQueryAttention",
            *(q, k, v, past_k, past_v, self.lengths, self.total, self.cos, self.sin),
            to=[f"attention_{len(w.nodes)}", present_k, present_v],
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )

    def _plain_attention(self, q: str, k: str, v: str, states: list[tuple[str, str]]) -> str:
        """Attention of `[1, heads, n, HEAD]` over a cache that Concat makes longer."""
        w = self.w
        q, k, v = (
            w.op("Transpose", x, perm=[0, 2, 1, 3])
            for x in (self._rotate(q), self._rotate(k), self._heads(v, KV_HEADS))
        )
        for (past, present), new in zip(states, (k, v), strict=True):
            w.op("Concat", past, new, axis=2, to=[present])
        k, v = (self._repeat(present) for _, present in states)
        scores = w.op("MatMul", q, w.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = w.op("Mul", scores, w.constant("scale", np.float32(HEAD**-0.5)))
        total = w.op("Gather", w.op("Shape", states[0][1]), w.constant("axis", np.int64(2)))
        zero, one = w.constant("zero", np.int64(0)), w.constant("one", np.int64(1))
        places = w.op("Range", zero, total, one)
        later = w.op("Greater", places, w.op("Unsqueeze", self.positions, w.ints(-1)))
        hidden = w.constant("hidden", np.float32(-1e9))
        weights = w.op("Softmax", w.op("Where", later, hidden, scores), axis=-1)
        mixed = w.op("Transpose", w.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        return w.op("Reshape", mixed, w.ints(0, 0, HIDDEN))

    def _repeat(self, x: str) -> str:
        """Give each query head its key head: [1, KV_HEADS, n, HEAD] to [1, HEADS, n, HEAD]."""
        w = self.w
        twice = w.op("Concat", *[w.op("Unsqueeze", x, w.ints(2))] * (HEADS // KV_HEADS), axis=2)
        return w.op("Reshape", twice, w.ints(1, HEADS, -1, HEAD))

    def _rotate(self, x: str) -> str:
        """Turn the halves of `[1, n, heads, HEAD]` against each other by each token's angle."""
        w = self.w
        cos, sin = (
            w.op("Unsqueeze", w.op("Gather", table, self.positions), w.ints(2))
            for table in (self.cos, self.sin)
        )
        a, b = w.slice(x, 0, HEAD // 2, 3), w.slice(x, HEAD // 2, HEAD, 3)
        first = w.op("Sub", w.op("Mul", a, cos), w.op("Mul", b, sin))
        second = w.op("Add", w.op("Mul", b, cos), w.op("Mul", a, sin))
        return w.op("Concat", first, second, axis=3)

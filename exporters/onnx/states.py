"""Names and shapes of a decoder's states, as the runtimes that keep them want them.

onnxruntime-genai 0.18 (models/builders/lfm2.py): `past.0.conv [batch, width, kernel - 1]`, and a
graph input that it does not know needs a default. Transformers.js 4 (src/configs.js,
getCacheNames): `past_conv.0 [batch, width, kernel]`; every symbol but batch_size in the shape of a
state is 0 at first, and `num_logits_to_keep` is given where it is asked for.
"""

from dataclasses import dataclass

from onnx import TensorProto

from edgekit.exporters.onnx.graph import OnnxGraph
from edgekit.models.architecture import Attention, ShortConv


@dataclass(frozen=True)
class Names:
    """One ABI: `%d` is the layer; `extra_taps` is what a state holds beyond `kernel - 1` inputs.

    `default_rows` is for how many tokens logits come out where nobody asks for a number, None where
    one must be given; `logits_rows` is what their dimension is declared as.
    """

    past_conv: str
    present_conv: str
    extra_taps: int
    default_rows: int | None
    logits_rows: int | str

    def conv(self, graph: OnnxGraph, block: ShortConv, layer: int) -> tuple[str, str]:
        """Declare the state of a convolution, in and out."""
        columns = block.kernel - 1 + self.extra_taps
        dims: list[int | str] = ["batch_size", block.width, columns]
        past = graph.input(self.past_conv % layer, TensorProto.FLOAT, dims)
        return past, graph.output(self.present_conv % layer, TensorProto.FLOAT, dims)

    def cache(self, graph: OnnxGraph, block: Attention, layer: int) -> tuple[list[str], list[str]]:
        """Declare the caches of keys and values, in and out."""

        def dims(positions: str) -> list[str | int]:
            return ["batch_size", block.kv_heads, positions, block.head_dim]

        past = [
            graph.input(
                f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, dims("past_sequence_length")
            )
            for kind in ("key", "value")
        ]
        present = [
            graph.output(
                f"present.{layer}.{kind}", TensorProto.FLOAT, dims("total_sequence_length")
            )
            for kind in ("key", "value")
        ]
        return past, present


# genai makes room for one row a token unless 1 is declared; whoever asks for more rows gets more.
GENAI = Names("past.%d.conv", "present.%d.conv", 0, default_rows=1, logits_rows=1)
TRANSFORMERS_JS = Names("past_conv.%d", "present_conv.%d", 1, None, "num_logits")
NAMES = {"genai": GENAI, "transformersjs": TRANSFORMERS_JS}

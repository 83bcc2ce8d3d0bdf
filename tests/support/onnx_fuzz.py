"""Opens and runs damaged copies of an ONNX decoder: arguments MODEL FIRST LAST.

A process of its own, for a crash in C++ would end the tests. Each number seeds one copy; it is
printed before its copy is tried, so that the last one printed is the culprit. Half of the copies
have bytes changed; the others are well-formed files that say something else.
"""

import random
import resource
import sys
from pathlib import Path

import onnx
from onnx import numpy_helper

from edgekit.errors import EdgekitError
from edgekit.runtime.engines.onnx.decoder import OnnxEngine

MOST_BYTES = 6 << 30
EXTREMES = (-1, 0, 1, 2, 3, 7, 64, 4095, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 63), (1 << 63) - 1)


def damaged(content: bytes, seed: int) -> bytes:
    """Return a copy with one to three changes."""
    draw = random.Random(seed)
    changes = draw.randint(1, 3)
    if seed % 2:
        model = onnx.load_model_from_string(content)
        for _ in range(changes):
            draw.choice((_attribute, _input, _operator, _dimension, _constant))(model.graph, draw)
        return bytes(model.SerializeToString())
    copy = bytearray(content)
    for _ in range(changes):
        copy[draw.randrange(len(copy))] ^= 1 << draw.randrange(8)
    return bytes(copy)


def _attribute(graph: onnx.GraphProto, draw: random.Random) -> None:
    """Give an attribute of a node another number."""
    found = [a for node in graph.node for a in node.attribute if a.type in (a.INT, a.INTS)]
    attribute = draw.choice(found)
    if attribute.type == attribute.INT:
        attribute.i = draw.choice(EXTREMES)
    else:
        attribute.ints[draw.randrange(len(attribute.ints))] = draw.choice(EXTREMES)


def _input(graph: onnx.GraphProto, draw: random.Random) -> None:
    """Let a node use something else that is there before it."""
    place = draw.randrange(1, len(graph.node))
    node = graph.node[place]
    names = [value.name for value in graph.input] + [c.name for c in graph.initializer] + [""]
    names += [name for earlier in graph.node[:place] for name in earlier.output]
    node.input[draw.randrange(len(node.input))] = draw.choice(names)


def _operator(graph: onnx.GraphProto, draw: random.Random) -> None:
    """Let a node be of another kind."""
    node, other = draw.choice(graph.node), draw.choice(graph.node)
    node.op_type, node.domain = other.op_type, other.domain


def _dimension(graph: onnx.GraphProto, draw: random.Random) -> None:
    """Declare another size of an input or output."""
    value = draw.choice([*graph.input, *graph.output])
    if value.type.tensor_type.shape.dim:
        draw.choice(value.type.tensor_type.shape.dim).dim_value = draw.choice(EXTREMES)


def _constant(graph: onnx.GraphProto, draw: random.Random) -> None:
    """Change a number or the shape of a constant that steers others."""
    steering = [c for c in graph.initializer if not c.external_data]
    constant = draw.choice(steering or [*graph.initializer])
    if constant.external_data:
        constant.dims.reverse()
        return
    array = numpy_helper.to_array(constant).copy()
    if array.dtype.kind == "i" and array.size:
        array.flat[draw.randrange(array.size)] = draw.choice(EXTREMES[:-3])
    constant.CopyFrom(numpy_helper.from_array(array, constant.name))


def attempt(path: Path) -> str:
    """Open and run a model; what came of it."""
    try:
        with OnnxEngine(path, threads=1) as engine:
            engine.prefill([token % engine.vocab_size for token in range(1, 6)])
            engine.decode(0)
    except EdgekitError as error:
        return "multi-line" if "\n" in str(error) else "refused"
    return "ran"


def main() -> None:
    model, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    content = model.read_bytes()
    path = model.with_name("damaged.onnx")  # beside the external data
    for seed in range(first, last):
        path.write_bytes(damaged(content, seed))
        print(seed, end=" ", flush=True)
        print(attempt(path), flush=True)

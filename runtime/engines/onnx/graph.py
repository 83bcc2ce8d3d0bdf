"""Finds in an ONNX graph what an LFM2-style decoder has: tokens, states, logits.

Two spellings of the states are in use, onnxruntime-genai's (`past.0.conv`, and a folder may rename
them in `genai_config.json`) and Transformers.js's (`past_conv.0`). Both: `past_key_values.2.key`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from edgekit.errors import EdgekitError
from edgekit.formats.onnx.file import OnnxFile
from edgekit.formats.onnx.genai_config import GenaiConfig
from edgekit.formats.onnx.model import Dim, Node, Value

ATTENTION = "com.microsoft::GroupQueryAttention"
# (genai's name of the input, of the output, the names in the graph), the layer as %d
_STATES = (
    ("past_key_names", "present_key_names", "past_key_values.%d.key", "present.%d.key"),
    ("past_value_names", "present_value_names", "past_key_values.%d.value", "present.%d.value"),
    ("past_conv_names", "present_conv_names", "past.%d.conv", "present.%d.conv"),
    ("past_conv_names", "present_conv_names", "past_conv.%d", "present_conv.%d"),
)
_INTEGERS = ("int64", "int32")
_FLOATS = ("float32", "float16")
_STATE_TYPES = (*_FLOATS, "int8", "uint8")
_ROTARY_TABLES = {ATTENTION: 7, "com.microsoft::RotaryEmbedding": 2}  # input with a row a position


@dataclass(frozen=True)
class State:
    """A state that goes in as `past` and comes out as `present`.

    `shape` has a 0 where the positions are counted, which a convolution's state does not do.
    `in_place` holds where the graph can write into the very buffer that it reads.
    """

    past: str
    present: str
    dtype: str
    shape: tuple[int, ...]
    in_place: bool

    @property
    def counts_positions(self) -> bool:
        """Whether this is a cache of keys or values."""
        return 0 in self.shape

    def sized(self, positions: int) -> tuple[int, ...]:
        """Return the shape with room for so many positions."""
        return tuple(size or positions for size in self.shape)


@dataclass(frozen=True)
class Decoder:
    """Inputs and outputs; `mask`, `positions` and `rows` are None where the graph has none.

    `rows` is the input that asks for the logits of the last so many tokens; `last_row_only` says
    that the graph computes those of the last token and no others. `most_positions` is where the
    tables of the rotary embedding end.
    """

    tokens: Value
    mask: Value | None
    positions: Value | None
    rows: Value | None
    logits: str
    last_row_only: bool
    vocab_size: int
    states: tuple[State, ...]
    most_positions: int | None


def read_decoder(model: OnnxFile, config: GenaiConfig | None) -> Decoder:
    """Return the decoder that a graph is; EdgekitError says what it has too much or too little."""
    return _Finder(model, config).decoder()


class _Finder:
    """Takes the inputs of a graph one after another; one that is left over is a stranger."""

    def __init__(self, model: OnnxFile, config: GenaiConfig | None) -> None:
        self._model, self._config = model, config
        defaults = {tensor.name for tensor in model.graph.initializers}
        self._inputs = {v.name: v for v in model.graph.inputs if v.name not in defaults}
        self._optional = {v.name: v for v in model.graph.inputs if v.name in defaults}
        self._outputs = {value.name: value for value in model.graph.outputs}
        self._readers = _readers(model)

    def decoder(self) -> Decoder:
        tokens = self._take("input_ids", 2)
        if tokens is None:
            raise self._error(f"has no input input_ids, only {_some(self._inputs)}")
        mask, positions = self._take("attention_mask", 2), self._take("position_ids", 2)
        rows = self._take("num_logits_to_keep", 0) or self._take("num_logits_to_keep", 1)
        states = tuple(self._states())
        if not states:
            raise self._error("keeps no state of past tokens: it is no decoder with a cache")
        if self._inputs:
            raise self._error(f"has inputs that no decoder here has: {_some(self._inputs)}")
        logits, vocab_size = self._logits()
        shape = logits.shape or ()
        return Decoder(
            tokens=tokens,
            mask=mask,
            positions=positions,
            rows=rows,
            logits=logits.name,
            last_row_only=rows is None and (len(shape) == 2 or shape[1] == 1),
            vocab_size=vocab_size,
            states=states,
            most_positions=self._most_positions(),
        )

    def _name(self, key: str, default: str, outputs: bool = False) -> str:
        """Return the graph's name of what genai calls `key`."""
        if self._config is None:
            return default
        return (self._config.outputs if outputs else self._config.inputs).get(key, default)

    def _take(self, key: str, rank: int) -> Value | None:
        """Return an input of integers and count it as used; None where there is none."""
        name = self._name(key, key)
        value = self._inputs.get(name) or self._optional.get(name)
        if value is None or value.shape is None or len(value.shape) != rank:
            return None
        if value.dtype not in _INTEGERS:
            raise self._error(f"input {value.name!r:.60} must be int64 or int32, not {value.dtype}")
        if rank == 2 and not _takes_any_length(value.shape):
            raise self._error(
                f"input {value.name!r:.60} must take one sequence of any length, not {value.shape}"
            )
        self._inputs.pop(name, None)
        return value

    def _states(self) -> Iterator[State]:
        for key_in, key_out, past, present in _STATES:
            counts = key_in != "past_conv_names"
            renamed = self._name(key_in, past), self._name(key_out, present, outputs=True)
            yield from self._matching(*renamed, counts)
            yield from self._matching(past, present, counts)

    def _matching(self, past: str, present: str, counts: bool) -> Iterator[State]:
        """Yield the states whose names fit a pair of patterns."""
        pattern = re.compile(re.escape(past).replace("%d", r"(\d{1,4})"), re.ASCII)
        for name in [*self._inputs]:
            match = pattern.fullmatch(name)
            if match and match.groups():
                value = self._inputs.pop(name)
                yield self._state(value, present.replace("%d", match[1]), counts)

    def _state(self, past: Value, name: str, counts: bool) -> State:
        present = self._outputs.get(name)
        if present is None:
            raise self._error(f"has the state {past.name!r:.60} but no output {name!r:.60}")
        if past.dtype not in _STATE_TYPES or present.dtype != past.dtype:
            raise self._error(
                f"state {past.name!r:.60} is {past.dtype} and comes out as {present.dtype}; "
                f"supported are {', '.join(_STATE_TYPES)}"
            )
        return State(
            past.name,
            name,
            past.dtype,
            self._shape(past, present, counts),
            counts and self._shares_buffer(past.name, name),
        )

    def _shape(self, past: Value, present: Value, counts: bool) -> tuple[int, ...]:
        """Return the sizes of a batch of one, 0 for the positions."""
        rank = 4 if counts else 3
        stated = present.shape or past.shape
        if past.shape is None or stated is None or not len(past.shape) == len(stated) == rank:
            raise self._error(
                f"state {past.name!r:.60} must have {rank} dimensions, not {past.shape} that "
                f"comes out as {present.shape}"
            )
        sizes = [a if isinstance(a, int) else b for a, b in zip(past.shape, stated, strict=True)]
        sizes[0] = 1 if not isinstance(sizes[0], int) else sizes[0]
        if counts:
            if isinstance(past.shape[2], int) or isinstance(stated[2], int):
                raise self._error(f"state {past.name!r:.60} has a fixed number of positions")
            sizes[2] = 0
            if not isinstance(sizes[3], int) and self._config is not None:
                sizes[3] = self._config.head_size
        fixed = [size for size in sizes if isinstance(size, int)]
        if len(fixed) != rank or fixed[0] != 1 or fixed.count(0) != counts:
            raise self._error(f"state {past.name!r:.60} has the unusable shape {past.shape}")
        return tuple(fixed)

    def _shares_buffer(self, past: str, present: str) -> bool:
        """Whether one attention operator reads the one and writes the other.

        It appends in place where both are the same buffer; Concat makes a longer one.
        """
        readers = self._readers.get(past, [])
        if len(readers) != 1 or readers[0].operator != ATTENTION:
            return False
        node = readers[0]
        pairs = zip(node.inputs[3:5], node.outputs[1:3], strict=False)
        return (past, present) in pairs

    def _logits(self) -> tuple[Value, int]:
        name = self._name("logits", "logits", outputs=True)
        logits = self._outputs.get(name)
        if logits is None:
            raise self._error(f"has no output {name!r:.60}, only {_some(self._outputs)}")
        if logits.dtype not in _FLOATS:
            raise self._error(f"logits must be float32 or float16, not {logits.dtype}")
        size = logits.shape[-1] if logits.shape else None
        if not isinstance(size, int) and self._config is not None:
            size = self._config.vocab_size
        if not isinstance(size, int) or size < 1 or len(logits.shape or ()) not in (2, 3):
            raise self._error(f"logits have the shape {logits.shape}, without a vocabulary size")
        return logits, size

    def _most_positions(self) -> int | None:
        rows = {t.name: t.shape[0] for t in self._model.graph.initializers if t.shape}
        named = (
            node.inputs[place]
            for node in self._model.graph.all_nodes()
            if (place := _ROTARY_TABLES.get(node.operator)) is not None and place < len(node.inputs)
        )
        return min((rows[name] for name in named if name in rows), default=None)

    def _error(self, what: str) -> EdgekitError:
        return EdgekitError(f"{self._model.path}: {what}")


def _takes_any_length(shape: tuple[Dim, ...]) -> bool:
    batch, length = shape
    return not isinstance(length, int) and (batch == 1 or not isinstance(batch, int))


def _readers(model: OnnxFile) -> dict[str, list[Node]]:
    """Return by name the nodes that use it."""
    found: dict[str, list[Node]] = {}
    for node in model.graph.all_nodes():
        for name in set(node.inputs):
            found.setdefault(name, []).append(node)
    return found


def _some(names: dict[str, Value]) -> str:
    listed = [*names]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(f"{name:.60}" for name in listed[:4]) + more

"""Batches of rows of unequal length: a masked token is as if it were not there.

Transformers pads in front, onnxruntime-genai behind; GroupQueryAttention and the convolutions want
what is new at the start of its row. So each row's tokens are moved before its padding, where no
token sees it, and the logits are taken from where the tokens went. A row without padding stays as
it is.
"""

import numpy as np
from onnx import TensorProto

from edgekit.exporters.onnx.graph import OnnxGraph


class Places:
    """Where the new tokens of each row are, as names of int64 values.

    tokens  the ids `[batch, new]`, a row's tokens first, then its padding
    index   the places 0, 1, ... `[new]`
    size    their number `[1]`
    held    how many tokens of a row came before `[batch, 1]`
    count   how many of its new ones are tokens `[batch, 1]`
    order   at which place the token is that was given at each position `[batch, new]`
    """

    def __init__(self, graph: OnnxGraph, tokens: str, mask: str, rows: str) -> None:
        """Move ids `[batch, new]` by a mask `[batch, so far and new]` of 1 and 0.

        `rows` is of how many of the last positions the logits are wanted, 0 for all.
        """
        self._graph = graph
        one = graph.integers(1)
        self.size = graph.node("Shape", [tokens], "places.size", start=1)
        limits = [
            graph.small("zero", np.int64(0)),
            graph.node("Squeeze", [self.size], "places.end"),
            graph.small("one", np.int64(1)),
        ]
        self.index = graph.node("Range", limits, "places")
        new = graph.node("Neg", [self.size], "mask.new_start")
        new = graph.last(mask, new, 1, "mask.new")
        total = graph.node("ReduceSum", [mask, one], "mask.total", keepdims=1)
        self.count = graph.node("ReduceSum", [new, one], "mask.count", keepdims=1)
        self.held = graph.node("Sub", [total, self.count], "mask.held")
        ranks = graph.node("CumSum", [new, limits[2]], "mask.ranks")
        first = graph.node("Sub", [ranks, one], "places.of_tokens")
        then = graph.node("Sub", [self.index, ranks], "mask.padding_before")
        then = graph.node("Add", [then, self.count], "places.of_padding")
        given = graph.node("Cast", [new], "mask.given", to=TensorProto.BOOL)
        self.order = graph.node("Where", [given, first, then], "places.order")
        self.tokens = graph.node(
            "ScatterElements", [tokens, self.order, tokens], "places.ids", axis=1
        )
        self._wanted = self._last(ranks, rows)
        self._back: str | None = None
        self._windows = dict[int, str]()

    def _last(self, ranks: str, rows: str) -> str:
        """Return the places of the last `rows` positions up to a row's last token `[batch, n, 1]`.

        Where fewer positions come before that, of the first: so all are in the order given.
        """
        graph = self._graph
        count = graph.node(
            "Reshape", [graph.node("Neg", [rows], "rows.neg"), graph.integers(1)], "rows.start"
        )
        positions = graph.last(self.index, count, 0, "rows.positions")
        before = graph.node("ReduceMin", [positions], "rows.before", keepdims=1)
        last = graph.node("ArgMax", [ranks], "rows.last_token", axis=1, keepdims=1)
        behind = graph.node("Sub", [self.size, last], "rows.from_last")
        behind = graph.node("Sub", [behind, graph.integers(1)], "rows.padding_behind")
        behind = graph.node("Min", [behind, before], "rows.shift")
        positions = graph.node("Sub", [positions, behind], "rows.wanted")
        places = graph.node("GatherElements", [self.order, positions], "rows.places", axis=1)
        return self._paired(places)

    def wanted(self, x: str, name: str) -> str:
        """Take the rows of `[batch, new, width]` whose logits are wanted."""
        return self._graph.rows(x, self._wanted, name)

    def back(self, x: str, name: str) -> str:
        """Put the rows of `[batch, new, width]` back to where they were given."""
        self._back = self._back or self._paired(self.order)
        return self._graph.rows(x, self._back, name)

    def window(self, columns: int) -> str:
        """Return where a convolution's state ends up in its old state followed by the new inputs.

        `[batch, columns, 1]`: the last inputs that are none of padding.
        """
        if columns not in self._windows:
            offsets = self._graph.integers(*range(columns))
            name = f"places.window{columns}"
            self._windows[columns] = self._paired(
                self._graph.node("Add", [self.count, offsets], name)
            )
        return self._windows[columns]

    def _paired(self, places: str) -> str:
        return self._graph.node("Unsqueeze", [places, self._graph.integers(-1)], f"{places}.rows")

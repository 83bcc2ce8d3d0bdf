"""Runs a padded batch through an ONNX decoder: what a single sequence never asks of a file."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.metrics.logits import Logits
from edgekit.runtime.engines.onnx.graph import Decoder

Integers = NDArray[np.int64]


def padded_logits(
    session: ort.InferenceSession,
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    following: Sequence[int],
    in_front: bool,
) -> Logits:
    """Run rows of any lengths at once, then the same single tokens after each.

    Logits `[1 + following, rows, vocab_size]`: after each row, and after each single token. Padding
    is token 0, before a row's tokens or behind them.
    """
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(-len(row), None) if in_front else slice(len(row))
        ids[index, place] = row
        mask[index, place] = 1
    names = [decoder.logits, *(state.present for state in decoder.states)]
    states = [
        np.zeros((len(rows), *state.shape[1:]), np.dtype(state.dtype)) for state in decoder.states
    ]
    found = []
    for token in (None, *following):
        if token is not None:
            ids = np.full((len(rows), 1), token, np.int64)
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        feeds = _feeds(decoder, ids, mask)
        feeds |= {state.past: old for state, old in zip(decoder.states, states, strict=True)}
        logits, *states = session.run(names, feeds)
        found.append(logits.reshape(len(rows), -1, decoder.vocab_size)[:, -1].astype(np.float32))
    return np.stack(found)


def _feeds(decoder: Decoder, ids: Integers, mask: Integers) -> dict[str, Any]:
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
    given = ((decoder.tokens, ids), (decoder.mask, mask), (decoder.positions, positions))
    feeds = {value.name: array.astype(value.dtype) for value, array in given if value is not None}
    if decoder.rows is not None:
        shape = [1] * len(decoder.rows.shape or ())
        feeds[decoder.rows.name] = np.ones(shape, decoder.rows.dtype)
    return feeds

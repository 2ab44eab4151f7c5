"""Raw responses on disk: what comes back is what was written, however parts of different answers took turns."""

from __future__ import annotations

import random
import struct
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.load.spill import SpillWriter, read_spill

pieces = st.lists(st.lists(st.binary(min_size=1, max_size=40), max_size=4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(answers=st.lists(pieces, min_size=1, max_size=5), order=st.randoms(use_true_random=False))
def test_parts_of_answers_that_take_turns(
    tmp_path_factory: pytest.TempPathFactory, answers: list[list[list[bytes]]], order: random.Random
) -> None:
    """``answers[k][j]``: the reads of part j of answer k; the last part is its end."""
    path = tmp_path_factory.mktemp("spill") / "spill"
    turns = [k for k, parts in enumerate(answers) for _ in parts]
    order.shuffle(turns)
    writer, done, finished = SpillWriter(path), [0] * len(answers), []
    for k in turns:
        reads = answers[k][done[k]]
        done[k] += 1
        stamps = b"".join(struct.pack("<qq", k, 100 * done[k] + i) for i in range(len(reads)))
        ends = array("I", np.cumsum([len(r) for r in reads]).tolist())
        if done[k] < len(answers[k]):
            writer.part(k, stamps, ends, b"".join(reads))
        else:
            writer.final(k, 1, 2, 3, 4 + k, None, "fine", 1, stamps, ends, b"".join(reads))
            finished.append(k)
    writer.close()
    outcomes = list(read_spill(path))
    assert [o.position for o in outcomes] == finished
    for o in outcomes:
        reads = [r for part in answers[o.position] for r in part]
        assert list(o.pieces()) == reads and o.data == b"".join(reads)
        numbers = [100 * j + i for j, part in enumerate(answers[o.position], 1) for i in range(len(part))]
        assert o.stamps_realtime.tolist() == [[o.position, n] for n in numbers]
        assert (o.end_ns, o.error, o.detail, o.kernel_stamps) == (4 + o.position, None, "fine", True)


def test_nothing_was_written(tmp_path: Path) -> None:
    assert list(read_spill(tmp_path / "none")) == []

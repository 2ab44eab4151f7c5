"""The regression of ``scripts/measure_front_end.py`` finds the costs that rows were made with, and refuses what hides them."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest

from bench.errors import BadInput
from scripts.measure_front_end import Load, Measured, cpu_s, loads, regress, server_writes_to


def rows(text: bool) -> list[Measured]:
    """0.7 ms a request, 0.8 us a prompt token beyond 128, 0.06 ms a chunk; a stream has one chunk more than tokens."""
    return [
        Measured(x, 0.7 + 0.0008 * (x.isl - 128) + 0.06 * (x.osl + 1), 0.0, x.osl + 1.0, 1.0, 0.1, 0.2)
        for x in loads()
        if x.text == text
    ]


def test_it_finds_the_costs_that_the_rows_were_made_with() -> None:
    found = regress(rows(text=True))
    assert (found.request_ms, found.prompt_token_ms, found.chunk_ms) == pytest.approx((0.7, 0.0008, 0.06))
    assert found.median_error < 1e-9


def test_equal_prompts_say_nothing_of_prompt_tokens_and_the_rest_is_still_found() -> None:
    found = regress([r for r in rows(text=False) if r.load.isl == 128])
    assert found.prompt_token_ms == 0.0
    assert (found.request_ms, found.chunk_ms) == pytest.approx((0.7, 0.06))


def test_equal_outputs_are_refused_because_they_hide_what_a_chunk_costs() -> None:
    same = [dataclasses.replace(r, chunks=5.0) for r in rows(text=False)]
    for some in (same, rows(text=False)[:2], []):
        with pytest.raises(BadInput, match="tell requests and chunks apart"):
            regress(some)


def test_both_kinds_of_prompt_come_one_by_one_and_all_at_once() -> None:
    assert {(x.text, x.concurrency >= x.num_requests) for x in loads()} == {
        (text, at_once) for text in (False, True) for at_once in (False, True)
    }
    assert Load(1000, 1000, 128, 4, True) in loads()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_time_is_that_of_the_main_thread_and_of_the_others() -> None:
    main, other = cpu_s(os.getpid())
    until = time.process_time() + 0.02
    while time.process_time() < until:
        pass
    later_main, later_other = cpu_s(os.getpid())
    assert main + other > 0 and later_main + later_other > main + other


def test_a_servers_words_go_to_its_log_and_ours_to_standard_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "server.log"
    with server_writes_to(log) as out:
        os.write(1, b"from the server\n")
        os.write(2, b"a warning\n")
        print("ours", file=out, flush=True)
    os.write(1, b"afterwards\n")
    assert log.read_text() == "from the server\na warning\n"
    assert capfd.readouterr() == ("ours\nafterwards\n", "")

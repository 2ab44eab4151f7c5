"""Prometheus text, and the comparison of both views."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest

from bench.errors import StoreError
from bench.records import EngineMetric, RequestRecord
from bench.telemetry.vllm_metrics import MetricsScraper, compare, parse_prometheus, total
from tests.load.conftest import make_requests

PAGE = """# HELP vllm:num_requests_running Number of requests
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a\\"b"} 3.0
vllm:num_requests_running{engine="1",model_name="a\\"b"} 4
vllm:prompt_tokens_total{engine="0"} %d
vllm:generation_tokens_total{engine="0"} %d
vllm:generation_tokens_created{engine="0"} 1.7e9
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 2
vllm:time_to_first_token_seconds_sum{} %s
vllm:time_to_first_token_seconds_count 2
vllm:prefix_cache_queries_total 100
vllm:prefix_cache_hits_total %d
vllm:broken{ 1
vllm:nan_gauge NaN
python_gc_objects 5
"""


def test_parsing() -> None:
    samples = parse_prometheus(PAGE % (10, 4, "0.5", 0), 1.5)
    assert total(samples, "num_requests_running") == 7
    first = samples[0]
    assert first == EngineMetric(
        1.5, "vllm:num_requests_running", json.dumps({"engine": "0", "model_name": 'a"b'}, separators=(",", ":")), 3.0
    )
    names = {s.name for s in samples}
    assert "python_gc_objects" not in names and "vllm:broken" not in names
    assert not any(n.endswith("_created") for n in names)
    assert "vllm:time_to_first_token_seconds_bucket" not in {
        s.name for s in parse_prometheus(PAGE % (1, 1, "1", 0), 0, buckets=False)
    }
    assert total(samples, "absent") is None


def record(index: int, isl: int = 5, osl: int = 2, ttft: float = 0.25) -> RequestRecord:
    return RequestRecord(index, "measured", isl, osl, None, 1.0, 1.0 + ttft, 2.0, 2.0)


def scraped(*pages: str) -> tuple[MetricsScraper, list[EngineMetric]]:
    kept: list[EngineMetric] = []
    left = list(pages)
    scraper = MetricsScraper(lambda: left.pop(0), kept.append, 0.0, interval_s=60)
    scraper.start()
    scraper.stop()
    return scraper, kept


def test_views_that_agree() -> None:
    scraper, kept = scraped(PAGE % (90, 10, "0", 0), PAGE % (100, 14, "0.5", 0))
    scraper.first = [s for s in scraper.first if "time_to" not in s.name]
    view = compare(scraper, [record(0), record(1)], make_requests(2), clean=True)
    assert (view.server_prompt_tokens, view.server_output_tokens) == (10, 4)
    assert view.server_ttft_mean_s == 0.25 and view.client_ttft_mean_s == 0.25
    assert view.disagreements == () and view.warnings == () and len(kept) > 10


def test_views_that_disagree_say_so() -> None:
    scraper, _ = scraped(PAGE % (0, 0, "0", 0), PAGE % (10, 5, "0.1", 0))
    scraper.first = [s for s in scraper.first if "time_to" not in s.name]
    view = compare(scraper, [record(0), record(1)], make_requests(2), clean=True)
    assert any("output tokens: the server counted 5, the client 4" in d for d in view.disagreements)
    assert any(d.startswith("mean TTFT") for d in view.disagreements)
    cut_off = compare(scraper, [record(0), replace(record(1), error="aborted")], make_requests(2), clean=False)
    assert cut_off.disagreements == ()


def test_unasked_prefix_hits_are_a_warning_and_failed_scrapes_are_counted() -> None:
    scraper, _ = scraped(
        PAGE % (0, 0, "0", 0), (PAGE % (10, 4, "0.5", 40)).replace("queries_total 100", "queries_total 200")
    )
    view = compare(scraper, [record(0), record(1)], make_requests(2), clean=True)
    assert view.prefix_cache_hit_ratio == 0.4 and "prefix cache" in view.warnings[0]
    empty, _ = scraped()
    assert empty.num_failed == 2 and empty.first == []


def test_a_full_disk_ends_the_scraping_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's other records meet the same error and say it in one line; a thread's traceback says it in thirty."""
    escaped: list[object] = []
    monkeypatch.setattr(threading, "excepthook", escaped.append)

    def emit(sample: EngineMetric) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise StoreError("cannot write: No space left on device", where="engine_metrics.arrow")

    scraper = MetricsScraper(lambda: PAGE % (0, 0, "0", 0), emit, time.monotonic(), interval_s=0.01)
    scraper.start()
    scraper._thread.join(timeout=10)
    assert not scraper._thread.is_alive() and escaped == []
    scraper.stop()

"""The server's own view: vLLM's Prometheus metrics, scraped on the run's clock, and compared with the client's.

vLLM's names are kept verbatim (``vllm:num_requests_running``, ...). Histogram buckets are kept from the first and the
last scrape only; sums and counts from every one.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError
from bench.records import EngineMetric, Request, RequestRecord

_LINE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
PREFIX = "vllm:"


def parse_prometheus(text: str, t_s: float, *, prefix: str = PREFIX, buckets: bool = True) -> list[EngineMetric]:
    """Samples of the text exposition format whose name starts with ``prefix``. Lines that are none are skipped:
    a metric that cannot be read must not end a run."""
    out = []
    for line in text.splitlines():
        if not line.startswith(prefix):
            continue
        match = _LINE.match(line.strip())
        if match is None or (not buckets and match[1].endswith("_bucket")) or match[1].endswith("_created"):
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        labels = {k: _ESCAPE.sub(lambda m: "\n" if m[1] == "n" else m[1], v) for k, v in _LABEL.findall(match[2] or "")}
        out.append(EngineMetric(t_s, match[1], json.dumps(labels, sort_keys=True, separators=(",", ":")), value))
    return out


def total(samples: Iterable[EngineMetric], name: str) -> float | None:
    """Sum over all label sets of one scrape's samples of ``name``; None when there are none."""
    values = [s.value for s in samples if s.name == PREFIX + name]
    return sum(values) if values else None


class MetricsScraper:
    """Scrapes on a thread every ``interval_s`` from :meth:`start` to :meth:`stop`, plus once at each end.

    Args:
        fetch: returns the page's text; raises OSError or ValueError when it cannot be had (counted, not raised).
        emit: called with every sample kept.
    """

    def __init__(
        self,
        fetch: Callable[[], str],
        emit: Callable[[EngineMetric], None],
        t0_monotonic_s: float,
        interval_s: float = 1.0,
    ) -> None:
        self._fetch, self._emit, self._t0, self._interval_s = fetch, emit, t0_monotonic_s, interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self.first: list[EngineMetric] = []
        self.last: list[EngineMetric] = []
        self.num_scrapes = self.num_failed = 0

    def _scrape(self, *, buckets: bool) -> list[EngineMetric]:
        before = time.monotonic()
        try:
            text = self._fetch()
        except Exception:
            self.num_failed += 1
            return []
        # The server reads its counters somewhere between request and answer.
        t_s = (before + time.monotonic()) / 2 - self._t0
        samples = parse_prometheus(text, t_s, buckets=buckets)
        self.num_scrapes += 1
        for sample in samples:
            self._emit(sample)
        return samples

    def _run(self) -> None:
        while not self._over.wait(self._interval_s):
            try:
                self._scrape(buckets=False)
            except BenchError:
                return  # the disk is full: whoever writes the run's other records meets the same, and says it

    def start(self) -> None:
        self.first = self._scrape(buckets=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._over.set()
            self._thread.join(timeout=30)
        if not self.last:
            self.last = self._scrape(buckets=True)

    def delta(self, name: str) -> float | None:
        """Growth of a counter over the run."""
        first, last = total(self.first, name), total(self.last, name)
        return None if last is None else last - (first or 0.0)


@dataclass(frozen=True, slots=True)
class ServerView:
    """What the server counted over the run (warm-up included), beside what the client counted.

    ``disagreements`` are sentences; empty means that both views agree. Token counts must agree exactly when every
    request completed; requests that were cut off leave a difference that is stated, not flagged.
    """

    server_prompt_tokens: float | None
    client_prompt_tokens: int
    server_output_tokens: float | None
    client_output_tokens: int
    server_requests: float | None
    client_requests: int
    server_ttft_mean_s: float | None
    client_ttft_mean_s: float | None
    server_tpot_mean_s: float | None
    num_preemptions: float | None
    prefix_cache_hit_ratio: float | None
    expected_prefix_hit_ratio: float
    spec_acceptance_ratio: float | None
    num_scrapes: int
    num_failed_scrapes: int
    disagreements: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


#: The server's TTFT runs from its own arrival stamp to its own first token: the client's is longer by the way there and
#: back through HTTP. More than this on top of 20 % is flagged.
TTFT_SLACK_S = 0.020


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def compare(
    scraper: MetricsScraper, records: Sequence[RequestRecord], requests: Sequence[Request], *, clean: bool
) -> ServerView:
    """Lay both views beside each other.

    Args:
        clean: every request that was sent completed, so that token counts must be equal.
    """
    sent = [r for r in records if r.sent_s is not None]
    done = [r for r in sent if r.error is None]
    ttfts = [r.first_token_s - r.sent_s for r in done if r.first_token_s is not None and r.sent_s is not None]
    d = scraper.delta
    prompt = sum(r.isl or 0 for r in done)
    output = sum(r.osl or 0 for r in done)
    by_index = {r.index: r for r in requests}
    asked = [by_index[r.index] for r in done if r.index in by_index]
    shared = sum(r.prefix_tokens for r in asked)
    expected = shared / prompt if prompt else 0.0
    hits = _ratio(d("prefix_cache_hits_total"), d("prefix_cache_queries_total"))
    view = ServerView(
        server_prompt_tokens=d("prompt_tokens_total"),
        client_prompt_tokens=prompt,
        server_output_tokens=d("generation_tokens_total"),
        client_output_tokens=output,
        server_requests=d("request_success_total"),
        client_requests=len(done),
        server_ttft_mean_s=_ratio(d("time_to_first_token_seconds_sum"), d("time_to_first_token_seconds_count")),
        client_ttft_mean_s=sum(ttfts) / len(ttfts) if ttfts else None,
        server_tpot_mean_s=_ratio(
            d("request_time_per_output_token_seconds_sum"), d("request_time_per_output_token_seconds_count")
        ),
        num_preemptions=d("num_preemptions_total"),
        prefix_cache_hit_ratio=hits,
        expected_prefix_hit_ratio=expected,
        spec_acceptance_ratio=_ratio(
            d("spec_decode_num_accepted_tokens_total"), d("spec_decode_num_draft_tokens_total")
        ),
        num_scrapes=scraper.num_scrapes,
        num_failed_scrapes=scraper.num_failed,
    )
    from dataclasses import replace

    return replace(view, disagreements=tuple(_disagreements(view, clean)), warnings=tuple(_warnings(view)))


def _disagreements(v: ServerView, clean: bool) -> list[str]:
    out = []
    pairs = (
        ("prompt tokens", v.server_prompt_tokens, v.client_prompt_tokens),
        ("output tokens", v.server_output_tokens, v.client_output_tokens),
    )
    for what, server, client in pairs:
        if server is not None and server != client and clean:
            out.append(f"{what}: the server counted {server:.0f}, the client {client}")
    if clean and v.server_ttft_mean_s is not None and v.client_ttft_mean_s is not None:
        excess = v.client_ttft_mean_s - v.server_ttft_mean_s
        if excess < -1e-3 or excess > TTFT_SLACK_S + 0.2 * v.server_ttft_mean_s:
            out.append(
                f"mean TTFT: the server says {v.server_ttft_mean_s * 1e3:.1f} ms, the client {v.client_ttft_mean_s * 1e3:.1f} ms"
            )
    return out


def _warnings(v: ServerView) -> list[str]:
    out = []
    hits = v.prefix_cache_hit_ratio
    if hits is not None and hits > v.expected_prefix_hit_ratio + 0.01:
        out.append(
            f"{hits:.1%} of the prompt tokens came from the prefix cache, the workload shares "
            f"{v.expected_prefix_hit_ratio:.1%}: prompts of an earlier run were repeated"
        )
    if v.num_failed_scrapes:
        out.append(f"{v.num_failed_scrapes} scrapes of /metrics failed")
    return out


def to_dict(view: ServerView) -> dict[str, Any]:
    """For the manifest."""
    from dataclasses import asdict

    return asdict(view)

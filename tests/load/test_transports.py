"""TLS, IPv6 and Unix sockets; the key that is nowhere on disk; limits, stop rules, sessions, phases."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.errors import BadInput, EngineUnavailable
from bench.load.driver import LoadOptions, drive
from bench.load.mock import Delay, Fault, read_truth
from bench.load.oneshot import ask
from bench.load.schedule import closed_loop, concurrency_ramp, offline, open_loop
from bench.load.self_test import errors_against_truth
from bench.load.target import Target, encode_token_ids
from bench.records import Request, StopRule
from tests.load.conftest import LIMITS, make_requests, run


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate for localhost and its key (PEM files)."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return str(folder / "cert.pem"), str(folder / "key.pem")


def good(result: Any, n: int) -> None:
    result.close()
    assert [(r.error, r.error_detail, r.osl) for r in result.records] == [(None, None, 8)] * n


def test_tls_is_verified_and_stamped_by_the_kernel(
    serve_mock: Callable[..., Any], certificate: tuple[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "truth"
    with serve_mock(tls_cert=certificate[0], tls_key=certificate[1], log_path=str(log)) as url:
        url = url.replace("127.0.0.1", "localhost")
        trusted = run(url, closed_loop(make_requests(12), 3), ca_file=certificate[0])
        assert trusted.honesty.stamps == "kernel"
        refused = run(url)
        refused.close()
        assert {r.error for r in refused.records} == {"connect"}
        assert all("certificate not accepted" in (r.error_detail or "") for r in refused.records)
    ttft, itl, _ = errors_against_truth(trusted, read_truth(log))
    good(trusted, 12)
    assert np.median(np.abs(itl)) < 0.002
    assert np.median(np.abs(ttft)) < 0.005


def test_tls_split_into_small_pieces(serve_mock: Callable[..., Any], certificate: tuple[str, str]) -> None:
    with serve_mock(tls_cert=certificate[0], tls_key=certificate[1], faults=(Fault("dribble"),)) as url:
        good(run(url.replace("127.0.0.1", "localhost"), ca_file=certificate[0]), 4)


def test_plain_port_asked_for_tls(serve_mock: Callable[..., Any]) -> None:
    with serve_mock() as url:
        result = run(url.replace("http://", "https://"))
    result.close()
    assert {r.error for r in result.records} <= {"connect", "connect_timeout"}
    assert all("may speak plain HTTP" in (r.error_detail or "") for r in result.records)


def _answering(answer: bytes) -> tuple[int, threading.Thread]:
    """A port that sends ``answer`` to the first connection, whatever it says, and closes it."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server, server.accept()[0] as peer:
            peer.recv(65536)
            peer.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return server.getsockname()[1], thread


@pytest.mark.parametrize(
    ("scheme", "answer", "hint"),
    [
        ("https", b"HTTP/1.1 400 Bad Request\r\n\r\n", "no TLS handshake: .*may speak plain HTTP: try http://"),
        ("https", b"\x15\x03\x03\x00\x02\x02\x46", "no TLS handshake: [^;]*ALERT[^;]*$"),  # it does speak TLS
        ("http", b"\x15\x03\x01\x00\x02\x02\x46", "its answer is not HTTP; .*speaks TLS: try https://"),
        ("http", b"", "speaks TLS: try https://"),
    ],
)
def test_a_first_question_in_the_wrong_protocol_says_so(scheme: str, answer: bytes, hint: str) -> None:
    port, thread = _answering(answer)
    with pytest.raises(EngineUnavailable, match=hint):
        ask(Target(f"{scheme}://127.0.0.1:{port}", model="mock"), "GET", "/v1/models", timeout_s=5)
    thread.join(timeout=5)


def test_unix_socket_has_user_stamps(serve_mock: Callable[..., Any], tmp_path: Path) -> None:
    with serve_mock(uds=str(tmp_path / "s")) as url:
        assert url == f"unix:{tmp_path / 's'}"
        result = run(url)
        assert result.honesty.stamps == "user"
        good(result, 4)


def test_ipv6(serve_mock: Callable[..., Any]) -> None:
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with serve_mock(host="::1") as url:
        assert "[::1]" in url
        good(run(url), 4)


def test_the_key_is_sent_and_nowhere_on_disk(
    serve_mock: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.config.experiment import Experiment
    from bench.runner.load_runs import LoadSession

    key = "sk-secret-0123456789"
    monkeypatch.setenv("MY_KEY", key)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serve_mock(api_key_env="MY_KEY") as url:
        options = LoadOptions(limits=LIMITS, scratch_parent=str(tmp_path), keep_raw=True)
        experiment = Experiment.model_validate({
            "name": "k", "why": "test", "model": "mock",
            "engine": {"kind": "endpoint", "url": url, "served_model": "mock", "api_key_env": "MY_KEY", "prompts": "token_ids"},
            "load": {"kind": "closed_loop", "concurrency": 2}, "workload": {"isl": 8, "osl": 8},
            "stop": {"max_requests": 4},
        })  # fmt: skip
        target = Target(url, model="mock", api_key_env="MY_KEY", ignore_eos=True, continuous_usage=True)
        session = LoadSession(experiment, target, options, vocab_size=4096, provenance={}, root=tmp_path / "runs")
        from bench.cli.load_spec import cell_of

        with session:
            folder = session.run(cell_of(experiment), {"concurrency": 2})
        assert (folder / "manifest.json").exists()
        monkeypatch.setenv("MY_KEY", "wrong")
        bad = run(url, api_key_env="MY_KEY")
        bad.close()
        assert {r.error for r in bad.records} == {"http_4xx"}
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(BadInput, match="MY_KEY is not set"):
            run(url, api_key_env="MY_KEY")
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 10
    for path in files:
        assert key.encode() not in path.read_bytes(), path


def test_urls_that_may_hold_secrets_are_refused() -> None:
    for url in ("http://user:pw@host/v1", "https://host/v1?key=1", "ftp://host", "host:80", "unix:"):
        with pytest.raises(BadInput):
            Target(url)


def test_paths() -> None:
    assert Target("http://h:1").request_path == "/v1/completions"
    assert Target("https://h/api/v1/", api="chat").request_path == "/api/v1/chat/completions"
    assert Target("https://h/v1/chat/completions", api="chat").request_path == "/v1/chat/completions"
    assert Target("https://h/api/v1").root_path("metrics") == "/api/metrics"
    ids = np.array([0, 5, 300000], dtype=np.int32)
    assert encode_token_ids(ids) == b"0,5,300000"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_gives_the_same_requests(serve_mock: Callable[..., Any], processes: int) -> None:
    with serve_mock() as url:
        schedule = open_loop(make_requests(60), 150.0, seed=4)
        result = run(url, schedule, options={"num_processes": processes})
    result.close()
    assert result.honesty.num_processes == processes
    assert sorted(r.index for r in result.records) == list(range(60))
    assert schedule.due_s is not None
    due = {r.index: r.due_s for r in result.records}
    offsets = [due[i] - schedule.due_s[i] for i in range(60)]  # type: ignore[operator]
    assert max(offsets) - min(offsets) < 1e-6, "one clock, one schedule"
    done = [r.done_s for r in result.records]
    assert done == sorted(done)  # type: ignore[type-var]


@pytest.mark.parametrize("processes", [1, 3])
def test_the_cap_holds_over_processes(serve_mock: Callable[..., Any], processes: int) -> None:
    with serve_mock(ttft=Delay(0.03)) as url:
        schedule = open_loop(make_requests(60), 400.0, max_in_flight=5, arrivals="constant")
        result = run(url, schedule, options={"num_processes": processes})
    result.close()
    assert most_in_flight(result.records) == 5
    late = [r.sent_s - r.due_s for r in result.records]  # type: ignore[operator]
    assert max(late) > 0.1, "queueing in the client is not hidden"


def most_in_flight(records: Any) -> int:
    changes = sorted([(r.sent_s, 1) for r in records] + [(r.done_s, -1) for r in records])
    level = most = 0
    for _, change in changes:
        level += change
        most = max(most, level)
    return most


def test_closed_loop_keeps_its_concurrency(serve_mock: Callable[..., Any]) -> None:
    with serve_mock() as url:
        result = run(url, closed_loop(make_requests(40), 7))
    result.close()
    assert most_in_flight(result.records) == 7
    assert all(r.due_s is None for r in result.records)


def test_offline_batches_wait_for_each_other(serve_mock: Callable[..., Any]) -> None:
    with serve_mock() as url:
        result = run(url, offline(make_requests(9), batch_size=3))
    result.close()
    by_index = {r.index: r for r in result.records}
    for first in (3, 6):
        before = max(by_index[i].done_s for i in range(first - 3, first))  # type: ignore[type-var]
        assert all(by_index[i].sent_s >= before for i in range(first, first + 3))  # type: ignore[operator]


def test_warm_up_comes_first_and_is_marked(serve_mock: Callable[..., Any]) -> None:
    items = [replace(r, phase="warmup") if r.index < 4 else r for r in make_requests(12)]
    with serve_mock() as url:
        result = run(url, open_loop(items, 50.0, seed=1))
    result.close()
    warm = [r for r in result.records if r.phase == "warmup"]
    rest = [r for r in result.records if r.phase != "warmup"]
    assert len(warm) == 4 and max(r.done_s for r in warm) <= min(r.sent_s for r in rest)  # type: ignore[type-var]
    assert min(r.due_s for r in rest) >= result.main_start_s  # type: ignore[type-var]


def test_sessions_wait_for_their_turn(serve_mock: Callable[..., Any]) -> None:
    ids = np.arange(300, 305, dtype=np.int32)
    items = [
        Request(index=3 * t + s, osl=8, isl=5, prompt_token_ids=ids, session=s, turn=t, think_s=0.05 if t else 0.0)
        for t in range(3)
        for s in range(3)
    ]
    with serve_mock() as url:
        result = run(url, closed_loop(items, 8))
    result.close()
    assert len(result.records) == 9 and all(r.error is None for r in result.records)
    for s in range(3):
        turns = sorted((r for r in result.records if r.session == s), key=lambda r: r.turn or 0)
        for a, b in itertools.pairwise(turns):
            assert b.sent_s - a.done_s >= 0.0499  # type: ignore[operator]


def test_stop_rules(serve_mock: Callable[..., Any]) -> None:
    with serve_mock(itl=Delay(0.01)) as url:
        many = make_requests(5000)
        r = run(url, closed_loop(many, 4, stop=StopRule(max_requests=10)))
        assert len(r.records) == 10
        r.close()
        r = run(url, closed_loop(many, 4, stop=StopRule(max_duration_s=0.5)))
        aborted = [x for x in r.records if x.error == "aborted"]
        assert 0 < len(aborted) <= 4 and "maximum duration" in r.stop_reason and len(r.records) < 200
        r.close()
        r = run(url, closed_loop(many, 4, stop=StopRule(min_duration_s=0.4, min_requests=20)))
        assert 20 <= len(r.records) < 200 and all(x.error is None for x in r.records)
        r.close()
    with serve_mock(faults=(Fault("http_500"),)) as url:
        # paced, so that how many go out until the stop is a matter of time and not of the machine's speed: 25 s in all
        r = run(url, open_loop(many, 200.0, arrivals="constant", stop=StopRule(max_errors=5)))
        sent = [x for x in r.records if x.sent_s is not None]
        assert 5 < len(sent) < 400 and "errors" in r.stop_reason
        r.close()


def test_requests_due_but_never_sent_are_records(serve_mock: Callable[..., Any]) -> None:
    with serve_mock(ttft=Delay(0.3)) as url:
        schedule = open_loop(
            make_requests(100), 100.0, max_in_flight=1, arrivals="constant", stop=StopRule(max_duration_s=0.7)
        )
        r = run(url, schedule)
    r.close()
    unsent = [x for x in r.records if x.sent_s is None]
    assert len(unsent) > 50 and {x.error for x in unsent} == {"aborted"}
    assert all(x.due_s is not None for x in unsent)


def test_concurrency_ramp(serve_mock: Callable[..., Any]) -> None:
    with serve_mock(ttft=Delay(0.05)) as url:
        steps = concurrency_ramp(1, 6, 0.5)
        r = run(url, closed_loop(make_requests(60), 6, steps=steps))
    r.close()
    start = min(x.sent_s for x in r.records)  # type: ignore[type-var]
    early = [x for x in r.records if x.sent_s < start + 0.08]  # type: ignore[operator]
    assert len(early) <= 3 and most_in_flight(r.records) == 6


def test_an_answer_longer_than_the_buffer_is_spilled_in_parts(serve_mock: Callable[..., Any]) -> None:
    """4,000 chunks of ~250 bytes: several parts, the same record."""
    with serve_mock(itl=Delay(0.0001)) as url:
        target = Target(url, model="m", continuous_usage=True)
        options = LoadOptions(limits=replace(LIMITS, total_s=60), exact_osl=True)
        r = drive(closed_loop(make_requests(3, osl=4000), 3), target, options)
    tokens = sum(int(b["tokens"].sum()) for b in r.chunk_blocks())
    r.close()
    assert [(x.error, x.osl) for x in r.records] == [(None, 4000)] * 3
    assert tokens == 12000


def test_scratch_is_removed(serve_mock: Callable[..., Any], tmp_path: Path) -> None:
    with serve_mock() as url:
        r = run(url, options={"scratch_parent": str(tmp_path)})
        assert os.listdir(tmp_path)
        r.close()
    assert os.listdir(tmp_path) == []


def test_a_mock_does_not_outlive_the_tool_that_started_it() -> None:
    code = (
        "import time; from bench.load.mock import MockConfig, running_mock\n"
        "with running_mock(MockConfig(processes=2)) as url: print(url, flush=True); time.sleep(600)"
    )
    tool = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert tool.stdout is not None
    port = int(tool.stdout.readline().decode().rsplit(":", 1)[1])
    tool.kill()
    tool.wait()
    tool.stdout.close()
    deadline = time.monotonic() + 60
    with contextlib.suppress(ConnectionRefusedError):
        while time.monotonic() < deadline:
            socket.create_connection(("127.0.0.1", port)).close()
            time.sleep(0.1)
        pytest.fail("the mock still listens")

"""Two hundred ways to write an experiment file wrong: each ends in one clear line that names the file."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from bench.config.loading import load
from bench.errors import EXIT_BAD_INPUT, BenchError

GOOD: dict[str, Any] = {
    "name": "good",
    "why": "to be made wrong",
    "model": "tiny-llama",
    "weights": "dummy",
    "engine": {"kind": "vllm", "args": {"tensor_parallel_size": 1, "max_model_len": 512}},
    "load": {"kind": "closed_loop", "concurrency": 4},
    "workload": {"isl": 128, "osl": {"kind": "uniform", "low": 8, "high": 16}},
    "warmup": {"num_requests": 4},
    "stop": {"min_requests": 8, "max_requests": 16},
    "repeats": 2,
    "seed": 1,
    "limits": {"engine_start_s": 60, "run_s": 60},
    "sweep": {"grid": {"tensor_parallel_size": [1, 2], "concurrency": [1, 2]}},
}

WRONG_VALUES: list[Any] = [None, True, -1, 0, 1.5, "", "abc", "10/s", [], {}, [1], {"a": 1}, float("nan"), float("inf")]

# field -> indices of WRONG_VALUES that are in fact allowed there
FIELDS: dict[tuple[str, ...], set[int]] = {
    ("name",): {6, 7} - {7},
    ("why",): {6, 7},
    ("weights",): set(),
    ("engine",): set(),
    ("load",): set(),
    ("workload",): set(),
    ("engine", "kind"): set(),
    ("load", "kind"): set(),
    ("load", "concurrency"): set(),
    ("workload", "isl"): set(),
    ("workload", "osl", "low"): set(),
    ("workload", "osl", "high"): set(),
    ("warmup", "num_requests"): {0, 3},
    ("stop", "min_requests"): {3},
    ("stop", "max_requests"): {0},
    ("repeats",): set(),
    ("seed",): {3},
    ("limits", "run_s"): {4},
}


def put(data: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    out = copy.deepcopy(data)
    node = out
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return out


def text_of(data: Any) -> str:
    import io

    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.dump(data, stream)
    return stream.getvalue()


def wrong_values() -> list[tuple[str, str]]:
    out = []
    for path, allowed in FIELDS.items():
        for i, value in enumerate(WRONG_VALUES):
            if i not in allowed:
                out.append((f"{'.'.join(path)}={value!r}", text_of(put(GOOD, path, value))))
    return out


def wrong_structure() -> list[tuple[str, str]]:
    good = text_of(GOOD)
    out = [(f"without {k}", text_of({a: b for a, b in GOOD.items() if a != k})) for k in ("name", "why", "model")]
    out += [
        (f"without {k}", text_of({a: b for a, b in GOOD.items() if a != k})) for k in ("engine", "load", "workload")
    ]
    out += [(f"unknown {k}", text_of({**GOOD, k: 1})) for k in ("nmae", "tp", "batch", "Name", "sweeps", "x")]
    out += [("unknown in " + k, text_of(put(GOOD, (k, "zzz"), 1))) for k in ("load", "workload", "stop", "limits")]
    out += [("empty", ""), ("a word", "hello"), ("a list", "- a\n- b\n"), ("a number", "3"), ("null", "null\n")]
    out += [("tab", good.replace("  ", "\t", 1)), ("unclosed", good + "x: [1, 2\n"), ("brace", good + "}\n")]
    out += [
        ("twice", good + "name: again\n"),
        ("bad anchor", good + "x: *nowhere\n"),
        ("tag", good + "x: !!python/object:a 1\n"),
    ]
    out += [("two documents", good + "---\n" + good), ("binary", good + "\x00"), ("quote", good + "y: 'open\n")]
    sweeps: list[Any] = [
        "x", [1], {"grid": 1}, {"grid": {"concurrency": 4}}, {"grid": {"concurrency": []}}, {"grid": {"nothing": [1]}},
        {"grid": {"concurrency": ["a"]}}, {"grid": {"concurrency": [0]}}, {"grid": {"batch_size": [1]}},
        {"points": {"a": 1}}, {"points": [1]}, {"points": [{}]}, {"points": [{"concurrency": -2}]}, {"gird": {}},
        {"grid": {"load": [1]}}, {"grid": {"shape": ["8k"]}}, {"grid": {"isl": [{"kind": "zipf"}]}},
        {"grid": {"seed": list(range(200)), "isl": list(range(1, 101))}},
    ]  # fmt: skip
    out += [(f"sweep {s!r}"[:60], text_of({**GOOD, "sweep": s})) for s in sweeps]
    return out


CASES = wrong_values() + wrong_structure()


def test_there_are_two_hundred() -> None:
    assert len(CASES) >= 200


def test_the_good_one_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(text_of(GOOD))
    assert len(load(path).cells) == 4


@pytest.mark.parametrize("text", [c[1] for c in CASES], ids=[c[0] for c in CASES])
def test_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(BenchError) as caught:
        load(path)
    message = str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert "wrong.yaml" in message
    assert "\n" not in message
    assert 20 < len(message) < 500


def test_not_utf8_missing_and_a_folder(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9\n")
    for path in (latin, tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(BenchError):
            load(str(path) if path != tmp_path else str(path) + "/")


def test_the_command_line_prints_the_line_and_exits_2(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text_of(put(GOOD, ("load", "concurrency"), "10/s")))
    done = subprocess.run(
        [sys.executable, "-m", "bench", "validate", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "wrong.yaml:" in done.stderr and "load.concurrency" in done.stderr and "10/s" in done.stderr
    assert "Traceback" not in done.stderr

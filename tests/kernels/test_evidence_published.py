"""What the evidence programme publishes: its archives, its first page, and one rehearsal with a real engine."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from scripts import evidence_publish, gpu_evidence
from scripts.evidence_parts import programme
from scripts.evidence_readme import readme

ROOT = Path(__file__).resolve().parents[2]


def test_archives_stay_below_the_limit_and_unpack_to_the_same_bytes(tmp_path):
    import random

    source = tmp_path / "evidence"
    source.mkdir()
    content = random.Random(0).randbytes(300_000)
    (source / "a.bin").write_bytes(content)
    (source / "b.txt").write_text("hello")
    pieces = evidence_publish.write_archive(
        source, [source / "a.bin", source / "b.txt"], tmp_path / "out", limit=64 * 1024
    )
    assert len(pieces) >= 4 and all(p.stat().st_size <= 64 * 1024 for p in pieces)
    joined = tmp_path / "joined.tar.xz"
    joined.write_bytes(b"".join(p.read_bytes() for p in sorted((tmp_path / "out").glob("evidence.tar.xz.*"))))
    with lzma.open(joined) as stream, tarfile.open(fileobj=stream) as archive:
        file = archive.extractfile("evidence/a.bin")
        assert file is not None and file.read() == content
    for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_a_rehearsal_says_so_in_its_readme(tmp_path):
    plan = programme(True)
    evidence = gpu_evidence.Evidence(plan, tmp_path / "e", 1.0)
    evidence.state["parts"]["kernels"] = {"status": "complete", "gpu_used_s": 0}
    target = tmp_path / "published"
    evidence_publish.publish_folder(evidence, target)
    text = (target / "README.md").read_text()
    assert "A rehearsal on a CPU" in text and "No figure in it means anything" in text
    assert (target / "archive" / "SHA256SUMS").exists()


def _complete_evidence(folder: Path) -> gpu_evidence.Evidence:
    """What the parts before `publish` leave, in small."""
    evidence = gpu_evidence.Evidence(programme(False), folder, 1.0)
    kernels = evidence.results / "kernels" / "h200" / "20261124T060000Z"
    kernels.mkdir(parents=True)
    bounds = [
        {"name": "copy", "verdict": "met", "value": 0.981, "limit": 0.9, "case_id": "x", "reason": "clone"},
        {"name": "gemm", "verdict": "missed", "value": 0.931, "limit": 0.95, "case_id": "y", "reason": "mm"},
    ]
    device = {"name": "NVIDIA H200", "kind": "cuda"}
    summary = {"status": "complete", "device": device, "software": {"torch": "2.11.0"}, "bounds": bounds}
    (kernels / "summary.json").write_text(json.dumps(summary))
    ratio = {"value": 0.9991, "low": 0.9951, "high": 1.0031}
    cost = {"ratio": ratio, "with_telemetry": [1, 2, 3], "without_telemetry": [1, 2, 3]}
    cost |= {"verdict": "no difference", "reason": "within 1 %"}
    (folder / "sampler-cost.json").write_text(json.dumps(cost))

    def errors(ratio: float, cells: int) -> dict:
        return {"summary": {"tpot_p50_s": {"median_absolute_error_ratio": ratio, "num_cells": cells}}, "cells": []}

    sources = {"data-sheet": errors(0.21, 9), "calibrated": errors(0.043, 7)}
    (folder / "prediction-errors.json").write_text(json.dumps({"sources": sources}))
    return evidence


def test_the_first_page_says_what_the_evidence_must_show_and_hides_no_miss(tmp_path):
    text = readme(_complete_evidence(tmp_path), ["evidence-8b"], ["evidence.tar.xz.001"])
    assert "# Evidence from NVIDIA H200" in text and "rehearsal" not in text
    assert "| copy | 98.1% | 90% | met | clone |" in text and "| gemm | 93.1% | 95% | missed | mm |" in text
    assert (
        "| before: data sheet and shipped curves | 21.0% (9) |" in text and "| after calibration | 4.3% (7) |" in text
    )
    assert "0.9991 (95 % interval 0.9951 to 1.0031), 3 runs against 3: no difference" in text
    assert "[evidence-8b](evidence-8b/report.md)" in text and "[table](kernels/table.txt)" in text


def test_the_newest_complete_kernels_count(tmp_path):
    evidence = _complete_evidence(tmp_path)
    first = evidence.kernels
    later = evidence.results / "kernels" / "h200" / "20261125T060000Z"
    later.mkdir()
    (later / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    assert evidence.kernels == first
    (later / "summary.json").write_text(json.dumps({"status": "complete"}))
    assert evidence.kernels == later


def test_a_file_that_no_forge_takes_is_refused(tmp_path, monkeypatch):
    evidence = _complete_evidence(tmp_path / "h200-2026-11-24")
    (evidence.folder / "doctor.json").write_text("x" * 5000)
    monkeypatch.setattr(evidence_publish, "PIECE_BYTES", 4000)
    with pytest.raises(gpu_evidence.PartFailed, match=r"larger than .* MiB, which no forge takes: doctor\.json"):
        evidence_publish.publish_folder(evidence, tmp_path / "published")


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_rehearsal_with_a_real_engine_from_doctor_to_archive(tmp_path):
    """One engine start stands for all: the serving parts are the same commands (the whole rehearsal takes minutes)."""
    pytest.importorskip("torch")
    from bench.engines.vllm_versions import installed_version

    if installed_version() is None:
        pytest.skip("vllm is not installed")
    parts = ("doctor", "kernels", "offline", "calibrate", "predict", "reports", "publish")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "gpu_evidence.py"),
        "--rehearse",
        "--out",
        str(tmp_path / "evidence"),
    ]
    for part in parts:
        command += ["--only", part]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that spin for each other on busy cores double the time
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=880, env=env)
    state = json.loads((tmp_path / "evidence" / "state.json").read_text())["parts"]
    assert {name: state[name]["status"] for name in parts} == dict.fromkeys(parts, "complete"), (
        done.stdout + done.stderr
    )
    errors = json.loads((tmp_path / "evidence" / "prediction-errors.json").read_text())["sources"]
    assert {cell["learned_from"] for cell in errors["calibrated"]["cells"]} == {True, False}
    published = tmp_path / "evidence" / "published"
    assert (published / "evidence-rehearsal-offline" / "report.html").stat().st_size > 50_000
    assert all(p.stat().st_size <= evidence_publish.PIECE_BYTES for p in (published / "archive").iterdir())
    # again: everything is complete, so nothing runs
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert "[" not in again.stdout.replace("GPU time", "")

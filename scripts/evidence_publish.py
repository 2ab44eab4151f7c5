"""Puts the evidence where it is published: reports and summaries to read, everything else in archives of at most 16 MiB."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.evidence_parts import Programme
from scripts.evidence_results import experiments

PIECE_BYTES = 16 * 2**20
ARCHIVE = "evidence.tar.xz"


class _Pieces(io.RawIOBase):
    """A write-only stream that starts a new file whenever one would exceed ``limit`` bytes."""

    def __init__(self, folder: Path, name: str, limit: int) -> None:
        self._folder, self._name, self._limit = folder, name, limit
        self.paths: list[Path] = []
        self._file: io.BufferedWriter | None = None
        self._room = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            if self._room == 0:
                self._next()
            part = view[done : done + self._room]
            assert self._file is not None
            self._file.write(part)
            self._room -= len(part)
            done += len(part)
        return done

    def _next(self) -> None:
        if self._file:
            self._file.close()
        path = self._folder / f"{self._name}.{len(self.paths) + 1:03d}"
        self.paths.append(path)
        self._file = path.open("wb")
        self._room = self._limit

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
        super().close()


def write_archive(source: Path, files: list[Path], folder: Path, limit: int = PIECE_BYTES) -> list[Path]:
    """Pack ``files`` (inside ``source``) into ``evidence.tar.xz.001``, ``.002``, ... of at most ``limit`` bytes each.

    Unpack with ``cat evidence.tar.xz.* | tar xJ``. Returns the pieces.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{ARCHIVE}.*"):
        old.unlink()
    with _Pieces(folder, ARCHIVE, limit) as pieces:
        with tarfile.open(fileobj=pieces, mode="w:xz", preset=6) as archive:  # type: ignore[call-overload]
            for file in files:
                archive.add(file, arcname=str(Path(source.name) / file.relative_to(source)))
        paths = pieces.paths
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in paths)
    (folder / "SHA256SUMS").write_text(sums)
    return paths


def files_to_archive(folder: Path) -> Iterator[Path]:
    """Every file of the evidence but what is only a copy or a cache (models' folders, earlier publications)."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if (
            path.is_file()
            and not path.is_symlink()
            and "published" not in parts
            and ".models" not in parts
            and path.name != ".lock"
        ):
            yield path


def publish_folder(folder: Path, target: Path, plan: Programme, state: dict[str, Any]) -> None:
    """Write ``target``: README.md, doctor and kernels, one folder per report, profile and errors, and the archive."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("doctor.json", "profile.json", "sampler-cost.json", "prediction-errors.json"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
    if (folder / "kernels").exists():
        _copy(folder / "kernels", target / "kernels", ("summary.json", "table.txt", "kernels.png", "kernels.svg"))
    reports = []
    for report in (folder / "results" / "runs" / name / "report" for name in experiments(folder / "results")):
        if not report.exists():
            continue
        shutil.copytree(report, target / report.parent.name, dirs_exist_ok=True)
        reports.append(report.parent.name)
    pieces = write_archive(folder, list(files_to_archive(folder)), target / "archive")
    (target / "README.md").write_text(readme(folder, plan, state, reports, pieces))


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def readme(folder: Path, plan: Programme, state: dict[str, Any], reports: list[str], pieces: list[Path]) -> str:
    """What was measured, on what, when, and what is missing."""
    kernels = (
        json.loads((folder / "kernels" / "summary.json").read_text())
        if (folder / "kernels" / "summary.json").exists()
        else {}
    )
    device = kernels.get("device", {})
    software = ", ".join(f"{k} {v}" for k, v in (kernels.get("software") or {}).items() if v is not None)
    lines = [f"# Evidence from {device.get('name', 'an unknown device')}", ""]
    if plan.name == "rehearsal":
        lines += [
            "**A rehearsal on a CPU with a tiny model: it shows that the programme runs. No figure in it means anything.**",
            "",
        ]
    lines += [
        f"Started {state['started_utc']}; {software}.",
        "",
        "Weights are random (`weights: dummy`): the speed of a dense model does not depend on them. That does not hold for the "
        "routing of experts or the acceptance of speculative tokens, and nothing here measures those.",
        "",
        "| Part | Status | GPU time | |",
        "|---|---|---|---|",
    ]
    for part in plan.parts:
        entry = state["parts"].get(part.name, {})
        status = entry.get("status", "running now" if part.name == "publish" else "missing")
        lines.append(
            f"| {part.name} | {status} | {entry.get('gpu_used_s', 0):.0f} s | {entry.get('reason') or part.what} |"
        )
    lines += ["", "- `kernels/`: [table](kernels/table.txt), [picture](kernels/kernels.png)"]
    lines += [f"- [{name}]({name}/report.md)" for name in reports]
    if (folder / "sampler-cost.json").exists():
        cost = json.loads((folder / "sampler-cost.json").read_text())
        lines.append(
            f"- What telemetry costs: {cost['ratio']['value']:.4f} of the throughput without it ({cost['verdict']})"
        )
    if (folder / "prediction-errors.json").exists():
        errors = json.loads((folder / "prediction-errors.json").read_text())
        for source, graded in errors["sources"].items():
            texts = [
                f"{n} {100 * e['median_absolute_error_ratio']:.1f} % ({e['num_cells']} cells)"
                for n, e in graded["summary"].items()
            ]
            lines.append(
                f"- Median error of predictions from {source}, cells not learned from: {', '.join(texts) or 'none graded'}"
            )
    names = ", ".join(p.name for p in pieces)
    lines += [
        "",
        f"Raw records: `archive/` ({names}); unpack with `cat {ARCHIVE}.* | tar xJ`, check with `sha256sum -c SHA256SUMS`.",
        "",
    ]
    return "\n".join(lines)

"""Puts the evidence where it is published: reports and summaries to read, everything else in archives of at most 16 MiB."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.evidence_results import experiments
from scripts.evidence_state import Evidence, PartFailed

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


def publish_folder(evidence: Evidence, target: Path) -> None:
    """Write ``target``: README.md, doctor and kernels, one folder per report, profile and errors, and the archive."""
    from scripts.evidence_readme import readme

    folder = evidence.folder
    target.mkdir(parents=True, exist_ok=True)
    for name in ("doctor.json", "profile.json", "sampler-cost.json", "prediction-errors.json"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
    if evidence.kernels:
        _copy(evidence.kernels, target / "kernels", ("summary.json", "table.txt", "kernels.png", "kernels.svg"))
    reports = []
    for report in (evidence.results / "runs" / name / "report" for name in experiments(evidence.results)):
        if not report.exists():
            continue
        shutil.copytree(report, target / report.parent.name, dirs_exist_ok=True)
        reports.append(report.parent.name)
    pieces = write_archive(folder, list(files_to_archive(folder)), target / "archive")
    (target / "README.md").write_text(readme(evidence, reports, [p.name for p in pieces]))
    large = [p for p in target.rglob("*") if p.is_file() and p.stat().st_size > PIECE_BYTES]
    if large:
        names = ", ".join(str(p.relative_to(target)) for p in large)
        raise PartFailed(f"larger than {PIECE_BYTES // 2**20} MiB, which no forge takes: {names}")


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)

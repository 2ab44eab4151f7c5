"""The formats that can be read, and telling them apart by their content."""

from __future__ import annotations

from types import ModuleType

from bench.errors import BadInput
from bench.interop import aiperf, genai_bench, guidellm, inference_perf, inferencex, ml_energy, vllm_bench
from bench.interop.imported import ForeignRun
from bench.interop.reading import ForeignFile

#: In the order in which they are tried. ML.ENERGY's files have all keys of vllm bench's and more.
FORMATS: dict[str, ModuleType] = {
    m.NAME: m for m in (ml_energy, vllm_bench, guidellm, aiperf, inference_perf, genai_bench, inferencex)
}


def recognise(file: ForeignFile) -> str:
    """The format's name.

    Raises:
        BadInput: none of them.
    """
    for name, module in FORMATS.items():
        if module.recognise(file.first):
            return name
    raise BadInput(
        f"not a result file of {', '.join(m.TOOL for m in FORMATS.values())}",
        where=str(file.path),
        next_step="see docs/importing.md for the files that can be read, or name the format with --format",
    )


def read_runs(file: ForeignFile, name: str = "auto") -> list[ForeignRun]:
    """Every run in the file.

    Raises:
        BadInput: another format, or something in it that cannot be understood (file, key and reason).
    """
    chosen = recognise(file) if name == "auto" else name
    if name != "auto" and not FORMATS[name].recognise(file.first):
        raise BadInput(
            f"not a result file of {FORMATS[name].TOOL}", where=str(file.path), next_step="leave --format out"
        )
    runs = list(FORMATS[chosen].read(file))
    if not runs:
        raise BadInput("holds no result", where=str(file.path))
    return runs

"""The parts of the evidence programme: what each runs, how long it may take, and what it needs. Values, no actions.

Two programmes share one shape: the one for a GPU, and its rehearsal on a CPU with a tiny model, whose figures mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["bench", "call"]


@dataclass(frozen=True, slots=True)
class Part:
    """One restartable part.

    ``argv`` is what follows ``bench`` for kind "bench" (with ``{out}``, ``{results}``, ``{gpu}``, ``{suite}`` filled in), or
    the name of a function of ``gpu_evidence.py`` for kind "call". ``gpu_s`` is the time that the GPU is expected to be held,
    an estimate for one H100 or H200; 0 for parts that need none. ``failed_ok``: exit code 1 (some runs failed) still lets
    the parts that follow use what there is.
    """

    name: str
    what: str
    kind: Kind
    argv: tuple[str, ...]
    gpu_s: float
    limit_s: float
    needs: tuple[str, ...] = ()
    failed_ok: bool = False
    shows: str = ""  # what --dry-run prints for a "call"
    derived: bool = False  # made from what the parts before it left: made again when one of them has run since


@dataclass(frozen=True, slots=True)
class Programme:
    """A list of parts with the experiments that they share."""

    name: str
    suite: str
    offline: tuple[str, ...]  # experiments; the first is the one that calibration learns from
    serve: str
    sampler_on: str
    sampler_off: str
    learn_only: dict[str, str]  # text that the id of a cell must hold to be learned from
    parts: tuple[Part, ...]

    @property
    def gpu_s(self) -> float:
        """Expected GPU time of everything."""
        return sum(p.gpu_s for p in self.parts)


def _run(part: str, what: str, experiment: str, gpu_s: float, limit_s: float, needs: tuple[str, ...] = ()) -> Part:
    argv = ("run", experiment, "--results", "{results}", "--plain")
    return Part(part, what, "bench", argv, gpu_s, limit_s, needs, failed_ok=True)


def programme(rehearsal: bool) -> Programme:
    """The programme for a GPU host, or its rehearsal on a CPU."""
    return _rehearsal() if rehearsal else _gpu()


def _call(
    part: str, what: str, gpu_s: float, limit_s: float, needs: tuple[str, ...], shows: str, derived: bool = False
) -> Part:
    """A part that is a function of ``gpu_evidence.py`` named like it."""
    function = part.replace("-", "_")
    return Part(part, what, "call", (function,), gpu_s, limit_s, needs, shows=shows, derived=derived)


def _shared(offline: tuple[str, ...], first_parts: tuple[Part, ...], suite: str) -> tuple[Part, ...]:
    """Doctor and kernels first, the measurements, then what needs no GPU."""
    held = 0 if suite == "tiny" else 1  # a rehearsal holds no GPU
    first = offline[0]
    return (
        _call("doctor", "what this machine can measure", 10 * held, 120, (), "bench doctor --json"),
        _call("kernels", "memory, GEMM, attention and links", 90 * held, 900, (), f"bench kernels --config {suite}"),
        *first_parts,
        _call(
            "sampler-cost",
            "tokens/s with and without telemetry",
            0,
            120,
            ("sampler-on", "sampler-off"),
            "(compares the two)",
            derived=True,
        ),
        _call(
            "calibrate",
            "fit the step-time model to some of the runs",
            0,
            600,
            (first,),
            "bench calibrate RUN...",
            derived=True,
        ),
        _call(
            "predict",
            "predict all cells before and after calibration, and grade it on those it was not fitted to",
            0,
            900,
            (first, "calibrate"),
            "bench predict EXPERIMENT --gpu GPU [--kernels KERNELS | --profile PROFILE]",
            derived=True,
        ),
        _call("reports", "one report an experiment", 0, 900, (first,), "bench report EXPERIMENT", derived=True),
        _call(
            "publish",
            "reports, summaries and archives of at most 16 MiB",
            0,
            900,
            ("reports",),
            "(copies and packs)",
            derived=True,
        ),
    )


def _gpu() -> Programme:
    offline = ("offline-8b", "offline-70b")
    measured = (
        _run("offline-8b", "8B, bf16 and fp8, batch 1 to 256, 1k/1k and 8k/1k", "evidence-8b", 460, 1800),
        _run("serve", "8B through vllm serve, 16 and 128 in flight", "evidence-serve", 200, 900),
        Part(
            "open",
            "the same, Poisson arrivals at 50 % and 80 % of the maximum",
            "call",
            ("open_loop",),
            190,
            900,
            ("serve",),
            True,
            shows="bench run {out}/experiments/evidence-open.yaml (written from what serve measured)",
        ),
        _run("offline-70b", "70B class, fp8 (bf16 where it fits), 1k/1k and 8k/1k", "evidence-70b", 340, 1800),
        _run("sampler-on", "one cell with telemetry at 20 Hz", "evidence-sampler-on", 95, 600),
        _run("sampler-off", "the same cell without", "evidence-sampler-off", 95, 600),
    )
    return Programme(
        "gpu",
        "quick",
        ("evidence-8b", "evidence-70b"),
        "evidence-serve",
        "evidence-sampler-on",
        "evidence-sampler-off",
        # bf16 at 1k/1k is learned from; fp8, 8k/1k, the 70B and everything served are predicted
        {"quantization": "None", "shape": "1k/1k"},
        _shared(offline, measured, "quick"),
    )


def _rehearsal() -> Programme:
    stem = "evidence-rehearsal"
    measured = (
        _run("offline", "a tiny Llama, two prompt lengths, batch 1 to 8", f"{stem}-offline", 0, 600),
        _run("serve", "the same through vllm serve", f"{stem}-serve", 0, 600),
        Part(
            "open",
            "Poisson arrivals at 50 % and 80 % of the maximum",
            "call",
            ("open_loop",),
            0,
            600,
            ("serve",),
            True,
            shows=f"bench run {{out}}/experiments/{stem}-open.yaml (written from what serve measured)",
        ),
        _run("sampler-on", "one cell with telemetry at 20 Hz", f"{stem}-sampler-on", 0, 600),
        _run("sampler-off", "the same cell without", f"{stem}-sampler-off", 0, 600),
    )
    return Programme(
        "rehearsal",
        "tiny",
        (f"{stem}-offline",),
        f"{stem}-serve",
        f"{stem}-sampler-on",
        f"{stem}-sampler-off",
        {"isl": "64"},
        _shared(("offline",), measured, "tiny"),
    )

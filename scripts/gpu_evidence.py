"""The evidence programme: everything that a GPU host should measure for a published report, in restartable parts.

    python scripts/gpu_evidence.py             run what is missing; again after an interruption
    python scripts/gpu_evidence.py --dry-run   the plan, with times
    python scripts/gpu_evidence.py --rehearse  the same programme on a CPU with a tiny model

A part that is complete is never repeated. Parts are started as long as the GPU time that was given (``--minutes``) holds
their estimate; the rest waits for the next call. See docs/gpu-runbook.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_SOME_FAILED  # noqa: E402
from scripts import evidence_results as measured  # noqa: E402
from scripts.evidence_parts import Part, programme  # noqa: E402
from scripts.evidence_state import STATE, Evidence, OutOfTime, PartFailed, bench, refuse, utc  # noqa: E402

INTERRUPTED, OUT_OF_TIME = "interrupted", "the time of this call is over"

# ---- running parts ---------------------------------------------------------------------------------------------------


def run_all(evidence: Evidence, only: tuple[str, ...], redo: tuple[str, ...]) -> int:
    """Run what is missing; returns 0 when nothing is left, 1 when something failed or is left, 130 on an interrupt.

    An interrupt and the end of this call's time leave the running part where it is; the next call continues there.
    """
    spent_s = 0.0
    for part in evidence.plan.parts:
        if (only and part.name not in only) or (evidence.is_done(part) and part.name not in redo):
            continue
        blocked = [n for n in part.needs if evidence.status(n) not in ("complete", "partial")]
        if blocked:
            print(f"[{part.name}] waits for {', '.join(blocked)}", flush=True)
            continue
        if part.gpu_s and spent_s + part.gpu_s > evidence.budget_s:
            print(
                f"[{part.name}] left for the next call: about {part.gpu_s:.0f} s, {evidence.budget_s - spent_s:.0f} s remain",
                flush=True,
            )
            continue
        took_s, stopped = run_part(evidence, part)
        spent_s += took_s if part.gpu_s else 0.0
        if stopped:
            print(f"{stopped}; the same command continues here", flush=True)
            if stopped == INTERRUPTED:
                return EXIT_INTERRUPTED
            break
    return report_state(evidence)


def run_part(evidence: Evidence, part: Part) -> tuple[float, str | None]:
    """Run one part and note how it ended; (seconds, why it was broken off, or None)."""
    print(f"[{part.name}] {part.what}", flush=True)
    begin = time.monotonic()
    status, reason, stopped = "complete", None, None
    try:
        if part.kind == "bench":
            argv = [a.format(results=evidence.results, out=evidence.folder) for a in part.argv]
            code = bench(evidence, part.name, argv, part.limit_s)
            status, reason = _status_of(code, part, evidence)
        else:
            CALLS[part.argv[0]](evidence, part)
    except PartFailed as error:
        status, reason = "failed", str(error)
    except KeyboardInterrupt:
        status, reason, stopped = "failed", INTERRUPTED, INTERRUPTED
    except OutOfTime:
        status, reason, stopped = "failed", OUT_OF_TIME, OUT_OF_TIME
    took_s = time.monotonic() - begin
    before = evidence.state["parts"].get(part.name, {}).get("gpu_used_s", 0.0)
    evidence.state["parts"][part.name] = {
        "status": status,
        "reason": reason,
        "order": 1 + max((p.get("order", 0) for p in evidence.state["parts"].values()), default=0),
        "ended_utc": utc(),
        "wall_s": round(took_s, 1),
        "gpu_used_s": round(before + (took_s if part.gpu_s else 0.0), 1),
    }
    evidence.save()
    print(f"[{part.name}] {status} after {took_s:.0f} s" + (f": {reason}" if reason else ""), flush=True)
    return took_s, stopped


def _status_of(code: int, part: Part, evidence: Evidence) -> tuple[str, str | None]:
    """What an exit code of ``bench`` means for a part."""
    if code == 0:
        experiment = part.argv[1] if part.argv[0] == "run" else ""
        if experiment and not measured.complete_runs(evidence.results, Path(experiment).stem):
            return "not possible here", "no cell of it can run on this machine"
        return "complete", None
    some = measured.complete_runs(evidence.results, Path(part.argv[1]).stem) if part.failed_ok else []
    reason = f"bench {part.argv[0]} ended with {code}, {len(some)} runs are complete; see logs/{part.name}.log"
    # 2 after complete runs: they stand, and what came after them (a report of prices that cannot be read) did not
    return ("partial" if code in (EXIT_SOME_FAILED, EXIT_BAD_INPUT) and some else "failed"), reason


# ---- parts that are more than one command ----------------------------------------------------------------------------


def doctor(evidence: Evidence, part: Part) -> None:
    """What the machine is, as JSON."""
    code = bench(evidence, part.name, ["doctor", "--json"], part.limit_s, evidence.folder / "doctor.json")
    if code:
        raise PartFailed(f"bench doctor ended with {code}; see logs/doctor.log")


def kernels(evidence: Evidence, part: Part) -> None:
    """The kernel suite, into the folder where the reports of these results look for it. An incomplete try stays beside it."""
    folder = evidence.results / "kernels" / re.sub(r"-\d{4}-\d\d-\d\d$", "", evidence.folder.name) / _stamp()
    suite = ["--config", evidence.plan.suite] + (["--device", "cpu"] if evidence.plan.name == "rehearsal" else [])
    code = bench(evidence, part.name, ["kernels", *suite, "--out", str(folder)], part.limit_s)
    if evidence.kernels != folder:
        raise PartFailed(f"bench kernels ended with {code} and wrote no complete summary; see logs/kernels.log")


def open_loop(evidence: Evidence, part: Part) -> None:
    """Poisson arrivals at shares of the highest request rate that the closed loop reached."""
    rate = measured.highest_rate(evidence.results, evidence.plan.serve)
    if rate is None:
        raise PartFailed("the closed loop has no complete run to take the maximum rate from")
    source = ROOT / "configs" / "experiments" / f"{evidence.plan.serve}.yaml"
    target = evidence.folder / "experiments" / f"{evidence.plan.serve.replace('serve', 'open')}.yaml"
    if not target.exists():  # a second try must run the same rates, or it would be another experiment
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(measured.open_loop_yaml(source.read_text(), rate, (0.5, 0.8)))
    code = bench(evidence, part.name, ["run", str(target), "--results", str(evidence.results), "--plain"], part.limit_s)
    if code not in (0, 1) or not measured.complete_runs(evidence.results, target.stem):
        raise PartFailed(f"bench run ended with {code}; see logs/open.log")


def sampler_cost(evidence: Evidence, part: Part) -> None:
    """Throughput with telemetry against without, as a ratio with its interval."""
    on, off = evidence.plan.sampler_on, evidence.plan.sampler_off
    _write_json(evidence.folder / "sampler-cost.json", measured.sampler_cost(evidence.results, on, off))


def calibrate(evidence: Evidence, part: Part) -> None:
    """Fit the profile to the cells that the plan says may be learned from."""
    runs = measured.runs_to_learn_from(evidence.results, evidence.plan.offline[0], evidence.plan.learn_only)
    if not runs:
        raise PartFailed("no complete run to learn from")
    argv = ["calibrate", *map(str, runs), "--name", "profile", "--out", str(evidence.folder)]
    code = bench(evidence, part.name, argv, part.limit_s)
    if code:
        raise PartFailed(f"bench calibrate ended with {code}; see logs/calibrate.log")


def predict(evidence: Evidence, part: Part) -> None:
    """Predict every measured experiment before and after calibration, and grade it on what was not learned from.

    Three predictions: from the data sheet and the shipped curves, with this device's kernels, and with the profile fitted to
    the runs that the plan lets it see. A cell that a source cannot serve is refused there and not graded.
    """
    if evidence.gpu is None:
        raise PartFailed("this device is not in configs/hardware: nothing to predict from; add a file there")
    sources: dict[str, list[str]] = {
        "data-sheet": [],
        "kernels": ["--kernels", str(evidence.kernels)],
        "calibrated": ["--profile", str(evidence.folder / "profile.json")],
    }
    errors: dict[str, Any] = {"learned_from": {evidence.plan.offline[0]: evidence.plan.learn_only}, "sources": {}}
    names = {n: n for n in (*evidence.plan.offline, evidence.plan.serve)}
    for file in (evidence.folder / "experiments").glob("*.yaml"):
        names[file.stem] = str(file)
    for source, options in sources.items():
        folder = evidence.folder / f"predicted-{source}"
        rows: list[dict[str, Any]] = []
        for name, where in names.items():
            if not measured.complete_runs(evidence.results, name):
                continue
            argv = ["predict", where, "--gpu", evidence.gpu, "--results", str(folder), *options]
            if source != "calibrated":  # these lie beside the measured runs in the reports, so they have as many
                argv += ["--repeats", "1"]
            code = bench(evidence, part.name, argv, part.limit_s)
            # 1: every cell was refused, for a reason that the log gives
            rows += (
                measured.prediction_errors(evidence.results, folder, name, evidence.learned(name)) if code == 0 else []
            )
        errors["sources"][source] = {"summary": measured.error_summary(rows), "cells": rows}
    _write_json(evidence.folder / "prediction-errors.json", errors)
    if not any(s["cells"] for s in errors["sources"].values()):
        raise PartFailed("no cell could be predicted; see logs/predict.log")


def reports(evidence: Evidence, part: Part) -> None:
    """A report of every experiment that has results, its calibrated prediction laid over it where there is one."""
    predictions = evidence.folder / "predicted-calibrated" / "runs"
    for experiment in measured.experiments(evidence.results):
        beside = predictions / f"{experiment}.predicted"
        over = ["--with", str(beside)] if measured.complete_runs(beside.parents[1], beside.name) else []
        code = bench(evidence, part.name, ["report", experiment, "--results", str(evidence.results), *over], 300)
        if code:
            raise PartFailed(f"bench report {experiment} ended with {code}; see logs/reports.log")


def publish(evidence: Evidence, part: Part) -> None:
    """Reports and summaries side by side, and everything in archives small enough for any forge."""
    from scripts.evidence_publish import publish_folder

    if evidence.plan.name == "rehearsal":
        target = evidence.folder / "published"  # figures that mean nothing stay out of results/published
    else:
        target = ROOT / "results" / "published" / evidence.folder.name
    publish_folder(evidence, target)
    print(f"[publish] {target}", flush=True)


CALLS: dict[str, Callable[[Evidence, Part], None]] = {
    "doctor": doctor,
    "kernels": kernels,
    "open_loop": open_loop,
    "sampler_cost": sampler_cost,
    "calibrate": calibrate,
    "predict": predict,
    "reports": reports,
    "publish": publish,
}


# ---- telling the user ------------------------------------------------------------------------------------------------


def dry_run(evidence: Evidence) -> int:
    """Print the plan: what would run, what is complete, and the time it takes."""
    plan = evidence.plan
    print(f"programme {plan.name}, results in {evidence.folder}")
    for part in plan.parts:
        text = "bench " + " ".join(part.argv) if part.kind == "bench" else part.shows
        command = text.format(results="RESULTS", out="FOLDER")
        held = f"{part.gpu_s / 60:4.1f} min GPU" if part.gpu_s else "       no GPU"
        print(f"  {part.name:13} {evidence.status(part.name):9} {held}  {part.what}")
        print(f"  {'':13} {command}")
    if plan.gpu_s:
        used = f"{evidence.gpu_used_s / 60:.1f} min used"
        print(f"GPU time: about {plan.gpu_s / 60:.0f} min in all (an estimate for one H100 or H200), {used}")
    else:
        print("a rehearsal: no GPU, a few minutes, and figures that mean nothing")
    return 0


def report_state(evidence: Evidence) -> int:
    """Print what is complete, failed and missing; 0 when nothing is left to do."""
    left = [
        p.name
        for p in evidence.plan.parts
        if evidence.status(p.name) not in ("complete", "partial", "not possible here")
    ]
    for part in evidence.plan.parts:
        entry = evidence.state["parts"].get(part.name, {})
        reason = f": {entry['reason']}" if entry.get("reason") else ""
        print(f"  {part.name:13} {evidence.status(part.name)}{reason}")
    print(
        f"GPU time used: {evidence.gpu_used_s / 60:.1f} min. {'Left: ' + ', '.join(left) if left else 'Nothing is left.'}"
    )
    return 1 if left else 0


def default_folder(name: str) -> Path:
    """results/evidence/<name>-<date>, or the newest one of this name that is not finished."""
    base = Path("results") / "evidence"
    for folder in sorted(base.glob(f"{name}-*"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads((folder / STATE).read_text())
            if state["parts"].get("publish", {}).get("status") != "complete":
                return folder
    return base / f"{name}-{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"


def gpu_slug() -> str | None:
    """The first GPU's name as a folder's, None when none answers."""
    try:
        import pynvml
    except ImportError:
        refuse("nvidia-ml-py is not installed: make setup, or pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        return None
    text = name if isinstance(name, str) else name.decode()
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("nvidia", "")).strip("-")


def _interrupt_on_signals() -> None:
    """Let a hang-up, a `kill` and `timeout` end us as Ctrl-C does: with what runs ended cleanly and the state written."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if sign != signal.SIGHUP or signal.getsignal(sign) != signal.SIG_IGN:  # under nohup it stays unheard
            signal.signal(sign, interrupt)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def _stamp() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU with a tiny model; its figures mean nothing")
    parser.add_argument("--minutes", type=float, default=25.0, help="GPU time for this call (default 25)")
    parser.add_argument(
        "--stop-after", type=float, metavar="MINUTES", help="end cleanly after this time; the same command continues"
    )
    parser.add_argument("--out", type=Path, help="folder (default results/evidence/<gpu>-<date>)")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="only this part (repeatable)")
    parser.add_argument("--redo", action="append", default=[], metavar="PART", help="this part again although complete")
    args = parser.parse_args(argv)
    plan = programme(args.rehearse)
    known = {p.name for p in plan.parts}
    for name in (*args.only, *args.redo):
        if name not in known:
            parser.error(f'no part "{name}"; choose from {", ".join(p.name for p in plan.parts)}')
    folder = args.out
    if folder is None:
        name = "rehearsal" if args.rehearse else gpu_slug()
        if name is None and not args.dry_run:
            refuse(
                "no NVIDIA GPU answers here (nvidia-smi); `--rehearse` runs the programme on this CPU with a tiny model"
            )
        folder = default_folder(name) if name else Path("results/evidence/<gpu>-<date>")
    evidence = Evidence(plan, folder, args.minutes * 60)
    if args.dry_run:
        return dry_run(evidence)
    if args.stop_after is not None:
        evidence.stop_at = time.monotonic() + args.stop_after * 60
    _interrupt_on_signals()
    return run_all(evidence, tuple(args.only), tuple(args.redo))


if __name__ == "__main__":
    sys.exit(main())

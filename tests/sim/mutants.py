"""Our scheduler with one rule changed: what the random cases must notice.

A rule that can be changed without any case telling the difference is not proved by comparing those cases with vLLM. Each
mutant replaces one piece of the source of ``scheduler.py`` or ``kv_cache.py``.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import bench.sim
from bench.sim.scheduler import SchedulerConfig


@dataclass(frozen=True)
class Mutant:
    """``old`` occurs exactly once in the file; ``new`` stands in its place."""

    file: str
    old: str
    new: str


KV, SCHEDULER = "kv_cache", "scheduler"

MUTANTS: dict[str, Mutant] = {
    # -- which requests fit ------------------------------------------------------------------------------------------
    "the watermark holds when nobody runs too": Mutant(
        KV, "self.watermark_blocks if others else 0", "self.watermark_blocks"
    ),
    "the watermark never holds": Mutant(KV, "self.watermark_blocks if others else 0", "0"),
    "the watermark is rounded up": Mutant(KV, "int(watermark * num_blocks)", "-int(-watermark * num_blocks // 1)"),
    "hit blocks that nobody holds cost nothing": Mutant(
        KV, "sum(1 for block in hit if self.pool.ref_count[block] == 0)", "0"
    ),
    "they cost nothing when the chunk is checked": Mutant(
        KV, "if needed + revived + watermark > self.pool.num_free:", "if needed + watermark > self.pool.num_free:"
    ),
    "they cost nothing when the whole prompt is checked": Mutant(
        KV, "self._missing(full, len(hit)) + revived + watermark", "self._missing(full, len(hit)) + watermark"
    ),
    "hit blocks that others hold cost a block too": Mutant(
        KV, "sum(1 for block in hit if self.pool.ref_count[block] == 0)", "len(hit)"
    ),
    "the whole prompt need not fit": Mutant(KV, "if full_must_fit:", "if False:"),
    "the whole prompt must fit beside its hit": Mutant(
        KV, "self._missing(full, len(hit)) +", "self._missing(full, 0) +"
    ),
    # -- blocks ------------------------------------------------------------------------------------------------------
    "a hit covers the last token": Mutant(KV, "(request.num_tokens - 1) // self", "request.num_tokens // self"),
    "unhashed blocks are freed to the back": Mutant(KV, "(first if self.hash_of[block] is None else last)", "last"),
    "hashed blocks are freed to the front": Mutant(KV, "(first if self.hash_of[block] is None else last)", "first"),
    "the head of a request is evicted first": Mutant(KV, "request.blocks[::-1]", "request.blocks"),
    "the last of equal blocks is found": Mutant(KV, "next(iter(same))", "next(reversed(same))"),
    "admitted blocks are hashed a step later": Mutant(
        KV, "self.register(request, min(num_computed + num_new, request.num_tokens))", "pass"
    ),
    "blocks are hashed before their tokens are known": Mutant(
        SCHEDULER, "request.num_computed_tokens - request.num_output_placeholders)", "request.num_computed_tokens)"
    ),
    # -- who runs ----------------------------------------------------------------------------------------------------
    "admission goes on after a preemption": Mutant(SCHEDULER, "0 if step.preempted else ", ""),
    "a preempted request goes to the back": Mutant(SCHEDULER, "self._queue.appendleft(request)", "self._queue.append(request)"),
    "priority does not choose the victim": Mutant(
        SCHEDULER, 'if self.config.policy == "priority":', 'if self.config.policy == "none":'
    ),
    "arrival does not choose the victim": Mutant(
        SCHEDULER, "(self.running[i].priority, self.running[i].arrival)", "self.running[i].priority"
    ),
    "a victim keeps the tokens that it was given": Mutant(
        SCHEDULER, "self.room += self.chunks.pop(request, 0)", "self.chunks.pop(request, 0)"
    ),
    "a request is resumed while its output is in flight": Mutant(
        SCHEDULER, "if request.num_stale_tokens > 0:", "if False:"
    ),
    "requests that are passed over change places": Mutant(SCHEDULER, "in reversed(skipped):", "in skipped:"),
    "max_num_active_seqs is not looked at": Mutant(
        SCHEDULER, "self.max_num_active_seqs or self.max_num_seqs", "self.max_num_seqs"
    ),
    # -- how many tokens ---------------------------------------------------------------------------------------------
    "max_num_scheduled_tokens is not looked at": Mutant(
        SCHEDULER, "self.max_num_scheduled_tokens or self.max_num_batched_tokens", "self.max_num_batched_tokens"
    ),
    "a long prompt is capped when it is alone": Mutant(SCHEDULER, "num_requests <= 1", "num_requests < 1"),
    "the adaptive cap shrinks": Mutant(SCHEDULER, "cap = max(cap,", "cap = min(cap,"),
    "running prompts are not capped": Mutant(SCHEDULER, "step.capped(num_new), step.room", "num_new, step.room"),
    "waiting prompts are not capped": Mutant(
        SCHEDULER, "step.capped(request.num_tokens - num_computed)", "request.num_tokens - num_computed"
    ),
    "prompts are cut without chunked prefill": Mutant(
        SCHEDULER, "if not self.config.enable_chunked_prefill and num_new > step.room:", "if False:"
    ),
    "the last position is used for a prompt": Mutant(
        SCHEDULER, "self.config.max_model_len - request.num_computed_tokens - 1", "self.config.max_model_len"
    ),
    # -- tokens in flight --------------------------------------------------------------------------------------------
    "one token more is scheduled than max_tokens": Mutant(SCHEDULER, "num_computed_tokens + 2 - placeholders", "num_computed_tokens + 1 - placeholders"),
    "the V2 runner decodes without a pause": Mutant(
        SCHEDULER, "self._step < request.next_decode_eligible_step", "False"
    ),
    "a preempted request keeps its placeholders": Mutant(
        SCHEDULER, "request.num_output_placeholders = 0\n", "pass\n"
    ),
    "stale output takes a placeholder": Mutant(SCHEDULER, "if not stale:", "if True:"),
    "finished requests are not reported": Mutant(
        SCHEDULER, "self._unreported_finishes = True", "self._unreported_finishes = False"
    ),
    "max_model_len ends nobody": Mutant(SCHEDULER, " or request.num_tokens >= self.config.max_model_len", ""),
}  # fmt: skip


def scheduler_with(mutant: Mutant, config: SchedulerConfig) -> Any:
    """A ``Scheduler`` for ``config`` with the mutant's rule changed.

    Raises:
        ValueError: the piece of source is not there exactly once; the mutant has to be written anew.
    """
    module = _changed(mutant)
    return module.Scheduler(module.SchedulerConfig(**asdict(config)))


@lru_cache
def _changed(mutant: Mutant) -> Any:
    """The module ``scheduler`` with the change in itself or in the cache that it uses."""
    source = _source(mutant.file)
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}.py has {source.count(mutant.old)} times: {mutant.old}")
    changed = _load(mutant.file, source.replace(mutant.old, mutant.new))
    if mutant.file == SCHEDULER:
        return changed
    scheduler: Any = _load(SCHEDULER, _source(SCHEDULER))
    scheduler.KVCache = changed.KVCache
    return scheduler


def _source(name: str) -> str:
    return (Path(bench.sim.__path__[0]) / f"{name}.py").read_text()


def _load(name: str, source: str) -> ModuleType:
    spec = importlib.util.spec_from_loader(f"mutated_{name}", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    exec(compile(source, f"<mutated {name}>", "exec"), module.__dict__)
    return module

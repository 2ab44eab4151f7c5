"""What the scheduler works on and what it decides: requests as counters, and the plan of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.sim.interface import StepLoad

WAITING, RUNNING, PREEMPTED, FINISHED = range(4)


@dataclass(slots=True, eq=False)
class SimRequest:
    """A request inside the scheduler. Counts only; ``block_hashes`` stand for its tokens (see ``bench.sim.prefixes``).

    ``stop_after`` is the number of output tokens after which the model emits a stop token (None: never, so
    ``max_tokens`` ends it). ``received_tokens`` prompt tokens come with their KV from a prefill instance.
    """

    index: int
    num_prompt_tokens: int
    max_tokens: int
    arrival: float = 0.0
    priority: int = 0
    stop_after: int | None = None
    block_hashes: Sequence[int] = ()
    received_tokens: int = 0
    num_tokens: int = 0  # prompt and generated tokens known to the scheduler
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    num_in_flight_tokens: int = 0
    num_stale_tokens: int = 0
    next_decode_eligible_step: int = 0
    num_preemptions: int = 0
    num_hit_tokens: int = -1  # prompt tokens served from the prefix cache at the first admission
    status: int = WAITING
    blocks: list[int] = field(default_factory=list)
    num_cached_blocks: int = 0

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def order(self) -> tuple[int, float, int]:
        return (self.priority, self.arrival, self.index)


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's share of a step: ``num_tokens`` behind ``num_context`` computed ones; does it yield a token?"""

    request: SimRequest
    num_tokens: int
    num_context: int
    emits: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one call of ``schedule`` decided."""

    scheduled: tuple[Scheduled, ...]
    preempted: tuple[SimRequest, ...]
    num_running: int
    num_waiting: int
    num_free_blocks: int
    hit_tokens: int  # prefix-cache tokens of requests admitted in this step

    @property
    def total_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)

    def load(self) -> StepLoad:
        """The step as the step-time model sees it."""
        requests = tokens = context = decodes = decode_sum = decode_max = 0
        pairs = 0.0
        for s in self.scheduled:
            if s.emits and s.num_tokens == 1:
                decodes += 1
                decode_sum += s.num_context + 1
                decode_max = max(decode_max, s.num_context + 1)
            else:
                requests += 1
                tokens += s.num_tokens
                context += s.num_context
                pairs += s.num_tokens * s.num_context + s.num_tokens * (s.num_tokens + 1) / 2
        return StepLoad(requests, tokens, pairs, context, decodes, decode_sum, decode_max, self.num_running)

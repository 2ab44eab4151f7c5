"""Which replica gets a request. The same rules are compiled in ``bench/sim/compiled_router.py``."""

from __future__ import annotations

from collections.abc import Sequence

from bench.sim.inputs import RoutingPolicy

#: prefix_aware follows the cache when at least this share of the prompt's blocks was seen there before ...
MIN_MATCH_RATIO = 0.5
#: ... unless that replica has this many requests more than the least loaded one. Both are the defaults of the
#: cache-aware policy of SGLang's router (cache_threshold 0.5, balance_abs_threshold 32).
MAX_IMBALANCE = 32


class Router:
    """Routes among ``members`` (replica numbers). Knows only what a router sees: what it sent where, and what came back.

    * ``round_robin``: in turn.
    * ``least_loaded``: fewest requests sent and not yet done; the lowest number among equals.
    * ``prefix_aware``: the replica to which the longest leading part of the prompt was sent before, if that part is at
      least half of the prompt's blocks and the replica is not overloaded; else the least loaded one.
    """

    def __init__(self, policy: RoutingPolicy, members: Sequence[int]) -> None:
        self.policy = policy
        self.members = tuple(members)
        self.outstanding = dict.fromkeys(self.members, 0)
        self._turn = 0
        self._seen: dict[int, set[int]] = {}  # block number -> replicas

    def pick(self, prompt_blocks: Sequence[int]) -> int:
        """The replica for a request whose full prompt blocks are numbered ``prompt_blocks``; counts it as sent."""
        if self.policy == "round_robin":
            chosen = self.members[self._turn % len(self.members)]
            self._turn += 1
        else:
            chosen = min(self.members, key=lambda m: self.outstanding[m])
            if self.policy == "prefix_aware":
                chosen = self._by_prefix(prompt_blocks, chosen)
        self.outstanding[chosen] += 1
        return chosen

    def done(self, member: int) -> None:
        self.outstanding[member] -= 1

    def _by_prefix(self, prompt_blocks: Sequence[int], least: int) -> int:
        best, best_match = least, 0
        for member in self.members:
            match = 0
            for block in prompt_blocks:
                if member not in self._seen.get(block, ()):
                    break
                match += 1
            if match > best_match:
                best, best_match = member, match
        if best_match < MIN_MATCH_RATIO * len(prompt_blocks):
            best = least
        if self.outstanding[best] - self.outstanding[least] > MAX_IMBALANCE:
            best = least
        for block in prompt_blocks:
            self._seen.setdefault(block, set()).add(best)
        return best

"""The paged KV cache as vLLM's scheduler sees it: which blocks are free, held and hashed. No tensors, only block numbers.

Reproduces ``vllm/v1/core/block_pool.py``, ``kv_cache_manager.py`` and the full-attention manager for one KV-cache group:

* block 0 is the null block and never handed out, so ``num_blocks - 1`` are usable;
* the free list starts in block order. Blocks are taken from its front. Freed blocks without a hash go to the front (last
  in, first out), freed blocks with a hash to the back (least recently used is evicted first); a request's blocks are freed
  tail first;
* only full blocks are hashed; a hit covers full blocks from the start, at most ``num_tokens - 1`` tokens; a taken block
  loses its hash; several blocks may carry the same hash, and the one that was registered first is found.

Block hashes are small integers here (:mod:`bench.sim.prefixes` makes them): equal integers mean equal prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class KVRequest(Protocol):
    """What the cache reads and writes of a request."""

    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int
    blocks: list[int]
    num_cached_blocks: int
    block_hashes: Sequence[int]


class BlockPool:
    """Blocks 1 .. num_blocks-1 on a doubly linked free list, with reference counts and hashes."""

    def __init__(self, num_blocks: int, enable_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self.num_free = num_blocks - 1
        self.ref_count = [0] * num_blocks
        self.hash_of: list[int | None] = [None] * num_blocks
        # insertion-ordered: the first registered of several equal blocks is the one that a lookup finds
        self.cached: dict[int, dict[int, None]] = {}
        # free list; the null block's place (0) serves as the ring's anchor
        self._next = [*range(1, num_blocks), 0]
        self._previous = [num_blocks - 1, *range(num_blocks - 1)]

    def take(self, count: int) -> list[int]:
        """``count`` blocks from the front of the free list. Raises ValueError if there are not so many."""
        if count > self.num_free:
            raise ValueError(f"{count} blocks wanted, {self.num_free} are free")
        taken = []
        for _ in range(count):
            block = self._next[0]
            self._unlink(block)
            self._forget_hash(block)
            self.ref_count[block] = 1
            taken.append(block)
        return taken

    def touch(self, blocks: Sequence[int]) -> None:
        """Hold ``blocks`` once more; those that were free leave the free list."""
        for block in blocks:
            if self.ref_count[block] == 0:
                self._unlink(block)
            self.ref_count[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of ``blocks``, given in the order in which they shall be evicted."""
        first: list[int] = []
        last: list[int] = []
        for block in blocks:
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0:
                (first if self.hash_of[block] is None else last).append(block)
        after = 0
        for block in first:
            self._link_after(after, block)
            after = block
        for block in last:
            self._link_after(self._previous[0], block)

    def register(self, block: int, block_hash: int) -> None:
        """``block`` now holds the full block ``block_hash``."""
        self.hash_of[block] = block_hash
        self.cached.setdefault(block_hash, {})[block] = None

    def find(self, block_hash: int) -> int | None:
        """A block that holds ``block_hash``, held or free."""
        same = self.cached.get(block_hash)
        return next(iter(same)) if same else None

    def free_list(self) -> list[int]:
        """Free blocks in the order in which they will be taken (for tests). Raises ValueError where they form no list."""
        order: list[int] = []
        block = self._next[0]
        while block:
            if len(order) == self.num_free:
                raise ValueError(f"the free list does not end after {self.num_free} blocks")
            order.append(block)
            block = self._next[block]
        return order

    def _forget_hash(self, block: int) -> None:
        block_hash = self.hash_of[block]
        if block_hash is None:
            return
        same = self.cached[block_hash]
        del same[block]
        if not same:
            del self.cached[block_hash]
        self.hash_of[block] = None

    def _link_after(self, before: int, block: int) -> None:
        after = self._next[before]
        self._next[before], self._previous[block] = block, before
        self._next[block], self._previous[after] = after, block
        self.num_free += 1

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self.num_free -= 1


class KVCache:
    """Allocation for requests, as ``KVCacheManager.allocate_slots`` decides it."""

    def __init__(
        self, num_blocks: int, block_size: int, max_model_len: int, enable_caching: bool, watermark: float = 0.0
    ) -> None:
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.enable_caching = enable_caching
        self.watermark_blocks = int(watermark * num_blocks)
        self.pool = BlockPool(num_blocks, enable_caching)

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def usage_ratio(self) -> float:
        """Share of usable blocks that requests hold (cached but free blocks count as free)."""
        usable = self.pool.num_blocks - 1
        return 1.0 - self.pool.num_free / usable if usable else 0.0

    def find_hit(self, request: KVRequest) -> list[int]:
        """Blocks of the longest cached prefix; at least the last known token is left to compute."""
        if not self.enable_caching:
            return []
        hit: list[int] = []
        for block_hash in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
            block = self.pool.find(block_hash)
            if block is None:
                break
            hit.append(block)
        return hit

    def admit(
        self, request: KVRequest, num_computed: int, num_new: int, hit: list[int], full_must_fit: bool, others: bool
    ) -> bool:
        """Blocks for a waiting request's first chunk, behind ``hit``; False if they do not fit.

        Args:
            num_computed: tokens that need no computation (hit, or received from a prefill instance).
            full_must_fit: all known tokens must fit into free blocks now, although only the chunk is allocated.
            others: some request is running, so the watermark is kept free.
        """
        # hit blocks that nobody holds leave the free list too
        revived = sum(1 for block in hit if self.pool.ref_count[block] == 0)
        watermark = self.watermark_blocks if others else 0
        if full_must_fit:
            full = min(request.num_tokens, self.max_model_len)
            if self._missing(full, len(hit)) + revived + watermark > self.pool.num_free:
                return False
        needed = self._missing(min(num_computed + num_new, self.max_model_len), len(hit))
        if needed + revived + watermark > self.pool.num_free:
            return False
        self.pool.touch(hit)
        request.blocks = hit + self.pool.take(needed)
        request.num_cached_blocks = len(hit)
        self.register(request, min(num_computed + num_new, request.num_tokens))
        return True

    def grow(self, request: KVRequest, num_new: int) -> bool:
        """Blocks for ``num_new`` further tokens of a running request; False if they do not fit."""
        after = request.num_computed_tokens + num_new
        needed = self._missing(min(after, self.max_model_len), len(request.blocks))
        if needed > self.pool.num_free:
            return False
        if needed:
            request.blocks.extend(self.pool.take(needed))
        self.register(request, min(after, request.num_tokens))
        return True

    def register(self, request: KVRequest, num_tokens: int) -> None:
        """Hash the request's blocks that are full once ``num_tokens`` known tokens are in the cache."""
        if not self.enable_caching:
            return
        for index in range(request.num_cached_blocks, num_tokens // self.block_size):
            self.pool.register(request.blocks[index], request.block_hashes[index])
            request.num_cached_blocks = index + 1

    def free(self, request: KVRequest) -> None:
        """Release all blocks of the request, the tail to be evicted first."""
        self.pool.release(request.blocks[::-1])
        request.blocks = []
        request.num_cached_blocks = 0

    def _missing(self, num_tokens: int, num_held: int) -> int:
        return max(-(-num_tokens // self.block_size) - num_held, 0)

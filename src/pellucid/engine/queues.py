"""Who runs, who waits and who is paused, and the places and blocks they have."""

from __future__ import annotations

from bisect import bisect_left, insort

from pellucid.core.sequence import Sequence, SequenceStatus
from pellucid.kvcache.block_pool import CacheIntegrityError
from pellucid.kvcache.cache_manager import CacheManager


def order_of(sequence: Sequence) -> tuple[int, int, int]:
    """(priority, arrival, index)."""
    return sequence.order


class Queues:
    """Three lists, each in the order of `order_of`.

    A sequence is in the list that its status names, or in none. One that runs has its places in the batch: its own, or
    also those of its group that are yet to be forked from it.

    Attributes:
        num_slots: places taken.
    """

    def __init__(self, cache: CacheManager) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.paused: list[Sequence] = []
        self.num_slots = 0
        self._cache = cache

    @staticmethod
    def slots(sequence: Sequence) -> int:
        """Places in a batch: a sequence yet to fork keeps those of its siblings, and the lead of a lockstep group those
        of all."""
        group = sequence.group
        if group.is_lockstep:
            return len(group.sequences) if sequence is group.lead else 0
        return 1 if group.is_forked else len(group.sequences)

    def wait(self, sequence: Sequence) -> None:
        """Put a sequence that is in none of the lists among those that wait."""
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence, key=order_of)

    def run(self, sequence: Sequence) -> None:
        """Put it among those that run, in places that are free."""
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=order_of)
        self.num_slots += self.slots(sequence)

    def pause(self, sequence: Sequence) -> None:
        """Put it among those that are paused."""
        sequence.status = SequenceStatus.PAUSED
        insort(self.paused, sequence, key=order_of)

    def fork(self, parent: Sequence, sequence: Sequence) -> None:
        """Let `sequence`, which is in none of the lists and holds nothing, go on from where `parent` is, in a place
        that their group has."""
        self._cache.fork(parent, sequence)
        sequence.group.num_computed_elsewhere -= sequence.num_computed_tokens
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=order_of)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the list it is in; if it ran, its places are free."""
        if sequence.status is SequenceStatus.RUNNING:
            self._remove(self.running, sequence)
            self.num_slots -= self.slots(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._remove(self.waiting, sequence)
        elif sequence.status is SequenceStatus.PAUSED:
            self._remove(self.paused, sequence)

    def stand_back(self, sequence: Sequence, *, keep_partial: bool) -> None:
        """Take one of a lockstep group out of its list, and its blocks; its place is its group's still."""
        self._remove(self.running if sequence.status is SequenceStatus.RUNNING else self.paused, sequence)
        self.free(sequence, keep_partial=keep_partial)
        sequence.status = SequenceStatus.PENDING

    def free(self, sequence: Sequence, *, keep_partial: bool) -> None:
        """Take its blocks."""
        sequence.group.num_computed_elsewhere += sequence.num_computed_tokens
        self._cache.free(sequence, keep_partial=keep_partial)

    def check_integrity(self, max_num_seqs: int) -> None:
        """Check the lists against each other.

        Raises:
            CacheIntegrityError: a list is out of order, there are more places taken than `max_num_seqs` or than those
                who run have, or one that waits holds blocks.
        """
        for queue, status in (
            (self.running, SequenceStatus.RUNNING),
            (self.waiting, SequenceStatus.WAITING),
            (self.paused, SequenceStatus.PAUSED),
        ):
            if queue != sorted(queue, key=order_of) or any(sequence.status is not status for sequence in queue):
                raise CacheIntegrityError(f"the {status.value} queue is out of order")
        if any(sequence.num_blocks for sequence in self.waiting):
            raise CacheIntegrityError("a waiting sequence holds blocks")
        if not self.num_slots == sum(map(self.slots, self.running)) <= max_num_seqs:
            raise CacheIntegrityError(f"{self.num_slots} places counted for {self.running}")

    @staticmethod
    def _remove(queue: list[Sequence], sequence: Sequence) -> None:
        del queue[bisect_left(queue, sequence.order, key=order_of)]

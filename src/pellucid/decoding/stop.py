"""Stop strings over a stream of text (Aho & Corasick, 1975)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pellucid.core.errors import InvalidRequestError

_ALPHABET = 0x110000  # code points; an edge's key is node * _ALPHABET + code point
_ROOT = 0


class _Automaton:
    """Every stop string in one trie with failure links; node 0 is the root. Immutable once built."""

    __slots__ = ("depth", "edges", "failure", "match_length")

    def __init__(self, stop_strings: Iterable[str]) -> None:
        self.edges: dict[int, int] = {}
        self.depth = [0]
        self.match_length = [0]  # characters of the longest stop string that ends at the node; 0 for none
        parents = [_ROOT]
        labels = [0]
        for stop in stop_strings:
            node = _ROOT
            for character in stop:
                key = node * _ALPHABET + ord(character)
                child = self.edges.get(key)
                if child is None:
                    child = self.edges[key] = len(self.depth)
                    self.depth.append(self.depth[node] + 1)
                    self.match_length.append(0)
                    parents.append(node)
                    labels.append(ord(character))
                node = child
            self.match_length[node] = self.depth[node]

        self.failure = [_ROOT] * len(self.depth)
        for node in sorted(range(1, len(self.depth)), key=self.depth.__getitem__):
            if parents[node] != _ROOT:
                self.failure[node] = self.advance(self.failure[parents[node]], labels[node])
            if not self.match_length[node]:
                self.match_length[node] = self.match_length[self.failure[node]]

    def advance(self, node: int, code_point: int) -> int:
        """The longest suffix of the text read so far that begins some stop string, as a node."""
        while True:
            child = self.edges.get(node * _ALPHABET + code_point)
            if child is not None:
                return child
            if node == _ROOT:
                return _ROOT
            node = self.failure[node]


@dataclass(frozen=True, slots=True)
class StopSnapshot:
    """Where a `StopMatcher` stood."""

    node: int
    held: str
    matched: str | None


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces, and never releases any part of one.

    The stop string that ends first wins; of those that end at the same character, the longest. How the text is cut into
    pieces makes no difference. Only what may still become a stop string is held back. Time is linear in the text,
    whatever the number of stop strings.

    Attributes:
        matched: the stop string found, or None. After a match every further text is dropped.
    """

    __slots__ = ("_automaton", "_held", "_include_stop", "_node", "matched")

    def __init__(self, stop_strings: Iterable[str], *, include_stop: bool = False) -> None:
        """
        Args:
            stop_strings: what ends the text.
            include_stop: whether `push` releases the stop string itself too.

        Raises:
            InvalidRequestError: a stop string is empty.
        """
        stop_strings = tuple(stop_strings)
        if "" in stop_strings:
            raise InvalidRequestError(
                f"stop string {stop_strings.index('')} is empty; each needs at least one character", param="stop"
            )
        self._automaton = _Automaton(stop_strings)
        self._include_stop = include_stop
        self._node = _ROOT
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece of text; return what is now certain not to belong to a stop string."""
        if self.matched is not None:
            return ""
        automaton = self._automaton
        if len(automaton.depth) == 1:
            return text
        node = self._node
        for index, character in enumerate(text):
            node = automaton.advance(node, ord(character))
            length = automaton.match_length[node]
            if length:
                seen = self._held + text[: index + 1]
                self.matched = seen[-length:]
                self._node, self._held = _ROOT, ""
                return seen if self._include_stop else seen[:-length]
        seen = self._held + text
        released = len(seen) - automaton.depth[node]
        self._node, self._held = node, seen[released:]
        return seen[:released]

    def flush(self) -> str:
        """The text is over: return what was held back."""
        held = self._held
        self._node, self._held = _ROOT, ""
        return held

    def snapshot(self) -> StopSnapshot:
        """Remember this state, for `restore`; constant time, nothing shared that changes."""
        return StopSnapshot(self._node, self._held, self.matched)

    def restore(self, snapshot: StopSnapshot) -> None:
        """Go back to a state of this matcher (or of one with the same stop strings)."""
        self._node, self._held, self.matched = snapshot.node, snapshot.held, snapshot.matched

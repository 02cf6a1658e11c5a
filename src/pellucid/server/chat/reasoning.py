"""What a model thinks before it answers, parted from the answer."""

from __future__ import annotations

from dataclasses import dataclass

from pellucid.server.chat.text_stream import Markers


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model sets off what it thinks.

    Attributes:
        name: as `--reasoning-parser` takes it; vLLM's.
        always_begun: the answer begins in the reasoning, even where the prompt does not open it.
    """

    name: str
    open: str
    close: str
    always_begun: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.open, self.close)


REASONING_FORMATS = {
    each.name: each
    for each in (
        ReasoningFormat("qwen3", "<think>", "</think>"),
        ReasoningFormat("deepseek_r1", "<think>", "</think>", always_begun=True),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("gemma4", "<|channel>thought\n", "<channel|>"),
    )
}


class ReasoningReader:
    """Parts the reasoning at the beginning of an answer from the rest. A marker that comes later is text. White space
    around the reasoning is left out.

    Args:
        begun: the answer begins within the reasoning. It may open it once more.
    """

    def __init__(self, reasoning: ReasoningFormat, *, begun: bool) -> None:
        self._open = reasoning.open
        self._close = reasoning.close
        self._closing = Markers((reasoning.close,))
        self._begun = begun
        self._state = "before"
        self._text = ""

    def push(self, text: str) -> tuple[str, str]:
        """What is now certain: reasoning, and text that follows it."""
        if self._state == "answer":
            return "", text
        self._text += text
        reasoning = ""
        if self._state == "before":
            rest = self._text.lstrip()
            if not rest or (len(rest) < len(self._open) and self._open.startswith(rest)):
                return "", ""
            if rest.startswith(self._open):
                self._state, self._text = "opened", rest[len(self._open) :]
            elif self._begun:
                self._state, self._text = "opened", rest
            else:
                self._state = "answer"
                return "", self._take()
        if self._state == "opened":  # what comes first is white space
            self._text = self._text.lstrip()
            if not self._text:
                return "", ""
            self._state = "reasoning"
        if self._state == "reasoning":
            found = self._closing.find(self._text)
            if found is None:
                end = len(self._text) - self._closing.held(self._text)
                certain = self._text[:end].rstrip()
                self._text = self._text[len(certain) :]
                return certain, ""
            reasoning = self._text[: found[0]].rstrip()
            self._state, self._text = "closed", self._text[found[0] + len(self._close) :]
        self._text = self._text.lstrip()
        if self._text:
            self._state = "answer"
        return reasoning, self._take()

    def finish(self) -> tuple[str, str]:
        """The answer is over: what was held back. Of a marker that closes, a part that was cut off is left out."""
        text = self._take()
        if self._state == "before" and not (self._begun and self._open.startswith(text.lstrip())):
            return ("", text) if not self._begun else (text.strip(), "")
        if self._state == "reasoning":
            return text.rstrip().removesuffix(_begun_marker(text.rstrip(), self._close)).rstrip(), ""
        return "", ""

    def _take(self) -> str:
        taken, self._text = self._text, ""
        return taken


def _begun_marker(text: str, marker: str) -> str:
    """The longest beginning of `marker`, of two characters at least, that `text` ends with."""
    lengths = range(len(marker) - 1, 1, -1)
    return next((marker[:length] for length in lengths if text.endswith(marker[:length])), "")

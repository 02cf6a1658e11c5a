"""The output items of a response of the Responses API, from the pieces of a chat answer: as events, and whole."""

from __future__ import annotations

from typing import Any

from pellucid.server.chat.events import ChatEvent, ReasoningDelta, TextDelta, ToolCallBegin

Event = dict[str, Any]
Logprobs = list[dict[str, Any]]

_ARGUMENTS = "response.function_call_arguments"
_TEXTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}
_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class OutputEvents:
    """Makes items of the pieces of an answer, and the events that tell of them.

    Args:
        name: unique; the items' `id`s are made from it.

    Attributes:
        items: those that are complete.
    """

    def __init__(self, name: str) -> None:
        self.items: list[dict[str, Any]] = []
        self._name = name
        self._item: dict[str, Any] = {}
        self._pieces: list[str] = []
        self._logprobs: Logprobs = []

    def push(self, piece: ChatEvent, logprobs: Logprobs) -> list[Event]:
        """What the next piece makes.

        Args:
            logprobs: of the tokens that it took; told of if it is text.
        """
        events: list[Event] = []
        if isinstance(piece, ToolCallBegin):
            begin = self._begin("function_call", call_id=piece.call_id, name=piece.name, arguments="")
            return [*events, *begin]
        if isinstance(piece, TextDelta):
            if self._item.get("type") != "message":
                events = self._begin("message", role="assistant", content=[])
            self._logprobs += logprobs
            events.append(self._of_part("response.output_text.delta", delta=piece.text, logprobs=logprobs))
        elif isinstance(piece, ReasoningDelta):
            if self._item.get("type") != "reasoning":
                events = self._begin("reasoning", summary=[], content=[])
            events.append(self._of_part("response.reasoning_text.delta", delta=piece.text))
        else:
            events.append(self._of_item(f"{_ARGUMENTS}.delta", delta=piece.text))
        self._pieces.append(piece.text)
        return events

    def end(self, *, status: str = "completed", logprobs: Logprobs | None = None) -> list[Event]:
        """The item that was begun, if one was, is complete.

        Args:
            status: "incomplete" if the answer was cut short in it.
            logprobs: of tokens that came after its last piece and say nothing.
        """
        item, text = self._item, "".join(self._pieces)
        if not item:
            return []
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            events = [self._of_item(f"{_ARGUMENTS}.done", name=item["name"], arguments=text)]
        else:
            told: dict[str, Any] = {"text": text}
            if item["type"] == "message":
                self._logprobs += logprobs or []
                told["logprobs"] = self._logprobs
            part = self._part() | told
            item["content"] = [part]
            events = [
                self._of_part(f"{_TEXTS[item['type']]}.done", **told),
                self._of_part("response.content_part.done", part=part),
            ]
        events.append(self._told("response.output_item.done", item=item))
        self.items.append(item)
        self._item, self._pieces, self._logprobs = {}, [], []
        return events

    def _begin(self, kind: str, **fields: Any) -> list[Event]:
        """The next item, after the end of the last one."""
        events = self.end()
        item_id = f"{_ID_PREFIXES[kind]}_{self._name}{len(self.items)}"
        self._item = {"type": kind, "id": item_id, "status": "in_progress", **fields}
        events.append(self._told("response.output_item.added", item=dict(self._item)))
        if kind in _TEXTS:
            events.append(self._of_part("response.content_part.added", part=self._part()))
        return events

    def _part(self) -> dict[str, Any]:
        """The one part of an item that is a text, empty."""
        if self._item["type"] == "message":
            return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": ""}

    def _of_part(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, content_index=0, **fields)

    def _of_item(self, kind: str, **fields: Any) -> Event:
        return self._told(kind, item_id=self._item["id"], **fields)

    def _told(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "output_index": len(self.items), **fields}

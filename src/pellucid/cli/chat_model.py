"""Who answers in `pellucid chat`: a model in this process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

from pellucid.cli.conversation import Piece
from pellucid.cli.session import Messages
from pellucid.core.errors import ContextLengthError, InvalidRequestError, PellucidError

if TYPE_CHECKING:
    from pellucid import LLM, SamplingParams
    from pellucid.cli.saved_conversation import SavedConversation
    from pellucid.engine.token_stream import TokenStream


class ChatModel:
    """A Partner that runs the model itself.

    Raises:
        InvalidRequestError: the model has no chat template.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, args: argparse.Namespace, saved: SavedConversation | None = None
    ) -> None:
        if not llm.tokenizer.has_chat_template:
            raise InvalidRequestError(
                f"{args.model} has no chat template: it continues text and cannot converse; use `pellucid generate`, "
                "or a model trained to follow instructions",
                param="model",
            )
        self.llm = llm
        self.params = params
        self.args = args
        self.saved = saved
        self._last: TokenStream | None = None

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        with self.llm.stream(messages, self.params) as stream:
            self._last = stream
            for output in stream:
                yield Piece(output.text)

    def goes_on_after(self, error: PellucidError) -> bool:
        return isinstance(error, ContextLengthError)

    def report(self) -> None:
        from pellucid.cli import session, timing

        if self._last is None:
            raise RuntimeError("there was no answer to report on")
        answer = session.answer_of(self._last)
        session.report_cut(self.llm, answer, self.args)
        if self.args.timing:
            print(timing.measure(self.llm, answer.metrics).line(), file=sys.stderr)

    def keep(self, messages: Messages) -> None:
        if self.saved is not None:
            self.saved.keep(self.llm, messages)

    def forget(self) -> None:
        if self.saved is not None:
            self.saved.forget()

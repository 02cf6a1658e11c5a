"""A conversation of many turns at the terminal, with whoever answers."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from typing import NamedTuple, Protocol

from pellucid.cli.session import Messages
from pellucid.core.errors import ContextLengthError, PellucidError

COMMANDS = """/clear  forget what was said and start again
/exit   leave (Ctrl-D does too)
Ctrl-C stops an answer. A line that ends with \\ goes on with the next one."""


class Piece(NamedTuple):
    """Some text of an answer; or of the reasoning before it, which is not part of what was said."""

    text: str
    is_reasoning: bool = False


class Partner(Protocol):
    """Who answers: a model in this process, or a server."""

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        """The answer to the last of `messages`, as it comes. Closing the generator stops it.

        Raises:
            ContextLengthError: they are longer than the context.
            PellucidError: there is no answer, or no more of it.
        """

    def goes_on_after(self, error: PellucidError) -> bool:
        """Whether other turns can be answered, though this one was not."""

    def report(self) -> None:
        """Tell on standard error what there is to know of the last answer, which came to its end."""

    def keep(self, messages: Messages) -> None:
        """Save what was said so far, where it is to be saved."""

    def forget(self) -> None:
        """The conversation starts again."""


class Conversation:
    """The turns so far, and the loop that adds to them.

    The history only ever holds whole turns: a turn that could not be answered is taken back.

    Args:
        partner: who answers.
        messages: what was said before.
    """

    def __init__(self, partner: Partner, messages: Messages) -> None:
        self.partner = partner
        self.interactive = sys.stdin.isatty()
        self.opening = [message for message in messages[:1] if message["role"] == "system"]
        self.messages = list(messages)

    def run(self) -> None:
        """Read turns until the input ends or the user leaves."""
        if self.interactive:
            enable_line_editing()
            print("Ctrl-C stops an answer, Ctrl-D leaves, /help shows the commands.", file=sys.stderr)
        while (text := self.read_turn()) is not None:
            if text.startswith("/"):
                if not self.command(text.strip()):
                    return
            elif text.strip():
                self.answer(text)

    def read_turn(self) -> str | None:
        """What the user says next; None where the input has ended."""
        lines: list[str] = []
        while True:
            try:
                line = self.read_line("... " if lines else ">>> ")
            except EOFError:
                if self.interactive:
                    print()
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit leaves)", file=sys.stderr)
                lines = []
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def read_line(self, prompt: str) -> str:
        """One line, asked for with `prompt` at a terminal."""
        return input(prompt if self.interactive else "")

    def command(self, text: str) -> bool:
        """Obey a slash command; False where it leaves."""
        if text in ("/exit", "/quit"):
            return False
        if text == "/clear":
            self.messages = list(self.opening)
            self.partner.forget()
            print("(the conversation starts again)", file=sys.stderr)
        elif text == "/help":
            print(COMMANDS, file=sys.stderr)
        else:
            print(f"unknown command {text.split()[0]}; /help shows them", file=sys.stderr)
        return True

    def answer(self, text: str) -> None:
        """Say `text`, show the answer as it comes, and keep both. Ctrl-C ends the answer early."""
        messages: Messages = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        try:
            with closing(self.partner.answer(messages)) as pieces:
                show(pieces, said)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        except PellucidError as error:
            if not self.partner.goes_on_after(error):
                raise
            if said:
                print(flush=True)
            print(f"error: {error.message}", file=sys.stderr)
            if isinstance(error, ContextLengthError):
                print("/clear starts a new conversation.", file=sys.stderr)
            return
        else:
            print(flush=True)
            self.partner.report()
        if said:
            self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
            self.partner.keep(self.messages)


def opening(system: str | None) -> Messages:
    """What a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def show(pieces: Iterator[Piece], said: list[str]) -> None:
    """Write pieces as they come, and add what is of the answer to `said`; reasoning is dim, on a terminal only."""
    from pellucid.cli.console import write_text

    reasons = False
    for piece in pieces:
        if piece.is_reasoning:
            if sys.stdout.isatty():
                write_text(piece.text, dim=True)
                reasons = True
        elif piece.text:
            if reasons:
                print("\n")
                reasons = False
            said.append(piece.text)
            write_text(piece.text)


def enable_line_editing() -> None:
    """Arrow keys and history in `input`, where the platform has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401

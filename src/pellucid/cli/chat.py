"""`pellucid chat`: a conversation of many turns."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from pellucid.cli.parser import add_engine_options, add_model_option, add_speculation_options
from pellucid.cli.sampling_options import add_sampling_options
from pellucid.cli.saved_conversation import SavedConversation
from pellucid.core.errors import ContextLengthError, InvalidRequestError

if TYPE_CHECKING:
    from pellucid import LLM, SamplingParams
    from pellucid.cli.session import Messages

DESCRIPTION = """
Talk with a model. It sees the whole conversation at every turn; what it has read stays in the KV cache, so a turn costs
only what is new. Ctrl-C stops an answer and keeps what was said; Ctrl-D or /exit leaves. A line that ends with \\ goes
on with the next one.

--session FILE keeps the conversation in FILE, and goes on with it where FILE is there already: what the model had read
comes back from the file instead of being computed again. FILE holds what was said; only you can read it, and /clear
deletes it.

In the conversation:
  /clear    forget what was said and start again
  /help     show these commands
  /exit     leave

Lines piped into standard input are taken as turns.
"""

EXAMPLES = """
pellucid chat
pellucid chat --system "You answer in one sentence." --temperature 0.7
pellucid chat --model model.gguf --timing
pellucid chat --session travel.chat
"""

COMMANDS = """/clear  forget what was said and start again
/exit   leave (Ctrl-D does too)
Ctrl-C stops an answer. A line that ends with \\ goes on with the next one."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options]"
    add_model_option(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--session", metavar="FILE", help="keep the conversation in FILE, and go on with it")
    parser.add_argument("--timing", action="store_true", help="print a timing line after each answer")
    add_sampling_options(parser, of_one_answer=False)
    add_engine_options(parser)
    add_speculation_options(parser)


def run(args: argparse.Namespace) -> int:
    from pellucid.cli import session

    params = session.sampling_params(args)
    speculative = session.speculative_config(args)
    saved = None if args.session is None else SavedConversation(args.session)
    with session.load_llm(args, speculative=speculative) as llm:
        if not llm.tokenizer.has_chat_template:
            raise InvalidRequestError(
                f"{args.model} has no chat template: it continues text and cannot converse; use `pellucid generate`, "
                "or a model trained to follow instructions",
                param="model",
            )
        Conversation(llm, params, args, saved).run()
    return 0


class Conversation:
    """The turns so far, and the loop that adds to them.

    The history only ever holds whole turns: a turn that could not be answered is taken back.
    """

    def __init__(
        self, llm: LLM, params: SamplingParams, args: argparse.Namespace, saved: SavedConversation | None = None
    ) -> None:
        self.llm = llm
        self.params = params
        self.args = args
        self.interactive = sys.stdin.isatty()
        self.opening: Messages = [] if args.system is None else [{"role": "system", "content": args.system}]
        self.messages: Messages = list(self.opening)
        self.saved = saved

    def run(self) -> None:
        """Read turns until the input ends or the user leaves."""
        if self.saved is not None and self.saved.exists():
            self.messages = self.saved.restore(self.llm, self.opening)
            self.opening = [message for message in self.messages[:1] if message["role"] == "system"]
        self.read_turns()
        if self.saved is not None:
            self.saved.leave(self.llm, self.messages)

    def read_turns(self) -> None:
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
            if self.saved is not None:
                self.saved.forget()
            print("(the conversation starts again)", file=sys.stderr)
        elif text == "/help":
            print(COMMANDS, file=sys.stderr)
        else:
            print(f"unknown command {text.split()[0]}; /help shows them", file=sys.stderr)
        return True

    def answer(self, text: str) -> None:
        """Say `text` to the model, stream its answer, and keep both. Ctrl-C ends the answer early."""
        from pellucid.cli import session, timing
        from pellucid.cli.console import write_text

        messages: Messages = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        try:
            with self.llm.stream(messages, self.params) as stream:
                for output in stream:
                    if output.text:
                        said.append(output.text)
                        write_text(output.text)
        except ContextLengthError as error:
            print(f"error: {error.message}\n/clear starts a new conversation.", file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        else:
            print(flush=True)
            answer = session.answer_of(stream)
            session.report_cut(self.llm, answer, self.args)
            if self.args.timing:
                print(timing.measure(self.llm, answer.metrics).line(), file=sys.stderr)
        if said:
            self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
            if self.saved is not None:
                self.saved.keep(self.llm, self.messages)


def enable_line_editing() -> None:
    """Arrow keys and history in `input`, where the platform has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401

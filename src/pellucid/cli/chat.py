"""`pellucid chat`: a conversation of many turns."""

from __future__ import annotations

import argparse

from pellucid.cli.parser import (
    DEFAULT_MODEL,
    DEFAULT_TIMEOUT,
    add_engine_options,
    add_model_option,
    add_server_options,
    add_speculation_options,
)
from pellucid.cli.sampling_options import DEFAULTS, add_sampling_options
from pellucid.core.errors import InvalidRequestError

DESCRIPTION = """
Talk with a model. It sees the whole conversation at every turn; what it has read stays in the KV cache, so a turn costs
only what is new. Ctrl-C stops an answer and keeps what was said; Ctrl-D or /exit leaves. A line that ends with \\ goes
on with the next one.

--session FILE keeps the conversation in FILE, and goes on with it where FILE is there already: what the model had read
comes back from the file instead of being computed again. FILE holds what was said; only you can read it, and /clear
deletes it.

--url talks with a model of a server that has the OpenAI API, Pellucid's or any other, in place of one that runs here.
The sampling options that are given go into the requests; Ctrl-C disconnects, which stops the server's work.

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
pellucid chat --url http://127.0.0.1:8000 --timing
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options]"
    add_model_option(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--session", metavar="FILE", help="keep the conversation in FILE, and go on with it")
    parser.add_argument("--timing", action="store_true", help="print a timing line after each answer")
    parser.add_argument(
        "--url",
        help="talk with a model of this server; /v1 is added where the URL has no path. --model is the model's name "
        "there (default: the first that the server lists)",
    )
    add_server_options(parser)
    add_sampling_options(parser, of_one_answer=False)
    add_engine_options(parser)
    add_speculation_options(parser)
    parser.set_defaults(model=None, temperature=None)  # a server has its own


def run(args: argparse.Namespace) -> int:
    if args.url is not None:
        converse_with_server(args)
    else:
        defaults: dict[str, object] = {"api_key": None, "header": [], "timeout": DEFAULT_TIMEOUT}
        for name, default in defaults.items():
            if getattr(args, name) != default:
                raise InvalidRequestError(f"--{name.replace('_', '-')} is about a server: give --url too", param=name)
        args.model = DEFAULT_MODEL if args.model is None else args.model
        args.temperature = DEFAULTS["temperature"] if args.temperature is None else args.temperature
        converse_with_model(args)
    return 0


def converse_with_model(args: argparse.Namespace) -> None:
    from pellucid.cli import session
    from pellucid.cli.chat_model import ChatModel
    from pellucid.cli.conversation import Conversation, opening
    from pellucid.cli.saved_conversation import SavedConversation

    params = session.sampling_params(args)
    speculative = session.speculative_config(args)
    saved = None if args.session is None else SavedConversation(args.session)
    with session.load_llm(args, speculative=speculative) as llm:
        partner = ChatModel(llm, params, args, saved)
        messages = opening(args.system)
        if saved is not None and saved.exists():
            messages = saved.restore(llm, messages)
        conversation = Conversation(partner, messages)
        conversation.run()
        if saved is not None:
            saved.leave(llm, conversation.messages)


def converse_with_server(args: argparse.Namespace) -> None:
    from pellucid.cli.chat_url import ChatServer
    from pellucid.cli.conversation import Conversation, opening

    with ChatServer(args) as partner:
        Conversation(partner, opening(args.system)).run()

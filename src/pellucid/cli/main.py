"""The `pellucid` command: finds the subcommand, runs it, turns errors into messages and exit codes.

Each subcommand is a module of this package, imported when it runs and not before; the parser is the standard
library's, which costs 6 ms where click costs 22 and typer 45 (a cold start to the first token has 600 in all).

A subcommand module has `DESCRIPTION` and `EXAMPLES` (its help text), `configure(parser)` and `run(args) -> exit code`.

Exit codes: 0 done; 1 a bug in Pellucid; 2 what was asked cannot be done, with a message that says why;
130 interrupted; 141 the reader of standard output went away.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from pellucid.core.errors import InvalidRequestError, PellucidError

COMMANDS = {
    "generate": "answer or continue a prompt, streamed",
    "chat": "talk with a model",
    "serve": "serve a model over HTTP, as the OpenAI API",
    "run-batch": "answer a file of requests, resumable",
    "pull": "fetch a model",
    "models": "list the models known by name",
    "inspect": "show what is in a model file",
    "tokenize": "show how text becomes tokens",
    "doctor": "show this machine, its limits and what Pellucid chose for it",
    "bench": "measure speed, cold start and memory",
    "bench serve": "measure a server of the OpenAI API under load",
}

HELP = """usage: pellucid COMMAND [options]

An LLM inference engine you can see through. Models run on this machine's CPU.

Commands:
{commands}

Start here:
  pellucid generate "What is the capital of France?"
  pellucid chat
  pellucid models

`pellucid COMMAND --help` says what a command does, with its options and examples.
Anywhere: --debug shows the traceback of an error; --version prints the version.
"""

EXIT_BUG = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    open_standard_streams()
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        code = dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt gets a line of its own
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # What is still buffered has no reader; the interpreter would complain about it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except PellucidError as error:
        return fail(error.message, EXIT_REFUSED, debug)
    except OSError as error:
        return fail(describe_os_error(error), EXIT_REFUSED, debug)
    except MemoryError:
        return fail("out of memory", EXIT_REFUSED, debug)
    except Exception as error:
        bug = f"{type(error).__name__}: {error}\nThis is a bug in Pellucid; --debug shows where."
        return fail(bug, EXIT_BUG, debug)


def open_standard_streams() -> None:
    """Give a process that was started without standard input, output or error what is empty and takes everything: else
    the next file or connection would get their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def dispatch(arguments: list[str]) -> int:
    """Handle the options before the command, then run the command."""
    while arguments and arguments[0] == "--debug":
        arguments.pop(0)
    if not arguments:
        sys.stderr.write(help_text())
        return EXIT_REFUSED
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        if name == "help" and rest:
            return run_command(rest[0], [*rest[1:], "--help"])
        sys.stdout.write(help_text())
        return 0
    if name in ("-V", "--version"):
        from pellucid import __version__

        print(f"pellucid {__version__}")
        return 0
    return run_command(name, rest)


def run_command(name: str, arguments: list[str]) -> int:
    """Import the module of command `name` and run it.

    Raises:
        InvalidRequestError: no such command or option, or an option's value is malformed.
    """
    if name not in COMMANDS or " " in name:
        import difflib

        kind = "option" if name.startswith("-") else "command"
        known = ["--help", "--version", "--debug"] if kind == "option" else [c for c in COMMANDS if " " not in c]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(known)}"
        raise InvalidRequestError(f"unknown {kind} `{name}`: {hint}", param="command")

    if arguments and f"{name} {arguments[0]}" in COMMANDS:
        name, arguments = f"{name} {arguments[0]}", arguments[1:]

    import importlib

    from pellucid.cli.parser import CommandParser

    module = importlib.import_module(f"pellucid.cli.{module_name(name)}")
    warnings.showwarning = show_warning
    parser = CommandParser(name, module.DESCRIPTION, module.EXAMPLES)
    module.configure(parser)
    return int(module.run(parser.parse(arguments)))


def module_name(command: str) -> str:
    """Of the module in this package that has `command`."""
    return command.replace("-", "_").replace(" ", "_")


def help_text() -> str:
    width = max(map(len, COMMANDS)) + 2
    return HELP.format(commands="\n".join(f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()))


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def fail(message: str, code: int, debug: bool) -> int:
    """Print `message` on standard error, after the traceback where `debug` asks for it, and return `code`."""
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def describe_os_error(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{reason}: {error.filename}" if error.filename else reason


if __name__ == "__main__":
    sys.exit(main())

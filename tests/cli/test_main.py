"""The command line's frame: what is imported, exit codes, messages."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pellucid.cli import main as cli
from pellucid.cli.parser import CommandParser
from pellucid.core.errors import ModelNotFoundError

HEAVY = ("numpy", "tokenizers", "rich", "typer", "click", "jinja2", "huggingface_hub", "transformers", "argparse")


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pellucid", *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )


def modules_after(*arguments: str) -> set[str]:
    """Modules in memory once a command line has run in a fresh interpreter."""
    code = f"import sys; from pellucid.cli.main import main; main({list(arguments)!r}); print('MODULES', *sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(result.stdout.rpartition("MODULES")[2].split())


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch):
    """Replaces `generate` by a function."""

    def install(function):
        module = SimpleNamespace(
            DESCRIPTION="Does it.", EXAMPLES="pellucid generate", configure=lambda parser: None, run=function
        )
        monkeypatch.setitem(sys.modules, "pellucid.cli.generate", module)

    return install


def raising(error: BaseException):
    def run(args):
        raise error

    return run


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    for name, summary in cli.COMMANDS.items():
        assert any(line.split() == [*name.split(), *summary.split()] for line in result.stdout.splitlines())


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("help",)])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert modules_after(*arguments).isdisjoint(HEAVY)


def test_the_import_guard_sees_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mutant: a help text that pulls in numpy.
    code = (
        "import sys; import numpy; from pellucid.cli.main import main; main(['--help']); print('MODULES', *sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(result.stdout.rpartition("MODULES")[2].split()).isdisjoint(HEAVY)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_teaches_and_is_light(name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert run("help", *name.split()).stdout == result.stdout
    assert f"usage: pellucid {name}" in result.stdout
    assert f"pellucid {name}" in result.stdout.partition("examples:")[2]
    assert max(map(len, result.stdout.splitlines())) <= 120


@pytest.mark.parametrize("columns", [60, 80, 300])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_the_terminal(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    module = importlib.import_module(f"pellucid.cli.{cli.module_name(name)}")
    parser = CommandParser(name, module.DESCRIPTION, module.EXAMPLES)
    text, _, examples = parser.format_help().partition("examples:")
    paragraphs = [paragraph for paragraph in text.split("\n\n") if "\n " not in paragraph]
    assert max(len(line) for paragraph in paragraphs for line in paragraph.splitlines()) <= min(columns, 120)
    assert examples.strip().splitlines()[0] in module.EXAMPLES  # which are not filled
    assert " ".join(module.DESCRIPTION.split()) in " ".join(text.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_parsing_a_command_imports_nothing_heavy(name: str) -> None:
    code = (
        f"import importlib, sys; from pellucid.cli.parser import CommandParser\n"
        f"module = importlib.import_module('pellucid.cli.{cli.module_name(name)}')\n"
        f"module.configure(CommandParser('{name}', module.DESCRIPTION, module.EXAMPLES)); print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()).isdisjoint(set(HEAVY) - {"argparse"})


def test_no_command_shows_the_help_and_fails() -> None:
    result = run()
    assert result.returncode == 2
    assert "usage: pellucid COMMAND" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("genrate",), "unknown command `genrate`: did you mean `generate`?"),
        (("xyzzy",), "unknown command `xyzzy`: there are generate, chat,"),
        (("bench", "serv"), "unexpected argument `serv`"),
        (("--versoin",), "unknown option `--versoin`: did you mean `--version`?"),
        (("generate", "--max-token", "3", "hi"), "unknown option `--max-token`: did you mean `--max-tokens`?"),
        (("generate", "--", "hi", "--max-tokens", "3"), "`--max-tokens` comes after `--`"),
        (("generate", "two", "words"), "unexpected argument `words` (a text with spaces needs quotes)"),
        (("generate", "--max-tokens", "many", "hi"), "argument --max-tokens: invalid int value: 'many'"),
    ],
)
def test_usage_errors_say_what_would_work(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModelNotFoundError("no model `x`"), 2, "error: no model `x`\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: No such file or directory: a.txt\n"),
        (MemoryError(), 2, "error: out of memory\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("x"), 1, "error: ZeroDivisionError: x\nThis is a bug in Pellucid; --debug shows where.\n"),
    ],
)
def test_exit_codes(fake_command, capsys, error: BaseException, code: int, message: str) -> None:
    fake_command(raising(error))
    assert cli.main(["generate"]) == code
    assert capsys.readouterr().err == message


def test_debug_shows_the_traceback(fake_command, capsys) -> None:
    fake_command(raising(ModelNotFoundError("no model `x`")))
    assert cli.main(["generate", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("error: no model `x`\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pellucid", "--help"]
    try:
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writer)
    assert result.returncode == 141
    assert result.stderr == ""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_error(closed: str) -> None:
    code = "import sys; from pellucid.cli.main import main; sys.exit(main(['models']))"
    result = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert ("smollm2" in result.stdout) == (">&-" not in closed.split())


def test_version() -> None:
    assert run("--version").stdout.startswith("pellucid ")

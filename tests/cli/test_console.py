import io

import pytest

from pellucid.cli import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_of_a_model_cannot_reach_a_terminal() -> None:
    text = "a\x1b[2Jb\x07\x9bc\n\td\u00e9"
    terminal, pipe = Terminal(), io.StringIO()
    console.write_text(text, terminal)
    console.write_text(text, pipe)
    assert terminal.getvalue() == "a\\x1b[2Jb\\x07\\x9bc\n\td\u00e9"
    assert pipe.getvalue() == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (98_362_432, "98.4 MB"), (999_600, "1 MB"), (2.5e12, "2.5 TB")],
)
def test_format_bytes(count: float, text: str) -> None:
    assert console.format_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(134_515_008, "135M"), (1.236e9, "1.24B"), (12, "12"), (999_600, "1M")])
def test_format_count(count: float, text: str) -> None:
    assert console.format_count(count) == text


def test_a_table_in_a_pipe_is_never_cut_or_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 500
    console.print_table(("name", "n"), [(long, 1), ("[red]markup[/red]\x1b[0m", 22)], right=("n",))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{long}   1"
    assert lines[2].split() == ["[red]markup[/red]\\x1b[0m", "22"]
    assert {len(line) for line in lines} == {len(long) + 4}


def test_progress_without_a_terminal_is_a_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with console.ProgressReport() as report:
        for done in (0, 50, 100):
            report("download", done, 100_000)
        report("extract", 0, None)
    assert capsys.readouterr().err == "download (100 kB) ...\nextract ...\n"

import json

import pytest

from pellucid.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["tokenize", *arguments]) == 0
    return capsys.readouterr().out


def test_table(chat_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--model", chat_model, "a tï").splitlines()
    assert lines[0].split() == ["position", "id", "piece", "text", "bytes"]
    assert lines[2].split()[2:] == ["Ġt", "'", "t'", "20", "74"]
    assert lines[-1] == "4 tokens"
    assert lines[3].split()[-1] == "c3"  # half of a character


@pytest.mark.parametrize("text", ["a tï 🎉", "", " \n\t ", "<|im_start|>"])
def test_ids_decode_to_the_text(chat_model: str, capsys: pytest.CaptureFixture[str], text: str) -> None:
    ids = run(capsys, "--model", chat_model, "--ids-only", text).split()
    if ids:
        assert run(capsys, "--model", chat_model, "--decode", *ids) == text + "\n"


def test_special_tokens_are_text_unless_asked_for(chat_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run(capsys, "--model", chat_model, "--ids-only", "<|im_end|>").split()) > 1
    assert run(capsys, "--model", chat_model, "--ids-only", "--special", "<|im_end|>") == "259\n"
    assert "special" in run(capsys, "--model", chat_model, "--special", "<|im_end|>")


def test_json(chat_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    described = json.loads(run(capsys, "--model", chat_model, "--json", "ï"))
    assert described["text"] == "ï"
    assert [token["bytes"] for token in described["tokens"]] == ["c3", "af"]


def test_refusals(chat_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", "--model", chat_model, "--decode", "99999"]) == 2
    assert "99999" in capsys.readouterr().err
    assert main(["tokenize", "--model", chat_model, "text", "--decode", "1"]) == 2
    assert "not both" in capsys.readouterr().err

"""`pellucid chat --session`, with a tiny model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pellucid import LLM, StorageError
from pellucid.cli.main import main
from pellucid.kvcache import saved_prefix
from pellucid.kvcache.saved_prefix import PrefixFile, SavedPrefix

pytestmark = pytest.mark.filterwarnings("ignore:the native core is not installed")

LONG = "a line that is long enough to fill more than one block of sixty-four tokens, byte for byte " * 2


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "session"


@pytest.fixture
def chat(chat_model: str, file: Path, pipe_in, capsys: pytest.CaptureFixture[str]):
    """Runs a chat with the session; gives its exit code, standard output and standard error."""

    def run(text: str, *options: str, model: str = chat_model) -> tuple[int, str, str]:
        pipe_in(text.encode())
        arguments = ["chat", "-m", model, "--session", str(file), "--max-tokens", "8", "--ignore-eos", "--timing"]
        code = main([*arguments, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def saved(file: Path) -> SavedPrefix:
    with PrefixFile.open(file) as opened:
        return opened.prefix


def said(file: Path) -> list[Any]:
    messages = saved(file).messages
    assert messages is not None
    return [(message["role"], message["content"]) for message in messages]


def test_a_conversation_goes_on_as_if_it_had_not_been_left(chat, file: Path) -> None:
    code, whole, _ = chat(f"{LONG}\nsecond\nthird\n")
    assert code == 0
    conversation = said(file)
    assert [role for role, _ in conversation] == ["user", "assistant"] * 3
    file.unlink()

    _, first, notes = chat(f"{LONG}\nsecond\n")
    assert "restored" not in notes
    num_cached = 64 * saved(file).num_blocks
    assert num_cached > 128
    code, second, notes = chat("third\n")
    assert (code, first + second) == (0, whole)
    assert f"(restored 4 messages, {num_cached} tokens from cache)" in notes
    assert f"({num_cached} cached)" in notes
    assert said(file) == conversation


def test_what_was_said_is_saved_after_every_turn(chat, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat that is killed has lost nothing but keys and values."""
    sizes: list[tuple[int, int]] = []
    write_prefix = saved_prefix.write_prefix
    monkeypatch.setattr(
        "pellucid.engine.prefix_store.write_prefix",
        lambda path, prefix, blocks: (
            sizes.append((len(prefix.messages or ()), prefix.num_blocks)),
            write_prefix(path, prefix, blocks),
        ),
    )
    chat(f"{LONG}\nsecond\n")
    assert [count for count, _ in sizes] == [2, 4, 4]
    assert [bool(num_blocks) for _, num_blocks in sizes] == [False, False, True]
    sizes.clear()
    chat("")
    assert sizes == []


def test_keys_and_values_that_do_not_fit_are_computed_again(chat, file: Path) -> None:
    _, whole, _ = chat(f"{LONG}\nsecond\nthird\n", "--kv-cache-dtype", "f32")
    file.unlink()
    _, first, _ = chat(f"{LONG}\nsecond\n")
    code, second, notes = chat("third\n", "--kv-cache-dtype", "f32")
    assert (code, second) == (0, whole.removeprefix(first))
    assert "(restored 4 messages, to be read again: " in notes
    assert "KV layout" in notes
    assert "f32" in saved(file).kv_layout


def test_a_conversation_longer_than_the_context_is_restored_and_says_so(chat, file: Path) -> None:
    chat(f"{LONG}\n{LONG}\n")
    conversation = said(file)
    code, _, notes = chat("more\n", "--max-model-len", "256")
    assert code == 0
    assert "(restored 4 messages, to be read again: " in notes
    assert "/clear starts a new conversation" in notes
    assert said(file) == conversation


def test_a_conversation_that_fills_the_context_is_kept(chat, file: Path) -> None:
    code, _, notes = chat(f"{LONG[:100]}\n", "--max-model-len", "160", "--max-tokens", "100")
    assert code == 0
    assert "the context of 160 tokens is full" in notes
    assert len(said(file)) == 2
    assert saved(file).num_blocks == 0


def test_another_model_is_refused_and_the_file_left_alone(chat, file: Path, chat_model: str, tmp_path: Path) -> None:
    chat("hello\n")
    before = file.read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(Path(chat_model).read_bytes() + b"\0")
    code, out, notes = chat("hello\n", model=str(other))
    assert (code, out) == (2, "")
    assert "was saved with chat.gguf" in notes
    assert "this model is other.gguf" in notes
    assert "load it with that model" in notes
    assert file.read_bytes() == before


def test_other_files_are_refused_and_left_alone(chat, file: Path, chat_model: str, tmp_path: Path) -> None:
    file.write_text("my notes")
    code, _, notes = chat("hello\n")
    assert code == 2
    assert "this is not a saved prefix" in notes
    assert file.read_text() == "my notes"
    with LLM(chat_model) as llm:
        for prefix in ("some text", [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]):
            llm.save_prefix(prefix, file)
            code, _, notes = chat("hello\n")
            assert code == 2
            assert "no conversation: give --session another file" in notes
    file.unlink()
    file.mkdir()
    code, _, notes = chat("hello\n")
    assert code == 2
    assert "is not a file" in notes


def test_there_must_be_a_folder(chat, tmp_path: Path, file: Path) -> None:
    code, _, notes = chat("hello\n", "--session", str(tmp_path / "gone" / "session"))
    assert code == 2
    assert "there is no folder" in notes


def test_the_system_message_stays(chat, file: Path) -> None:
    chat("hello\n", "--system", "be brief")
    code, _, notes = chat("/clear\nagain\n")
    assert code == 0
    assert "restored 3 messages" in notes
    assert said(file)[:2] == [("system", "be brief"), ("user", "again")]
    assert chat("more\n", "--system", "be brief")[0] == 0
    assert len(said(file)) == 5
    code, _, notes = chat("more\n", "--system", "be long")
    assert code == 2
    assert "leave --system out" in notes
    assert len(said(file)) == 5


def test_clear_takes_the_file_away(chat, file: Path) -> None:
    chat("hello\n")
    assert chat("/clear\n")[0] == 0
    assert not file.exists()
    assert chat("/clear\n/exit\n")[0] == 0
    assert not file.exists()


def test_a_turn_that_cannot_be_saved_is_told_and_the_chat_goes_on(
    chat, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr("pellucid.engine.prefix_store.write_prefix", full)
    code, out, notes = chat("hello\nagain\n")
    assert out.count("\n") >= 2
    assert notes.count("warning: this turn was not saved: the disk is full") == 2
    assert code == 2  # what was asked for, a session that is kept, was not to be had
    assert not file.exists()


def test_an_interrupt_while_a_turn_is_saved_does_not_cut_it_short(
    chat, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prefix = saved_prefix.write_prefix

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write_prefix(*args)
        monkeypatch.setattr("pellucid.engine.prefix_store.write_prefix", write_prefix)

    monkeypatch.setattr("pellucid.engine.prefix_store.write_prefix", interrupted)
    code, _, _ = chat("hello\nagain\n")
    assert code == 0
    assert len(said(file)) == 4


def test_what_is_in_the_file_is_what_was_said(chat, file: Path) -> None:
    chat("tell me a secret\n")
    data = file.read_bytes()
    header = json.loads(data[56 : 56 + int.from_bytes(data[12:16], "little")])
    assert header["messages"][0] == {"role": "user", "content": "tell me a secret"}
    assert header["model_name"] == "chat.gguf"

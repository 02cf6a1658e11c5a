import json
import re
from pathlib import Path
from typing import Any

import pytest

from pellucid.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:the native core is not installed")


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]):
    """Runs `generate`; returns (exit code, standard output, standard error without the warning of a slow backend)."""

    def run(model: str, *arguments: str) -> tuple[int, str, str]:
        code = main(["generate", "--model", model, *arguments])
        captured = capsys.readouterr()
        notes = [line for line in captured.err.splitlines() if not line.startswith("warning: the native core")]
        return code, captured.out, "\n".join(notes)

    return run


@pytest.fixture
def answer(generate):
    """Runs `generate --json` and returns the object."""

    def run(model: str, *arguments: str) -> dict[str, Any]:
        code, out, err = generate(model, "--json", *arguments)
        assert code == 0, err
        return json.loads(out)

    return run


def test_streams_the_answer_and_ends_with_a_timing_line(generate, answer, chat_model: str) -> None:
    code, out, err = generate(chat_model, "hello", "--max-tokens", "12")
    assert code == 0
    whole = answer(chat_model, "hello", "--max-tokens", "12")
    assert out.removesuffix("\n") == whole["text"].removesuffix("\n")
    prompt_tokens = len(whole["prompt_token_ids"])
    assert re.match(rf"{prompt_tokens} prompt tokens, TTFT \d+ ms, prefill \d+ tok/s, decode \d+ tok/s \(", err)
    assert len(err.splitlines()) == 1


def test_no_timing(generate, chat_model: str) -> None:
    assert generate(chat_model, "hello", "--max-tokens", "2", "--no-timing")[2] == ""


def test_guessing_ahead_changes_no_token(answer, generate, chat_model: str) -> None:
    prompt = ("abc abc abc abc abc abc", "--raw", "--ignore-eos", "--max-tokens", "40")
    plain = answer(chat_model, *prompt)
    guessed = answer(chat_model, *prompt, "--speculative", "ngram", "--num-draft-tokens", "4")
    assert guessed["token_ids"] == plain["token_ids"]
    assert plain["timing"]["draft_tokens"] == 0 <= guessed["timing"]["accepted_tokens"]
    for options in (
        ["lookahead"],
        ["layer_skip", "--draft-layers", "0-1"],
        ["draft_model", "--draft-model", chat_model],
    ):
        assert answer(chat_model, *prompt, "--speculative", *options)["token_ids"] == plain["token_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speculative", "magic"], "speculative must be one of ngram"),
        (["--speculative", "ngram", "--num-draft-tokens", "0"], "num_draft_tokens must be"),
        (["--num-draft-tokens", "3"], "give --speculative too"),
        (["--speculative", "ngram", "--draft-model", "small"], "an option of the method 'draft_model'"),
        (["--speculative", "draft_model"], "draft_model must be"),
        (["--speculative", "layer_skip", "--draft-layers", "1,0"], "layers must be"),
        (["--speculative", "layer_skip", "--draft-layers", "0-99"], "this model has layers 0 to 1"),
        (["--speculative", "layer_skip", "--draft-layers", "some"], "--draft-layers: invalid layer_numbers value"),
    ],
)
def test_how_to_guess_is_checked(generate, chat_model: str, options: list[str], message: str) -> None:
    code, _, err = generate(chat_model, "hello", *options)
    assert code == 2
    assert message in err


def test_the_default_is_reproducible(answer, chat_model: str) -> None:
    first, second = (answer(chat_model, "hello", "--max-tokens", "8") for _ in range(2))
    assert first["token_ids"] == second["token_ids"]
    assert first["seed"] is None


def test_a_temperature_reports_the_seed_that_repeats_it(answer, generate, chat_model: str) -> None:
    options = ("hello", "--temperature", "1.5", "--max-tokens", "16", "--ignore-eos")
    first = answer(chat_model, *options)
    assert first["seed"] is not None
    assert answer(chat_model, *options, "--seed", str(first["seed"]))["token_ids"] == first["token_ids"]
    assert answer(chat_model, *options, "--seed", str(first["seed"] + 1))["token_ids"] != first["token_ids"]
    assert generate(chat_model, *options, "--seed", "7")[2].endswith(", seed 7")


def test_the_chat_template_is_used_where_there_is_one(answer, chat_model: str, base_model: str) -> None:
    raw = answer(chat_model, "--raw", "hi", "--max-tokens", "1")["prompt_token_ids"]
    chat = answer(chat_model, "hi", "--max-tokens", "1")["prompt_token_ids"]
    assert len(raw) == 2
    assert len(chat) > len(raw)
    assert chat[0] == 258  # <|im_start|>
    assert answer(base_model, "hi", "--max-tokens", "1")["prompt_token_ids"] == raw


def test_a_system_message_comes_first(answer, chat_model: str) -> None:
    without = answer(chat_model, "hi", "--max-tokens", "1")["prompt_token_ids"]
    with_system = answer(chat_model, "hi", "--system", "be brief", "--max-tokens", "1")["prompt_token_ids"]
    assert with_system[-len(without) :] == without
    assert with_system.count(258) == without.count(258) + 1


@pytest.mark.parametrize("option", [("--chat",), ("--system", "be brief")])
def test_a_base_model_cannot_converse(generate, base_model: str, option: tuple[str, ...]) -> None:
    code, out, err = generate(base_model, "hi", *option)
    assert (code, out) == (2, "")
    assert "no chat template" in err


@pytest.mark.parametrize("argument", [(), ("-",)])
@pytest.mark.parametrize(("piped", "read"), [(b"hi", "hi"), (b"hi\n", "hi"), (b"hi\r\n", "hi"), (b"hi\n\n", "hi\n")])
def test_a_piped_prompt(answer, chat_model: str, pipe_in, argument, piped: bytes, read: str) -> None:
    expected = answer(chat_model, "--raw", read, "--max-tokens", "1")["prompt_token_ids"]
    pipe_in(piped)
    assert answer(chat_model, "--raw", *argument, "--max-tokens", "1")["prompt_token_ids"] == expected


def test_logprobs(generate, chat_model: str) -> None:
    code, out, _ = generate(chat_model, "--raw", "hi", "--max-tokens", "3", "--logprobs", "2", "--ignore-eos")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 3
    for line in lines:
        chosen, alternatives = re.split(r"%   ", line, maxsplit=1)
        assert len(re.findall(r"\d%", alternatives)) == 2
        # Greedy: the likeliest alternative is the token itself.
        assert alternatives.startswith(chosen.split("  ")[0].strip())


def test_json_logprobs(answer, chat_model: str) -> None:
    result = answer(chat_model, "--raw", "hi", "--max-tokens", "3", "--logprobs", "2", "--ignore-eos")
    assert [step[0]["token_id"] for step in result["logprobs"]] == result["token_ids"]
    assert all(item["logprob"] <= 0 for step in result["logprobs"] for item in step)


def test_several_answers(generate, answer, chat_model: str) -> None:
    options = ("--raw", "hi", "--n", "2", "--temperature", "1", "--seed", "3", "--max-tokens", "4", "--ignore-eos")
    whole = answer(chat_model, *options)
    assert whole["text"] == whole["outputs"][0]["text"]
    assert whole["token_ids"] != whole["outputs"][1]["token_ids"]
    code, out, _ = generate(chat_model, *options)
    assert code == 0
    shown = [
        f"[{number}]\n" + each["text"].removesuffix("\n") + "\n" for number, each in enumerate(whole["outputs"], 1)
    ]
    assert out == "".join(shown)
    best = answer(chat_model, *options, "--best-of", "3", "--logprobs", "0")
    means = [each["cumulative_logprob"] / len(each["token_ids"]) for each in best["outputs"]]
    assert means == sorted(means, reverse=True)
    (line, *_) = generate(chat_model, "--raw", "hi", "--best-of", "3", "--max-tokens", "2")[1].splitlines()
    assert line != "[1]"
    assert len(generate(chat_model, *options, "--logprobs", "1")[1].splitlines()) == 2 + 2 * 4


def test_an_echo(generate, answer, chat_model: str) -> None:
    options = ("--raw", "hi", "--max-tokens", "2", "--ignore-eos")
    plain, echo = answer(chat_model, *options), answer(chat_model, *options, "--echo", "--prompt-logprobs", "1")
    assert echo["text"] == "hi" + plain["text"]
    assert echo["token_ids"] == plain["prompt_token_ids"] + plain["token_ids"]
    first, second = echo["prompt_logprobs"]
    assert first is None
    assert second[0]["token_id"] == plain["prompt_token_ids"][1]
    lines = generate(chat_model, *options, "--echo", "--logprobs", "1")[1].splitlines()
    assert len(lines) == 4
    assert lines[0] == "'h'"


def test_what_cut_the_answer_off_is_said(generate, chat_model: str) -> None:
    context = ("--max-model-len", "64", "--ignore-eos", "--no-timing")
    assert generate(chat_model, "--raw", "hi", *context)[2] == "(cut off: the context of 64 tokens is full)"
    assert generate(chat_model, "--raw", "hi", *context, "--max-tokens", "3")[2] == ""
    long_context = ("--ignore-eos", "--no-timing")
    _, _, note = generate(chat_model, "--raw", "hi", *long_context)
    assert note == "(cut off after 512 tokens; --max-tokens sets the limit)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hi", "--temperature", "-1"), "temperature must be"),
        (("hi", "--top-p", "0"), "top_p must be"),
        (("hi", "--max-tokens", "0"), "max_tokens must be"),
        (("hi", "--logprobs", "1000"), "logprobs must be"),
        (("hi", "--threads", "0"), "threads must be"),
        (("hi", "--backend", "gpu"), "backend must be"),
        (("hi", "--max-model-len", "99999"), "max_model_len is 99999"),
        (("hi", "--raw", "--system", "x"), "--raw has no chat template to put --system in"),
        (("",), "the prompt is empty"),
        (("x" * 3000,), "the context holds 1024 tokens"),
        (("\udcff",), "the prompt is not valid UTF-8"),
    ],
)
def test_refusals(generate, chat_model: str, arguments: tuple[str, ...], message: str) -> None:
    raw = () if "--system" in arguments else ("--raw",)
    code, out, err = generate(chat_model, *raw, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_piped_bytes_that_are_no_text(generate, chat_model: str, pipe_in) -> None:
    pipe_in(b"ab\xff")
    code, out, err = generate(chat_model)
    assert (code, out) == (2, "")
    assert err == "error: the prompt on standard input is not valid UTF-8: invalid start byte at byte 2"


def test_no_prompt_at_a_terminal(generate, chat_model: str, terminal_in) -> None:
    code, _, err = generate(chat_model)
    assert code == 2
    assert err.startswith("error: no prompt:")


def test_bad_options_are_found_before_the_model_is_looked_for(generate) -> None:
    assert "temperature" in generate("no-such-model", "hi", "--temperature", "-1")[2]
    assert "no model named" in generate("no-such-model", "hi")[2]


def test_a_missing_file(generate, tmp_path: Path) -> None:
    code, out, err = generate(str(tmp_path / "none.gguf"), "hi")
    assert (code, out) == (2, "")
    assert err == f"error: no such file: {tmp_path / 'none.gguf'}"


def test_the_answer_looks_as_the_options_ask(answer, chat_model: str, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text('{"type": "object", "properties": {"é": {"enum": [1, 2]}}, "required": ["é"]}', encoding="utf-8")
    grammar.write_text('root ::= "<" [ab]{2} ">"\n')
    options = ("hello", "--max-tokens", "40", "--temperature", "1", "--seed", "3")
    assert json.loads(answer(chat_model, *options, "--json-schema", str(schema))["text"])["é"] in (1, 2)
    assert re.fullmatch("[0-9]{3}", answer(chat_model, *options, "--regex", "[0-9]{3}")["text"])
    assert answer(chat_model, *options, "--choice", "yes", "--choice", "no")["text"] in ("yes", "no")
    assert re.fullmatch("<[ab]{2}>", answer(chat_model, *options, "--grammar", str(grammar))["text"])
    assert answer(chat_model, *options, "--json-object")["text"].startswith("{")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--json-schema", "/nowhere/schema.json"), "--json-schema: /nowhere/schema.json cannot be read: No such file"),
        (("--grammar", "/"), "--grammar: / cannot be read: "),
        (("--regex", "a("), "unclosed group"),
        (("--regex", ""), "not empty"),
        (("--choice", ""), "not ''"),
        (("--regex", "a", "--choice", "b"), "not allowed with"),
        (("--choice", "a", "--ignore-eos"), "leave ignore_eos false"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(generate, chat_model: str, options: tuple[str, ...], message: str) -> None:
    code, out, err = generate(chat_model, "hello", *options)
    assert (code, out) == (2, "")
    assert message in err


def test_a_schema_file_that_is_not_utf8_is_refused(generate, chat_model: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_bytes(b'{"const": "\xff"}')
    assert "not valid UTF-8: " in generate(chat_model, "hello", "--json-schema", str(schema))[2]

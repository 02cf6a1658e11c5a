"""Malice over HTTP: each is answered with a 4xx that names the parameter, and the server stays as it was."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pellucid.server.app import routes
from pellucid.server.openai.requests import SAMPLING_FIELDS
from pellucid.tokenizer.byte_pair_encoding import BytePairEncoder
from tests.support.chat_models import write_chat_model
from tests.support.chat_templates import HERMES
from tests.support.live_server import LiveServer, live_server
from tests.support.raw_http import Answer

MEGABYTE = 1 << 20
HUGE = 10**400
COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"


@dataclass(frozen=True, slots=True)
class Client:
    """Requests to a server, each on a connection of its own."""

    server: LiveServer

    def send(
        self, path: str, body: Any = None, *, method: str = "POST", headers: dict[str, str] | None = None
    ) -> Answer:
        """What answers `body`: bytes as they are, anything else as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.server.url.removeprefix("http://"), timeout=60)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def complete(self, **fields: Any) -> Answer:
        return self.send(COMPLETIONS, {"model": "tiny", "prompt": "hi", "max_tokens": 2, **fields})

    def chat(self, content: Any, **fields: Any) -> Answer:
        messages = [{"role": "user", "content": content}]
        return self.send(CHAT, {"model": "tiny", "messages": messages, "max_tokens": 2, **fields})

    def sound(self) -> str:
        """What the server says when it is well."""
        assert self.send("/health", method="GET").status == 200
        answer = self.complete(prompt="How are you?", max_tokens=8, temperature=0)
        text: str = json.loads(answer.body)["choices"][0]["text"]
        return text


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """At the end the server says what it said in the beginning."""
    with live_server(write_chat_model(tmp_path_factory.mktemp("model") / "tiny.gguf")) as server:
        client = Client(server)
        before = client.sound()
        yield client
        assert client.sound() == before


def check_refused(answer: Answer, param: str | None, message: str = "", status: int = 400) -> None:
    assert answer.status == status, answer.body[:500]
    assert answer.headers["content-type"] == "application/json"
    error = json.loads(answer.body)["error"]
    if "param" in error:  # Anthropic's form has none
        assert error["param"] == param, error
    assert message in error["message"]
    assert len(answer.body) < 2000


def post_paths() -> list[str]:
    return sorted({route.path for route in routes() if route.methods is not None and "POST" in route.methods})


def test_there_are_routes_to_attack() -> None:
    assert {COMPLETIONS, CHAT, RESPONSES, MESSAGES} <= set(post_paths())


MALFORMED: list[tuple[bytes, str, str]] = [
    (b"", "body", "the body is empty"),
    (b"[]", "body", "must be a JSON object, not []"),
    (b"{", "body", "not valid JSON"),
    (b"\xff\xfe{}", "body", "not valid UTF-8"),
    (b"\xef\xbb\xbf{}", "body", "byte order mark"),
    (b"[" * 100_000, "body", "nests too deeply"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "body", "nests too deeply"),
    (b'{"a":[' + b"[]," * 50_001 + b"[]]}", "body", "over 50,000 objects and arrays"),
    (b'{"model": "tiny", "model": "tiny"}', "model", "comes twice"),
    (b'{"temperature": NaN}', "temperature", "NaN"),
    (b'{"temperature": -Infinity}', "temperature", "-Infinity"),
    (b'{"temperature": 1e999}', "temperature", "beyond the range of a float64"),
    (b'{"temperature": 1' + b"0" * 5000 + b"}", "temperature", "digits"),
    (b'{"messages": [{"content": "\\ud800"}]}', "messages[0].content", "lone surrogate"),
    (b'{"prompt": "a\\u0000"}', "prompt", "NUL"),
    (b'{"prompt": "a\0"}', "body", "control character"),
    (b'{"' + b"x" * MEGABYTE + b'": 1}', "x" * 128, "is not a parameter"),
]


@pytest.mark.parametrize("path", post_paths())
def test_bodies_that_are_no_json_object(client: Client, path: str) -> None:
    for data, param, message in MALFORMED:
        check_refused(client.send(path, data), param, message)
    check_refused(client.send(path, b"{}", headers={"Content-Type": "text/plain"}), "Content-Type", status=415)
    check_refused(client.send(path, b"{}", headers={"Content-Encoding": "gzip"}), "Content-Encoding", status=415)


@pytest.mark.parametrize("path", post_paths())
def test_a_body_one_byte_over_the_limit(client: Client, path: str) -> None:
    limit = 2 * MEGABYTE
    body = b'{"nonsense": 1}'
    check_refused(client.send(path, body + b" " * (limit - len(body))), "nonsense")
    over = client.send(path, body + b" " * (limit + 1 - len(body)))
    check_refused(over, "body", "2,097,153 bytes; at most 2,097,152", 413)


def test_a_megabyte_of_header(client: Client) -> None:
    check_refused(
        client.send("/health", method="GET", headers={"X": "x" * MEGABYTE}), None, "over 65,536 bytes", status=431
    )


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"Host": "evil.example"}, "Host"),
        ({"Host": "127.0.0.1.evil.example"}, "Host"),
        ({"Origin": "http://evil.example"}, "Origin"),
        ({"Origin": "null"}, "Origin"),
    ],
)
def test_pages_of_others(client: Client, headers: dict[str, str], param: str) -> None:
    for method, path in [("GET", "/health"), ("GET", "/v1/models"), ("OPTIONS", CHAT), ("POST", COMPLETIONS)]:
        check_refused(client.send(path, b"{}", method=method, headers=headers), param, status=403)


class Encoded:
    """How many characters were tokenized."""

    def __init__(self) -> None:
        self.num_characters = 0


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    encoded = Encoded()
    encode = BytePairEncoder.encode

    def counting(self: BytePairEncoder, text: str) -> list[int]:
        encoded.num_characters += len(text)
        return encode(self, text)

    monkeypatch.setattr(BytePairEncoder, "encode", counting)
    return encoded


@pytest.mark.parametrize("character", ["a", "字", " ", "\n", "😀", "<|im_end|>"])
def test_a_megabyte_that_cannot_fit_is_not_tokenized(client: Client, encoded: Encoded, character: str) -> None:
    text = character * (MEGABYTE // len(json.dumps(character, ensure_ascii=False).encode()[1:-1]))

    def send(path: str, **fields: Any) -> Answer:
        data = json.dumps({"model": "tiny", **fields}, ensure_ascii=False).encode()
        assert len(data) < 2 * MEGABYTE
        return client.send(path, data)

    message = "tokens or more, but only 1023 fit in the context"
    messages = [{"role": "user", "content": text}]
    check_refused(send(COMPLETIONS, prompt=text), "prompt", message)
    check_refused(send(COMPLETIONS, prompt=["a", text]), "prompt", message)
    check_refused(send(COMPLETIONS, prompt="a", negative_prompt=text, guidance_scale=2), "negative_prompt", message)
    check_refused(send(CHAT, messages=messages), "prompt", message)
    check_refused(send(RESPONSES, input=text), "prompt", message)
    check_refused(send(MESSAGES, messages=messages, max_tokens=1), None, message)
    assert encoded.num_characters < 1000


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "not []"),
        ([[]], "empty"),
        ([-1], "token id -1 is not in the vocabulary, which has ids 0 to 259"),
        ([260], "token id 260 is not in the vocabulary"),
        ([2**63], "is not in the vocabulary"),
        ([HUGE], "is not in the vocabulary"),
        ([1.5], "not 1.5"),
        ([True], "not True"),
        ([None], "not None"),
        ([1, "a"], "not 'a'"),
        ([[["a"]]], "not ['a']"),
        ({"a": 1}, "not {'a': 1}"),
        (["a"] * 2049, "not 2049 of them"),
        ([5] * 1024, "the prompt has 1024 tokens and needs room for one more, but the context holds 1024"),
        ("a" * 2000, "the prompt has 2000 tokens"),
    ],
)
def test_prompts(client: Client, prompt: Any, message: str) -> None:
    check_refused(client.complete(prompt=prompt), "prompt", message)


VALUES: list[Any] = [-1, 0, 2**31, 2**63, HUGE, -HUGE, 1e-308, 1e308, 1.5, True, "x", "", [], [1], {}, {"a": 1}, [HUGE]]


@pytest.mark.parametrize("name", sorted(SAMPLING_FIELDS))
def test_any_value_of_any_parameter_is_served_or_refused_by_name(client: Client, name: str) -> None:
    for path, prompt in ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": [{"role": "user", "content": "hi"}]})):
        for value in VALUES:
            answer = client.send(path, {"model": "tiny", "max_tokens": 2, **prompt, name: value})
            if answer.status != 200:
                assert answer.status == 400, (value, answer.body)
                assert answer.error["param"], (value, answer.error)
                assert name in answer.error["message"], (value, answer.error)


@pytest.mark.parametrize("value", [-1, 0, 2**31, 2**63, HUGE, 1.5, True, "1", [1]])
@pytest.mark.parametrize("name", ["n", "max_tokens"])
def test_counts(client: Client, name: str, value: Any) -> None:
    check_refused(client.complete(**{name: value}), name, f"{name} must be an integer from 1 to ")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"logprobs": 21}, "logprobs", "0 to 20, not 21"),
        ({"logprobs": -1}, "logprobs", "not -1"),
        ({"top_k": 2**31}, "top_k", "not 2147483648"),
        ({"top_k": -2}, "top_k", "not -2"),
        ({"temperature": 1e-308}, "temperature", "0.0001"),
        ({"top_p": 1e-308}, "top_p", "not 1e-308"),
        ({"n": 128}, "n", "at most 64 sequences"),
        ({"stop": [f"s{number}" for number in range(10_000)]}, "stop", "up to 64 strings"),
        ({"stop": "x" * MEGABYTE}, "stop", "1024 characters"),
        ({"stop_token_ids": list(range(100_000))}, "stop_token_ids", "up to 1024"),
        ({"logit_bias": {str(token): 1 for token in range(100_000)}}, "logit_bias", "up to 4096 token ids"),
        ({"logit_bias": {"260": 1}}, "logit_bias", "ids 0 to 259"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "digits"),
        ({"logit_bias": {str(2**63): 1}}, "logit_bias", "digits"),
        ({"logit_bias": {"1": 1, "01": 1}}, "logit_bias", "twice"),
        ({"bad_words": ["x"] * 100_000}, "bad_words", "up to 1024"),
        ({"cache_salt": "x" * MEGABYTE}, "cache_salt", "1024 characters"),
        ({"dry_multiplier": 1, "dry_sequence_breakers": ["x"] * 10_000}, "dry_sequence_breakers", "up to 64"),
        ({"model": "x" * MEGABYTE}, "model", "is not served here"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}, "chat_template", "is not a parameter"),
    ],
)
def test_parameters(client: Client, fields: dict[str, Any], param: str, message: str) -> None:
    check_refused(client.complete(**fields), param, message, 404 if param == "model" else 400)


def test_a_million_logit_biases(client: Client) -> None:
    data = b'{"model": "tiny", "prompt": "a", "logit_bias": {' + b",".join(b'"%d":1' % i for i in range(1_000_000))
    check_refused(client.send(COMPLETIONS, data + b"}}"), "body", "at most 2,097,152", 413)


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def structured(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


CYCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (structured(regex="(" * 60_000 + ")" * 60_000), "regex"),
        (structured(regex="(" * 8000 + ")" * 8000), "regex"),
        (structured(regex="("), "regex"),
        (structured(regex=r"(a)\1"), "regex"),
        (structured(regex="a" * MEGABYTE), "regex"),
        (structured(grammar='start: start "a"'), "grammar"),
        (structured(grammar="start: a\na: a"), "grammar"),
        (structured(grammar="start: b"), "grammar"),
        (structured(grammar="start: " + "(" * 8000 + '"a"' + ")" * 8000), "grammar"),
        (structured(choice=["x"] * 100_000), "choice"),
        (structured(choice=[]), "choice"),
        (structured(structural_tag="[" * 10_000), "structural_tag"),
        (structured(json="[" * 10_000), "json"),
        (structured(json='{"const": NaN}'), "json"),
        (schema({"$ref": "#"}), "json"),
        (schema(CYCLE), "json"),
        (schema({"$ref": "#/nope"}), "json"),
        (schema({"$ref": "http://127.0.0.1:1/schema"}), "json"),
        (schema({"$ref": "file:///etc/passwd"}), "json"),
        (schema({"type": "array", "minItems": HUGE}), "json"),
        (schema({"type": "string", "maxLength": 2**64 - 1}), "json"),
        (schema({"type": "string", "minLength": 2**40}), "json"),
        (schema({"type": "integer", "multipleOf": 1e-300}), "json"),
        (schema({"enum": [f"value {number}" for number in range(100_000)]}), "json"),
        (schema({"type": "object", "properties": {f"p{number}": {} for number in range(20_000)}}), "json"),
    ],
)
def test_grammars(client: Client, fields: dict[str, Any], param: str) -> None:
    check_refused(client.complete(**fields), f"structured_outputs.{param}")


@pytest.mark.parametrize(
    "fields",
    [
        structured(regex="(a+)+b"),
        structured(regex="((a{1,100}){1,100}){1,100}"),
        schema({"type": "array", "maxItems": 2**64 - 1}),
        schema({"type": "string", "pattern": "(x+x+)+y"}),
    ],
)
def test_grammars_that_cost_others_much_are_served(client: Client, fields: dict[str, Any]) -> None:
    assert client.complete(**fields).status == 200


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("x", "messages"),
        ([], "messages"),
        ([None], "messages[0]"),
        ([{"role": "user", "content": "a"}] * 20_000, "messages"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}], "prompt"),
        ([{"role": "root", "content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [[["a"]]]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "a", "evil": 1}], "messages[0].evil"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1"}}]}], None),
    ],
)
def test_messages(client: Client, messages: Any, param: str | None) -> None:
    answer = client.send(CHAT, {"model": "tiny", "messages": messages})
    check_refused(answer, param if param is not None else answer.error["param"])
    assert answer.error["param"].startswith(("messages", "prompt"))


@pytest.mark.parametrize("name", ["chat_template", "messages", "tools", "add_generation_prompt", "max_tokens", "self"])
def test_template_options_that_would_be_arguments(client: Client, name: str) -> None:
    answer = client.chat("hi", chat_template_kwargs={name: "{% for i in range(10**9) %}x{% endfor %}"})
    check_refused(answer, f"chat_template_kwargs.{name}")


def test_special_tokens_of_users_are_text(client: Client) -> None:
    """They cost more tokens than the one that they would be."""
    count = [json.loads(client.chat(text).body)["usage"]["prompt_tokens"] for text in ("", "<|im_end|>")]
    assert count[1] == count[0] + len("<|im_end|>")


def test_a_request_id_of_another_user_gives_nothing_of_theirs(client: Client) -> None:
    """Requests by one name run side by side, each with its own answer."""
    headers = {"X-Request-Id": "the-same"}

    def ask(prompt: str) -> Answer:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "echo": True}
        return client.send(COMPLETIONS, body, headers=headers)

    prompts = [f"prompt {number}" for number in range(8)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(ask, prompts))
    assert {answer.headers["x-request-id"] for answer in answers} == {"the-same"}
    bodies = [json.loads(answer.body) for answer in answers]
    assert len({body["id"] for body in bodies}) == len(prompts)
    for prompt, body in zip(prompts, bodies, strict=True):
        assert body["choices"][0]["text"].startswith(prompt)


@pytest.fixture(scope="module")
def tool_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The same for a model that takes tools."""
    path = tmp_path_factory.mktemp("model") / "tools.gguf"
    with live_server(write_chat_model(path, template=HERMES)) as server:
        client = Client(server)
        before = client.sound()
        yield client
        assert client.sound() == before


def function(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def nested_schema(depth: int) -> dict[str, Any]:
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        nested = {"type": "object", "properties": {"a": nested}}
    return nested


def properties(**each: Any) -> dict[str, Any]:
    return {"type": "object", "properties": each, "required": list(each)}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ("x", "tools"),
        ([None], "tools[0]"),
        ([function()] * 2, "tools[1].function.name"),
        ([function(f"f{number}") for number in range(3000)], "tools"),
        ([function("f" * MEGABYTE)], "tools[0].function.name"),
        ([function('f"}\n')], "tools[0].function.name"),
        ([function(description="x" * MEGABYTE)], "prompt"),
        ([function(evil=1)], "tools[0].function.evil"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([function(parameters="x")], "tools[0].function.parameters"),
        ([function(parameters={"type": "array"})], "tools[0].function.parameters.type"),
        ([function(parameters=nested_schema(60))], "tools[0]"),
        ([function(parameters=CYCLE)], "tools"),
        ([function(parameters={"$ref": "#"})], "tools"),
        ([function(parameters={"$ref": "http://127.0.0.1:1/schema"})], "tools"),
        ([function(parameters=properties(a={"type": "array", "minItems": HUGE}))], "tools"),
        ([function(parameters=properties(a={"type": "string", "pattern": "("}))], "tools"),
        (
            [function(parameters=properties(**{f"p{number}": {} for number in range(5000)}))],
            "tools[0].function.parameters",
        ),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools(tool_client: Client, tools: Any, param: str, choice: str) -> None:
    check_refused(tool_client.chat("hi", tools=tools, tool_choice=choice), param)


@pytest.mark.parametrize("choice", [5, "x", {}, {"type": "function"}, {"type": "function", "function": {"name": "g"}}])
def test_tool_choices(tool_client: Client, choice: Any) -> None:
    answer = tool_client.chat("hi", tools=[function()], tool_choice=choice)
    check_refused(answer, answer.error["param"], "tool_choice")


@pytest.mark.parametrize(
    "arguments", ["{", "[]", 5, "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"a": 1' + "0" * 5000 + "}"]
)
def test_arguments_of_calls(tool_client: Client, arguments: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "x"},
    ]
    answer = tool_client.send(CHAT, {"model": "tiny", "messages": messages})
    check_refused(answer, answer.error["param"], "messages[1].tool_calls")


@pytest.mark.parametrize(
    "template", ["{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**9 }}", "{{ messages.x.y }"]
)
def test_a_model_with_a_hostile_template(tmp_path: Path, template: str) -> None:
    with live_server(write_chat_model(tmp_path / "tiny.gguf", template=template)) as server:
        client = Client(server)
        before = client.sound()
        answer = client.chat("hi")
        assert (answer.status, answer.error["code"]) == (422, "model_file_invalid")
        assert client.sound() == before

"""Chat templates of every kind that the chat package knows, written for tests, and tokenizers that have them."""

from __future__ import annotations

from functools import cache

from pellucid.tokenizer import Tokenizer
from pellucid.tokenizer.vocabulary import TokenType
from tests.support.tokenizers import byte_level_metadata

_OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"

PLAIN = "{% for message in messages %}" + _TURN + "{% endfor %}" + _OPENING
"""Knows nothing of tools."""

SMOLLM = "{# SmolLM #}" + PLAIN

HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}"
    "{% for call in message.tool_calls %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}" + _OPENING
)

TEXT_ARGUMENTS = HERMES.replace("call.function.arguments | tojson", "'' + call.function.arguments")
"""Takes the arguments of a call as text."""

OTHER_CALLS = (
    HERMES.replace('{"name": "', "<function=").replace('", "arguments": ', ">").replace("tojson }}}", "tojson }}")
)
"""Writes calls in a form that is not known."""

XML_TOOLS = HERMES.replace("tools %}", "xml_tools %}").replace("in tools", "in xml_tools")

LLAMA = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.tool_calls %}"
    "{% if message.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '<|im_start|>assistant\n{"name": "{{ message.tool_calls[0].function.name }}", '
    '"parameters": {{ message.tool_calls[0].function.arguments | tojson }}}<|im_end|>\n'
    "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _OPENING
)

MISTRAL = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ message.content }}[/INST]"
    "{% elif message.tool_calls %}[TOOL_CALLS] ["
    "{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}"
    '{{ call.function | tojson }}, "id": "{{ call.id }}"{{ "" if loop.last else ", " }}'
    "{% endfor %}]"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS] {{ message.tool_call_id }} {{ message.content }}[/TOOL_RESULTS]"
    "{% else %} {{ message.content }}{% endif %}"
    "{% endfor %}"
)

MISTRAL_ARGS = (
    MISTRAL.replace("[TOOL_CALLS] [", "")
    .replace("{% endfor %}]", "{% endfor %}")
    .replace(
        '{{ call.function | tojson }}, "id": "{{ call.id }}"{{ "" if loop.last else ", " }}',
        "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}",
    )
)

MISTRAL_CALL_ID = MISTRAL_ARGS.replace("[ARGS]", "[CALL_ID]{{ call.id }}[ARGS]")

THINKING = HERMES + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
"""The answer may begin with `<think>`, unless `enable_thinking` is false."""

ALWAYS_THINKING = PLAIN + "{% if add_generation_prompt %}<think>\n{% endif %}"
"""The prompt ends with `<think>`."""


@cache
def chat_tokenizer(template: str | None, *special: str, plain: tuple[str, ...] = ()) -> Tokenizer:
    """A byte-level tokenizer with more special tokens, and with `plain` tokens that are not special."""
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *special, *plain]
    metadata["tokenizer.ggml.token_type"] = [
        *metadata["tokenizer.ggml.token_type"],
        *[TokenType.CONTROL] * len(special),
        *[TokenType.USER_DEFINED] * len(plain),
    ]
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return Tokenizer.from_gguf(metadata)

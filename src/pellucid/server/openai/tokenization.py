"""`/tokenize` and `/detokenize`, as vLLM has them: what texts and conversations are to the model, and back.
(https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import check_boolean, refusal
from pellucid.server.chat.tools import parse_chat_turn, render_chat
from pellucid.server.http.replies import join_object, json_bytes, long_list, long_string
from pellucid.server.json_fields import Neutral, required
from pellucid.server.openai.fields import check_names, model_name, without_nulls
from pellucid.server.openai.inputs import check_vocabulary
from pellucid.server.served_model import ServedModel
from pellucid.tokenizer.chat_template import check_template_kwargs

_OF_A_PROMPT = frozenset(("prompt", "add_special_tokens", "parse_special"))
_OF_A_CONVERSATION = frozenset(("messages", "tools", "add_generation_prompt", "chat_template_kwargs"))
NEUTRAL: Neutral = {
    "chat_template": (),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
}
"""Parameters of vLLM that are not supported, with the values that ask for nothing."""


def tokenize(body: Mapping[str, Any], model: ServedModel) -> bytes:
    """What answers `POST /tokenize`, as JSON. A text may have more tokens than the context holds.

    Raises:
        InvalidRequestError: `param` names what cannot be served; the chat template refuses the messages.
        ModelNotFoundError: it asks for another model.
        ModelFileError: the model's chat template is faulty.
    """
    body = without_nulls(body)
    own, others = (_OF_A_CONVERSATION, _OF_A_PROMPT) if "messages" in body else (_OF_A_PROMPT, _OF_A_CONVERSATION)
    for name in sorted(others & body.keys()):
        raise InvalidRequestError(
            f"{name} does not go with {'messages' if 'messages' in own else 'prompt'}", param=name
        )
    check_names(body, {"model", "return_token_strs", *own}, NEUTRAL)
    model_name(body, model)
    wants_strings = check_boolean("return_token_strs", body.get("return_token_strs", False))
    token_ids = _of_conversation(body, model) if "messages" in body else _of_prompt(body, model)
    strings = [model.tokenizer.id_to_token(token_id) for token_id in token_ids] if wants_strings else None
    return join_object(
        {
            "count": json_bytes(len(token_ids)),
            "max_model_len": json_bytes(model.max_model_len),
            "tokens": long_list(token_ids),
            "token_strs": json_bytes(None) if strings is None else long_list(strings),
        }
    )


def detokenize(body: Mapping[str, Any], model: ServedModel) -> bytes:
    """What answers `POST /detokenize`, as JSON.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
        ModelNotFoundError: it asks for another model.
    """
    body = without_nulls(body)
    check_names(body, {"model", "tokens", "skip_special_tokens"})
    model_name(body, model)
    skip = check_boolean("skip_special_tokens", body.get("skip_special_tokens", False))
    tokens = required("", body, "tokens")
    if not isinstance(tokens, list):
        raise refusal("tokens", tokens, "a list of token ids")
    check_vocabulary("tokens", tokens, model)
    return join_object({"prompt": long_string(model.tokenizer.decode(tokens, skip_special_tokens=skip))})


def _of_prompt(body: Mapping[str, Any], model: ServedModel) -> list[int]:
    prompt = required("", body, "prompt")
    if not isinstance(prompt, str):
        raise refusal("prompt", prompt, "a string")
    flags = {"add_special_tokens": True, "parse_special": False}
    return model.tokenizer.encode(
        prompt, **{name: check_boolean(name, body.get(name, default)) for name, default in flags.items()}
    )


def _of_conversation(body: Mapping[str, Any], model: ServedModel) -> list[int]:
    opens_turn = check_boolean("add_generation_prompt", body.get("add_generation_prompt", True))
    template_kwargs = body.get("chat_template_kwargs", {})
    if not isinstance(template_kwargs, dict):
        raise refusal("chat_template_kwargs", template_kwargs, "an object")
    check_template_kwargs(template_kwargs)
    turn = parse_chat_turn(body.get("tools"), None, None, model.chat_format)
    token_ids, _ = render_chat(body["messages"], turn, model, add_generation_prompt=opens_turn, **template_kwargs)
    return token_ids

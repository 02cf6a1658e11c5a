"""What the document says of `/v1/embeddings`, `/v1/score`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import get_args

from pellucid.core.errors import ContextLengthError, EngineClosedError, ModelFileError, QueueFullError
from pellucid.core.pooling_params import MAX_LABELS, Pooling
from pellucid.server.errors import DeadlineError
from pellucid.server.openai.embeddings import NEUTRAL as NEUTRAL_OF_EMBEDDINGS
from pellucid.server.openai.embeddings import POOLING_FIELDS
from pellucid.server.openai.fields import LABELS
from pellucid.server.openai.inputs import MAX_INPUTS
from pellucid.server.openai.score import LABEL_FIELDS
from pellucid.server.openai.score import NEUTRAL as NEUTRAL_OF_SCORE
from pellucid.server.openai.tokenization import NEUTRAL as NEUTRAL_OF_TOKENIZE
from pellucid.server.openapi.fields import (
    MODEL,
    extension_properties,
    label_properties,
    neutral_properties,
    tools_property,
)
from pellucid.server.openapi.operation import JSON, OF_THE_MODEL, Operation
from pellucid.server.openapi.sampling import TEXT
from pellucid.server.openapi.schema import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    STRING,
    TOKEN_ID,
    Schema,
    answer_object,
    any_of,
    array,
    const,
    described,
    enum,
    integer,
    nullable,
    ref,
    request_object,
)

_OF_POOLING = (*OF_THE_MODEL, ContextLengthError, QueueFullError, EngineClosedError, DeadlineError)


def _pooling_properties() -> dict[str, Schema]:
    pooling = described(enum(*get_args(Pooling)), "Of which hidden states the vector is made.")
    special = described(BOOLEAN, "Add the tokens that the model wants around a text.")
    own = {"model": MODEL, "pooling": {**pooling, "default": "mean"}, "add_special_tokens": special}
    properties = {**own, **extension_properties(("priority", "cache_salt"))}
    assert properties.keys() == POOLING_FIELDS
    return {**properties, **label_properties(LABELS)}


def _embeddings_request() -> Schema:
    one = any_of(TEXT, array(TOKEN_ID, least=1))
    inputs = any_of(*one["anyOf"], array(one, least=1, most=MAX_INPUTS))
    properties = {
        **neutral_properties(NEUTRAL_OF_EMBEDDINGS),
        **_pooling_properties(),
        "input": described(inputs, "Text, token ids, or several of these, each with a vector of its own."),
        "encoding_format": described(enum("float", "base64"), "base64: of little-endian float32."),
        "dimensions": described(integer(1, 2**31 - 1), "As many as the model's vectors have."),
        "normalize": described(BOOLEAN, "Scale vectors to length 1."),
    }
    return request_object(properties, ("input",))


def _score_request() -> Schema:
    texts = any_of(TEXT, array(TEXT, least=1, most=MAX_INPUTS))
    properties = {
        **neutral_properties(NEUTRAL_OF_SCORE),
        **_pooling_properties(),
        "text_1": described(texts, "One text for all of text_2, or as many."),
        "text_2": texts,
    }
    return any_of(request_object(properties, ("text_1", "text_2")), *_label_requests())


def _label_requests() -> tuple[Schema, Schema]:
    ids = array(TOKEN_ID)
    common = {
        **label_properties(LABELS),
        **extension_properties(("priority", "cache_salt")),
        "model": MODEL,
        "label_token_ids": described(array(TOKEN_ID, least=1, most=MAX_LABELS), "How probable these are to follow."),
        "apply_softmax": described(BOOLEAN, "Of the labels alone, so that their probabilities sum to 1."),
        "item_first": described(BOOLEAN, "Put each item before the query, and not after it."),
    }
    of_texts = {"query": TEXT, "items": any_of(TEXT, array(TEXT, least=1, most=MAX_INPUTS))}
    of_ids = {"query": ids, "items": any_of(array(TOKEN_ID, least=1), array(ids, least=1, most=MAX_INPUTS))}
    of_texts, of_ids = ({**common, **own} for own in (of_texts, of_ids))
    assert of_texts.keys() > LABEL_FIELDS
    required = ("query", "items", "label_token_ids")
    return request_object(of_texts, required), request_object(of_ids, required)


def _tokenize_request() -> Schema:
    common = {
        **neutral_properties(NEUTRAL_OF_TOKENIZE),
        **label_properties(LABELS),
        "model": MODEL,
        "return_token_strs": described(BOOLEAN, "Tell the tokens' text too."),
    }
    of_prompt = {
        "prompt": STRING,
        "add_special_tokens": described(BOOLEAN, "Add the tokens that the model wants around a text."),
        "parse_special": described(BOOLEAN, "Read special tokens that the text spells out."),
    }
    of_conversation = {
        "messages": array(ref("ChatMessage"), least=1),
        "tools": tools_property(),
        "add_generation_prompt": described(BOOLEAN, "End with the opening of an assistant's turn."),
        **extension_properties(("chat_template_kwargs",)),
    }
    return any_of(
        request_object({**common, **of_prompt}, ("prompt",)),
        request_object({**common, **of_conversation}, ("messages",)),
    )


def schemas() -> dict[str, Schema]:
    """The components that these routes need, by name."""
    usage = answer_object({"prompt_tokens": INTEGER, "total_tokens": INTEGER})
    vector = any_of(array(NUMBER), described(STRING, "base64"))
    embedding = answer_object({"object": const("embedding"), "index": INTEGER, "embedding": vector})
    score = answer_object({"index": INTEGER, "object": const("score"), "score": NUMBER})
    detokenize = {
        **label_properties(LABELS),
        "model": MODEL,
        "tokens": array(TOKEN_ID),
        "skip_special_tokens": described(BOOLEAN, "Leave control tokens out of the text."),
    }
    return {
        "EmbeddingsRequest": _embeddings_request(),
        "Embeddings": answer_object(
            {"object": const("list"), "data": array(embedding), "model": STRING, "usage": usage}
        ),
        "ScoreRequest": _score_request(),
        "Scores": answer_object(
            {
                "id": STRING,
                "object": const("list"),
                "created": described(INTEGER, "Seconds since 1970."),
                "model": STRING,
                "data": array(score),
                "usage": usage,
            }
        ),
        "LabelScores": answer_object(
            {"object": const("scoring"), "model": STRING, "scores": array(array(NUMBER)), "usage": usage}
        ),
        "TokenizeRequest": _tokenize_request(),
        "Tokens": answer_object(
            {
                "count": INTEGER,
                "max_model_len": INTEGER,
                "tokens": array(INTEGER),
                "token_strs": nullable(array(STRING)),
            }
        ),
        "DetokenizeRequest": request_object(detokenize, ("tokens",)),
        "Text": answer_object({"prompt": STRING}),
    }


OPERATIONS = {
    ("post", "/v1/embeddings"): Operation(
        tag="OpenAI",
        summary="A vector for each input, of the model's hidden states",
        body=ref("EmbeddingsRequest"),
        example={"input": ["The cat sat.", "A dog ran."]},
        answer={JSON: ref("Embeddings")},
        errors=_OF_POOLING,
    ),
    ("post", "/v1/score"): Operation(
        tag="vLLM",
        summary="How alike texts are; or, as in SGLang, how probable labels are after items",
        body=ref("ScoreRequest"),
        example={"text_1": "The cat sat.", "text_2": ["A cat was sitting.", "It rains."]},
        answer={JSON: any_of(ref("Scores"), ref("LabelScores"))},
        errors=_OF_POOLING,
    ),
    ("post", "/tokenize"): Operation(
        tag="vLLM",
        summary="What a text or a conversation is to the model",
        body=ref("TokenizeRequest"),
        example={"prompt": "Hello there"},
        answer={JSON: ref("Tokens")},
        errors=(*OF_THE_MODEL, ModelFileError),
    ),
    ("post", "/detokenize"): Operation(
        tag="vLLM",
        summary="And back",
        body=ref("DetokenizeRequest"),
        example={"tokens": [1, 2, 3]},
        answer={JSON: ref("Text")},
        errors=OF_THE_MODEL,
    ),
}

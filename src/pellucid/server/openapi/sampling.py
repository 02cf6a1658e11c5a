"""JSON schemas of what a request asks of the decoder, made of the tables that SamplingParams is checked with."""

from __future__ import annotations

from dataclasses import fields

from pellucid.core import sampling_params as tables
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.structured_outputs import MAX_CHOICES, StructuredOutputsParams
from pellucid.core.validation import INT32_MAX, RealRange
from pellucid.server.openai.response_format import GUIDED_FIELDS, JSON_SCHEMA_FIELDS
from pellucid.server.openapi.schema import (
    BOOLEAN,
    STRING,
    TOKEN_ID,
    Schema,
    any_of,
    array,
    attribute_descriptions,
    const,
    described,
    enum,
    integer,
    request_object,
)

TEXT: Schema = {"type": "string", "minLength": 1}


def real(reals: RealRange) -> Schema:
    """The numbers of a range."""
    return {"type": "number", "exclusiveMinimum" if reals.open else "minimum": reals.low, "maximum": reals.high}


def _strings(most: int) -> Schema:
    string: Schema = {"type": "string", "minLength": 1, "maxLength": tables.MAX_STOP_CHARACTERS}
    return any_of(string, array(string, most=most))


_OTHERS: dict[str, Schema] = {
    "temperature": any_of(
        const(0), {"type": "number", "minimum": tables.MIN_TEMPERATURE, "maximum": tables.MAX_TEMPERATURE}
    ),
    "top_k": integer(-1, INT32_MAX),
    "allowed_token_ids": array(TOKEN_ID, least=1, most=tables.TOKEN_IDS["allowed_token_ids"]),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": tables.MAX_LOGIT_BIASES,
    },
    "logprobs_mode": enum("raw", "processed"),
    "early_stopping": enum(True, False, "never"),
    "dola_layers": any_of(enum("low", "high"), array(integer(0, INT32_MAX), least=1, most=tables.MAX_DOLA_LAYERS)),
    "negative_prompt": any_of(STRING, array(TOKEN_ID, most=tables.MAX_LISTED_TOKEN_IDS)),
}

TABLES: dict[str, Schema] = {
    **{name: real(reals) for name, reals in tables.REALS.items()},
    **{name: integer(*limits) for name, limits in tables.INTEGERS.items()},
    **{name: integer(*limits) for name, limits in tables.OPTIONAL_INTEGERS.items()},
    **dict.fromkeys(tables.BOOLEANS, BOOLEAN),
    **{name: _strings(most) for name, most in tables.STRINGS.items()},
    **{name: array(TOKEN_ID, most=most) for name, most in tables.TOKEN_IDS.items()},
    **_OTHERS,
}


def sampling_properties() -> dict[str, Schema]:
    """A schema for each field of SamplingParams that a body can hold, with its description and its default."""
    descriptions = attribute_descriptions(SamplingParams)
    properties = {}
    for field in fields(SamplingParams):
        if field.name in TABLES:
            schema = described(TABLES[field.name], descriptions.get(field.name, ""))
            if isinstance(field.default, bool | int | float | str):
                schema = {**schema, "default": field.default}
            properties[field.name] = schema
    return properties


JSON_SCHEMA: Schema = any_of({"type": "object"}, TEXT, const(True))
_STRUCTURED: dict[str, Schema] = {
    "json": JSON_SCHEMA,
    "json_object": BOOLEAN,
    "regex": TEXT,
    "choice": array(TEXT, least=1, most=MAX_CHOICES),
    "grammar": TEXT,
    "structural_tag": any_of({"type": "object"}, TEXT),
    "whitespace_pattern": TEXT,
}


def structured_properties() -> dict[str, Schema]:
    """What a body may say of the form of its answer."""
    descriptions = attribute_descriptions(StructuredOutputsParams)
    structured = {name: described(schema, descriptions.get(name, "")) for name, schema in _STRUCTURED.items()}
    return {
        "response_format": described(_response_format(), "What the answer must look like."),
        "structured_outputs": described(request_object(structured), "The same in the form of vLLM: exactly one kind."),
        **{
            guided: described(structured[name], f"As structured_outputs.{name}.")
            for guided, name in GUIDED_FIELDS.items()
        },
    }


def _response_format() -> Schema:
    fields_of_schema = {
        "name": STRING,
        "description": STRING,
        "schema": {"type": "object"},
        "strict": BOOLEAN,
    }
    assert fields_of_schema.keys() == JSON_SCHEMA_FIELDS
    described_schema = request_object(fields_of_schema, ("name", "schema"))
    return any_of(
        request_object({"type": enum("text", "json_object")}, ("type",)),
        request_object({"type": const("json_schema"), "json_schema": described_schema}, ("type", "json_schema")),
    )

"""Fields that the bodies of several routes have."""

from __future__ import annotations

import json
from collections.abc import Iterable

from pellucid.core.validation import INT32_MAX
from pellucid.server.chat.tool_request import MAX_TOOLS, NAME_PATTERN
from pellucid.server.json_fields import Neutral
from pellucid.server.openai.fields import CACHE_OPTIONS, MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE
from pellucid.server.openapi.sampling import sampling_properties, structured_properties
from pellucid.server.openapi.schema import (
    BOOLEAN,
    STRING,
    Schema,
    array,
    const,
    described,
    enum,
    integer,
    nullable,
    request_object,
)
from pellucid.tokenizer.chat_template import TEMPLATE_KWARGS

METADATA: Schema = {
    "type": "object",
    "maxProperties": MAX_METADATA,
    "propertyNames": {"maxLength": MAX_METADATA_KEY},
    "additionalProperties": nullable({"type": "string", "maxLength": MAX_METADATA_VALUE}),
}
CACHE_CONTROL = described(
    request_object({"type": const("ephemeral"), "ttl": enum("5m", "1h")}, ("type",)),
    "Asks for nothing: prefixes are cached and found without being told.",
)
CACHE_OPTIONS_PROPERTY = described(
    request_object({name: enum(*values) for name, values in CACHE_OPTIONS.items()}),
    "Asks for nothing: prefixes are cached and found without being told.",
)
MODEL = described(STRING, "A name of the model that is served, as `/v1/models` lists it.")


def neutral_properties(table: Neutral) -> dict[str, Schema]:
    """Fields that are not supported, with the values that ask for nothing."""
    text = "Not supported: {} is taken, for clients that send it."
    return {
        name: described(
            enum(*values, None), text.format(" or ".join(map(json.dumps, values)) if values else "null alone")
        )
        for name, values in table.items()
    }


def label_properties(names: Iterable[str]) -> dict[str, Schema]:
    """Strings that name the caller."""
    return dict.fromkeys(names, described(STRING, "Names the caller; no answer depends on it."))


def extension_properties(names: Iterable[str]) -> dict[str, Schema]:
    """What a body may have beyond the API that it is of, by name."""
    template_kwargs: Schema = {
        "type": "object",
        "properties": {name: {} for name in sorted(TEMPLATE_KWARGS)},
        "additionalProperties": False,
    }
    properties = {
        **sampling_properties(),
        **structured_properties(),
        "priority": described(integer(-INT32_MAX, INT32_MAX), "Lower runs first."),
        "cache_salt": described(STRING, "Cached prefixes are shared only between requests of the same salt."),
        "chat_template_kwargs": described(template_kwargs, "Switches that the model's chat template reads."),
    }
    return {name: properties[name] for name in names}


def tools_property() -> Schema:
    """The field `tools` of OpenAI's chat completions."""
    name = {"type": "string", "pattern": NAME_PATTERN}
    parameters = described({"type": "object"}, "A JSON schema of the arguments.")
    function = {"name": name, "description": STRING, "parameters": parameters, "strict": BOOLEAN}
    tool = {"type": const("function"), "function": request_object(function, ("name",))}
    return described(array(request_object(tool, tool), most=MAX_TOOLS), "What the model may call.")

"""The input file of a batch: one JSON object a line, each a request of the OpenAI Batch API.

(https://platform.openai.com/docs/api-reference/batch)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any, BinaryIO

from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import shown
from pellucid.server.strict_json import decode_json

MAX_LINE_BYTES = 2**24
MAX_PROBLEMS_SHOWN = 10
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request, not yet looked into.

    Attributes:
        index: counts requests from 0.
        number: the line's number in the file, from 1.
        custom_id: by which the caller knows it; no other line has it.
        fields: the line's object.
    """

    index: int
    number: int
    custom_id: str
    fields: dict[str, Any]


class BatchInput:
    """An input file whose every line is known to be a request with a custom_id of its own.

    Blank lines, a byte order mark and CRLF are as good as none. What is in a request is not looked into.

    Args:
        file: opened for reading, seekable.
        name: what to call it in messages.

    Attributes:
        num_requests: how many there are.
        sha256: of the whole file, in hexadecimal.

    Raises:
        InvalidRequestError: it is not such a file; the message lists the lines at fault.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.num_requests = 0
        problems: list[str] = []
        num_problems = 0
        digest = sha256()
        number_of: dict[bytes, int] = {}
        for number, data in self._raw_lines(digest):
            try:
                custom_id, _ = _parse(data)
                first = number_of.setdefault(blake2b(custom_id.encode(), digest_size=16).digest(), number)
                if first != number:
                    raise ValueError(f"custom_id {shown(custom_id)} is that of line {first} too")
            except ValueError as error:
                num_problems += 1
                if len(problems) < MAX_PROBLEMS_SHOWN:
                    problems.append(f"  line {number}: {error}")
            else:
                self.num_requests += 1
        if num_problems > len(problems):
            problems.append(f"  and {num_problems - len(problems)} more")
        if problems:
            raise InvalidRequestError(
                "\n".join([f"{name} is not a batch file; nothing was computed:", *problems]), param="input"
            )
        if not self.num_requests:
            raise InvalidRequestError(f"{name} has no request: give one JSON object a line", param="input")
        self.sha256 = digest.hexdigest()

    def lines(self) -> Iterator[BatchLine]:
        """The requests, in order, read from the file as they are asked for.

        Raises:
            InvalidRequestError: the file is not what it was.
        """
        digest = sha256()
        for index, (number, data) in enumerate(self._raw_lines(digest)):
            try:
                custom_id, fields = _parse(data)
            except ValueError:
                raise self._changed() from None
            yield BatchLine(index, number, custom_id, fields)
        if digest.hexdigest() != self.sha256:
            raise self._changed()

    def _raw_lines(self, digest: Any) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, with their numbers; one that is too long is cut."""
        self._file.seek(0)
        number = 0
        while data := self._file.readline(MAX_LINE_BYTES + 1):
            digest.update(data)
            line = data
            while len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
                data = self._file.readline(MAX_LINE_BYTES + 1)
                digest.update(data)
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, line

    def _changed(self) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self._name} was changed while it was read: leave it as it is until the run is done", param="input"
        )


def _parse(data: bytes) -> tuple[str, dict[str, Any]]:
    """A line's custom_id and its object. ValueError (an InvalidRequestError among them) says what is wrong."""
    if len(data) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    fields = decode_json(data, "the line", any_characters=True)
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object is expected, not {shown(fields)}")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        found = "it is missing" if custom_id is None else f"not {shown(custom_id)}"
        raise ValueError(f"custom_id must be a string that is not empty; {found}")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise ValueError("custom_id holds a lone surrogate, which is not valid Unicode text") from None
    return custom_id, fields

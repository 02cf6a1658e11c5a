"""A batch: the requests of a file through one LLM, each answered exactly once.

The formats are those of the OpenAI Batch API (https://platform.openai.com/docs/api-reference/batch).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from pellucid.core.errors import BackendError, InvalidRequestError, ModelFileError, ModelNotFoundError, PellucidError
from pellucid.core.outputs import RequestOutput
from pellucid.core.sampling_params import SamplingParams
from pellucid.core.validation import shown
from pellucid.engine.llm import LLM
from pellucid.engine.offline import OfflineRun, Request
from pellucid.engine.progress import GenerateProgress
from pellucid.server.batch.batch_input import BatchInput, BatchLine
from pellucid.server.batch.batch_output import BatchOutput, Identity
from pellucid.server.openai.requests import ENDPOINTS, GenerationRequest
from pellucid.server.openai.responses import error_body, response_body
from pellucid.server.served_model import ServedModel

LINE_FIELDS = frozenset(("custom_id", "method", "url", "body"))


@dataclass(slots=True)
class Pending:
    """A line whose prompts are with the engine.

    Attributes:
        outputs: one for each prompt that has ended, by its place among the line's prompts.
    """

    line: BatchLine
    request: GenerationRequest
    outputs: dict[int, RequestOutput]


class Batch:
    """What is to be done, and where the answers go.

    A line that cannot be served is answered with an error, as is one that fails; the others go on. Lines are answered
    as they finish, the later ones before the earlier ones where they are shorter.

    Args:
        batch_input: the requests.
        output: where the answers go; what it has already is not done again.
        identity: names the answers.
        served_model_names: what a request may call the model.
        seed: from which a request without a seed draws its own, by its custom_id: wherever it stands in the file, and
            whether the run was interrupted or not, it draws the same.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        llm: LLM,
        batch_input: BatchInput,
        output: BatchOutput,
        identity: Identity,
        *,
        served_model_names: Sequence[str],
        seed: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._llm = llm
        self._input = batch_input
        self._output = output
        self._identity = identity
        self._model = ServedModel.of(llm, served_model_names)
        self._seed = seed
        self._clock = clock
        self._pending: dict[int, tuple[Pending, int]] = {}

    def run(self, progress: GenerateProgress) -> None:
        """Answer every request that has no answer yet. Whatever it raises, what was answered stays answered.

        Raises:
            InvalidRequestError: the input file was changed meanwhile.
            StorageError: an answer could not be written.
            BackendError: the LLM was closed.
        """
        with progress, OfflineRun(self._llm.shared_engine, self._requests(progress), progress) as run:
            for number, reply in run:
                pending, place = self._pending.pop(number)
                pending.outputs[place] = reply
                if len(pending.outputs) == len(pending.request.prompts):
                    self._answer(pending.line, *self._response(pending))
                    progress.advance()

    def _requests(self, progress: GenerateProgress) -> Iterator[Request]:
        """The prompts of every line that is yet to be answered; lines that are refused are answered on the way."""
        number = 0
        for line in self._input.lines():
            if self._output.is_done(line.index):
                continue
            try:
                request = parse_line(line, self._model)
            except (InvalidRequestError, ModelNotFoundError, ModelFileError) as error:
                self._answer(line, *_failure(error))
                progress.advance()
                continue
            pending = Pending(line, request, {})
            for place, prompt in enumerate(request.prompts):
                self._pending[number] = pending, place
                number += 1
                yield prompt, self._params(line, request.sampling_params, place)

    def _params(self, line: BatchLine, params: SamplingParams, place: int) -> SamplingParams:
        if params.seed is not None:
            return params
        numbers = self._seed.to_bytes(8, "little") + place.to_bytes(8, "little")
        digest = sha256(b"pellucid batch seed\0" + numbers + line.custom_id.encode()).digest()
        return replace(params, seed=int.from_bytes(digest[:8], "little"))

    def _response(self, pending: Pending) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        request = pending.request
        outputs = [pending.outputs[place] for place in range(len(request.prompts))]
        for place, output in enumerate(outputs):
            if output.error is not None:
                where = f"prompt {place} of {len(outputs)}: " if len(outputs) > 1 else ""
                return _failure(request.chat.blamed(output.error), where)
            if any(each.finish_reason == "abort" for each in output.outputs):
                raise BackendError("this LLM is closed")
        return 200, response_body(
            request,
            outputs,
            self._llm.tokenizer,
            name=self._identity.name(pending.line.index),
            created=int(self._clock()),
            tells_cached=False,
        )

    def _answer(self, line: BatchLine, status: int, body: dict[str, Any]) -> None:
        response = {"status_code": status, "request_id": f"req_{self._identity.name(line.index)}", "body": body}
        answer_id = self._identity.answer_id(line.index)
        self._output.write(
            line.index, {"id": answer_id, "custom_id": line.custom_id, "response": response, "error": None}
        )


def parse_line(line: BatchLine, model: ServedModel) -> GenerationRequest:
    """What a line asks for.

    Raises:
        InvalidRequestError: `param` names what cannot be served.
        ModelNotFoundError: it asks for another model.
        ModelFileError: the model's chat template is faulty.
    """
    fields = line.fields
    for name in fields:
        if name not in LINE_FIELDS:
            raise InvalidRequestError(f"{shown(name)} is not a field of a batch request", param=name)
    method, url, body = fields.get("method"), fields.get("url"), fields.get("body")
    if method != "POST":
        raise InvalidRequestError(f'method must be "POST", not {shown(method)}', param="method")
    parse = ENDPOINTS.get(url) if isinstance(url, str) else None
    if parse is None:
        raise InvalidRequestError(f"url must be one of {', '.join(ENDPOINTS)}, not {shown(url)}", param="url")
    if not isinstance(body, dict):
        raise InvalidRequestError(f"body must be an object, not {shown(body)}", param="body")
    request = parse(body, model)
    for name in ("stream", "priority", "cache_salt"):
        if getattr(request, name):
            raise InvalidRequestError(f"{name} has no meaning in a batch: leave it out", param=name)
    return request


def _failure(error: PellucidError, where: str = "") -> tuple[int, dict[str, Any]]:
    body = error_body(error)
    body["error"]["message"] = where + error.message
    return error.status, body

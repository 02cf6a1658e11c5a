"""What `LLM.stream` gives: the tokens of one request."""

from __future__ import annotations

from pellucid.core.closing import Closing
from pellucid.core.outputs import RequestOutput, TokenOutput
from pellucid.engine.shared_engine import Inbox, SharedEngine


class TokenStream(Closing):
    """The tokens of one streamed request, as an iterator and a context manager. Closing it, or letting go of it, aborts
    the request.

    Attributes:
        request_id: the request's name within the engine.
        request_output: the whole answer, once the last token has been read or the stream closed; None before.
    """

    def __init__(self, engine: SharedEngine, request_id: str, inbox: Inbox) -> None:
        self.request_id = request_id
        self.request_output: RequestOutput | None = None
        self._engine = engine
        self._inbox = inbox
        self._finished = False

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenOutput:
        """Raises PellucidError if the request failed, StopIteration after its last token."""
        if self._finished:
            raise StopIteration
        while not self._inbox:
            self._engine.step_for(self._inbox)
        token = self._take()
        if self._finished and self.request_output is not None and self.request_output.error is not None:
            raise self.request_output.error
        return token

    def close(self) -> None:
        """Abort the request, if it is not finished; what it had answered is in `request_output`."""
        if not self._finished:
            with self._engine.exclusive(closing=True):
                self._engine.abort(self.request_id)
            while not self._finished and self._inbox:
                self._take()
            self._finished = True

    def _take(self) -> TokenOutput:
        token = self._inbox.popleft()
        assert isinstance(token, TokenOutput)
        if token.request_output is not None:
            self.request_output = token.request_output
            self._finished = True
        return token

    def __del__(self) -> None:
        if not self._finished:
            self._engine.drop([self.request_id])

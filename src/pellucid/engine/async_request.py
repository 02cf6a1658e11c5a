"""A request of the AsyncEngine, on its way between an event loop and the engine thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from pellucid.core.capture import CaptureParams
from pellucid.core.errors import PellucidError
from pellucid.core.outputs import RequestOutput, TokenOutput
from pellucid.engine.request_intake import Message, PromptLike, RequestParams

if TYPE_CHECKING:
    from pellucid.engine.async_engine import AsyncEngine

Item: TypeAlias = TokenOutput | RequestOutput | PellucidError


class AsyncRequest:
    """What the two sides know of a request. Each attribute is written by one side only.

    Written by the event loop:
        loop: whose request it is; None before it was begun.
        arrival_time: when it was begun, in seconds on the engine's clock.
        num_read: items taken.
        offer: takes a token that comes while one is waited for, instead of the queue; or does not, and says so.
        resume_asked: whether the engine thread was told that a paused request has been read; it takes that back.
        is_dropped: nobody reads it any more.

    Written by the engine thread:
        is_added: whether the engine knows it.
        is_aborted: whether it is to be aborted as soon as the engine knows it.
        is_paused: whether it is left out of steps until more of it was read.
        num_sent: items handed over.
    """

    __slots__ = (
        "_items",
        "_num_wanted",
        "_waiter",
        "arrival_time",
        "cache_salt",
        "capture",
        "is_aborted",
        "is_added",
        "is_dropped",
        "is_paused",
        "loop",
        "num_read",
        "num_sent",
        "offer",
        "params",
        "priority",
        "request_id",
        "resume_asked",
        "stream",
    )

    def __init__(
        self,
        request_id: str,
        params: RequestParams,
        priority: int,
        cache_salt: str,
        capture: CaptureParams | None,
        *,
        stream: bool,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.priority = priority
        self.cache_salt = cache_salt
        self.capture = capture
        self.stream = stream
        self.loop: asyncio.AbstractEventLoop | None = None
        self.arrival_time = 0.0
        self.num_read = 0
        self.offer: Callable[[TokenOutput], bool] | None = None
        self.resume_asked = False
        self.is_dropped = False
        self.is_added = False
        self.is_aborted = False
        self.is_paused = False
        self.num_sent = 0
        self._items: deque[Item] = deque()
        self._num_wanted = 1
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_unread(self) -> int:
        """Items handed over and not taken yet, those on their way to the loop included."""
        return self.num_sent - self.num_read

    def receive(self, item: Item, *, is_alone: bool) -> None:
        """In the loop: an item has come, the only one for now or one of several."""
        waiter = self._waiter if self._waiter is not None and not self._waiter.done() else None
        if is_alone and waiter is not None and self.offer is not None and not self._items and _is_inner(item):
            try:
                if self.offer(item):
                    self.num_read += 1
                    return
            except Exception as error:  # the reader's own
                waiter.set_exception(error)
                return
        self._items.append(item)
        if waiter is not None and self._is_enough():
            waiter.set_result(None)

    def hang_up(self) -> None:
        """In the loop: whoever waits for an item is told that none will come."""
        self.is_dropped = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self, num_wanted: int = 1) -> Item | None:
        """In the loop: the next item, once `num_wanted` or the last one are there; None if the request was dropped."""
        self._num_wanted = num_wanted
        while not self._is_enough():
            if self.is_dropped:
                return None
            if self._waiter is not None:
                raise RuntimeError(f"two readers wait for request {self.request_id!r} at once")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._pop()

    def take_ready(self) -> TokenOutput | None:
        """In the loop: the next item, if it is there and no failure."""
        item = self._items[0] if self._items else None
        if not isinstance(item, TokenOutput) or (item.request_output is not None and item.request_output.error):
            return None
        self._pop()
        return item

    def _is_enough(self) -> bool:
        if len(self._items) >= self._num_wanted or not self._items:
            return bool(self._items)
        last = self._items[-1]
        return not _is_inner(last)

    def _pop(self) -> Item:
        self.num_read += 1
        return self._items.popleft()


def _is_inner(item: Item) -> TypeGuard[TokenOutput]:
    """Whether it is a token with others to come."""
    return isinstance(item, TokenOutput) and item.request_output is None


class AsyncTokenStream:
    """The tokens of one request, as an async iterator and an async context manager.

    The request is begun by `async with`, or with the first token that is asked for, and that is when what is wrong with
    its prompt is raised. Leaving the context, `aclose`, a cancelled wait, or letting go of the stream aborts it.

    Attributes:
        request_id: the request's name within the engine.
        request_output: the whole answer, once the last token has been read; None before.
    """

    def __init__(self, engine: AsyncEngine, request: AsyncRequest, prompt: PromptLike | ListLike[Message]) -> None:
        self.request_id = request.request_id
        self.request_output: RequestOutput | None = None
        self._engine = engine
        self._request = request
        self._prompt = prompt
        self._is_begun = False
        self._is_over = False

    def __aiter__(self) -> AsyncTokenStream:
        return self

    async def __anext__(self) -> TokenOutput:
        """Raises PellucidError if the request was refused or failed, StopAsyncIteration after its last token."""
        token = None if self._is_over else await self._next(1)
        if token is None:
            raise StopAsyncIteration
        return token

    async def read(self, num_wanted: int = 1) -> list[TokenOutput]:
        """All tokens that have come since the last call, once `num_wanted` or the last one are there: for whoever
        passes tokens on and may have fallen behind. Empty after the last one.

        Args:
            num_wanted: no more are waited for than the engine's `max_unread_tokens`, at which the request is paused.

        Raises:
            PellucidError: the request was refused or failed, and the tokens that came before that have been read.
        """
        if self._is_over:
            return []
        token = await self._next(min(num_wanted, self._engine._max_unread_tokens))
        tokens = [] if token is None else [token]
        while not self._is_over and (item := self._request.take_ready()) is not None:
            tokens.append(self._opened(item))
        return tokens

    def pass_on(self, take: Callable[[TokenOutput], bool]) -> None:
        """Offer each token that comes while it is waited for to `take`, in the loop and at once, for to wake the task
        that waits takes longer than most of what is done with a token. One that is taken will not be read; one that is
        not, several that come together, and the last one are read as ever. What `take` raises is raised to whoever
        waits. It must not refer to this stream, or letting go of that does not abort the request."""
        self._request.offer = take

    async def _next(self, num_wanted: int) -> TokenOutput | None:
        await self._begin()
        try:
            item = await self._request.take(num_wanted)
        except asyncio.CancelledError:
            self._drop()
            raise
        return None if item is None else self._opened(item)

    def _opened(self, item: Item) -> TokenOutput:
        if self._request.is_paused:
            self._engine._has_read(self._request)
        if isinstance(item, PellucidError):
            self._is_over = True
            raise item
        assert isinstance(item, TokenOutput)
        if item.request_output is not None:
            self._is_over = True
            self.request_output = item.request_output
            if item.request_output.error is not None:
                raise item.request_output.error
        return item

    async def aclose(self) -> None:
        """Abort the request, if it is not over. Does not wait for that to be done, at the latest after this step."""
        self._drop()
        self._request.hang_up()

    async def __aenter__(self) -> AsyncTokenStream:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._drop()

    async def _begin(self) -> None:
        if not self._is_begun:
            self._is_begun = True
            try:
                await self._engine._submit(self._request, self._prompt)
            except BaseException:
                self._is_over = True
                raise

    def _drop(self) -> None:
        if not self._is_over:
            self._is_over = True
            if self._is_begun:
                self._engine._drop(self._request)

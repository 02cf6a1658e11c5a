"""HTTP/1.1 over asyncio: one origin, connections kept alive, bodies streamed. h11 reads and writes the protocol.

No redirect is followed and no proxy is asked. A request is sent a second time in one case only: where it went out on a
kept connection that turns out to be closed, as servers may do between any two requests (RFC 9112, 9.5).
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import h11

from pellucid.client.errors import ConnectionFailedError, ConnectionLostError, ProtocolError, ServerTimeoutError
from pellucid.core.errors import InvalidRequestError
from pellucid.core.validation import RealRange, shown

Headers = Iterable[tuple[str, str]]

READ_BYTES = 65536
MAX_IDLE_SECONDS = 2.0
"""A connection that was idle for longer is not used again: servers close theirs after 5 seconds and more."""
MAX_HEADER_BYTES = 65536
SECONDS = RealRange(0, 86_400, open=True)
FRAMING_HEADERS = frozenset(("content-length", "transfer-encoding", "connection"))


class Origin:
    """Where requests go, out of a URL `http[s]://host[:port][/path]`.

    Attributes:
        host, port: to connect to.
        is_https: whether with TLS.
        path: what every request's path begins with, without a slash at its end.

    Raises:
        InvalidRequestError: `url` is something else.
    """

    def __init__(self, url: str) -> None:
        def refuse(reason: str) -> InvalidRequestError:
            return InvalidRequestError(f"{shown(url)} {reason}, such as http://127.0.0.1:8000", param="url")

        if not url.isascii() or any(character <= " " for character in url):
            raise refuse("is not a URL of ASCII characters without spaces")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise refuse(f"is not a URL ({error})") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise refuse("does not name a server: give http:// or https:// and a host")
        try:
            parts.hostname.encode("idna")
        except UnicodeError:
            raise refuse("names a host that no machine can have") from None
        if parts.username is not None or parts.query or parts.fragment:
            raise refuse("has more than a host, a port and a path (keys go into a header)")
        self.is_https = parts.scheme == "https"
        self.host = parts.hostname
        self.port = (443 if self.is_https else 80) if port is None else port
        self.path = parts.path.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = host if port is None else f"{host}:{port}"

    def __str__(self) -> str:
        return f"{'https' if self.is_https else 'http'}://{self.authority}"


class HttpClient:
    """Requests to one origin, any number at a time, each on a connection of its own.

    Args:
        url: where requests go; its path begins theirs.
        headers: sent with every request.
        connect_timeout, read_timeout: seconds until a connection stands; seconds without a byte from the server.

    Raises:
        InvalidRequestError: `url`, a header or a timeout cannot be used.
    """

    def __init__(
        self, url: str, *, headers: Headers = (), connect_timeout: float = 10.0, read_timeout: float = 600.0
    ) -> None:
        self.origin = Origin(url)
        self._connect_timeout = SECONDS.check("timeout", connect_timeout)
        self._read_timeout = SECONDS.check("timeout", read_timeout)
        self._headers = _merged(
            [("Host", self.origin.authority), ("User-Agent", "pellucid"), ("Accept-Encoding", "identity")], headers
        )
        self._ssl = ssl.create_default_context() if self.origin.is_https else None
        self._idle: list[_Connection] = []

    @asynccontextmanager
    async def request(
        self, method: str, path: str, *, headers: Headers = (), body: bytes | None = None
    ) -> AsyncIterator[HttpResponse]:
        """Send a request, and give the response as soon as its headers are there.

        On leaving, the connection is kept for the next request if the response was read to its end, and else closed,
        which is how a server learns that the rest is not wanted.

        Raises:
            ConnectionFailedError, ConnectionLostError, ServerTimeoutError, ProtocolError: no response came. Reading its
                body raises the last three too.
            ProtocolError: the response is a redirect, or compressed.
        """
        connection = self._kept_connection() or await self._connect()
        try:
            message = (method, self.origin.path + path, [*self._headers, *headers], body)
            try:
                response = await connection.send(*message)
            except ConnectionLostError:
                if not connection.was_closed_unheard():
                    raise
                connection.close()
                connection = await self._connect()
                response = await connection.send(*message)
            yield response
        finally:
            if connection.is_reusable():
                self._idle.append(connection)
            else:
                connection.close()

    async def aclose(self) -> None:
        """Close the connections that no request uses."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    def _kept_connection(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        origin = self.origin
        try:
            async with asyncio.timeout(self._connect_timeout):
                reader, writer = await asyncio.open_connection(
                    origin.host, origin.port, ssl=self._ssl, limit=READ_BYTES
                )
        except TimeoutError:
            raise ConnectionFailedError(
                f"no connection to {origin} within {self._connect_timeout:g} seconds", param="url"
            ) from None
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or error.reason or error
            raise ConnectionFailedError(f"no secure connection to {origin}: {reason}", param="url") from None
        except OSError as error:
            # Of a name with several addresses asyncio gives a list of errors, as text.
            is_refused = f"[Errno {errno.ECONNREFUSED}]" in str(error)
            reason = "nothing listens there" if is_refused else error.strerror or str(error)
            raise ConnectionFailedError(f"no connection to {origin}: {reason}", param="url") from None
        return _Connection(origin, reader, writer, self._read_timeout)


def _merged(defaults: Headers, given: Headers) -> list[tuple[str, str]]:
    """`defaults` but for those that are `given`, and these.

    Raises:
        InvalidRequestError: a header cannot be sent. Its value may be a secret, and is not shown.
    """
    given = list(given)
    for name, value in given:
        if name.lower() in FRAMING_HEADERS:
            raise InvalidRequestError(f"the header {name} is not for callers to set", param="header")
        try:
            h11.Response(status_code=200, headers=[(name, value)])
        except (h11.LocalProtocolError, UnicodeEncodeError):
            raise InvalidRequestError(
                f"the header {shown(name)}, or its value, has characters that no header may have", param="header"
            ) from None
    names = {name.lower() for name, _ in given}
    return [*((name, value) for name, value in defaults if name.lower() not in names), *given]


class HttpResponse:
    """A response whose body is read as it comes.

    Attributes:
        status: its code.
        headers: by name in lower case; of a header that came more than once, all values with commas between.
    """

    def __init__(self, connection: _Connection, head: h11.Response) -> None:
        self.status = head.status_code
        self.headers: dict[str, str] = {}
        for raw_name, raw_value in head.headers:
            name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
            self.headers[name] = f"{self.headers[name]}, {value}" if name in self.headers else value
        self._connection = connection

    async def read_some(self) -> bytes:
        """The next bytes of the body; none at its end."""
        return await self._connection.read_body()

    async def read(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            ProtocolError: it has more than `limit` bytes.
        """
        pieces: list[bytes] = []
        size = 0
        while piece := await self.read_some():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise ProtocolError(f"{self._connection.origin} answered with more than {limit} bytes")
        return b"".join(pieces)


class _Connection:
    """A connection, and where in the protocol it is."""

    def __init__(
        self, origin: Origin, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, read_timeout: float
    ) -> None:
        self.origin = origin
        self._reader = reader
        self._writer = writer
        self._read_timeout = read_timeout
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
        self._has_ended = False  # the server's side
        self._num_requests = 0
        self._is_heard = False  # something of the answer to the last of them
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None  # for the server's next bytes
        self._idle_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def send(self, method: str, target: str, headers: Headers, body: bytes | None) -> HttpResponse:
        headers = [*headers] if body is None else [*headers, ("Content-Length", str(len(body)))]
        request = h11.Request(method=method, target=target, headers=headers)
        data = self._h11.send(request) or b""
        if body:
            data += self._h11.send(h11.Data(data=body)) or b""
        data += self._h11.send(h11.EndOfMessage()) or b""
        self._writer.write(data)
        self._num_requests += 1
        self._is_heard = False
        try:
            async with asyncio.timeout(self._read_timeout):
                with suppress(ConnectionError):  # a server may answer, and close, before it has read everything
                    await self._writer.drain()
        except TimeoutError:
            raise ServerTimeoutError(f"{self.origin} took nothing for {self._read_timeout:g} seconds") from None
        self._check_silence()
        while True:
            event = await self._next_event()
            if isinstance(event, h11.Response):
                return self._checked(HttpResponse(self, event))

    def _check_silence(self) -> None:
        """Look now and then how long a read has waited: a timer for each read would cost more than the read."""
        now = self._loop.time()
        rest = self._read_timeout - (now - (self._waiting_since or now))
        if rest > 0:
            self._timer = self._loop.call_later(rest, self._check_silence)
        else:
            self._reader.set_exception(
                ServerTimeoutError(f"{self.origin} sent nothing for {self._read_timeout:g} seconds")
            )

    def _stop_checking(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _checked(self, response: HttpResponse) -> HttpResponse:
        if 300 <= response.status < 400 and "location" in response.headers:
            location = shown(response.headers["location"])
            raise ProtocolError(
                f"{self.origin} redirects to {location}, and no redirect is followed: give the address that is meant"
            )
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ProtocolError(f"{self.origin} answered with content-encoding {shown(encoding)}, unasked")
        return response

    async def read_body(self) -> bytes:
        if self._h11.their_state is not h11.SEND_BODY:
            return b""
        event = await self._next_event()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if set(self._h11.states.values()) == {h11.DONE}:
            self._h11.start_next_cycle()
            self._stop_checking()
            self._idle_since = self._loop.time()
        return b""

    async def _next_event(self) -> h11.Event:
        while True:
            try:
                event = self._h11.next_event()
                if isinstance(event, h11.Event):
                    return event
                self._waiting_since = self._loop.time()
                data = await self._reader.read(READ_BYTES)
                self._waiting_since = None
                self._has_ended = not data
                self._is_heard |= bool(data)
                self._h11.receive_data(data)
            except ConnectionError as error:
                raise ConnectionLostError(
                    f"{self.origin} broke the connection off before the answer was whole: {error.strerror or error}"
                ) from None
            except ssl.SSLError as error:
                raise ConnectionLostError(f"{self.origin} broke TLS: {error.reason or error}") from None
            except h11.RemoteProtocolError as error:
                if self._has_ended:
                    raise ConnectionLostError(
                        f"{self.origin} closed the connection before the answer was whole"
                    ) from None
                raise ProtocolError(f"{self.origin} does not answer in HTTP/1.1: {error}") from None

    def is_reusable(self) -> bool:
        """Whether the response was read to its end, and the server keeps the connection."""
        return self._h11.our_state is h11.IDLE and not self._reader.at_eof()

    def was_closed_unheard(self) -> bool:
        """Whether it had served before, and was closed without a byte of an answer to its last request."""
        return self._num_requests > 1 and not self._is_heard

    def is_usable(self) -> bool:
        """Whether a request can still be sent, after some time in which nothing was."""
        return self.is_reusable() and self._loop.time() - self._idle_since < MAX_IDLE_SECONDS

    def close(self) -> None:
        self._stop_checking()
        self._writer.close()

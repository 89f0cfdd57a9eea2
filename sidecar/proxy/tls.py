"""TLS on a client's connection: a transport for the protocol above it, a protocol for the socket below.

Our own, not ``loop.start_tls``: that one cannot be given the bytes which a client that begins with
TLS at once has sent already, waits for the client when it closes, and keeps a buffer of 256 KiB for
each connection. This one is the same on uvloop and on asyncio's loop. The handshake is awaited, and
computes in a thread: a signature by a long RSA key takes milliseconds. After it, all is synchronous.
"""

import asyncio
import logging
import ssl
from typing import Any, Final

log = logging.getLogger("pgsidecar.proxy")

ALPN: Final = "postgresql"
"""The name of PostgreSQL's protocol in TLS (54.2.11)."""

_PIECE: Final = 8 * 1024
"""Bytes that are passed through OpenSSL's buffers at a time: they stay as large as they have ever been.
PostgreSQL's records are as long (PQ_SEND_BUFFER_SIZE)."""

_MAX_UNREAD: Final = 1024 * 1024
"""Bytes of answers to changes of keys that a client may leave unread. One read can bring 256 KiB."""

_RECORD: Final = 16 * 1024
"""Bytes of plain text in a TLS record, at most (RFC 8446, 5.1)."""


class HandshakeFailed(Exception):
    """The client does not speak TLS, or not as we want it."""


class TlsTransport:
    """An ``asyncio.Transport`` and an ``asyncio.Protocol`` by shape."""

    __slots__ = (
        "_incoming",
        "_is_closing",
        "_is_lost",
        "_is_open",
        "_outgoing",
        "_protocol",
        "_raw",
        "_received",
        "_tls",
        "_unread",
        "_wake",
    )

    def __init__(self, raw: Any, context: ssl.SSLContext, protocol: Any) -> None:
        self._raw: Final = raw
        self._protocol = protocol
        self._incoming: Final = ssl.MemoryBIO()
        self._outgoing: Final = ssl.MemoryBIO()
        self._tls: Final = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._is_open = False  # the handshake is done
        self._is_closing = False
        self._is_lost = False
        self._received = b""  # during the handshake
        self._unread = 0
        self._wake: asyncio.Future[None] | None = None

    # -- the handshake -------------------------------------------------------------------------

    async def handshake(self, received: bytes) -> None:
        """Take the socket over; ``received`` is what the client has sent of TLS already.

        Raises HandshakeFailed and EOFError (the client hung up). The caller sets the deadline.
        """
        self._raw.set_protocol(self)
        self._received = received
        while not await self._step():
            while not self._received:
                if self._is_lost:
                    raise EOFError
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake
        self._is_open = True
        data, self._received = self._received, b""
        self.data_received(
            data
        )  # also if there is none: what came with the handshake's end is inside

    async def _step(self) -> bool:
        """Work on what has come. True if the handshake is done.

        Nothing else touches OpenSSL's objects meanwhile, also after a cancellation: the thread
        may still be at work.
        """
        data, self._received = self._received, b""
        self._incoming.write(data)
        self._read_on(False)
        is_done = True
        try:
            await asyncio.to_thread(self._tls.do_handshake)
        except ssl.SSLWantReadError:
            is_done = False
        except ssl.SSLError as exc:
            self._flush()  # says why, in TLS's own words
            raise HandshakeFailed(_reason(exc)) from exc
        self._flush()
        self._read_on(True)
        return is_done

    def _read_on(self, is_wanted: bool) -> None:
        """So that a client cannot send without end while a thread is at work."""
        if not self._raw.is_closing():
            if is_wanted:
                self._raw.resume_reading()
            else:
                self._raw.pause_reading()

    # -- who is there --------------------------------------------------------------------------

    @property
    def application_protocol(self) -> str | None:
        return self._tls.selected_alpn_protocol()

    @property
    def version(self) -> str:
        return self._tls.version() or "none"

    @property
    def cipher(self) -> str:
        cipher = self._tls.cipher()
        return "none" if cipher is None else cipher[0]

    def subject(self) -> list[tuple[str, str]]:
        """Types and values of the subject's name in the client's certificate; empty: it has shown none."""
        certificate: dict[str, Any] = self._tls.getpeercert() or {}
        return [pair for names in certificate.get("subject", ()) for pair in names]

    # -- the socket's protocol -----------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if not self._is_open:
            self._received += data
            self._notify()
            return
        tls, incoming = self._tls, self._incoming
        texts: list[bytes] = []
        is_ended = False
        try:
            for at in range(0, len(data) or 1, _PIECE):
                incoming.write(data if len(data) <= _PIECE else data[at : at + _PIECE])
                while (incoming.pending or tls.pending()) and not is_ended:
                    try:
                        text = tls.read(_RECORD)
                    except ssl.SSLWantReadError:
                        break  # the rest of the record is yet to come
                    texts.append(text)
                    is_ended = not text
        except ssl.SSLError as exc:
            self._fail(exc)
            return
        if self._outgoing.pending:
            self._answer()
        if texts:
            text = texts[0] if len(texts) == 1 else b"".join(texts)
            if text:
                self._protocol.data_received(text)
            if is_ended and not self._protocol.eof_received():
                self.close()

    def eof_received(self) -> bool:
        return bool(self._is_open and self._protocol.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = self._is_closing = True
        self._notify()
        # no circle is left, so OpenSSL's part is freed
        protocol, self._protocol = self._protocol, None
        protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _flush(self) -> None:
        if not self._raw.is_closing():
            self._raw.write(self._outgoing.read())

    def _answer(self) -> None:
        """To a change of keys. A client may ask for them without end, and read nothing."""
        if not self._raw.get_write_buffer_size():
            self._unread = 0
        self._unread += self._outgoing.pending
        self._flush()
        if self._unread > _MAX_UNREAD:
            log.info("client closed: it changes keys, and does not read")
            self.abort()

    def _fail(self, error: ssl.SSLError) -> None:
        """The client, or who sits in between, has broken TLS: there is no one left to talk to."""
        log.debug("TLS broken by the client", extra={"cause": _reason(error)})
        self._flush()
        self._is_closing = True
        self._raw.close()

    # -- the protocol's transport --------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """What is written before the handshake is done cannot be told to anyone, and is dropped."""
        if self._is_closing or not self._is_open:
            return
        tls, outgoing = self._tls, self._outgoing
        size = len(data)
        try:
            if size <= _PIECE:
                tls.write(data)
                self._raw.write(outgoing.read())
                return
            records: list[bytes] = []
            view = memoryview(data)
            at = 0
            while at < size:
                at += tls.write(view[at : at + _PIECE])
                records.append(outgoing.read())
            self._raw.write(b"".join(records))
        except ssl.SSLError as exc:
            self._fail(exc)

    def close(self) -> None:
        """Say that nothing more comes; what has been written is sent. ``connection_lost`` follows.

        Not so in TLS 1.2: of a connection that ends properly OpenSSL keeps the session there, up to
        20,480 of 1 KiB, or 9 with a client's certificate, and Python cannot tell it not to. It forgets
        those that are cut short; PostgreSQL's messages show well enough whether something is missing.
        """
        if self._is_closing:
            return
        self._is_closing = True
        if self._is_open and not self._raw.is_closing() and self.version != "TLSv1.2":
            try:
                self._tls.unwrap()
            except ssl.SSLError:
                pass  # the client's answer, which nobody waits for
            self._flush()
        self._raw.close()

    def abort(self) -> None:
        self._is_closing = True
        self._raw.abort()

    def is_closing(self) -> bool:
        return self._is_closing or bool(self._raw.is_closing())

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def pause_reading(self) -> None:
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._raw.resume_reading()

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._raw.get_extra_info(name, default)


def _reason(error: ssl.SSLError) -> str:
    """``no shared cipher``, where Python says ``[SSL: NO_SHARED_CIPHER] no shared cipher (_ssl.c:1002)``."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    return (error.reason or "TLS error").replace("_", " ").lower()

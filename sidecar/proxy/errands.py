"""Queries of our own on a client's server connection, and what the server says to us alone.

Pure. Owns whether such a query is under way, what the client sends while its outcome has to be known
first, what the answer changes, and how the session goes on then. The queries themselves, and reading their
answers, are ``carrier``'s and ``pins``'.
"""

from typing import Final, Protocol

from sidecar.errors import SidecarError
from sidecar.events import CloseReason, PinPolicy
from sidecar.pool.pool import Pool
from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy import expect
from sidecar.proxy.carrier import Carrier
from sidecar.proxy.pins import Inquiry, reason_of
from sidecar.proxy.replies import CHECKED, Replies
from sidecar.proxy.requests import Requests
from sidecar.proxy.scrub import message_of
from sidecar.sql import NONE


class Host(Protocol):
    """The session whose errands these are, a relay. It is handed in by each call: an errand done may
    end its lease, begin another, or end the session."""

    server: ServerConnection | None
    is_closed: bool

    def write(self, data: bytes) -> None:
        """To the client."""

    def data_received(self, data: bytes) -> None:
        """From the client."""

    def held(self, data: bytes) -> None:
        """The client has sent this, and it has to wait."""

    def taken(self, data: bytes) -> None:
        """It goes on."""

    def take_held_back(self) -> bytes:
        """What waits for a check, or for an outcome."""

    def begin(self, data: bytes) -> None:
        """Go on without a connection."""

    def forward(self, server: ServerConnection, data: bytes, now: float) -> None: ...

    def end_lease(self, server: ServerConnection, now: float) -> None:
        """Where nothing keeps it."""

    def leave(self, server: ServerConnection, reason: CloseReason, now: float) -> None: ...

    def fail(self, error: SidecarError) -> None: ...


class Errands:
    """Those for one client."""

    __slots__ = (
        "_carrier",
        "_inquiry",
        "_pool",
        "_replies",
        "_requests",
        "_rest",
        "is_holding",
        "is_running",
    )

    def __init__(self, pool: Pool, carrier: Carrier, requests: Requests, replies: Replies) -> None:
        self._pool: Final = pool
        self._carrier: Final = carrier
        self._requests: Final = requests
        self._replies: Final = replies
        self._inquiry: Inquiry | None = None
        self.is_running = False  # what the server says next answers a query of ours
        self.is_holding = False  # and the client's messages wait until it is through:
        self._rest = b""
        self._note_dialect()

    @property
    def is_asking(self) -> bool:
        """What the client left behind is not known yet."""
        return self._inquiry is not None

    def hold(self, host: Host, data: bytes) -> None:
        """The client goes on, and has to wait."""
        self._rest += data
        host.held(self._rest)

    def take_reply(self, host: Host, server: ServerConnection, data: bytes, now: float) -> bytes:
        """While a query of ours is under way. Returns what follows the answer.

        Raises ServerProtocolError.
        """
        carrier, inquiry, replies = self._carrier, self._inquiry, self._replies
        data = replies.take_held() + data
        if inquiry is not None:
            pos = inquiry.take_reply(server, data)
            news = b"".join(inquiry.news)
            inquiry.news.clear()
        else:
            pos = carrier.take_reply(server, data)
            news = carrier.take_news()
        if news:
            host.write(news)
        replies.hold(data[pos:])
        if inquiry is not None:
            if inquiry.is_done:
                self._answered(host, server, inquiry, now)
        elif not carrier.is_setting:
            self._settings_done(host, server, now)
        return b"" if self.is_running else replies.take_held()

    def _end(self, host: Host) -> bytes:
        """It is through. Returns what the client has sent meanwhile."""
        self.is_running = self.is_holding = False
        rest, self._rest = self._rest, b""
        host.taken(rest)
        return rest

    # -- settings ------------------------------------------------------------------------------

    def set_up(self, server: ServerConnection, data: bytes) -> bool:
        """Carry over this client's settings. False if ``data`` has to wait for the outcome.

        Settings that a server has accepted before travel together with the client's first
        message and cost no round trip of their own.
        """
        carrier = self._carrier
        carrier.set_up(server)
        self.is_running = carrier.is_setting
        settings = carrier.settings
        if not carrier.is_setting or (settings.is_proven and not settings.is_risky):
            return True
        self.is_holding = True
        self._rest = data
        # the reply to our SET is owed, should the client leave now
        self._replies.is_at_rest = False
        return False

    def set_back(self, host: Host, server: ServerConnection, data: bytes, now: float) -> None:
        """The client's RESET took what it had brought along, and it goes on with this connection."""
        self._requests.begin_lease()  # our Query takes the unnamed statement away
        self._carrier.set_back(server)
        self.is_running = True
        host.forward(server, data, now)

    def _settings_done(self, host: Host, server: ServerConnection, now: float) -> None:
        replies, error = self._replies, self._carrier.error
        rest = self._end(host)
        if rest:
            replies.is_at_rest = True  # nothing of the client's has been sent
        self._note_dialect()
        if error is not None:
            host.leave(server, CloseReason.SETTINGS_FAILED, now)
            text = m.error_fields(error).get("M", "a startup parameter was refused")
            logged = message_of(error, None)
            host.fail(SidecarError(text, sqlstate=m.sqlstate_of(error), logged=logged))
        elif rest:
            host.forward(server, rest, now)
        elif server.expected and server.expected[0] <= expect.AUTOMATIC:
            host.write(replies.answer_ourselves(server))

    def note_values(self, host: Host, server: ServerConnection, now: float) -> None:
        """Values of settings, and answers to our Describes, came among the replies."""
        carrier, requests, replies = self._carrier, self._requests, self._replies
        values = [value for value in replies.values if value != CHECKED]
        is_checked = len(values) < len(replies.values)
        replies.values.clear()
        if values:
            carrier.note_values(server, values, requests.resets)
            requests.resets = NONE
        self._note_dialect()
        if replies.is_at_rest and server.tx_status == m.IDLE:
            server.is_odd = False
        news = carrier.take_news()
        if news:
            host.write(news)
        if is_checked and requests.statements.awaits_check is not None:
            requests.statements.checked()
            host.forward(server, host.take_held_back(), now)

    def note_outcome(self, host: Host, server: ServerConnection) -> None:
        """Once the outcome of earlier cycles is known, what has waited for it goes on."""
        if (
            host.server is not server
            or not server.expected
            or server.copy_in  # what the server waits for may be what we hold back
            or self.is_holding
        ):
            self._requests.statements.awaits_outcome = False
            data = host.take_held_back()
            self._pool.traffic.client_received -= len(data)  # they have been counted
            host.data_received(data)

    def _note_dialect(self) -> None:
        self._requests.statements.dialect = self._carrier.settings.dialect

    # -- what a client left behind -------------------------------------------------------------

    def keep(self, server: ServerConnection, *, can_ask: bool) -> bool:
        """Whether the client keeps its connection, since it may have left something behind there. If
        that is not known yet, the server is asked: for as long it does. ``can_ask``: else later."""
        if self._pool.config.pin is PinPolicy.OFF:
            server.is_dirty = True
            return False
        self._carrier.judge_reset(server)
        if not server.effects:
            return False
        if server.effects != server.asked and can_ask:
            self._ask(server)
        return True

    def _ask(self, server: ServerConnection) -> None:
        user = self._pool.opener.parameters.get(b"session_authorization", b"")
        self._requests.begin_lease()  # our Query takes the unnamed statement away
        self._inquiry = Inquiry(server, user, self._carrier.settings)
        self.is_running = self.is_holding = True
        self._replies.is_at_rest = False

    def _answered(self, host: Host, server: ServerConnection, inquiry: Inquiry, now: float) -> None:
        self._inquiry = None
        self._replies.is_at_rest = True
        was_pinned = server.pin is not None
        if inquiry.there and self._pool.config.pin is PinPolicy.REFUSE:
            server.is_dirty = True  # what could not be seen beforehand
            inquiry.there = 0
        server.effects = server.asked = inquiry.there
        server.pin = reason_of(inquiry.there)
        if inquiry.settings is not None:
            self._carrier.note_session(server, inquiry.settings, stays=bool(inquiry.there))
            self._note_dialect()
        if server.pin is not None and not was_pinned:
            server.pinned_at = now
            self._pool.observer.pinned(server.pin)
        server.is_odd = False
        rest = self._end(host)
        if host.is_closed:
            host.leave(server, CloseReason.CLIENT_LOST, now)
            return
        host.end_lease(server, now)
        if not rest:
            return
        if host.server is None:
            host.begin(rest)
        elif server.lacks:
            self.set_back(host, server, rest, now)
        else:
            host.forward(server, rest, now)

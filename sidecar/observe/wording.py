"""Numbers, names and commands as a verdict says them, to a person who is half awake.

Pure. Names of clients' choosing are quoted and cut; a statement is always its normal form.
"""

from typing import Final

from sidecar.observe.blame import POOL, UNNAMED
from sidecar.observe.evidence import Evidence, Name, Settings

_SENTENCE: Final = 400
_NAME: Final = 64
_TEXT: Final = 160
"""Characters of a sentence, and of a name and a statement within one."""


def lasting(seconds: float) -> str:
    """``0.2 s``, ``45 s``, ``2 min 12 s``, ``3 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    minutes = whole // 60
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def milliseconds(seconds: float) -> str:
    """Of something that as a rule is short."""
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else lasting(seconds)


def option(seconds: float) -> str:
    """The value of a duration's option."""
    return "off" if not seconds else lasting(seconds)


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == round(value) else f"{value:.1f}"


def percent(share: float) -> str:
    return f"{min(share, 1.0) * 100:.0f} %"


def counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def waiting(count: int) -> str:
    """What follows a colon."""
    return "nobody waits" if not count else f"{counted(count, 'client')} wait{'s' * (count == 1)}"


def queue(e: Evidence) -> str:
    """What follows a colon: who waits, or has until a moment ago."""
    if e.pending or not e.most_pending:
        return waiting(e.pending)
    most = counted(e.most_pending, "client")
    return f"{'up to ' if e.most_pending > 1 else ''}{most} waited until just now"


def application(name: str) -> str:
    if name in ("", UNNAMED):
        return "an application without application_name"
    return "the pool itself" if name == POOL else one_line(name, _NAME)


def statement(name: Name) -> str:
    return f"{one_line(name.text, _TEXT) or 'a statement without text'} ({name.fingerprint})"


def one_line(text: str, most: int = _SENTENCE) -> str:
    """Whatever a client or a server put there: nothing that moves a cursor, and not too much."""
    shown = "".join(c if c.isprintable() else " " for c in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def command(settings: Settings, order: str) -> str:
    """To be copied into a shell."""
    told = f"{settings.console} -c '{order}'"
    return told if settings.has_admin else f"{told} (name an ADMIN in console.admin_users first)"


def waits(e: Evidence) -> str:
    text = f"{sentence(waiting(e.pending))}"
    if e.pending:
        text += f", the oldest for {lasting(e.oldest_wait)}"
    if e.most_pending > e.pending:
        text += f" (up to {e.most_pending} in the last {lasting(e.seconds)})"
    if e.in_login:
        text += f"; {e.in_login} of them in login, where SHOW WAITS does not see them"
    if e.timeouts:
        text += f"; {e.timeouts} waited in vain"
    return text + "."


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def host_of(server: str) -> str:
    """What pg_isready takes, of the first of several servers."""
    host, colon, port = server.partition(",")[0].strip().rpartition(":")
    return f"host={host} port={port}" if colon and port.isdigit() else f"host={server}"

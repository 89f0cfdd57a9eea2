"""The terminal that ``pgsidecar top`` draws on and gets its keys from.

Owns the terminal's state: it is as before when ``close`` returns, whatever happened meanwhile. Where the
output is no terminal, frames follow each other as plain text; where the input is none, there are no keys.
"""

import os
import shutil
import sys
import termios
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self, TextIO

_ENTER: Final = "\x1b[?1049h\x1b[?25l\x1b[2J"  # the alternate screen, no cursor
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_CLEAR_LINE, _CLEAR_BELOW = "\x1b[K", "\x1b[J"

PLAIN_WIDTH: Final = 160
"""Of plain text; the variable COLUMNS tells another."""
_READ: Final = 1024


class Screen:
    """A ``with``: the terminal is given back at its end. ``is_live`` False: plain text, no keys."""

    def __init__(
        self,
        out: TextIO,
        keyboard: TextIO | None,
        is_live: bool = True,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        is_terminal = out.isatty() and environ.get("TERM", "dumb") != "dumb"
        self._out: Final = out
        self.is_live: Final = is_live and is_terminal
        self.has_color: Final = is_terminal and not environ.get("NO_COLOR")
        self.is_utf8: Final = "utf" in (out.encoding or "").lower()
        self.keys: Final = _descriptor(keyboard) if self.is_live else None
        """The descriptor to read keys from, where there are any."""
        self._before: list[Any] | None = None
        self._is_entered = False
        self.is_lost = False
        """Nobody reads the output any more."""

    def __enter__(self) -> Self:
        if self.keys is not None:
            self._before = termios.tcgetattr(self.keys)
            quiet = termios.tcgetattr(self.keys)
            quiet[3] &= ~(termios.ICANON | termios.ECHO)  # key by key; Ctrl-C is a signal still
            quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0
            quiet[6][termios.VSUSP] = b"\0"  # stopped, we would leave the terminal like this
            termios.tcsetattr(self.keys, termios.TCSADRAIN, quiet)
        if self.is_live:
            self._is_entered = True
            self._write(_ENTER)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """A second time is harmless."""
        before, self._before = self._before, None
        try:
            if self._is_entered:
                self._is_entered = False
                self._write(_LEAVE)
        except OSError:
            pass  # nobody is there to see it
        finally:
            if before is not None and self.keys is not None:
                try:
                    termios.tcsetattr(self.keys, termios.TCSADRAIN, before)
                except termios.error:
                    pass  # the terminal is gone

    def size(self) -> tuple[int, int | None]:
        """Columns and lines; as many lines as it takes where the frame is not live."""
        width, height = shutil.get_terminal_size((PLAIN_WIDTH, 0))
        if self.is_live:
            try:
                width, height = os.get_terminal_size(self._out.fileno())
            except OSError:
                pass
            return width, height or 24
        return width, None

    def show(self, frame: str) -> None:
        """The last line's end is left out: it would scroll."""
        if self.is_live:
            lines = frame.rstrip("\n").split("\n")
            self._write(_HOME + f"{_CLEAR_LINE}\r\n".join(lines) + _CLEAR_LINE + _CLEAR_BELOW)
        else:
            self._write(frame)

    def read(self) -> bytes | None:
        """What was typed; None where the terminal is gone."""
        assert self.keys is not None
        try:
            return os.read(self.keys, _READ) or None
        except OSError:
            return None

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            self.is_lost = True
            raise


def _descriptor(keyboard: TextIO | None) -> int | None:
    if keyboard is None or not keyboard.isatty():
        return None
    return keyboard.fileno()


def discard_output() -> None:
    """Whoever read it has gone: the interpreter's last flush is not to fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

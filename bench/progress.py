"""How far the benchmark is: one line that redraws on a terminal, plain lines elsewhere."""

import shutil
import time
from typing import Final, TextIO

REDRAW: Final = 0.2  # s, on a terminal
LINE_EVERY: Final = 5.0  # s, elsewhere


class Progress:
    """``expected`` is the length of the whole in seconds, as planned; the time left follows the pace."""

    def __init__(self, out: TextIO, expected: float) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._expected = expected
        self._done = 0.0
        self._began = time.monotonic()
        self._shown = 0.0
        self._what = ""

    def step(self, what: str) -> None:
        """Say what runs from now on."""
        self._what = what
        self.tick(0.0 if self._is_terminal else LINE_EVERY)

    def tick(self, every: float = REDRAW) -> None:
        """To be called often while something runs."""
        now = time.monotonic()
        if now - self._shown < every or (not self._is_terminal and every < LINE_EVERY):
            return
        self._shown = now
        text = f"{self._time_left(now)} left · {self._what}"
        if not self._is_terminal:
            print(text, file=self._out, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        self._out.write(f"\r\x1b[K{text[:width]}")
        self._out.flush()

    def done(self, expected: float) -> None:
        """A part that was planned to take ``expected`` seconds is over."""
        self._done += expected

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        print(text, file=self._out, flush=True)

    def clear(self) -> None:
        if self._is_terminal:
            self._out.write("\r\x1b[K")
            self._out.flush()

    def _time_left(self, now: float) -> str:
        elapsed = now - self._began
        pace = max(1.0, elapsed / self._done) if self._done > 20 else 1.0
        left = max(0, round((self._expected - self._done) * pace))
        return f"{left // 60}:{left % 60:02d}"

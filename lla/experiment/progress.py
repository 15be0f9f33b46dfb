"""One line of progress with the time that is left."""

import sys
import time
from typing import TextIO


class Progress:
    """Reports finished work; on a terminal in place, elsewhere one line a report.

    Args:
      total: work in any unit, what is already finished left out.
      stream: where to write; standard error if None.
    """

    def __init__(self, total: float, stream: TextIO | None = None):
        self.total = total
        self.done = 0.0
        self.stream = sys.stderr if stream is None else stream
        self.start = time.monotonic()

    def advance(self, work: float, label: str) -> None:
        """Adds finished work and writes the line."""
        self.done += work
        elapsed = time.monotonic() - self.start
        left = elapsed * max(self.total - self.done, 0.0) / self.done
        share = self.done / self.total
        line = f"{share:4.0%}  {_clock(elapsed)} gone, {_clock(left)} left  {label}"
        if self.stream.isatty():
            end = "\n" if share >= 1 - 1e-9 else ""
            self.stream.write(f"\r\x1b[K{line}{end}")
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"

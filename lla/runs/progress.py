"""A line of progress, with an estimate of the time left."""

import sys
import time
from typing import TextIO


class Progress:
    """Reports finished work: on a terminal in one line, elsewhere in a new line each time.

    Args:
      total: the whole work, in any unit.
      stream: where to write; by default standard error.
      done: work that was finished before. It counts as work, but not for the estimate.
    """

    def __init__(self, total: float, stream: TextIO | None = None, *, done: float = 0.0):
        self.total = total
        self.before = self.done = done
        self.stream = sys.stderr if stream is None else stream
        self.start = time.monotonic()

    def advance(self, work: float, label: str) -> None:
        """Adds finished work and writes the line."""
        self.done += work
        elapsed = time.monotonic() - self.start
        left = elapsed * max(self.total - self.done, 0.0) / (self.done - self.before)
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

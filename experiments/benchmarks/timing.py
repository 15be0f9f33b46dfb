"""Timing of calls, the turn that processes take on one device, and the time limit of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

Key = TypeVar("Key", bound=Hashable)
START = time.monotonic()
GRACE = 8.0  # seconds beyond the limit after which a process is ended


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
      time_min_s, time_median_s: the fastest and the median measurement.
      repeats: number of measurements. A measurement of a short call spans several calls.
      calls_in_queue: the median of how many calls were still queued on the device when the host had
        launched the last one. At about 1 or less the device waited for the host, so that the time
        is that of the launches.
    """

    time_min_s: float
    time_median_s: float
    repeats: int
    calls_in_queue: float


def time_interleaved(
    calls: Mapping[Key, Callable[[], Any]], repeats: int, budget: float
) -> dict[Key, Timing]:
    """Times warmed-up calls in turns, so that a slow phase of the machine hits all of them.

    Args:
      calls: functions without arguments that return JAX arrays.
      repeats: measurements of each.
      budget: a call that has used this many seconds and was measured twice is not measured again.
    """
    spent = dict.fromkeys(calls, 0.0)
    samples: dict[Key, list[float]] = {name: [] for name in calls}
    queues: dict[Key, list[float]] = {name: [] for name in calls}
    inner = {name: _calls_per_sample(call) for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            if len(samples[name]) >= 2 and spent[name] > budget:
                continue
            start = time.perf_counter()
            for _ in range(inner[name]):
                out = call()
            launched = time.perf_counter()
            jax.block_until_ready(out)
            end = time.perf_counter()
            spent[name] += end - start
            samples[name].append((end - start) / inner[name])
            queues[name].append((end - launched) / samples[name][-1])
    return {
        name: Timing(
            min(times), statistics.median(times), len(times), statistics.median(queues[name])
        )
        for name, times in samples.items()
    }


def _calls_per_sample(call) -> int:
    """How many calls take 50 ms together on an accelerator; 1 on a CPU.

    In a real program the queue of an accelerator hides the launch of a short call. A queue of some
    tens of calls does so here, too.
    """
    if jax.default_backend() == "cpu":
        return 1
    start = time.perf_counter()
    jax.block_until_ready(call())
    return max(1, min(1000, math.ceil(0.05 / (time.perf_counter() - start))))


class GuardedCall:
    """A call for `time_interleaved`; an exception in it does not end the run.

    The call is its own result. `jax.block_until_ready` calls the method of that name on objects
    that it does not know, so that the results of every framework are waited for in the same way.

    Args:
      function: called with `given`.
      given: its argument.
      wait: called with the results; returns when they are computed.
      reason: why it cannot be called, None if it can. Set after an exception.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        given: Any,
        wait: Callable[[Any], Any],
        reason: str | None = None,
    ):
        self.function, self.given, self.wait, self.reason = function, given, wait, reason
        self.results: Any = None

    def __call__(self) -> GuardedCall:
        self._try(lambda: self.function(self.given))
        return self

    def block_until_ready(self) -> GuardedCall:
        """Waits for the results of the last call."""
        results = self.results
        self._try(lambda: self.wait(results) or results)
        return self

    def _try(self, step: Callable[[], Any]) -> None:
        if self.reason is not None:
            return
        try:
            self.results = step()
        except Exception as error:
            self.reason, self.results = error_line(error), None


@contextlib.contextmanager
def device_lock(path: str | os.PathLike | None):
    """Holds the lock file `path`, waiting for it if necessary; does nothing for None.

    Processes that share a device compile at the same time and measure one after the other.
    """
    if path is None:
        yield
        return
    import fcntl

    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def log(text: str) -> None:
    """Prints a line to standard error, with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


def error_line(error: Exception) -> str:
    """The kind of an exception and the first line of its message."""
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0][:300]}"


def exit_after(seconds: float) -> None:
    """Ends the process after so many seconds, even inside a compilation.

    Results are written as they are measured, so that nothing is lost.
    """

    def end():
        log("the time limit is reached")
        sys.stdout.flush()
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()

"""Compiling many programs in threads; one that fails does not stop the others."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from lla.experiments.benchmarks.timing import error_line, log

Program = TypeVar("Program", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, or the reason why there is none.

    Attributes:
      call: the program; None if it did not compile.
      memory: `memory_fields` of it.
      seconds: of tracing, lowering and compiling.
      error: the exception, in one line.
    """

    call: Callable[..., Any] | None
    memory: dict[str, int]
    seconds: float
    error: str | None = None


def memory_fields(compiled) -> dict[str, int]:
    """Bytes of temporary memory and of results, as fields of a record."""
    found = compiled.memory_analysis()
    return {
        "temp_bytes": int(found.temp_size_in_bytes),
        "output_bytes": int(found.output_size_in_bytes),
    }


def try_compile(build: Callable[[], Any]) -> Compiled:
    """`build` lowers and compiles a program; an exception becomes the result's `error`."""
    start = time.monotonic()
    try:
        compiled = build()
        return Compiled(compiled, memory_fields(compiled), time.monotonic() - start)
    except Exception as error:
        return Compiled(None, {}, time.monotonic() - start, error_line(error))


def compile_all(
    programs: Iterable[Program],
    compile_one: Callable[[Program], Compiled],
    workers: int,
    deadline: float = math.inf,
) -> dict[Program, Compiled]:
    """Compiles each program once, in `workers` threads.

    Programs whose turn had not come at `deadline`, a time of `time.monotonic`, are missing.
    """
    executor = concurrent.futures.ThreadPoolExecutor(workers)
    futures = {executor.submit(compile_one, p): p for p in dict.fromkeys(programs)}
    done: dict[Program, Compiled] = {}
    log(f"compiling {len(futures)} programs")

    def collect(waited, timeout):
        for future in concurrent.futures.as_completed(waited, timeout):
            program, result = futures[future], future.result()
            done[program] = result
            outcome = f"{result.seconds:.1f} s" + (f", {result.error}" if result.error else "")
            log(f"compiled {len(done)} of {len(futures)}: {describe(program)}: {outcome}")

    try:
        left = deadline - time.monotonic()
        collect(futures, None if math.isinf(left) else max(0.0, left))
    except concurrent.futures.TimeoutError:
        executor.shutdown(wait=False, cancel_futures=True)
        log("no time to compile more; waiting for the programs that are being compiled")
        collect([f for f, p in futures.items() if p not in done and not f.cancelled()], None)
    executor.shutdown()
    return done


def describe(program: Any) -> str:
    """A named tuple in a word."""
    return "-".join(str(part) for part in program if part is not None)

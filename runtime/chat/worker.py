"""What a helper process does: it reads a request a line, and writes a reply a line, both JSON.

The system limits the memory and the processor time of a request: Linux both, macOS the time, Windows neither. The
other side, process.py, has a clock for all of them.
"""

import json
import os
import sys
from contextlib import suppress
from importlib import import_module

MAX_MEMORY = 256 << 20  # bytes of memory for a request,
MEMORY_FACTOR = 32  # and for each byte of it: a character may take four bytes, and stands in several texts at a time
OUT_OF_MEMORY = 77  # exit code
HELLO = b"gguf-run is ready\n"  # written before the first reply


def main(work: str, cpu_s: float) -> None:
    """Answer requests until stdin ends, which it does when the other process ends.

    work: the function that answers, as module:name. cpu_s: seconds of processor time for a request.
    A request that passes a limit ends this process: by SIGPROF, or with the code OUT_OF_MEMORY.
    """
    module, name = work.split(":")
    answer = getattr(import_module(module), name)
    _heed_the_clock()
    sys.stdout.buffer.write(HELLO)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        _limit(cpu_s, MAX_MEMORY + MEMORY_FACTOR * len(line))
        try:
            reply = json.dumps(answer(**json.loads(line)), ensure_ascii=False).encode("utf-8", "surrogatepass")
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        _limit(0, None)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


def _heed_the_clock() -> None:
    """Let SIGPROF end this process, also where the program that started it ignores or blocks the signal."""
    if sys.platform == "win32":
        return
    import signal

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


def _limit(seconds: float, n_bytes: int | None) -> None:
    """Let this process use so many seconds of processor time from now on, and bytes of memory. 0, None: no limit."""
    if sys.platform == "win32":
        return
    import resource
    import signal

    signal.setitimer(signal.ITIMER_PROF, seconds)
    with suppress(ValueError, OSError):  # the system has no such limit, or a lower one
        highest = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes or highest, highest))

"""A process for what strangers write, as chat templates. What passes a limit ends it, and the next gets a new one."""

import json
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Lock, Timer
from typing import Any, Self

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.chat.worker import HELLO, MAX_MEMORY, OUT_OF_MEMORY

MAX_REPLY = 1 << 28  # bytes of a reply
MAX_WALL_S = 15.0  # seconds of a request, where the system does not limit its processor time
# The child finds the modules that this process finds; -P keeps the working directory out.
_CHILD = (
    "import sys; sys.path[:] = sys.argv[1:]; from gguf_run.runtime.chat.worker import main; main({work!r}, {cpu_s})"
)


class HelperProcess:
    """A process that answers requests: started when it is first needed, or by start(), and used again and again.

    Threads may share it. It ends with close(), with this object, or with the program.
    """

    subject: str  # what it runs, for errors
    work: str  # the function that answers a request, as module:name
    advice: str  # what to do if a limit is passed
    cpu_s = 2.0  # seconds of processor time for a request

    def __init__(self) -> None:
        self._lock = Lock()  # for a request and its reply
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False  # the process has said HELLO
        self._end: Callable[[], object] = lambda: None

    def start(self) -> Self:
        """Start the process now, so that it is ready when it is needed; return this object."""
        with self._lock:
            self._started()
        return self

    def close(self) -> None:
        """End the process."""
        self._end()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply of `work`; request: its arguments. GgufRunError if the process cannot be started.

        {"error": text}: a limit is passed.
        """
        line = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            process, start, reply, is_ready = self._started(), time.monotonic(), b"", self._is_ready
            assert process.stdin
            assert process.stdout
            clock = Timer(MAX_WALL_S, process.kill)
            clock.start()
            try:
                with suppress(OSError):  # it has ended
                    # What a user's site-packages print at the start stands before HELLO.
                    self._is_ready = is_ready = is_ready or any(line.endswith(HELLO) for line in process.stdout)
                    process.stdin.write(line)
                    process.stdin.flush()
                    reply = process.stdout.readline(MAX_REPLY)
            finally:
                clock.cancel()
                if not reply.endswith(b"}\n"):  # after Ctrl-C too: a late reply would be taken for the next one
                    self._end()
        if reply.endswith(b"}\n"):
            result: dict[str, Any] = json.loads(reply)
            return result
        if not is_ready:
            raise GgufRunError(
                f"{self._needed}, but {sys.executable} is no Python with this package: set sys.executable"
            )
        reason = f"its process ended with code {process.returncode}"
        if len(reply) == MAX_REPLY:
            reason = f"it makes more than {MAX_REPLY >> 20} MB of text"
        elif process.returncode == OUT_OF_MEMORY:
            reason = f"it takes more than {MAX_MEMORY >> 20} MB of memory"
        elif -process.returncode == getattr(signal, "SIGPROF", None):
            reason = f"it takes more than {self.cpu_s:g} s of processor time"
        elif time.monotonic() - start >= MAX_WALL_S:
            reason = f"it takes more than {MAX_WALL_S:g} s"
        elif -process.returncode == getattr(signal, "SIGSEGV", None):
            reason = "it is nested too deeply"
        return {"error": f": {reason}: {self.advice}"}

    @property
    def _needed(self) -> str:
        return f"{self.subject} needs a Python process of its own"

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:  # a fork has no such child: it starts its own
            return self._process
        self._end()
        self._is_ready = False
        python = "" if getattr(sys, "frozen", False) else sys.executable or ""  # a frozen program would start itself
        pipe, no_window = subprocess.PIPE, getattr(subprocess, "CREATE_NO_WINDOW", 0)
        try:
            self._process = subprocess.Popen(
                [python, "-P", "-c", _CHILD.format(work=self.work, cpu_s=self.cpu_s), *map(str, sys.path)],
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C on the terminal is not for the child
                creationflags=no_window,
            )
        except OSError as error:
            found = f"{python or 'the empty sys.executable'} does not start: {error.strerror or error}"
            raise GgufRunError(f"{self._needed}, but {found}") from None
        self._end = weakref.finalize(self, _ended, self._process)
        return self._process


class TemplateProcess(HelperProcess):
    """A process that renders chat templates."""

    subject, work = "a chat template", "gguf_run.runtime.chat.sandbox:render"
    advice = "choose another template (--chat-template)"

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()  # notes that the user has got


def _ended(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # what was not read is lost
            pipe.close()  # type: ignore[union-attr]
    process.wait()

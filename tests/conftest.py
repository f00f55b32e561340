"""For all tests."""

import os
import signal

from hypothesis import settings

# Tests do not measure time: the machine may be busy.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

# A shell without job control starts background commands with Ctrl-C ignored, and children inherit that: the tests that
# interrupt a process would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton's kernels run in its interpreter, or, if TRITON_INTERPRET=0 says so, on a GPU: that is decided when triton is
# imported, for the whole process.
os.environ.setdefault("TRITON_INTERPRET", "1")

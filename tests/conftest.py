"""For all tests."""

import signal

# A shell without job control starts background commands with Ctrl-C ignored, and children inherit that: the tests that
# interrupt a process would wait for nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)

"""Templates that mean harm: each ends with one line, and the next template is rendered as ever."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.chat import process as process_module
from gguf_run.runtime.chat.process import TemplateProcess

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


def ask(process: TemplateProcess, source: str, text: str = "Hi") -> str:
    variables = {"messages": [{"role": "user", "content": text}], "tools": None}
    reply = process.ask({"source": source, "variables": variables})
    return str(reply.get("text", reply.get("error")))


LIST = "{% set s = 'a' * 1000000 %}{% set l = [s] * 100000 %}"  # 100 GB where it is written out
DOUBLED = "{% set n = namespace(s=VALUE) %}{% for i in range(60) %}{% set n.s = SUM %}{% endfor %}"
LISTS = DOUBLED.replace("VALUE", "[]").replace("SUM", "[n.s, n.s]")
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    # Text inside of lists and objects.
    "{% set s='a'*1000000 %}{{ [[s]]*100000 }}",
    *(
        LIST + "{{ " + end + " }}"
        for end in ("l | join", "l | string | length", "l | batch(2) | list", "l | tojson", "l | pprint", "l | urlize",
                    "{'a': l} | xmlattr", "l | map('upper') | join", "l | slice(3) | list | forceescape")
    ),
    # Widths in arguments, and filters that make much of little.
    "{{ '%*d' % (2000000000, 1) }}",
    "{{ '%2000000000d' | format(1) }}",
    "{{ '{:{}}'.format(1, 2000000000) }}",
    "{{ '{0:{1}{2}}'.format('a', '>', 2000000000) }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ 'a'.ljust(2000000000) }}",
    "{{ ('\t' * 100000).expandtabs(100000) }}",
    "{{ ('a\n' * 100000) | indent(100000) }}",
    "{{ ('a b ' * 1000) | wordwrap(1, wrapstring='c' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ messages | tojson(indent=2000000000) }}",
    "{{ [1] * 2000000000 }}",
    "{{ (1).to_bytes(2000000000, 'big') }}",
    "{{ lipsum(n=100000) }}",
    DOUBLED.replace("VALUE", "'a'").replace("SUM", "n.s + n.s"),
    LISTS + "{{ n.s | tojson }}",
    "{{ raise_exception([[['x' * 1000000] * 1000] * 1000]) }}",
    # Time: in a loop, in one native operation, in the compiler.
    LOOP,
    "{{ 7 ** 99999999 % 10 }}",
    "{{ f(" + ",".join(f"a{i}=1" for i in range(26_000)) + ") }}",
    "{{ " + "+".join(["1"] * 100_000) + " }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_limits(process: TemplateProcess, source: str) -> None:
    assert ask(process, "{{ messages[0].content }}") == "Hi"  # a new process: its start is not counted
    start = time.monotonic()
    error = ask(process, source)
    # 256 MB, 2 s; a busy machine. On some machines the depth of Python's compiler ends before its memory.
    limits = ": it takes more than 2", ": it takes more than 15 s:", ": it is nested too deeply or calls itself:"
    assert error.startswith(limits), error
    assert error.endswith(": choose another template (--chat-template)")
    assert time.monotonic() - start < 30
    assert ask(process, "{{ messages[0].content }}") == "Hi"


@needs_proc
def test_memory_is_not_taken() -> None:
    """Neither by the process of the templates, nor by the one that asks."""
    process = TemplateProcess()
    ask(process, "")
    assert process._process
    child, before, highest = process._process.pid, peak(os.getpid()), [peak(process._process.pid)]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, process, HOSTILE[0])
        while not asked.done():
            with suppress(OSError, StopIteration):  # it has ended
                highest.append(peak(child))
            time.sleep(0.005)
    assert highest[0] + (100 << 20) < max(highest) < highest[0] + (300 << 20)
    assert peak(os.getpid()) < before + (50 << 20)


def peak(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def test_a_long_text_has_memory_for_itself(process: TemplateProcess) -> None:
    text = "aé世🙂" * 5_000_000
    assert ask(process, "<{{ messages[0].content | trim }}>", text) == f"<{text}>"


def test_lone_surrogates_and_all_lines(process: TemplateProcess) -> None:
    text = "\ud800 a\nb\r\x00\u2028\x85 🙂"
    assert ask(process, "{{ messages[0].content }}", text) == text


def test_it_is_one_process(process: TemplateProcess) -> None:
    ask(process, "a")
    first = process._process
    process.start()
    assert [ask(process, "{{ 1 / 0 }}"), ask(process, "b")] == [": ZeroDivisionError: division by zero", "b"]
    assert process._process is first


def test_an_ended_process_is_replaced(process: TemplateProcess) -> None:
    ask(process, "")
    assert process._process
    process._process.kill()
    process._process.wait()
    assert ask(process, "a") == "a"
    process.close()
    process.close()
    assert ask(process, "b") == "b"


def test_a_clock_where_the_system_has_no_limits(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(process, "")
    monkeypatch.setattr(process_module, "MAX_WALL_S", 0.3)
    assert ask(process, LOOP) == ": it takes more than 0.3 s: choose another template (--chat-template)"


def test_a_reply_that_is_too_long(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "MAX_REPLY", 1 << 20)
    assert ask(process, "{{ 'a' * 2000000 }}").startswith(": it makes more than 1 MB of text: ")
    assert ask(process, "{{ 'a' * 1000000 }}") == "a" * 1_000_000


def test_threads_share_a_process(process: TemplateProcess) -> None:
    def asked(i: int) -> bool:
        return ask(process, "{{ messages[0].content }}" * (1 + i % 3), f"{i} ") == f"{i} " * (1 + i % 3)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(asked, range(200)))


def test_ctrl_c_while_a_template_runs(process: TemplateProcess) -> None:
    """The reply that nobody waits for is not taken for the next one."""
    ask(process, "")
    main = threading.main_thread().ident
    threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        ask(process, LOOP)
    assert ask(process, "a") == "a"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_has_a_process_of_its_own() -> None:
    """Both render at the same time, and the end of one does not end the other's."""
    code = (
        "import os, sys\n"
        "from gguf_run.runtime.chat.template import TemplateProcess, render_chat\n"
        "process = TemplateProcess()\n"
        "source = '{{ messages[0].content }}'\n"
        "ask = lambda text: render_chat(source, text, bos_token='', eos_token='', process=process)\n"
        "ask('')\n"
        "pid = os.fork()\n"
        "found = [ask(f'{pid} {i}') for i in range(50)]\n"
        "if pid == 0:\n"
        "    sys.exit(found != [f'{pid} {i}' for i in range(50)])\n"
        "code = os.waitpid(pid, 0)[1]\n"
        "found += [ask(f'{pid} {i}') for i in range(50, 60)]\n"
        "sys.exit(code or found != [f'{pid} {i}' for i in range(60)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@needs_proc
@pytest.mark.parametrize("end", ["pass", "import os; os.kill(os.getpid(), 9)", "process.close()", "del process"])
def test_it_ends_with_the_program(end: str) -> None:
    code = (
        "from gguf_run.runtime.chat.process import TemplateProcess\n"
        "process = TemplateProcess()\n"
        "process.start()\n"
        f"print(process._process.pid, flush=True)\n{end}\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    place = Path(f"/proc/{int(done.stdout)}")
    for _ in range(200):
        if not place.exists():
            return
        time.sleep(0.05)
    raise AssertionError("the process lives on")


def test_what_the_child_imports() -> None:
    """Jinja and little else: it must be there before the model is loaded."""
    code = (
        "import sys, gguf_run.runtime.chat.worker, gguf_run.runtime.chat.sandbox\n"
        "print([m for m in ('numpy', 'numba', 'tokenizers', 'click', 'subprocess', 'asyncio') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_modules_are_found_where_this_process_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that only sys.path names; and never in the working directory, which may be a stranger's."""
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").write_text("raise SystemExit(5)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    process = TemplateProcess()
    assert ask(process, "a") == "a"
    monkeypatch.syspath_prepend(str(tmp_path))
    other = TemplateProcess()
    with pytest.raises(GgufRunError, match="is no Python with this package"):  # not the template's fault
        ask(other, "a")


NONE = r"a chat template needs a Python process of its own, but (.* does not start|sys.executable names none)"


def test_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("frozen", True), *(("executable", path) for path in ("", None, "/no/python", "/"))):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, value, raising=False)
            with pytest.raises(GgufRunError, match=NONE):
                TemplateProcess().start()


@pytest.mark.skipif(os.name != "posix", reason="programs of POSIX")
@pytest.mark.parametrize("program", ["cat", "true", "echo"])
def test_another_program_in_place_of_python(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """As in a program that holds Python: the template is not blamed."""
    path = shutil.which(program)
    monkeypatch.setattr(sys, "executable", path)
    with pytest.raises(GgufRunError, match=rf"but {path} is no Python with this package: set sys.executable"):
        ask(TemplateProcess(), "a")


def test_what_the_child_prints_at_its_start_is_no_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('welcome')\nprint('{}', end='')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ask(TemplateProcess(), "a") == "a"


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
@pytest.mark.parametrize("how", ["signal(SIGPROF, SIG_IGN)", "pthread_sigmask(SIG_BLOCK, [SIGPROF])"])
def test_a_program_that_does_not_heed_the_clock(how: str) -> None:
    code = (
        f"from signal import *\n{how}\n"
        "from gguf_run.runtime.chat.process import TemplateProcess\n"
        f"print(TemplateProcess().ask({{'source': {LOOP!r}, 'variables': {{'messages': [], 'tools': None}}}}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "it takes more than 2 s of processor time" in done.stdout

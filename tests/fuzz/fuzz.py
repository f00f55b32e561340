"""Damages files at random for some minutes, and tells what the readers do not refuse in one line.

    python tests/fuzz/fuzz.py --minutes 5                               all targets in turn
    python tests/fuzz/fuzz.py --target gguf --seed 123 --count 1        one mutant again

A mutant may be read or refused. A finding is all else: another exception, a crash, too much processor time
or memory. Its files and its error are kept in build/fuzz/TARGET-SEED.
"""

import argparse
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]

from attacks import attacks  # noqa: E402
from mutate import Gguf, Sealed, mutated  # noqa: E402
from targets import REFUSALS, TARGETS  # noqa: E402

WALL_SECONDS, MEGABYTES = 60, 512
KEPT = Path(__file__).parents[2] / "build/fuzz"
TURN_SECONDS, FIRST_TURN, LONGEST_TURN = 4, 100, 20_000  # of a target, before the next has its turn: time, mutants
SHARED_MEMORY = Path("/dev/shm")


Mutant = int | str  # a seed, or the name of an attack of attacks.py


class TooSlow(BaseException):
    """No reader catches it."""


@dataclass(frozen=True)
class Finding:
    target: str
    mutant: "Mutant"
    what: str  # the last line of the traceback
    trace: str

    @property
    def kind(self) -> str:
        """Findings with the same lines of code are one kind."""
        places = [line.strip() for line in self.trace.splitlines() if "gguf_run/" in line]
        return f"{self.what.partition(':')[0]} {places[-1] if places else ''}"


@cache
def whole(target: str) -> dict[str, Any]:
    return dict(TARGETS[target].files())


@cache
def whole_bytes(target: str) -> dict[str, bytes]:
    files = whole(target)
    return {name: file.data() if isinstance(file, Gguf | Sealed) else file for name, file in files.items()}


def write_attack(target: str, name: str, folder: Path) -> None:
    """Write the files of an attack: beside its own those that they do not replace, unless they stand alone."""
    _, changes = attacks()[name]
    together = not any(isinstance(file, Gguf | Sealed) for file in whole(target).values())
    for file, data in whole_bytes(target).items() if together else ():
        if file not in changes:
            (folder / file).write_bytes(data)
    for file, change in changes.items():
        _ = (folder / file).write_bytes(change) if isinstance(change, bytes) else change(folder / file)


def write_mutant(target: str, mutant: Mutant, folder: Path) -> None:
    """Write the files of a mutant: one of several is changed, alone if it is a GGUF file."""
    if isinstance(mutant, str):
        return write_attack(target, mutant, folder)
    chance = random.Random(f"{target} {mutant}")
    files = whole(target)
    name = chance.choice(sorted(files))
    together = not isinstance(files[name], Gguf)
    for other, data in whole_bytes(target).items() if together else ():
        if other != name:
            (folder / other).write_bytes(data)
    if chance.random() < 0.995:
        (folder / name).write_bytes(mutated(name, files[name], chance))
    elif chance.random() < 0.5:
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(chance.choice(["none", name, "/dev/zero", "/dev/null"]))


def use(target: str, mutant: Mutant, folder: Path) -> Finding | None:
    """Write a mutant into an empty folder and use it."""
    write_mutant(target, mutant, folder)
    try:
        signal.setitimer(signal.ITIMER_PROF, TARGETS[target].seconds)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS + 2 * TARGETS[target].seconds)
        TARGETS[target].use(folder)
    except BaseException as error:
        return Finding(target, mutant, traceback.format_exception_only(error)[-1].strip(), traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def _too_slow(*_: object) -> None:
    raise TooSlow


def _work(target: str, mutants: Iterable[Mutant], pipe: Connection) -> None:
    """What a process does: use one mutant after the other, and tell the parent."""
    signal.signal(signal.SIGPROF, _too_slow)
    signal.signal(signal.SIGALRM, _too_slow)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        import resource

        # Written memory, not addresses: the C library reserves 64 MB of addresses for each thread.
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        limit = pages * resource.getpagesize() + (MEGABYTES << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as base:
        for i, mutant in enumerate(mutants):
            pipe.send(i)
            folder = Path(base) / str(i)
            folder.mkdir()
            if finding := use(target, mutant, folder):
                pipe.send(finding)
            shutil.rmtree(folder)


def prepare(target: str) -> None:
    """Use the whole files: none is refused, and what is compiled or imported is there before processes start."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in whole_bytes(target).items():
            (Path(folder) / name).write_bytes(data)
        TARGETS[target].use(Path(folder))
    assert REFUSALS == [], f"{target}: {REFUSALS}"


def hunt(target: str, mutants: Sequence[Mutant]) -> Iterator[Finding]:
    """Use mutants in processes of their own, one process at a time. One that dies or hangs is a finding."""
    context = multiprocessing.get_context("fork")
    while mutants:
        at = 0
        parent, child = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(target, mutants, child))
        process.start()
        child.close()
        why = ""
        while parent.poll(4 * WALL_SECONDS + 4 * TARGETS[target].seconds):
            try:
                said = parent.recv()
            except EOFError:
                process.join()
                why = f"the process ended with {process.exitcode}" if process.exitcode else ""
                break
            if isinstance(said, Finding):
                yield said
            else:
                at = said
        else:
            process.kill()
            process.join()
            why = "no end"
        if why:
            yield Finding(target, mutants[at], why, why)
        mutants = mutants[at + 1 :] if why else ()


def keep(finding: Finding) -> Path:
    """Write a mutant and its error where a person can look at them."""
    folder = KEPT / f"{finding.target}-{finding.mutant}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_mutant(finding.target, finding.mutant, folder)
    (folder / "error.txt").write_text(finding.trace, errors="backslashreplace")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first mutant of each target")
    parser.add_argument("--count", type=int, help="mutants of each target, however long they take")
    given = parser.parse_args()
    names, found, used = given.target or list(TARGETS), Counter[str](), Counter[str]()
    print(f"seed {given.seed}", flush=True)
    for name in names:
        prepare(name)
    end, turns = time.monotonic() + 60 * given.minutes, dict.fromkeys(names, given.count or FIRST_TURN)
    while time.monotonic() < end and not (given.count and used):
        for name in names:
            at, start = given.seed + used[name], time.monotonic()
            for finding in hunt(name, range(at, at + turns[name])):
                found[finding.kind] += 1
                if found[finding.kind] == 1:
                    print(f"{finding.target} {finding.mutant}: {finding.what[:200]}\n    {keep(finding)}", flush=True)
            used[name] += turns[name]
            # Each target has the same time, so that more mutants of the fast ones are tried.
            per_second = turns[name] / (time.monotonic() - start)
            turns[name] = min(max(FIRST_TURN, int(TURN_SECONDS * per_second)), LONGEST_TURN)
    print(f"{used.total()} mutants: " + ", ".join(f"{name} {n}" for name, n in used.items()))
    for kind, n in found.most_common():
        print(f"{n} x {kind}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

"""Checks and times the GPU backend on this machine's GPU. Prints a Markdown table. Needs only torch and Triton.

    python benchmarks/gpu.py [--check] [--sweep] [--model] [--tune] [--quick] [--perplexity MODEL TEXT] [--json OUT]

Where gguf-run is not installed: make build/typing/gguf_run && PYTHONPATH=build/typing python3 benchmarks/gpu.py
The tests need pytest and gguf, and are quicker with pytest-xdist.

--check runs the tests of kernels_gpu on the GPU, every kernel against float64 NumPy. All other cases are in
gpu_cases.py. Each case runs in a process of its own, so that a failure stops nothing else. At first several processes
compile all kernels at the same time. Then the cases run one by one for the timings. --interpret runs everything on tiny
shapes without a GPU.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
TESTS = [
    f"tests/kernels_gpu/{name}.py"
    for name in ("test_ops", "attention/test_attention", "panels/test_repack", "matmul/test_moe", "test_backend")
]
NO_MODEL_FILES = "not real_model"
NOMINAL = {"H200": 4.0e12, "H100": 2.9e12}  # bytes per second that a plain read reaches
SILENT = 120.0  # seconds without a record after which a process is stopped; the interpreter gets ten times as long
QUICK = (
    "limits", "check", "Q4_K", "Q6_K", "Q8_0", "attention f16", "attention q8_0", "llama-8b Q4_K_M",
    "llama-8b Q4_K_M, users, f16",
)  # fmt: skip
# Part of case and record: tokens per second on an H200, or the part of what the bytes allow at its nominal bandwidth.
TARGETS: tuple[tuple[str, str, float], ...] = (
    ("llama-8b Q4_K_M", "decode", 600),
    ("llama-8b", "decode", 0.70),
    ("llama-8b Q4_K_M", "decode at depth", 0.60),
    ("llama-8b Q4_K_M", "prefill 2048", 25_000),
    ("llama-8b Q4_K_M", "prefill 512", 15_000),
)
HOST_SECONDS = 1e-4

Key = list[str]  # part, case, arguments
Record = dict[str, Any]


def run_cases(keys: Sequence[Key], bench: Any, write: Callable[[Record], None]) -> bool:
    """Write the records of cases as they come. Return False if the GPU stops answering: the rest has not run."""
    from gpu_cases import CASES

    for key in keys:
        write({"begin": key})
        try:
            for record in CASES[key[0]][key[1]](bench, *key[2:]):
                write({"key": key} | record)
        except Exception as error:
            text = (" ".join(str(error).split()) or "no message")[:160]
            write({"key": key, "error": f"{type(error).__name__}: {text}"})
        write({"end": key})
        gc.collect()
        try:
            bench.clean()
        except Exception:  # what failed has taken the process's hold of the GPU along
            return False
    return True


def child(keys: Sequence[Key], out: Path, interpret: bool, warm: bool) -> None:
    import torch
    from gpu_cases import FULL, TINY, Bench

    if interpret:
        sys.path.append(str(ROOT / "tests/helpers"))
        from gpu_ops import speed_up

        speed_up(setattr)
    bench = Bench(torch.device("cpu") if interpret else torch.device("cuda", 0), TINY if interpret else FULL, warm)
    with out.open("a") as file:

        def write(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        if not run_cases(keys, bench, write):
            os._exit(3)


def _lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def in_processes(keys: Sequence[Key], options: Sequence[str], deadline: float) -> list[Record]:
    """Yield the records of the cases. After a process ends, another one goes on with the next case."""
    left, found, silent = list(keys), list[Record](), SILENT * (10 if "--interpret" in options else 1)
    while left:
        if time.monotonic() > deadline:
            return found + [{"key": key, "error": "left out: no time"} for key in left]
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder) / "out", Path(folder) / "log"
            out.touch()
            command = [sys.executable, __file__, "--cases", json.dumps(left), "--out", str(out), *options]
            with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
                code, size, since = None, 0, time.monotonic()
                while code is None:
                    time.sleep(0.05)
                    code, now = process.poll(), out.stat().st_size
                    if now > size:
                        size, since = now, time.monotonic()
                    if time.monotonic() > min(deadline + 30, since + silent):
                        process.kill()
            lines, last = _lines(out), log.read_text().strip().splitlines()[-1:]
        found += [line for line in lines if "key" in line]
        ended = [line["end"] for line in lines if "end" in line]
        begun = [line["begin"] for line in lines if "begin" in line and line["begin"] not in ended] or left[:1]
        left = [key for key in left if key not in ended]
        if left and (code != 3 or not ended):
            left.remove(begun[0])
            text = "".join(last)[:160] or "no answer for too long"
            found.append({"key": begun[0], "error": f"the process ended with {code}: {text}"})
    return found


def run_tests(interpret: bool, deadline: float) -> list[Record]:
    """Run the tests. Return one record for each test function."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        only = "fallbacks or activations" if interpret else NO_MODEL_FILES
        command = [sys.executable, "-m", "pytest", *TESTS, "-k", only, "-p", "no:warnings", "-p", "no:cacheprovider"]
        command.append("--continue-on-collection-errors")
        environment = os.environ | {"TRITON_INTERPRET": str(int(interpret))}
        seconds = max(1.0, deadline - time.monotonic())
        try:
            done = subprocess.run(
                [*command, *workers, f"--junit-xml={report}"], cwd=ROOT, env=environment, timeout=seconds,
                capture_output=True, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [{"key": ["check", "tests"], "error": f"not done in {seconds:.0f} s"}]
        if not report.is_file():
            return [{"key": ["check", "tests"], "error": (done.stdout + done.stderr).strip()[-160:]}]
        cases = ET.parse(report).getroot().iter("testcase")
    print(done.stdout[-6000:] if done.returncode else "", file=sys.stderr)
    found: dict[str, list[Record]] = {}
    for case in cases:
        failure = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if case.find("skipped") is None:
            name, _, values = case.attrib["name"].partition("[")
            text = " ".join(failure.attrib["message"].split())[:100] if failure is not None else ""
            found.setdefault(name, []).append({"values": values.rstrip("]"), "error": text})
    records: list[Record] = []
    for name, results in found.items():
        failed = [f"{r['values']}: {r['error']}" for r in results if r["error"]]
        key, value = ["check", "tests"], f"{len(results) - len(failed)} of {len(results)} right"
        records.append({"key": key, "name": name, "value": value} | ({"error": "; ".join(failed)} if failed else {}))
    return records


def versions() -> tuple[str, str]:
    """Return the GPU's name, and a line with the versions of the software."""
    import torch
    import triton

    name, driver = "Triton's interpreter", ""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = f", driver {subprocess.run(query, capture_output=True, text=True).stdout.strip()}"
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return name, f"{date}, {name}{driver}, torch {torch.__version__}, triton {triton.__version__}"


def table(records: Sequence[Record], card: str) -> Iterator[str]:
    """Return lines of Markdown. A figure that misses its target is bold."""
    measured = {r["name"]: r.get("bytes", r.get("flops", 0)) / r["seconds"] for r in records if r["key"][0] == "limits"
                and "seconds" in r}  # fmt: skip
    read = measured.get("read", 0.0)
    nominal = next((speed for name, speed in NOMINAL.items() if name in card), read)
    product = next((speed for name, speed in measured.items() if "product" in name), 0.0)
    yield (f"| case | what | time | tokens/s | GB/s, TFLOP/s | of this card | of {nominal / 1e12:.1f} TB/s | goal |")
    yield "|---" * 8 + "|"
    for record in records:
        cells = [" ".join(record["key"][1:2]), str(record.get("name", "")), *[""] * 6]
        seconds = record.get("seconds")
        if seconds:
            cells[2] = f"{seconds * 1e3:.3f} ms"
            rate = record["tokens"] / seconds if "tokens" in record else 0.0
            cells[3] = f"{rate:.5g}" if rate else ""
            speed = record.get("bytes", record.get("flops", 0)) / seconds
            of = nominal and speed / nominal if "bytes" in record else 0.0
            if speed:
                cells[4] = f"{speed / 1e9:.4g} GB/s" if "bytes" in record else f"{speed / 1e12:.4g} TFLOP/s"
                top = read if "bytes" in record else product
                cells[5] = f"{speed / top:.0%}" if top else ""
            cells[6] = f"{of:.0%}" if of else ""
            cells[7] = _target(record, rate, of, nominal)
        elif "value" in record:
            cells[2], cells[7] = record["value"], record.get("target", "")
            if record.get("missed") or (cells[7].isdigit() and int(cells[2]) > int(cells[7])):
                cells[7] = f"**{cells[7]}**"
        if "error" in record:
            cells[7] = "**failed**: " + record["error"].replace("|", "/")
        yield f"| {' | '.join(cells)} |"


def _target(record: Record, rate: float, of: float, nominal: float) -> str:
    name = record["name"]
    if name.endswith("not on the device"):
        return "0.1 ms" if record["seconds"] <= HOST_SECONDS else "**0.1 ms**"
    what = "decode at depth" if name.startswith("decode at depth") else name
    for case, kind, goal in TARGETS:
        if record["key"][1].startswith(case) and what == kind:
            if goal < 1:
                return f"{goal:.0%}" if of >= goal else f"**{goal:.0%}**"
            if what == "decode":  # of an H200
                goal *= nominal / NOMINAL["H200"]
            return f"{goal:,.0f}" if rate >= goal else f"**{goal:,.0f}**"
    return ""


def best_tuning(records: Sequence[Record]) -> str:
    """Return the fastest candidates as a row of TUNINGS."""
    times = {r["key"][1]: r["seconds"] for r in records if r["key"][0] == "tune" and "seconds" in r}

    def best(prefix: str) -> str:
        found = {name.removeprefix(prefix): seconds for name, seconds in times.items() if name.startswith(prefix)}
        return min(found, key=found.__getitem__, default="?")

    rows = ", ".join(f"({n}, {best(f'rows {n} ')})" for n in (1, 2, 4, 8))
    mma = ", ".join(best(f"mma {m} ") for m in (16, 32, 64))
    return f"Tuning(mma=({mma}), rows=({rows}), programs={best('programs ')})"


@click.command()
@click.option("--check", "parts", flag_value="check", multiple=True, help="Every kernel against NumPy; graphs.")
@click.option("--sweep", "parts", flag_value="sweep", multiple=True, help="Products and attention, each type.")
@click.option("--model", "parts", flag_value="model", multiple=True, help="Whole decoders with random weights.")
@click.option("--tune", "parts", flag_value="tune", multiple=True, help="Candidates for the table TUNINGS.")
@click.option("--perplexity", nargs=2, type=click.Path(exists=True), help="MODEL TEXT: GPU against CPU, 0.2 %.")
@click.option("--quick", is_flag=True, help="Fewer types and models.")
@click.option("--interpret", is_flag=True, help="Tiny shapes in Triton's interpreter: no time means anything.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all records there.")
@click.option("--seconds", default=440.0, show_default=True, help="Begin nothing after so long.")
@click.option("--cases", hidden=True)
@click.option("--out", hidden=True, type=click.Path(path_type=Path))
@click.option("--warm", is_flag=True, hidden=True)
def main(
    parts: tuple[str, ...],
    perplexity: tuple[str, str] | None,
    quick: bool,
    interpret: bool,
    json_file: Path | None,
    seconds: float,
    cases: str | None,
    out: Path | None,
    warm: bool,
) -> None:
    """Without --check, --sweep, --model, --tune or --perplexity: the first three."""
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    if cases is not None:
        assert out is not None
        child(json.loads(cases), out, interpret, warm)
        return
    from gpu_cases import CASES

    begin = time.monotonic()
    deadline = begin + seconds
    wanted = parts or (() if perplexity else ("check", "sweep", "model"))
    keys = [[part, name] for part in ("limits", *wanted) for name in CASES[part]]
    if quick:
        keys = [key for key in keys if key[0] in QUICK or key[1] in QUICK]
    keys += [["perplexity", "perplexity", *perplexity]] if perplexity else []
    options = ["--interpret"] if interpret else []
    n_process = 1 if interpret else max(1, min(8, (os.cpu_count() or 2) // 2))
    with ThreadPoolExecutor(n_process + 1) as pool:
        tests = pool.submit(run_tests, interpret, begin + seconds * 0.7) if "check" in wanted else None
        if not interpret:
            warm_keys = [key for key in keys if key[0] != "perplexity"]
            groups = [warm_keys[i::n_process] for i in range(n_process)]
            warming = [
                pool.submit(in_processes, group, [*options, "--warm"], begin + seconds * 0.5) for group in groups
            ]
            for task in warming:
                task.result()
        records = tests.result() if tests else []
    click.echo(f"compiled and checked: {time.monotonic() - begin:.0f} s", err=True)
    records = in_processes(keys, options, deadline) + records
    card, line = versions()
    click.echo("\n".join([line, "", *table(records, card), ""]))
    if "tune" in wanted:
        click.echo(best_tuning(records))
    click.echo(f"{time.monotonic() - begin:.0f} s in all", err=True)
    if json_file:
        json_file.write_text(json.dumps({"measured": line, "records": records}, indent=1))
    sys.exit(any("error" in record or record.get("missed") for record in records))


if __name__ == "__main__":
    main()

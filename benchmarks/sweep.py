"""Measures the README's table: every row against llama.cpp, in turns, and the limits of the machine in the same run.

    python benchmarks/sweep.py RESULTS.jsonl --models FOLDER [--row REGEX] [--quick]     # measures what is missing
    python benchmarks/sweep.py RESULTS.jsonl --table                                     # prints the table

Each finished row adds a line to RESULTS, so a stopped run can go on. The table shows the last line of a row (--again
adds lines). Models of random weights, with the shape of a Llama of 1 billion weights, are written into FOLDER when a
row needs them (0.4 to 1.3 GB each). --delete removes each model after its last row.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import click
from isa_features import environment
from make_model import SHAPES, mix_of, write_model
from pair import Rounds, Test, Worker, compare

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.bench.bench import BenchedModel, Case, ideal_seconds
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.hub.places import models_dir

_SHAPE = "llama-1b"
_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_K_M")
_SMOLLM2, _GEMMA = "SmolLM2-135M Q4_1", "Gemma 3 270M Q4_K_M"
_DEPTH = 8192
_PEER_LIBRARY = {"AVX2": "haswell"}  # by instruction set: llama.cpp's library that knows no better one


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    model: str
    n_threads: int = 2
    isa: str = ""  # instruction set of both sides; "": the best
    depth: int = 0
    pp_goal: float = 2.0  # least ratio of pp
    tg_goal: float = 1.15  # least ratio of tg
    limit_goal: float = 0.0  # least part of the streaming limit in decode

    def __str__(self) -> str:
        parts = [self.model, f"{self.n_threads} thread{'s' * (self.n_threads > 1)}", self.isa]
        return ", ".join([*filter(None, parts), *([f"depth {self.depth}"] if self.depth else [])])


def rows() -> Iterator[Row]:
    """Yield all rows. Rows that share a file are neighbours."""
    yield Row(_SMOLLM2, pp_goal=3.0, tg_goal=1.8)
    yield Row(_GEMMA, pp_goal=2.0, tg_goal=1.3)
    for type in _TYPES:
        model = f"{_SHAPE} {type}"
        yield Row(model, limit_goal=0.95)
        yield Row(model, n_threads=1, tg_goal=1.5)
        if type in ("Q4_0", "Q8_0", "Q4_K_M"):
            yield Row(model, isa="AVX2", pp_goal=1.3, tg_goal=1.0)
        if type == "Q4_K_M":
            yield Row(model, depth=_DEPTH, pp_goal=1.5, tg_goal=1.3)


@dataclass(frozen=True)
class Plan:
    """How long each row is measured."""

    n_prompt: int  # tokens of pp
    n_gen: int  # tokens of tg
    repeat: int  # see pair.compare
    seconds: float  # see pair.compare


def made_file(model: str, folder: Path) -> Path | None:
    """Return the path of a model of random weights; None for a real model."""
    shape, _, type = model.partition(" ")
    return folder / f"{shape}-{type}.gguf" if shape == _SHAPE else None


def model_file(model: str, folder: Path, gemma: Path) -> Path:
    """Return the file of a model. A missing model of random weights is written first."""
    path = made_file(model, folder)
    if path is None:
        return gemma if model == _GEMMA else find_model(None)
    if not path.is_file():
        click.echo(f"writing {path}", err=True)
        with GGUFFile.open(find_model(None)) as vocab:
            write_model(path, SHAPES[_SHAPE], mix_of(model.split(" ")[1]), vocab)
        os.sync()  # not while something is measured
    return path


def measure(row: Row, path: Path, plan: Plan) -> dict[str, Any]:
    """Measure a row. Return its line of RESULTS: seconds, limits and reached parts of limits, by round."""
    with GGUFFile.open(path) as file:
        model = BenchedModel.of(file)
        # a separate table of embeddings is not read but for one row
        unread = file.tensors["token_embd.weight"].nbytes if "output.weight" in file.tensors else 0
    n_ctx = -(-(row.depth + max(plan.n_prompt, plan.n_gen)) // 256) * 256
    cpu = _PEER_LIBRARY.get(row.isa, "auto")
    with (
        Worker("peer", path, row.n_threads, n_ctx, cpu) as peer,
        Worker("ours", path, row.n_threads, n_ctx, environment=environment(row.isa) if row.isa else None) as ours,
    ):
        if row.isa and (peer.cpu != cpu or not ours.cpu.endswith(f", {row.isa}")):
            raise SystemExit(f"{row}: the kernels in use are {peer.cpu} and {ours.cpu}")
        tests = [Test("pp", plan.n_prompt, row.depth), Test("tg", plan.n_gen, row.depth)]
        rounds = [compare(test, peer, ours, plan.repeat, plan.seconds, limits=True) for test in tests]
    return {
        "row": str(row),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpus": [peer.cpu, ours.cpu],
        "tests": [
            asdict(each)
            | {"of_file": _fractions(each, model, model.model_size - unread)}
            | {"of_panels": _fractions(each, model, ours.weight_bytes)}
            for each in rounds
        ],
    }


def _fractions(rounds: Rounds, model: BenchedModel, weight_bytes: int) -> list[float]:
    """Return the part of the limits that each of our rounds reached. weight_bytes: weights that a token reads."""
    test = rounds.test
    n_prompt, n_gen = (test.n, 0) if test.kind == "pp" else (0, test.n)
    case = Case("", n_prompt, n_gen, test.depth)
    pairs = zip(rounds.limits, rounds.ours, strict=True)
    return [ideal_seconds(case, model, weight_bytes, limits) / seconds for limits, seconds in pairs]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of each row."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {record["row"]: record for record in map(json.loads, lines)}


def table(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the Markdown table. Ratios below their goal are bold, with the goal."""
    yield (
        "| model | prefill: llama.cpp | gguf-run | ratio (rounds) | of the int8 limit "
        "| decode: llama.cpp | gguf-run | ratio (rounds) | of the memory limit: panels | file |"
    )
    yield "|---" * 10 + "|"
    for row in rows():
        if str(row) not in results:
            continue
        cells = [str(row)]
        for test, goal in zip(results[str(row)]["tests"], (row.pp_goal, row.tg_goal), strict=True):
            rounds = Rounds(Test(**test["test"]), test["peer"], test["ours"])
            cells += [f"{rounds.peer_speed:.4g}", f"{rounds.ours_speed:.4g}", _ratio(rounds, goal)]
            panels, of_file = median(test["of_panels"]), median(test["of_file"])
            missed = test["test"]["kind"] == "tg" and panels < row.limit_goal
            cells.append(f"**{panels:.0%}** (goal {row.limit_goal:.0%})" if missed else f"{panels:.0%}")
            if rounds.test.kind == "tg":
                cells.append(f"{of_file:.0%}")
        yield f"| {' | '.join(cells)} |"


def _ratio(rounds: Rounds, goal: float) -> str:
    low, high = rounds.range
    spread = f"{low:.2f} to {high:.2f}"
    return (
        f"{rounds.ratio:.2f} ({spread})" if rounds.ratio >= goal else f"**{rounds.ratio:.2f}** ({spread}; goal {goal})"
    )


@click.command()
@click.argument("results", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--models", type=click.Path(file_okay=False, path_type=Path), help="Folder for models of random weights.")
@click.option("--gemma", type=click.Path(path_type=Path), help="Gemma 3 270M Q4_K_M.  [default: where tests keep it]")
@click.option("--row", "pattern", default="", help="Only rows whose name has this regular expression in it.")
@click.option("--again", is_flag=True, help="Also rows that the results hold.")
@click.option("--delete", is_flag=True, help="Remove each model of random weights after its last row.")
@click.option("-p", "n_prompt", default=512, show_default=True, type=click.IntRange(1), help="Tokens of pp.")
@click.option("-n", "n_gen", default=64, show_default=True, type=click.IntRange(1), help="Tokens of tg.")
@click.option("-r", "repeat", default=3, show_default=True, type=click.IntRange(1), help="Rounds of a test, at most.")
@click.option("--seconds", default=10.0, show_default=True, help="No third round of a test after this time.")
@click.option("--quick", is_flag=True, help="Like -p 256 -n 32 -r 2.")
@click.option("--table", "print_table", is_flag=True, help="Print the table instead of measuring.")
@click.option("--list", "list_rows", is_flag=True, help="Print the names of the rows instead.")
def main(
    results: Path,
    models: Path | None,
    gemma: Path | None,
    pattern: str,
    again: bool,
    delete: bool,
    n_prompt: int,
    n_gen: int,
    repeat: int,
    seconds: float,
    quick: bool,
    print_table: bool,
    list_rows: bool,
) -> None:
    """Measure the rows that RESULTS lacks."""
    done = read_results(results)
    if print_table:
        click.echo("\n".join(table(done)))
        return
    wanted = [row for row in rows() if re.search(pattern, str(row)) and (again or str(row) not in done)]
    if list_rows:
        click.echo("\n".join(map(str, wanted)))
        return
    if models is None and any(made_file(row.model, Path()) for row in wanted):
        raise click.UsageError("--models: give the folder for the models of random weights, up to 1.3 GB each")
    folder, plan = models or Path(), Plan(256, 32, 2, seconds) if quick else Plan(n_prompt, n_gen, repeat, seconds)
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(wanted):
        path = model_file(row.model, folder, gemma or models_dir() / "gemma-3-270m-q4_k_m.gguf")
        if not path.is_file():
            click.echo(f"{row}: there is no {path}: left out", err=True)
            continue
        record = measure(row, path, plan)
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        click.echo(list(table({str(row): record}))[-1])
        if delete and made_file(row.model, folder) == path and all(next.model != row.model for next in wanted[i + 1 :]):
            path.unlink()


if __name__ == "__main__":
    main()

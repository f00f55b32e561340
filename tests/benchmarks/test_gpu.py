"""benchmarks/gpu.py on tiny shapes in Triton's interpreter: its cases, its table, processes that end early."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import gpu
import gpu_cases
import torch
from gpu_ops import fast_dots, unpack_part
from gpu_random import STD, random_part

from gguf_run.kernels_gpu.panels.panels import PANELS

__all__ = ["fast_dots"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # rows that only fill up may hold anything
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # the interpreter's own
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PANELS)
def test_random_weights(name: str) -> None:
    w = unpack_part(random_part(name, 1024, 64, CPU))
    assert abs(w.mean()) < STD / 50
    assert 0.8 * STD < w.std() < 1.6 * STD
    assert len({*abs(w[:, ::256]).max(1)}) > 4, "the scales differ"


@pytest.mark.usefixtures("fast_dots")
def test_cases_and_table() -> None:
    def fail(bench: gpu_cases.Bench) -> None:
        raise ValueError("a\nb")

    cases = {
        "limits": gpu_cases.CASES["limits"],
        "sweep": {
            "Q4_K": lambda bench: gpu_cases.matmul(bench, "Q4_K", (1,)),
            "attention f16": gpu_cases.CASES["sweep"]["attention f16"],
            "broken": fail,
        },
        "model": {
            "llama-8b Q4_K_M": gpu_cases.CASES["model"]["llama-8b Q4_K_M, q8_0"],
            "users": gpu_cases.CASES["model"]["llama-8b Q4_K_M, users, q8_0"],
        },
    }
    written: list[dict[str, Any]] = []
    bench = gpu_cases.Bench(CPU, gpu_cases.TINY, warm=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_cases, "CASES", cases)
        assert gpu.run_cases([[part, name] for part in cases for name in cases[part]], bench, written.append)
    records = [json.loads(json.dumps(record)) for record in written if "key" in record]
    assert [r["error"] for r in records if "error" in r] == ["ValueError: a b"]
    assert len(records) == 3 + 1 + 1 + 1 + 2 + 4
    lines = list(gpu.table(records, "NVIDIA H200"))
    assert {line.count(" | ") for line in lines if "---" not in line} == {7}
    assert "of 4.0 TB/s" in lines[0]
    depth = next(line for line in lines if "| decode at depth 40, q8_0 cache |" in line)
    assert depth.endswith("| **60%** |")
    assert "**failed**: ValueError: a b" in lines[7]


def test_figures_and_targets() -> None:
    key = ["model", "llama-8b Q4_K_M"]
    records = [
        {"key": ["limits", "this card"], "name": "read", "seconds": 1.0, "bytes": 3e12},
        {"key": key, "name": "decode", "seconds": 1 / 500, "tokens": 1, "bytes": 4.5e9},
        {"key": ["model", "llama-8b Q8_0"], "name": "decode", "seconds": 1 / 320, "tokens": 1, "bytes": 8e9},
        {"key": key, "name": "prefill 2048", "seconds": 0.1, "tokens": 2048},
        {"key": key, "name": "decode: not on the device", "seconds": 5e-5},
        {"key": ["check", "launches"], "name": "launches", "value": "9", "target": "7"},
    ]
    lines = list(gpu.table(records, "NVIDIA H100 80GB HBM3"))[3:]
    assert lines[0].endswith("| 2.000 ms | 500 | 2250 GB/s | 75% | 78% | 435 |")
    assert lines[1].endswith("| 2560 GB/s | 85% | 88% | 70% |")
    assert lines[2].endswith("| 100.000 ms | 20480 |  |  |  | **25,000** |")
    assert lines[3].endswith("| 0.050 ms |  |  |  |  | 0.1 ms |")
    assert lines[4].endswith("| **7** |")
    names = ("rows 1 8", "rows 2 2", "rows 4 2", "rows 8 1", "mma 32 (32, 1, 4)")
    times = dict.fromkeys(names, 1.0) | {"rows 1 4": 2.0}
    tuned = [{"key": ["tune", name], "name": name, "seconds": seconds} for name, seconds in times.items()]
    rows = "rows=((1, 8), (2, 2), (4, 2), (8, 1))"
    assert gpu.best_tuning(tuned) == f"Tuning(mma=(?, (32, 1, 4), ?), {rows}, programs=?)"


def test_processes_that_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the benchmark: a script that ends in "b" and, as after a GPU's error, behind "c"."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "with open(sys.argv[4], 'a') as out:\n"
        "    for key in json.loads(sys.argv[2]):\n"
        "        print(json.dumps({'begin': key}), file=out, flush=True)\n"
        "        if key[1] == 'b': sys.exit('Segmentation fault')\n"
        "        print(json.dumps({'key': key, 'name': 'x'}), file=out)\n"
        "        print(json.dumps({'end': key}), file=out)\n"
        "        if key[1] == 'c': sys.exit(3)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    records = gpu.in_processes([["sweep", name] for name in "abcd"], [], math.inf)
    assert [(r["key"][1], r.get("error")) for r in records] == [
        ("a", None),
        ("b", "the process ended with 1: Segmentation fault"),
        ("c", None),
        ("d", None),
    ]
    assert "no time" in gpu.in_processes([["sweep", "a"]], [], 0.0)[0]["error"]

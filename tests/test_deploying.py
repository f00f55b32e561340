"""The files of docs/deploying and the numbers of their page: they can be read, and name what exists."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import PYPROJECT, ROOT, options_of

from gguf_run.kernels_cpu.measure.limits import Limits
from gguf_run.models.backend import CacheType
from gguf_run.runtime.info.fit import USUAL_MODELS, Machine, fit_row, quantized
from gguf_run.runtime.load.memory import MemoryPlan
from gguf_run.runtime.serve.metrics import _METRICS

FOLDER, PAGE = ROOT / "docs/deploying", (ROOT / "docs/deploying.md").read_text()
SERVE = options_of("gguf-serve") | {"-c"}


def options_in(line: str) -> set[str]:
    return {*re.findall(r"(?<![\w-])--?[a-z][\w-]*", line)}


def test_containerfile() -> None:
    lines = dict(re.findall(r"^([A-Z]+) (.*)$", (FOLDER / "Containerfile").read_text(), re.MULTILINE))
    extras = re.search(r"pip install .*\.whl\)\[([\w,]+)\]", lines["RUN"])
    assert extras is not None
    assert {*extras[1].split(",")} <= {*PYPROJECT["project"]["optional-dependencies"]}
    version = re.search(r"python:(3\.\d+)-", lines["FROM"])
    assert version is not None
    assert any(text.endswith(version[1]) for text in PYPROJECT["project"]["classifiers"])
    assert lines["USER"].isdigit()
    command, *arguments = yaml.safe_load(lines["ENTRYPOINT"])
    assert command in PYPROJECT["project"]["scripts"]
    assert options_in(" ".join(arguments)) <= SERVE


def test_unit(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(FOLDER / "gguf-serve.service")
    service = unit["Service"]
    assert service["DynamicUser"] == service["NoNewPrivileges"] == "yes"
    assert options_in(service["ExecStart"]) <= SERVE
    assert "MemoryDenyWriteExecute" not in service  # kernels are compiled
    if (analyze := shutil.which("systemd-analyze")) is not None:
        copy = tmp_path / "gguf-serve.service"
        copy.write_text(
            (FOLDER / copy.name).read_text().replace("/opt/gguf-run/bin/gguf-serve", shutil.which("true") or "")
        )
        done = subprocess.run([analyze, "verify", str(copy)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_manifests() -> None:
    found: dict[str, Any] = {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}
    pod = found["Deployment"]["spec"]["template"]
    container, labels = pod["spec"]["containers"][0], pod["metadata"]["labels"]
    (port,) = container["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert options_in(" ".join(container["args"])) <= SERVE
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels == found["Service"]["spec"]["selector"]
    pool = found["InferencePool"]["spec"]
    assert pool["selector"]["matchLabels"] == labels
    assert pool["targetPorts"] == [{"number": port["containerPort"]}]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])


def test_metrics_of_the_page() -> None:
    assert {*re.findall(r"`(vllm:\w+)`", PAGE)} <= {name for name, *_ in _METRICS}


@pytest.mark.parametrize("model", USUAL_MODELS, ids=lambda model: model.name)
def test_sizes_of_the_page(model: Any) -> None:
    """They are what gguf-info --fit says."""
    config, tensors = model.tensors()
    tensors = quantized(tensors, config, "Q4_K_M")
    row = fit_row("Q4_K_M", config, tensors, Machine(None, Limits(1, 1e10, 1e12)))
    plan = MemoryPlan(config, tensors, row["n_ctx"], [CacheType("f16", "f16")] * config.n_layer)
    sizes = [plan.cache_bytes(), plan.with_type("q8_0").cache_bytes()]
    cells = [f"{row['memory'] / 1e9:.2f}", *(f"{n / row['n_ctx'] / 1e3:.0f}" for n in sizes)]
    assert f"| {model.name} | {' | '.join(cells)} |\n" in PAGE

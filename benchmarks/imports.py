"""Counts the modules of this project that a command imports, and their lines.

    python benchmarks/imports.py [MODEL] [--command "--raw -p hi -n 1"]

Without MODEL a tiny llama is made. The command runs in a process of its own after the kernels are compiled, so the
compiler is not counted. `__init__` files hold only docstrings and are not counted.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import click

PROBE = """
import json, sys
from gguf_run.runtime.cli.run import main
main(sys.argv[1:], standalone_mode=False)
files = {name: module.__file__ for name, module in sys.modules.items() if name.startswith("gguf_run.")}
print(json.dumps(files), file=sys.stderr)
"""


def imported(arguments: list[str]) -> dict[str, int]:
    """Run gguf-run with arguments. Return the lines of each module of this project that is imported at the end."""
    for _ in range(2):  # the first run compiles
        done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    files = json.loads(done.stderr.splitlines()[-1])
    paths = {name.removeprefix("gguf_run."): Path(file) for name, file in files.items() if file}
    return {
        name: len(path.read_text().splitlines()) for name, path in sorted(paths.items()) if path.name != "__init__.py"
    }


@click.command()
@click.argument("model", required=False)
@click.option("--command", default="--raw -p the -n 1", show_default=True, help="What gguf-run is called with.")
def main(model: str | None, command: str) -> None:
    """Print the modules that a command imports, their lines, and sums."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/helpers"))
            model = f"{folder}/tiny.gguf"
            import_module("tinymodel").write_tiny(Path(model))
        lines = imported([model, "--device", "cpu", *shlex.split(command)])
    for name, n in lines.items():
        print(f"{n:>5} {name}")
    print(f"{sum(lines.values()):>5} lines in {len(lines)} modules")


if __name__ == "__main__":
    main()

"""Time from process start to the first token, and the most memory a run holds.

    python benchmarks/startup.py MODEL [-r 5] [--skip-cold]

Warm: the median of several runs, with compiled Python modules as an installed package has them. Cold: one run with an
empty cache of compiled kernels. The prompt has 20 tokens. Memory: the highest VmHWM in /proc (Linux), and its parts at
the moment of the highest RSS. The limit is file size + KV cache + 250 MB.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.config import ModelConfig
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

_WORDS = "The quick brown fox jumps over the lazy dog near the bank of the river while the sun is setting behind hills"
_N_TOKENS = 20
_ALLOWED = 250_000_000
_COMMAND = (sys.executable, "-c", "from gguf_run.runtime.cli.run import main; main()")
_FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")


def prompt_for(path: Path) -> tuple[str, int]:
    """Return a text of 20 tokens, BOS included, and the bytes of an f16 KV cache per position."""
    with GGUFFile.open(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
    texts = (_WORDS[:end] for end in range(len(_WORDS), 0, -1))
    text = next(text for text in texts if len(tokenizer.encode(text)) == _N_TOKENS)
    return text, config.n_layer * 2 * config.n_embd_kv * 2


def first_token(command: list[str], modules: Path, cache: Path | None = None) -> float:
    """Return the seconds from process start to the first byte on stdout.

    modules: folder for compiled Python modules. cache: another folder for XDG_CACHE_HOME.
    """
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(modules)}
    environment |= {"XDG_CACHE_HOME": str(cache)} if cache else {}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryFile() as messages:
        start = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=messages) as process:
            assert process.stdout
            process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode:
            messages.seek(0)
            raise SystemExit(f"{command[-1]} ended with {process.returncode}: {messages.read().decode()}")
    return seconds


def most_memory(command: list[str]) -> dict[str, int]:
    """Run a command. Return bytes by /proc's names at the sample with the highest VmRSS, and the last VmHWM."""
    most = dict.fromkeys(_FIELDS, 0)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            if "VmHWM" in fields:  # not once it has ended
                now = {name: int(fields[name].split()[0]) * 1024 for name in _FIELDS}
                most = max(now, most, key=lambda sample: sample["VmRSS"]) | {"VmHWM": now["VmHWM"]}
            time.sleep(0.001)
    return most


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("-r", "--repeat", default=5, show_default=True, type=click.IntRange(1), help="Warm runs.")
@click.option("-c", "--ctx-size", "n_ctx", default=2048, show_default=True)
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("--skip-cold", is_flag=True, help="Leave out the run that compiles everything.")
def main(model: Path, repeat: int, n_ctx: int, threads: int, skip_cold: bool) -> None:
    """Print start-up times and memory of `gguf-run MODEL`."""
    prompt, cache_bytes = prompt_for(model)
    options = ["--raw", "-c", str(n_ctx), "-t", str(threads), "--temperature", "0", "-p", prompt]
    command = [*_COMMAND, str(model), *options]
    print(f"{model.name}, {threads} threads, prompt of {_N_TOKENS} tokens, process start to first token:")
    once = [*command, "-n", "1"]
    with tempfile.TemporaryDirectory() as folder:
        modules = Path(folder) / "modules"
        first_token(once, modules)  # fills the caches
        warm = [first_token(once, modules) for _ in range(repeat)]
        print(f"  warm  {median(warm):6.2f} s   ({min(warm):.2f} to {max(warm):.2f} in {repeat} runs)")
        if not skip_cold:
            cold = first_token(once, modules, Path(folder) / "kernels")
            print(f"  cold  {cold:6.2f} s   (no kernel compiled yet)")
    most = most_memory([*command, "-n", "32"])
    limit = model.stat().st_size + n_ctx * cache_bytes + _ALLOWED
    parts = ", ".join(f"{name} {most[name] / 1e6:.0f}" for name in _FIELDS)
    print(f"memory in MB: {parts}")
    print(
        f"limit in MB: {limit / 1e6:.0f} = file {model.stat().st_size / 1e6:.0f}"
        f" + KV cache {n_ctx * cache_bytes / 1e6:.0f} (f16, {n_ctx} positions) + {_ALLOWED / 1e6:.0f}"
    )


if __name__ == "__main__":
    main()

"""--help of every command, and completion in shells."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from documents import SCRIPTS, command_of, commands_in, options_of

from gguf_run.runtime.cli.help import GROUPS

COMMANDS = [
    name
    for script in SCRIPTS
    for name in (script, *(f"{script} {sub}" for sub in getattr(command_of(script), "commands", {})))
]


def help_of(name: str, columns: int) -> str:
    script, *words = name.split()
    done = CliRunner().invoke(command_of(script), [*words, "--help"], env={"COLUMNS": str(columns)}, prog_name=script)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    """Three examples at least, of options that exist; all options; as wide as the terminal is."""
    text = help_of(name, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith(f"Usage: {name} ")
    section = text.partition("\nExamples:\n")[2].partition("\nExit codes:\n")[0]
    found = list(commands_in(f"```\n{section}```"))
    assert 3 <= len(found) <= 5
    for script, options in found:
        assert set(options) <= options_of(script), script
    assert name in {script for script, _ in found} or isinstance(command_of(name), click.Group)
    for parameter in command_of(name).params:
        if isinstance(parameter, click.Option):
            assert any(f" {option}" in text for option in parameter.opts)


def test_width_and_order() -> None:
    wide, narrow = help_of("gguf-run", 200), help_of("gguf-run", 50)
    assert 80 < max(map(len, wide.splitlines())) <= 100
    options = narrow.partition("\nOptions:\n")[2].partition("\nExamples:\n")[0]
    assert max(len(line) for line in options.splitlines() if not line.startswith("  -")) <= 50
    at = [wide.index(f"\n{title}:\n") for title in ("Options", "Sampling", "Context", "What runs where", "Examples")]
    assert at == sorted(at)
    assert "\x1b" not in wide


def test_groups_are_of_something() -> None:
    names = {parameter.name for name in COMMANDS for parameter in command_of(name).params}
    assert {name for _, members in GROUPS for name in members} <= names


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("gguf-quantize a.gguf b.gguf q4_km", 'TYPE is "q4_km": did you mean Q4_K_M? allowed are F32, '),
        ("gguf-quantize a.gguf b.gguf zzz", 'TYPE is "zzz": allowed are F32, '),
        ("gguf-run --temperatur 1", "Did you mean"),
        ("gguf-eval perplexty", "Did you mean 'perplexity'?"),
    ],
)
def test_did_you_mean(words: str, expected: str) -> None:
    script, *arguments = words.split()
    done = CliRunner().invoke(command_of(script), arguments)
    assert (done.exit_code, expected in done.stderr) == (2, True), done.stderr


COMPLETIONS = [
    ("run", [], "--samp", ["--samplers"]),
    ("run", ["-ct"], "q8", ["q8_0"]),
    ("run", [], "hf:own/one:", ["hf:own/one:Q8_0"]),
    ("run", [], "mod", ["model.gguf"]),
    ("run", ["--chat-template"], "chat", ["chatml"]),
    ("run", ["--samplers"], "top_k;min", ["top_k;min_p"]),
    ("run", ["--file"], "mod", ["file mod"]),
    ("info", ["--diff"], "model", ["model.gguf"]),
    ("info", [], "fold", ["file fold"]),
    ("quantize", ["a.gguf", "b.gguf"], "q5_k", ["Q5_K_S", "Q5_K_M"]),
    ("bench", ["m.gguf", "-ct"], "f16,q8", ["f16,q8_0"]),
    ("evaluate", ["perplexity"], "--chu", ["--chunks"]),
]
COMPLETE = """
import json, sys
from importlib import import_module
from click.shell_completion import ZshComplete
found = []
for name, words, typed in json.loads(sys.argv[1]):
    command = import_module(f"gguf_run.runtime.cli.{name}").main
    items = ZshComplete(command, {}, "x", "X").get_completions(words, typed)
    found.append([item.value if item.type == "plain" else f"{item.type} {item.value}" for item in items])
print(json.dumps(found))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    one = tmp_path / "cache/gguf-run/models/hub/own/one"
    one.mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    for path in (one / "m-Q8_0.gguf", tmp_path / "model.gguf", tmp_path / "model.txt"):
        path.touch()
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    here = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HOME": str(folder / "none")}
    return {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | here


def test_completion(folder: Path) -> None:
    """In a process of its own: completing changes the commands."""
    cases = json.dumps([case[:3] for case in COMPLETIONS])
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE, cases], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [expected for *_, expected in COMPLETIONS]


def test_completion_in_bash(folder: Path) -> None:
    """bash itself, which cuts words at colons."""
    bash, script = shutil.which("bash"), Path(sys.executable).with_name("gguf-run")
    if bash is None or not script.is_file():
        pytest.skip("needs bash, and the commands beside Python's interpreter")
    code = 'eval "$(gguf-run --completion bash)"; COMP_WORDS=(gguf-run hf : own/one : q); COMP_CWORD=5; '
    code += '_gguf_run_completion gguf-run; echo "${COMPREPLY[*]}"; complete -p gguf-eval'
    path = {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", code], env=environment(folder) | path, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "Q8_0", done.stderr
    assert "_gguf_eval_completion" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    done = CliRunner().invoke(command_of("gguf-run"), ["--completion", shell])
    assert done.exit_code == 0
    assert all(f"_{name.replace('-', '_').upper()}_COMPLETE" in done.output for name in SCRIPTS)

"""Runs command-line agents of npm against gguf-serve, with a model that says what a script tells it to.

    python benchmarks/agents.py [codex] [claude] [opencode]

Each agent is asked for the word in a file. The script calls the agent's own tools, several at once and one that gives a
picture, and says the word that it finds in their results: it knows it from nowhere else. So an answer is right if the
agent's requests, the server's streams, the calls and their results all fit. npm fetches the agents once (1.2 GB).
"""

import base64
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import click

from gguf_run.formats.compiler.cachedir import user_cache_dir

sys.path.append(str(Path(__file__).parent.parent / "tests/helpers"))
Steps = Sequence[Sequence[tuple[str, Mapping[str, Any]]]]  # calls of tools, together and one after the other
_QUESTION = "Read the file word.txt and look at picture.png, then tell me the word."
_MOST_S = 120  # seconds that an agent may take
_N_CTX = 1 << 18  # a token is a byte, and an agent's prompt has up to 100,000 of them
_PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@dataclass(frozen=True)
class Agent:
    """How an agent is run."""

    package: str  # of npm, with its version
    command: tuple[str, ...]
    steps: Steps  # the script
    settings: Callable[[str, Path], Mapping[str, str]]  # writes files into its home; returns its environment


def _codex(url: str, home: Path) -> Mapping[str, str]:
    provider = f'[model_providers.gguf]\nname = "gguf"\nbase_url = "{url}/v1"\nwire_api = "responses"\n'
    (home / ".codex").mkdir()
    (home / ".codex/config.toml").write_text(f'model = "m0"\nmodel_provider = "gguf"\n{provider}')
    return {}


def _claude(url: str, home: Path) -> Mapping[str, str]:
    quiet = ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_TELEMETRY", "DISABLE_AUTOUPDATER")
    return dict.fromkeys(quiet, "1") | {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "any",
        "ANTHROPIC_MODEL": "m0",
    }


def _opencode(url: str, home: Path) -> Mapping[str, str]:
    provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{url}/v1"}, "models": {"m0": {}}}
    settings = {"model": "gguf/m0", "autoupdate": False, "share": "disabled", "provider": {"gguf": provider}}
    (home / ".config/opencode").mkdir(parents=True)
    (home / ".config/opencode/opencode.json").write_text(json.dumps(settings))
    return dict.fromkeys(("OPENCODE_DISABLE_AUTOUPDATE", "OPENCODE_DISABLE_MODELS_FETCH"), "1")


_LIST = {"command": "ls", "description": "List files"}
AGENTS = {
    "codex": Agent("@openai/codex@0.171.0", ("codex", "exec", "--skip-git-repo-check", _QUESTION), (
        (("exec_command", {"cmd": "ls"}), ("exec_command", {"cmd": "cat word.txt"})),
        (("view_image", {"path": "picture.png"}), ("multi_agent_v1__close_agent", {"target": "nobody"})),
    ), _codex),
    "claude": Agent("@anthropic-ai/claude-code@2.1.332", ("claude", "-p", _QUESTION), (
        (("Read", {"file_path": "word.txt"}), ("Bash", _LIST)),
        (("ToolSearch", {"query": "select:WebFetch"}), ("Read", {"file_path": "picture.png"})),
    ), _claude),
    "opencode": Agent("opencode-ai@1.18.33", ("opencode", "run", _QUESTION), (
        (("read", {"filePath": "word.txt"}), ("bash", _LIST)), (("read", {"filePath": "picture.png"}),),
    ), _opencode),
}  # fmt: skip


def said(steps: Steps, results: list[str], prompt: str) -> str:
    """Return the answer to a prompt. results: gets what the tools have given so far."""
    if f'"name": "{steps[0][0][0]}"' not in prompt:  # it has no tools: it asks for a title
        return "The word"
    results[:] = re.findall("<[|]im_start[|]>tool\n(.*?)<[|]im_end[|]>", prompt, re.DOTALL)
    n_said = prompt.count("<|im_start|>assistant")
    if n_said < len(steps):
        calls = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in steps[n_said]]
        return "<think>\nHm.\n</think>\n\nI look." + "".join(f"\n<tool_call>\n{one}\n</tool_call>" for one in calls)
    found = re.search("WORD-[0-9a-f]{8}", "".join(results))
    return f"<think>\nSo.\n</think>\n\nIt is {found[0] if found else 'not there'}."


def program(agent: Agent) -> Path:
    """Return the file that runs an agent. npm fetches it once."""
    folder = user_cache_dir() / f"agent-{agent.package.rpartition('/')[2]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {agent.package} with npm into {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            command = ["npm", "install", "--silent", "--prefix", f"{scratch}/new", agent.package]
            subprocess.run(command, check=True, stdout=DEVNULL)
            Path(scratch, "new").rename(folder)
    return folder / "node_modules/.bin" / agent.command[0]


def outcome(agent: Agent, url: str, home: str, folder: str) -> str:
    """Return what an agent prints, "" if it takes too long."""
    environment = {"PATH": os.environ["PATH"], "HOME": home, **agent.settings(url, Path(home))}
    command = [str(program(agent)), *agent.command[1:]]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=_MOST_S)[0].decode()
        except subprocess.TimeoutExpired:
            return ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started


def run(agent: Agent) -> str:
    """Run an agent; return a row of the table."""
    from served import scripted, serving

    from gguf_run.runtime.serve.server import Access

    word, lines, results, start = f"WORD-{secrets.token_hex(4)}", list[str](), list[str](), time.monotonic()
    model = scripted(partial(said, agent.steps, results), n_ctx=_N_CTX, n_batch=8192, cost=(0, 0, 0, 0))
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
        tempfile.TemporaryDirectory() as folder,
        serving(model, access=Access(log=lines.append)) as server,
    ):
        Path(folder, "word.txt").write_text(f"{word}\n")
        Path(folder, "picture.png").write_bytes(base64.b64decode(_PICTURE))
        answer = outcome(agent, server.url, home, folder)
    logged = [json.loads(line) for line in lines]
    requests = Counter(f"{one['method']} {one['path']} {one['status']}" for one in logged)
    n_prompt, n_cached = (sum(one.get(name, 0) for one in logged) for name in ("n_prompt", "n_cached"))
    n_done = sum("unsupported call" not in result for result in results)
    cells = [agent.package, ", ".join(f"{n} x {name}" for name, n in requests.items())]
    cells += [f"{n_done} of {sum(map(len, agent.steps))}", f"{n_prompt}", f"{n_cached}"]
    cells += ["right" if f"It is {word}" in answer else "wrong", f"{time.monotonic() - start:.0f} s"]
    return f"| {' | '.join(cells)} |"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(AGENTS)))
def main(names: Sequence[str]) -> None:
    """Print a table of what each agent did. NAMES: all of them if none is given."""
    print(
        "| agent | version | requests | calls done | bytes of prompts | cached | answer | took |\n" + 8 * "|---" + "|"
    )
    for name in names or AGENTS:
        print(run(AGENTS[name]), flush=True)


if __name__ == "__main__":
    main()

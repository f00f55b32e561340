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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, NamedTuple

import click

from gguf_run.formats.compiler.cachedir import user_cache_dir

sys.path.append(str(Path(__file__).parent.parent / "tests/helpers"))
Steps = Sequence[Sequence[tuple[str, Mapping[str, Any]]]]  # calls of tools, together and one after the other
_QUESTION = "Read the file word.txt and look at picture.png, then tell me the word."
_PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Agent(NamedTuple):
    """How an agent is run."""

    package: str  # of npm, with its version
    command: tuple[str, ...]
    steps: Steps  # the script


# Files in the home folder, and variables, of which each agent takes its own.
_FILES = {
    ".codex/config.toml": 'model = "m0"\nmodel_provider = "gguf"\n[model_providers.gguf]\nname = "gguf"\n'
    'base_url = "URL/v1"\nwire_api = "responses"\n',
    ".config/opencode/opencode.json": '{"model": "gguf/m0", "provider": {"gguf": {"npm": "@ai-sdk/openai-compatible", '
    '"options": {"baseURL": "URL/v1"}, "models": {"m0": {}}}}}',
}
_SET = {"ANTHROPIC_AUTH_TOKEN": "any", "ANTHROPIC_MODEL": "m0", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}  # fmt: skip
_LIST = {"command": "ls", "description": "List files"}
AGENTS = {
    "codex": Agent("@openai/codex@0.171.0", ("codex", "exec", "--skip-git-repo-check", _QUESTION), (
        (("exec_command", {"cmd": "ls"}), ("exec_command", {"cmd": "cat word.txt"})),
        (("view_image", {"path": "picture.png"}), ("multi_agent_v1__close_agent", {"target": "nobody"})),
    )),
    "claude": Agent("@anthropic-ai/claude-code@2.1.332", ("claude", "-p", _QUESTION), (
        (("Read", {"file_path": "word.txt"}), ("Bash", _LIST)),
        (("ToolSearch", {"query": "select:WebFetch"}), ("Read", {"file_path": "picture.png"})),
    )),
    "opencode": Agent("opencode-ai@1.18.33", ("opencode", "run", _QUESTION), (
        (("read", {"filePath": "word.txt"}), ("bash", _LIST)), (("read", {"filePath": "picture.png"}),),
    )),
}  # fmt: skip


def said(steps: Steps, results: list[str], prompt: str) -> str:
    """Return the answer to a prompt. results: gets what the tools have given so far."""
    if f'"name": "{steps[0][0][0]}"' not in prompt:  # it has no tools: it asks for a title
        return "The word"
    results[:] = re.findall("<[|]im_start[|]>tool\n(.*?)<[|]im_end[|]>", prompt, re.DOTALL)
    if (n_said := prompt.count("<|im_start|>assistant")) < len(steps):
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
            subprocess.run(["npm", "install", "--silent", "--prefix", f"{scratch}/new", agent.package], check=True)
            Path(scratch, "new").rename(folder)
    return folder / "node_modules/.bin" / agent.command[0]


def outcome(agent: Agent, url: str, home: str, folder: str) -> str:
    """Return what an agent prints, "" if it takes too long."""
    for name, text in _FILES.items():
        Path(home, name).parent.mkdir(parents=True)
        Path(home, name).write_text(text.replace("URL/", f"{url}/"))
    environment = {"PATH": os.environ["PATH"], "HOME": home, "ANTHROPIC_BASE_URL": url, **_SET}
    command = [str(program(agent)), *agent.command[1:]]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=120)[0].decode()
        except subprocess.TimeoutExpired:
            return ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started


def run(agent: Agent) -> str:
    """Run an agent; return a row of the table."""
    from served import scripted, serving

    from gguf_run.runtime.serve.server import Access

    program(agent)
    word, lines, results, start = f"WORD-{secrets.token_hex(4)}", list[str](), list[str](), time.monotonic()
    model = scripted(partial(said, agent.steps, results), n_ctx=1 << 18, n_batch=8192, cost=(0, 0, 0, 0))
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
        tempfile.TemporaryDirectory() as folder,
        serving(model, access=Access(log=lines.append)) as server,
    ):
        Path(folder, "word.txt").write_text(f"{word}\n")
        Path(folder, "picture.png").write_bytes(base64.b64decode(_PICTURE))
        answer = outcome(agent, server.url, home, folder)
    logged = [json.loads(line) for line in lines]
    requests = Counter(f"{one['method']} {one['path']} {one['status']}" for one in logged).items()
    n_prompt, n_cached = (sum(one.get(name, 0) for one in logged) for name in ("n_prompt", "n_cached"))
    n_done, n_calls = sum("unsupported call" not in result for result in results), sum(map(len, agent.steps))
    seen, end = ", ".join(f"{n} x {name}" for name, n in requests), "right" if f"It is {word}" in answer else "wrong"
    took = f"{time.monotonic() - start:.0f} s"
    return f"| {agent.package} | {seen} | {n_done} of {n_calls} | {n_prompt} | {n_cached} | {end} | {took} |"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(AGENTS)))
def main(names: Sequence[str]) -> None:
    """Print a table of what each agent did. NAMES: all of them if none is given."""
    print("| agent | requests | calls done | bytes of prompts | cached | answer | took |\n" + 7 * "|---" + "|")
    for name in names or AGENTS:
        print(run(AGENTS[name]), flush=True)


if __name__ == "__main__":
    main()

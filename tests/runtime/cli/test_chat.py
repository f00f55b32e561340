"""The chat's commands, messages of several lines, and how reasoning is shown."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tinymodel import Tiny, write_tiny

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime import Model
from gguf_run.runtime.chat.answer_parts import open_tag
from gguf_run.runtime.cli import chat as cli_chat
from gguf_run.runtime.cli import chat_input as cli_chat_input
from gguf_run.runtime.cli.chat_commands import COMMANDS, Chat, completions, run_command
from gguf_run.runtime.cli.run import main
from gguf_run.runtime.engine.check import ContextError
from gguf_run.runtime.terminal.reasoning import DIM, PLAIN, dimmed
from gguf_run.runtime.terminal.text import has_colours
from gguf_run.runtime.terminal.wrap import wrapped

GREEDY = ["--temperature", "0", "-n", "6"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path, Tiny(n_ctx=2048))
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model.load(path, n_threads=2) as model:
        yield model


def talk(path: Path, *lines: str, options: list[str] = GREEDY) -> Result:
    arguments = [str(path), "--chat", *options]
    return CliRunner().invoke(main, arguments, input="".join(f"{line}\n" for line in lines).encode())


def answers(model: Model, *contents: str, system: str | None = None, **options: Any) -> list[str]:
    """What the model says to each message, the ones before it known."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for content in contents:
        messages.append({"role": "user", "content": content})
        text = "".join(model.chat(messages, max_tokens=6, **({"temperature": 0} | options)))
        messages.append({"role": "assistant", "content": text})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def shown(*texts: str) -> str:
    return "".join(f"{text}\n" for text in texts)


def test_reset_system_and_exit(path: Path, model: Model) -> None:
    result = talk(path, "One", "/reset", "Two", "/system Be brief.", "/reset", "Three", "/system", "/exit", "Four")
    assert result.exit_code == 0
    three = answers(model, "Three", system="Be brief.")
    assert result.stdout == shown(*answers(model, "One"), *answers(model, "Two"), *three)
    assert "forgot the conversation, not the system message\n" in result.stderr
    assert "no system message\n" in result.stderr


def test_save_and_load(path: Path, model: Model, tmp_path: Path) -> None:
    file = tmp_path / "talk.session"
    result = talk(
        path, "One", f"/save {file}", "Two", "/reset", f"/load {file}", "Two", f"/load {tmp_path / 'no'}", "/save"
    )
    assert result.exit_code == 0
    one, two = answers(model, "One", "Two")
    assert result.stdout == shown(one, two, two)
    assert f"saved to {file}: 2 messages\n" in result.stderr
    assert f"error: {tmp_path / 'no'}: No such file" in result.stderr
    assert "error: /save FILE: name the file\n" in result.stderr
    assert "error: /save /no/such/x: cannot be written" in talk(path, "/save /no/such/x").stderr


def test_a_conversation_that_goes_on_is_shown(path: Path, model: Model, tmp_path: Path) -> None:
    """By its last turns, cut short; of what a file holds, no code reaches the terminal."""
    file = tmp_path / "talk.session"
    messages = [{"role": "system", "content": "S"}]
    for i in range(4):
        messages += [{"role": "user", "content": f"Q{i} \x1b[31m"}, {"role": "assistant", "content": f"A{i}\n" * 300}]
    model.reset()
    model.save_session(file, messages)
    answer = " ".join(["A2"] * 134)[:400]
    expected = f"> Q2 \\x1b[31m\n{answer} ...\n> Q3 \\x1b[31m\n{answer.replace('2', '3')} ...\n"
    assert expected in CliRunner().invoke(main, [str(path), "--chat", "--session", str(file)], input=b"").stderr
    assert expected in talk(path, f"/load {file}").stderr


@pytest.mark.parametrize("name", ["/bye", "/quit", "exit", "QUIT", "/EXIT", "/exit "])
def test_other_ways_out(path: Path, name: str) -> None:
    result = talk(path, name, "One")
    assert (result.exit_code, result.stdout) == (0, "")


def test_other_names_of_commands(path: Path, model: Model) -> None:
    result = talk(path, "One", "/clear", "Two", "/?", "/stats")
    assert result.stdout == shown(*answers(model, "One"), *answers(model, "Two"))
    assert "forgot the conversation\n" in result.stderr
    assert "/stats show the speed" in result.stderr
    assert (
        len(re.findall(r"prefill .* tokens in .*/s \| decode .*/s \| context \d+ of 2048 tokens\n", result.stderr)) == 1
    )
    assert re.search(r"^load .* \| context \d+ of 2048 tokens\n$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize("line", ["/exti", "/exti now", "/?!", "/save-all x", "/tmp"])
def test_unknown_commands_are_not_sent(path: Path, line: str) -> None:
    result = talk(path, line)
    assert result.stdout == ""
    assert f"{line.split()[0]} is not a command; " in result.stderr
    assert ("did you mean /exit?" in result.stderr) == line.startswith("/exti")


@pytest.mark.parametrize("line", ["/usr/bin is full", " /exit", "exit the room", "/etc/fstab"])
def test_messages_that_look_like_commands(line: str, model: Model) -> None:
    assert not run_command(Chat(model, [], {}), line)


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "fine talk").touch()
    monkeypatch.chdir(tmp_path)
    assert completions("/s") == ["/save ", "/system ", "/set ", "/stats "]
    assert completions("/b") == ["/bye "]
    assert completions("") == completions("Hello") == completions("/system fo") == []
    assert completions("/save f") == ["fine talk ", "folder/"]
    assert completions("/load fine t") == ["talk "]
    assert completions(f"/load {tmp_path}/fo") == [f"{tmp_path}/folder/"]
    assert completions("/set top_") == ["top_k ", "top_p ", "top_n_sigma "]


def test_regenerate_draws_anew(path: Path, model: Model) -> None:
    hot = ["--temperature", "5", "--top-k", "0", "--top-p", "1", "--min-p", "0", "-n", "6", "--seed", "4"]
    result = talk(path, "/regenerate", "One", "/regenerate", options=hot)
    options: dict[str, Any] = {"temperature": 5, "top_k": 0, "top_p": 1, "min_p": 0}
    first, second = (answers(model, "One", seed=seed, **options)[0] for seed in (4, 5))
    assert result.stdout == shown(first, second)
    assert first != second
    assert "error: /regenerate: there is no answer yet\n" in result.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/set temp 0.5", "temperature 0.5"),
        ("/set top-k=7", "top_k 7"),
        ("/set --max-tokens 3", "max_tokens 3"),
        ("/set seed 12", "seed 12"),
        ("/set samplers tk", "samplers tk"),
        ("/set", "temperature 0.8, top_k 40, "),
        ("/set top_k x", "error: /set top_k: 'x' is not a number"),
        ("/set top_k -1", "error: top_k is -1; allowed: "),
        ("/set max_tokens 0", "error: max_tokens is 0; allowed: "),
        ("/set samplers z", "error: samplers: 'z' is not known"),
        ("/set nothing 1", "error: /set nothing 1: write a name and a value; the names are temperature, "),
        ("/set dry 1", "error: /set dry 1: write a name"),  # several begin so
        ("/exti", "/exti is not a command; there are /save, /load, "),
        ("/help", "/save FILE: write"),
    ],
)
def test_set_and_mistakes(model: Model, line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(model, [], {"temperature": 0.8, "top_k": 40, "max_tokens": None})
    before = dict(chat.options)
    assert run_command(chat, line)
    assert capsys.readouterr().err.startswith(expected)
    assert (chat.options == before) == ("error" in expected or line in ("/set", "/exti", "/help"))


def test_set_changes_the_answer(path: Path, model: Model) -> None:
    assert talk(path, "/set max_tokens 2", "One").stdout != talk(path, "One").stdout


@pytest.mark.parametrize("line", ["/usr/bin is full", " /reset", "Hello /exit", "/"])
def test_not_commands(model: Model, line: str) -> None:
    assert not run_command(Chat(model, [], {}), line)


def test_several_lines(path: Path, model: Model) -> None:
    result = talk(path, "One \\", "two\\", "three", '"""', "a", "", "b", '"""', '"""', "not closed")
    assert result.stdout == shown(*answers(model, "One \ntwo\nthree", "a\n\nb", "not closed"))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["a", KeyboardInterrupt, "b", KeyboardInterrupt, KeyboardInterrupt, "c"], ["a", "b"]),
        (['"""', "dropped", KeyboardInterrupt, "a", "dropped \\", KeyboardInterrupt, "b", EOFError], ["a", "b"]),
        (["pasted\nlines", "", "a\\", EOFError, EOFError], ["pasted\nlines", "a\n"]),
        ([EOFError], []),
    ],
)
def test_input_on_a_terminal(typed: list[Any], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C drops what was begun, twice in a row it leaves, as Ctrl-D does."""
    script = iter(typed)

    def key(prompt: str) -> str:
        line = next(script)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(cli_chat_input, "on_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", key)
    assert list(cli_chat_input.inputs(None, cli_chat_input.Interrupts())) == expected


def test_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come back in the next chat: a thousand, for this user's eyes only."""
    readline = pytest.importorskip("readline")
    folder = tmp_path / "cache"
    file = folder / "chat-history"
    monkeypatch.setattr(cli_chat_input, "on_terminal", lambda: True)
    monkeypatch.setattr(cli_chat_input, "user_cache_dir", lambda: folder)

    def talk(*lines: str, keep: bool = True) -> str | None:
        readline.clear_history()
        with cli_chat_input.line_editing(keep):
            last: str | None = readline.get_history_item(readline.get_current_history_length())
            for line in lines:
                readline.add_history(line)
        return last

    try:
        talk("secret", keep=False)
        talk()
        assert not folder.exists()
        talk("one", "two é")
        assert (file.read_text(), file.stat().st_mode & 0o777) == ("one\ntwo é\n", 0o600)
        assert talk(*map(str, range(1100))) == "two é"
        assert file.read_text().split() == [str(i) for i in range(100, 1100)]
        folder = Path(os.devnull)
        assert talk("not kept") is None
    finally:
        readline.clear_history()


def test_an_error_does_not_end_a_chat_on_a_terminal(
    path: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% if messages[-1].content == 'x' %}{{ raise_exception('no x') }}{% endif %}{{ messages | length }}"
    )
    options = ["--chat-template", str(template), *GREEDY]
    assert talk(path, "x", options=options).exit_code == 1
    monkeypatch.setattr(cli_chat, "on_terminal", lambda: True)
    result = talk(path, "x", "One", options=options)
    assert result.exit_code == 0
    assert result.stderr.startswith("error: the model's chat template failed: no x\n")
    assert result.stdout == shown("".join(model.generate("1", temperature=0, max_tokens=6)))


def test_template_options(path: Path, model: Model, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[-1].content }}{{ ' the' if enable_thinking else ' order' }}")

    def ask(text: str, *options: str) -> Result:
        return CliRunner().invoke(main, [str(path), "-p", "One", *GREEDY, "--chat-template-kwargs", text, *options])

    for value, word in (("true", "the"), ("false", "order")):
        expected = "".join(model.generate(f"One {word}", temperature=0, max_tokens=6))
        result = ask(f'{{"enable_thinking": {value}}}', "--chat-template", str(template))
        assert result.stdout == shown(expected)
    for wrong in ("{", "[1]", "no"):
        result = ask(wrong)
        assert result.exit_code == 2
        assert f"error: --chat-template-kwargs is {wrong}; allowed: a JSON object, as " in result.stderr
    assert ask("{}", "--raw").exit_code == 2


def test_ignore_eos(path: Path, model: Model) -> None:
    """Where the model would end its answer at once, it must go on."""
    stop = min(model.tokenizer.stop_ids)
    ends: dict[str, Any] = {"logit_bias": {stop: 1e6}, "temperature": 0, "max_tokens": 5}
    assert "".join(model.generate("One", **ends)) == ""
    text = "".join(model.generate("One", ignore_eos=True, **ends))
    assert (text != "", model.stats.finish, model.stats.n_decoded) == (True, "length", 4)
    options = ["--raw", "-p", "One", "-l", f"{stop}+1000000", "--temp", "0", "-n", "5", "--ignore-eos"]
    assert CliRunner().invoke(main, [str(path), *options]).stdout == shown(text)


def test_commands_are_documented() -> None:
    page = (Path(__file__).parents[3] / "docs/running.md").read_text()
    assert [name for name in COMMANDS if f"`{name}" not in page] == []


def test_tools_and_templates(path: Path, model: Model, tmp_path: Path) -> None:
    tools, template = tmp_path / "tools.json", tmp_path / "t.jinja"
    tools.write_text('[{"type": "function", "function": {"name": "f"}}]')
    template.write_text("{% for t in tools %}{{ t.function.name }} {% endfor %}{{ messages[-1].content }}")

    def ask(*options: Any) -> Result:
        return CliRunner().invoke(main, [str(path), "-p", "One", *GREEDY, *map(str, options)])

    expected = "".join(model.generate("f One", temperature=0, max_tokens=6))
    assert ask("--chat-template", template, "--tools", tools).stdout == shown(expected)
    with_chatml = "".join(
        model.generate("<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n", temperature=0, max_tokens=6)
    )
    assert ask("--chat-template", "chatml").stdout == shown(with_chatml)
    model.chat_template, before = template.read_text(), model.chat_template
    assert model.chat_prompt([{"role": "user", "content": "x"}], json.loads(tools.read_text())) == "f x"
    model.tool_template, before_tools = "tools: {{ tools | length }}", model.tool_template
    assert model.chat_prompt([], json.loads(tools.read_text())) == "tools: 1"
    model.chat_template, model.tool_template = before, before_tools
    for text, message in (("{", "not JSON"), ("{}", "must be a list of objects"), ("[1]", "must be a list of objects")):
        tools.write_text(text)
        result = ask("--tools", tools)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert f"error: --tools {tools}: {message}" in result.stderr
    assert ask("--chat-template", "nope").stderr.startswith("error: --chat-template nope: neither a file nor one of ")
    assert ask("--raw", "--chat-template", "chatml").exit_code == 2


def test_what_the_template_has_no_place_for_is_said_once(path: Path, model: Model, tmp_path: Path) -> None:
    tools, template = tmp_path / "tools.json", tmp_path / "t.jinja"
    tools.write_text('[{"type": "function", "function": {"name": "f"}}]')
    template.write_text("{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}")
    options = ["--chat-template", str(template), "--tools", str(tools), "--system", "the", *GREEDY]
    result = talk(path, "One", "Two", options=options)
    assert result.exit_code == 0
    assert result.stdout.startswith(shown("".join(model.generate("the\nOne;", temperature=0, max_tokens=6))))
    said = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert said == [
        "warning: the chat template has no place for a system message: the user's message begins with it",
        "warning: the chat template has no place for tools: the model does not learn of them",
    ]


def test_a_template_that_takes_too_much(path: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% set s='a'*1000000 %}{{ [[s]]*100000 }}")
    result = CliRunner().invoke(main, [str(path), "-p", "One", "--chat-template", str(template)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: the model's chat template failed: it takes more than 256 MB of memory: "
        "choose another template (--chat-template)\n"
    )


def test_sampling_options(path: Path, model: Model) -> None:
    """They reach the sampler, under the names of llama.cpp."""

    def ask(*options: str) -> Result:
        return CliRunner().invoke(main, [str(path), "--raw", "-p", "the order", "-n", "6", "--seed", "3", *options])

    every = shlex.split(
        "--temp 1.5 --typical 0.9 --top-nsigma 2 --xtc-probability 0.5 --xtc-threshold 0.05 --repeat-penalty 1.1 "
        "--repeat-last-n 8 --presence-penalty 0.1 --frequency-penalty 0.2 --dry-multiplier 0.8 --dry-base 1.5 "
        "--dry-allowed-length 1 --dry-penalty-last-n 32 --dry-sequence-breaker none --dry-sequence-breaker x "
        "--dynatemp-range 0.3 --dynatemp-exp 2 --samplers 'top-k;typ_p;temperature;dry;penalties' -l 5+1.5 -l 6-inf"
    )
    options: dict[str, Any] = {
        "temperature": 1.5, "typical_p": 0.9, "top_n_sigma": 2, "xtc_probability": 0.5, "xtc_threshold": 0.05,
        "repeat_penalty": 1.1, "repeat_last_n": 8, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 1, "dry_penalty_last_n": 32,
        "dry_sequence_breakers": ["x"], "dynatemp_range": 0.3, "dynatemp_exponent": 2, "samplers": "kytde",
        "logit_bias": {5: 1.5, 6: -float("inf")},
    }  # fmt: skip
    expected = "".join(model.generate("the order", max_tokens=6, seed=3, **options))
    assert ask(*every).stdout == shown(expected)
    for mirostat in ("1", "2"):
        assert ask("--mirostat", mirostat, "--mirostat-ent", "2", "--mirostat-lr", "0.2").exit_code == 0
    assert ask("--samplers", "ka", "--adaptive-target", "0.3", "--adaptive-decay", "0.5").exit_code == 0
    for wrong, message in (
        (["-l", "5"], "write a token's id"), (["-l", "x+1"], "write a token's id"),
        (["--mirostat", "3"], "0 (off), 1 or 2"),
        (["-l", "99999+1"], "logit_bias (--logit-bias) of token 99999; allowed: ids from 0 to"),
        (["--samplers", "top_k;nope"], "samplers: 'nope' is not known"), (["--dry-base", "-1"], "dry_base is -1.0"),
    ):  # fmt: skip
        result = ask(*wrong)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize(
    ("pieces", "inside", "expected"),
    [
        (["Hello ", "there"], None, "Hello there"),
        (["<think>a</think>b"], None, f"{DIM}<think>a</think>{PLAIN}b"),
        (["x<th", "ink>a<", "b</thi", "nk> c<"], None, f"x{DIM}<think>a<b</think>{PLAIN} c<"),
        (["a</think>b<think>", "c"], "<think>", f"{DIM}a</think>{PLAIN}b{DIM}<think>c{PLAIN}"),
        (["[THINK]</think>[/THINK]"], None, f"{DIM}[THINK]</think>[/THINK]{PLAIN}"),
        (["<thi"], None, "<thi"),
        ([], "<think>", DIM + PLAIN),
    ],
)  # fmt: skip
def test_dimmed(pieces: list[str], inside: str | None, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "".join(dimmed(pieces, inside)) == expected
    assert "".join(wrapped(dimmed(pieces, inside), lambda: 80)) == expected  # what is held back comes before PLAIN
    assert capsys.readouterr().out == ""
    given_up = dimmed(iter(["<think>a", "b"]), None)
    assert next(given_up) == f"{DIM}<think>"
    given_up.close()
    assert capsys.readouterr().out == PLAIN


def test_open_tag() -> None:
    assert open_tag("<assistant><think>\n") == "<think>"
    assert open_tag("<think>x</think>\n") is None


def test_colours_only_on_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_colours()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours()


def test_no_template(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "chat_template", None)
    with pytest.raises(GgufRunError, match="to chat, name one: --chat-template"):
        model.chat_prompt([])


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_thoughts_on_a_terminal(path: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """The template has begun a block: the answer is dimmed from its first letter on, and the terminal is left plain."""
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[-1].content }}<think>\n\n")
    code = "from gguf_run.runtime.cli.run import main; main(prog_name='gguf-run')"
    terminal, end = pty.openpty()
    arguments = [str(path), "-p", "One", *GREEDY, "--chat-template", str(template)]
    clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"} | environment
    with os.fdopen(terminal, "rb", buffering=0) as output, os.fdopen(end, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], stdout=stdout, stderr=subprocess.PIPE, env=clean, timeout=240
        )
        shown = output.read(1 << 16).decode()
    assert done.returncode == 0
    assert (shown.startswith(DIM), PLAIN in shown) == ((False, False) if environment else (True, True))


def test_ctrl_c_while_a_prompt_is_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is as if never asked, the next one is answered as ever."""
    top, calls = model.decoder.top, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return top(*arguments)

    expected = answers(model, "Two")
    monkeypatch.setattr(model.decoder, "top", interrupted)
    script = iter(["One", "Two"])
    monkeypatch.setattr(cli_chat, "inputs", lambda *_: script)
    messages: list[dict[str, Any]] = []
    cli_chat.chat(model, messages, None, {"temperature": 0, "max_tokens": 6})
    assert [message["content"] for message in messages] == ["Two", *expected]


def test_a_full_context_keeps_the_question(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a conversation that does not end with an answer, as a file of a session may have it."""
    asked: list[list[str]] = []

    def fake(messages: list[dict[str, str]], **_: Any) -> Iterator[str]:
        asked.append([message["content"] for message in messages])
        if len(messages) > 2:
            raise ContextError("too long")
        return iter("A")

    monkeypatch.setattr(model, "chat", fake)
    roles = zip(["system", "user", "user", "user"], "sabc", strict=True)
    state = Chat(model, [{"role": role, "content": text} for role, text in roles], {})
    cli_chat._turn(state, cli_chat_input.Interrupts())
    assert asked == [["s", "a", "b", "c"], ["s", "c"]]
    state.messages[1:] = [{"role": "user", "content": text} for text in "xy"]
    cli_chat._turn(state, cli_chat_input.Interrupts())
    assert asked[2:] == [["s", "x", "y"], ["s", "y"]]

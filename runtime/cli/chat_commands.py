"""The commands that a user can type in a chat, such as /save and /system: one function and one row of COMMANDS each."""

import glob
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import GgufRunError, OptionError, did_you_mean
from gguf_run.runtime.cli.conversation import (
    Conversation,
    answer_facts,
    context_used,
)
from gguf_run.runtime.cli.describe import describe
from gguf_run.runtime.cli.session import check_place
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.terminal.text import message, one_line

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model

SHOWN_MESSAGES, SHOWN_CHARACTERS = 4, 400  # of a conversation that goes on


@dataclass
class Chat:
    """A running chat."""

    model: "Model"
    messages: Conversation
    options: dict[str, Any]  # arguments of Model.chat
    is_over: bool = False  # /exit was typed
    answers: bool = False  # the last message waits for an answer


def run_command(chat: Chat, line: str) -> bool:
    """Run a line that is a command; return False for any other line.

    Errors of a command are shown, and the chat goes on.
    """
    typed, _, rest = line.rstrip().partition(" ") if line.startswith("/") else (line.rstrip(), "", "")
    rest = rest.strip()
    name = ALIASES.get(typed.lower(), typed.lower())
    if name not in COMMANDS:
        # "/usr/bin is full" is a message, "/exti" is a slip.
        if not re.fullmatch(r"/[^\s/.]+", typed):
            return False
        hint = f"{did_you_mean(typed, COMMANDS)}a space before it sends it to the model"
        message(f"{typed} is not a command; there are {', '.join(COMMANDS)} ({hint})")
        return True
    what, command = COMMANDS[name]
    try:
        if what.startswith("FILE") and not rest:
            raise OptionError(f"{name} FILE: name the file")
        command(chat, rest)
    except (GgufRunError, OSError) as error:
        message(f"error: {describe(error)}")
    return True


def completions(line: str) -> list[str]:
    """Return what the last word of a line can become: a command, a file for one that takes a file, an option of /set.

    line: what is typed, up to the cursor.
    """
    name, space, rest = line.partition(" ")
    if not space:
        return [f"{known} " for known in (*COMMANDS, *ALIASES) if name and known.startswith(name)]
    if name == "/set":
        return [f"{known} " for known in _settable() if known.startswith(rest)]
    if name not in COMMANDS or not COMMANDS[name][0].startswith("FILE"):
        return []
    start = rest.rpartition("/")[2]
    at = rest[: len(rest) - len(start)]
    found = sorted(Path(at or ".").expanduser().glob(f"{glob.escape(start)}*"))
    before = rest.rfind(" ") + 1  # a word ends at each space
    return [f"{at}{path.name}{'/' if path.is_dir() else ' '}"[before:] for path in found]


def _save(chat: Chat, name: str) -> None:
    path = Path(name).expanduser()
    check_place(path, "/save")
    chat.model.save_session(path, chat.messages)
    message(f"saved to {path}: {len(chat.messages)} messages")


def _load(chat: Chat, name: str) -> None:
    path = Path(name).expanduser()
    chat.messages[:] = chat.model.load_session(path)
    message(f"{path}: {len(chat.messages)} messages")
    last_turns(chat.messages)


def _reset(chat: Chat, rest: str) -> None:
    del chat.messages[_n_system(chat) :]
    message("forgot the conversation" + ", not the system message" * bool(chat.messages))


def _regenerate(chat: Chat, rest: str) -> None:
    if not chat.messages or chat.messages[-1]["role"] != "assistant":
        raise GgufRunError("/regenerate: there is no answer yet")
    del chat.messages[-1]
    if chat.options.get("seed") is not None:  # the same seed would give the same answer
        chat.options["seed"] = (chat.options["seed"] + 1) % 2**64
    chat.answers = True


def _system(chat: Chat, text: str) -> None:
    del chat.messages[: _n_system(chat)]
    if text:
        chat.messages.insert(0, {"role": "system", "content": text})
    message("the system message is set" if text else "no system message")


def _stats(chat: Chat, rest: str) -> None:
    message(" | ".join([*answer_facts(chat.model), context_used(chat.model)]))


def _settable() -> dict[str, type]:
    """Return what /set can change, with types."""
    types = {option.name: type(option.default) for option in fields(SamplingParams)}
    numbers = {name: type for name, type in types.items() if type in (int, float)}
    return numbers | {"seed": int, "max_tokens": int, "samplers": str}


def _set(chat: Chat, rest: str) -> None:
    settable = _settable()
    name, _, text = rest.replace("=", " ").partition(" ")
    name, text = name.lstrip("-").replace("-", "_"), text.strip()
    if not name:
        message(", ".join(f"{name} {chat.options.get(name)}" for name in settable))
        return
    alike = [known for known in settable if known.startswith(name)]
    name = alike[0] if len(alike) == 1 else name
    if name not in settable or not text:
        raise OptionError(f"/set {rest}: write a name and a value; the names are {', '.join(settable)}")
    try:
        value: Any = settable[name](text)
    except ValueError:
        raise OptionError(f"/set {name}: {text!r} is not a number") from None
    if name == "max_tokens":
        if value < 1:
            raise OptionError(f"max_tokens is {value}; allowed: at least 1")
    else:
        SamplingParams(**{name: value})
    chat.options[name] = value
    message(f"{name} {value}")


def _exit(chat: Chat, rest: str) -> None:
    chat.is_over = True


def _help(chat: Chat, rest: str) -> None:
    for name, (what, _) in COMMANDS.items():
        message(f"{name} {what}")
    message(f"also: {', '.join(ALIASES)}")
    message('A line that ends with \\ goes on in the next one. Lines of """ enclose a message of several lines.')


def _n_system(chat: Chat) -> int:
    return int(bool(chat.messages) and chat.messages[0]["role"] == "system")


COMMANDS: dict[str, tuple[str, Callable[[Chat, str], None]]] = {
    "/save": ("FILE: write the conversation and its KV cache to a file", _save),
    "/load": ("FILE: go on from a file that /save wrote", _load),
    "/reset": ("forget the conversation", _reset),
    "/regenerate": ("answer the last question again", _regenerate),
    "/system": ("TEXT: change the system message", _system),
    "/set": ("NAME VALUE: change an option of sampling or max-tokens; /set alone shows them", _set),
    "/stats": ("show the speed of the last answer, and how full the context is", _stats),
    "/help": ("show this help", _help),
    "/exit": ("end the chat, as Ctrl-D does", _exit),
}
# Other names, some without a slash: a line that holds nothing else.
ALIASES = {"/?": "/help", "/clear": "/reset", "/bye": "/exit", "/quit": "/exit", "exit": "/exit", "quit": "/exit"}


def last_turns(messages: Conversation) -> None:
    """Show how a conversation that comes from a file has ended, each message on a line of its own."""
    for entry in [entry for entry in messages if entry["role"] != "system"][-SHOWN_MESSAGES:]:
        mark = "> " if entry["role"] == "user" else ""
        text = one_line(str(entry.get("content") or ""))
        message(mark + (text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."))

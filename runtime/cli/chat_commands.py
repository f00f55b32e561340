"""The commands that a user can type in a chat, such as /save and /system: one function and one row of COMMANDS each."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.cli.common import describe
from gguf_run.runtime.cli.conversation import Conversation, check_place
from gguf_run.runtime.sampling.params import SamplingParams
from gguf_run.runtime.terminal.text import message

if TYPE_CHECKING:
    from gguf_run.runtime.model import Model


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
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name not in COMMANDS:
        # "/usr/bin is full" is a message, "/exti" is a slip.
        if not (name.startswith("/") and name[1:].isalpha()):
            return False
        message(f"{name} is not a command; there are {', '.join(COMMANDS)} (a space before it sends it to the model)")
        return True
    what, command = COMMANDS[name]
    try:
        if what.startswith("FILE") and not rest:
            raise OptionError(f"{name} FILE: name the file")
        command(chat, rest)
    except (GgufRunError, OSError) as error:
        message(f"error: {describe(error)}")
    return True


def _save(chat: Chat, path: str) -> None:
    check_place(Path(path), "/save")
    chat.model.save_session(path, chat.messages)
    message(f"saved to {path}: {len(chat.messages)} messages")


def _load(chat: Chat, path: str) -> None:
    chat.messages[:] = chat.model.load_session(path)
    message(f"{path}: {len(chat.messages)} messages")


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


def _set(chat: Chat, rest: str) -> None:
    types = {option.name: type(option.default) for option in fields(SamplingParams)}
    settable = {name: type for name, type in types.items() if type in (int, float)}
    settable |= {"seed": int, "max_tokens": int, "samplers": str}
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
    "/help": ("show this help", _help),
    "/exit": ("end the chat, as Ctrl-D does", _exit),
}

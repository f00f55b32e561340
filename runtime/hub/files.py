"""Chooses the GGUF file that `hf:owner/repo[:TYPE]` means, from the names of all files in a repository."""

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.terminal.text import message

# What is wanted: a GGUF file; a checkpoint; or a GGUF file where a repository has one, else the checkpoint.
Kind = Literal["gguf", "checkpoint", "any"]
MAX_SHARDS = 1000
DEFAULT_TYPE = "Q4_K_M"
# The types to try where the user names none and there is no Q4_K_M: about as many bits, then more, then fewer.
_NEXT_BEST = (
    *("Q4_K", "Q4_K_XL", "Q4_K_L", "Q4_K_S", "MXFP4", "MXFP4_MOE", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4"),
    *("Q5_K_M", "Q5_K", "Q5_K_S", "Q5_K_XL", "Q5_K_L", "Q5_1", "Q5_0", "Q6_K", "Q6_K_L", "Q6_K_XL", "Q8_0", "Q8"),
    *("Q3_K_L", "Q3_K_XL", "Q3_K_M", "Q3_K", "Q3_K_S", "BF16", "F16", "FP16", "F32"),
)
_TYPE = re.compile(
    r"(?<![A-Z0-9])(?:(?:UD-)?[IT]?Q\d(?:_[A-Z0-9]{1,3})*|B?F16|FP16|FP?32|(?:NV|MX)FP4(?:_MOE)?)(?![A-Z0-9])", re.I
)
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
# Words for GGUF files that lie beside a model. A word counts where no letters touch it, in folders too.
_DRAFT = r"draft(?:er|s|model)?|assistant|speculative"  # small models that guess the tokens of a large one
_PART = r"eagle|mtp|nextn|medusa|speculators?|heads?|q?loras?|adapters?|control[-_. ]?vectors?|cvec|vocab|clip|imatrix"
_PROJECTOR = r"mmproj|projectors?"  # image encoders
_BESIDE = re.compile(rf"(?<![a-z])(?:(?P<draft>{_DRAFT})|(?P<part>{_PART})|{_PROJECTOR})(?![a-z])", re.I)


def shards(name: str) -> list[str]:
    """Return the names of all files of a split model; of any other model its one name.

    GgufRunError if the name has an impossible number of a part.
    """
    match = _SHARD.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= MAX_SHARDS:
        raise GgufRunError(f"{name}: shard {match['number']} of {match['count']}; allowed are 1 to {MAX_SHARDS} shards")
    return [f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, count + 1)]


def type_of(name: str) -> str:
    """Return the type in a file's name, such as "Q4_K_M" or "UD-Q2_K_XL"; "" if there is none."""
    return next(reversed(_TYPE.findall(name.upper())), "")


def models_among(names: Iterable[str], repo: str = "") -> list[str]:
    """Return the GGUF files that are models; of a split model the first file, if all of its files are there.

    A drafter, an adapter, a projector is no model. But a model's own name may have such a word. Where no other file is
    a model, a file counts if `repo` has the same words. Otherwise drafters count, which are models too.
    Without `repo`, no file with such a word counts.
    """
    known = set(names)

    def is_whole(name: str) -> bool:
        with suppress(GgufRunError):
            return shards(name)[0] == name and known.issuperset(shards(name))
        return False

    words = {name: _words(name) for name in sorted(known) if name.lower().endswith(".gguf") and is_whole(name)}
    own = {(kind, word) for kind, word in _words(repo) if kind}
    found = [name for name in words if not words[name]]
    if repo and not found:
        found = [name for name in words if words[name] <= own]
    if repo and not found:
        found = [name for name in words if all(kind == "draft" or (kind, word) in own for kind, word in words[name])]
    return found


def _words(name: str) -> set[tuple[str | None, str]]:
    """Return the words of a name that tell what lies beside a model, each behind its kind: "draft", "part" or None."""
    return {(match.lastgroup, match[0].lower()) for match in _BESIDE.finditer(name)}


def pick(models: Iterable[str], wanted: str | None) -> list[str]:
    """Return the models of the wanted type, in upper or lower case; "Q4_K_M" is preferred to "UD-Q4_K_M".

    models: names from models_among. wanted: None for Q4_K_M or the next best type.
    The result is empty if no model has the type. It has several names if several models have it.
    """
    types: dict[str, list[str]] = {}
    for name in models:
        types.setdefault(type_of(name), []).append(name)
    plain = {key.removeprefix("UD-"): names for key, names in types.items() if key.startswith("UD-")} | types
    if wanted is not None:
        return plain.get(wanted.upper(), [])
    order = [key for key in (DEFAULT_TYPE, *_NEXT_BEST) if key in plain] + sorted(plain)
    return plain[order[0]] if order else []


def choose(repo: str, wanted: str | None, names: Iterable[str]) -> str:
    """Return the file that hf:repo[:wanted] means. Say so on stderr if its type is not the default.

    names: of all files in the repository. GgufRunError, which lists the types there are, if no file or more than one
    has the type.
    """
    names = list(names)
    models = models_among(names, repo)
    found = pick(models, wanted)
    types = ", ".join(sorted({type_of(name) for name in models} - {""})) or ", ".join(models)
    if not models:
        hint = f"; its checkpoint can be run: gguf-run hf:{repo} --quantize {wanted or DEFAULT_TYPE}, or gguf-convert"
        others = [name for name in names if name.lower().endswith(".gguf")]
        beside = f"; by their names these are none: {', '.join(others)}" if others else ""
        raise GgufRunError(f"hf:{repo} has no GGUF files of models{beside}{hint if 'config.json' in names else ''}")
    if not found:
        raise GgufRunError(f"hf:{repo}:{wanted}: no file of this type in the repository; it has {types}")
    if len(found) > 1:
        raise GgufRunError(f"hf:{repo} has several such files: name one: {', '.join(f'hf:{repo}/{n}' for n in found)}")
    if wanted is None and type_of(found[0]) != DEFAULT_TYPE and len(models) > 1:
        message(f"hf:{repo} has no {DEFAULT_TYPE}: taking {found[0]} (it has {types})")
    return found[0]

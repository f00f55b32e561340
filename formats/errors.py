"""The errors a user can meet. The command line prints them as one line and exits with 1."""

from collections.abc import Iterable

_MOST_CHARACTERS = 1000  # of a message


def plain(text: str) -> str:
    """Return text from a file in a form that is safe to show: on one line, what is not printable as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}"


class GgufRunError(Exception):
    """Base: one line that says what was found, what was allowed and what to do.

    What files hold is shown in a plain form. A long message is cut in its middle, as its end says what to do.
    """

    def __init__(self, text: str) -> None:
        super().__init__(_shortened(plain(_shortened(text))))


class FormatError(GgufRunError):
    """A file is not what it must be. Names the file and the place in it."""


class UnsupportedError(GgufRunError):
    """A file is valid, but holds something that this program does not know."""


class OptionError(GgufRunError):
    """An option's value is not allowed. Names the option, the value and what is allowed; command lines exit with 2."""


def did_you_mean(name: str, allowed: Iterable[str], cutoff: float = 0.75) -> str:
    """Return "did you mean ...? " for a name that is nearly one of those allowed, else "". cutoff: 1 is equal."""
    from difflib import get_close_matches

    known = {other.lower(): other for other in allowed}
    near = get_close_matches(name.lower(), known, n=1, cutoff=cutoff)
    return f"did you mean {known[near[0]]}? " if near else ""


def check_names(options: Iterable[str], allowed: Iterable[str]) -> None:
    """OptionError for a keyword that is not allowed: it names the nearest one, or all if none is near."""
    allowed = sorted(allowed)
    for name in options:
        if name not in allowed:
            hint = did_you_mean(name, allowed, cutoff=0.5).strip() or f"allowed: {', '.join(allowed)}"
            raise OptionError(f"{name} is not an option; {hint}")

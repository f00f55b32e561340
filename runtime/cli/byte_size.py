"""Sizes that options name, as 500M."""

import re

from gguf_run.formats.errors import OptionError

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


def byte_size(text: str | None, option: str = "--split-max-size") -> int:
    """Return the bytes that an option such as "500M" or "2G" means; None means 0."""
    if not text:
        return 0
    match = re.fullmatch(r"([1-9]\d{0,9})([KMG]?)", text.upper())
    if match is None:
        raise OptionError(f"{option} {text}: must be a number of bytes, as 500M or 2G")
    return int(match[1]) * _UNITS.get(match[2], 1)

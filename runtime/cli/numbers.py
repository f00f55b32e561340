"""Numbers of the command line, in llama-bench's form."""

import re
from collections.abc import Sequence

from gguf_run.formats.errors import OptionError

MAX_TESTS = 10_000
MOST = 2**31 - 1


def parse_values(option: str, texts: Sequence[str], lowest: int, highest: int = MOST) -> list[int]:
    """Return the numbers that an option names: "8", "1,2,4", "1-8", "128-512+128" or "1-64*2".

    texts: one for each use of the option. OptionError for anything else, and for numbers below lowest or above highest.
    """
    values: list[int] = []
    for part in (part for text in texts for part in text.split(",")):
        match = re.fullmatch(r"\s*(\d{1,10})(?:-(\d{1,10})(?:([+*])(\d{1,10}))?)?\s*", part)
        if match is None:
            raise OptionError(
                f"{option} {part!r}: must be numbers or ranges with commas between them: 512, 1-8, 128-512+128, 1-64*2"
            )
        first, last, sign, step = int(match[1]), int(match[2] or match[1]), match[3], int(match[4] or 1)
        if last < first or (first * step if sign == "*" else first + step) <= first < last:
            raise OptionError(f"{option} {part!r}: this range never reaches its end")
        if first == last:
            values.append(first)
        elif sign == "*":
            values += [value for i in range(last.bit_length()) if (value := first * step**i) <= last]
        else:
            values += range(first, last + 1, step)[: MAX_TESTS + 1]
        if not (lowest <= first and last <= highest) or len(values) > MAX_TESTS:
            raise OptionError(
                f"{option} {part!r}: allowed are {lowest} to {highest}, at most {MAX_TESTS} numbers in all"
            )
    return values

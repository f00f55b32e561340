"""Tables that fit the terminal: a row that is too wide goes on in further lines, and nothing is left out."""

import sys
from collections.abc import Iterable, Iterator, Sequence

from gguf_run.runtime.terminal.text import n_columns

_INDENT = "  "  # of a row's further lines


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str, width: int | None = None) -> Iterator[str]:
    """Yield the lines of a table.

    align: "l" or "r" for each column.
    width: the most columns of a line; None: as many as the terminal of stdout has, or any number where there is none.
    """
    most = n_columns(sys.stdout) if width is None else width
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    if sum(widths) + 2 * len(widths) - 2 > most:
        widths = [min(n, most // 2) for n in widths]  # long texts must not push short ones away
    for row in [head, *rows]:
        cells = [
            cell.rjust(n) if side == "r" else cell.ljust(n) for cell, n, side in zip(row, widths, align, strict=True)
        ]
        yield from fold(cells, _INDENT, most)


def fold(cells: Iterable[str], between: str, width: int) -> Iterator[str]:
    """Yield a row as lines of at most `width` columns. A line ends between two cells, or within one that is longer."""
    line, is_first = "", True
    for cell in cells:
        joined = cell if is_first else line + between + cell
        if not is_first and len(joined.rstrip()) > width:
            yield line.rstrip()
            joined = _INDENT + cell.strip()
        line, is_first = joined, False
        while len(line.rstrip()) > width:
            yield line[:width]
            line = _INDENT + line[width:]
    yield line.rstrip()

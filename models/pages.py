"""Pages of the KV cache: which are in use, and which tokens the others still hold.

A page has PAGE positions of one sequence, in the caches of all layers with the same window. Page 7 is in the same place
in each of these caches, so one table serves all of them. A page may belong to several sequences that begin alike.

A page that nobody uses keeps its rows until it is taken for new ones. Until then an index finds it by its tokens and
all tokens before them. The least recently used page is taken first. A sequence releases its last page first, so the
pages at the ends of texts go before the beginnings that other texts may share.
"""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.frozen import frozen

PAGE = 64  # positions of a page
NO_PAGE = -1  # in place of the number of a page


class CacheFullError(GgufRunError):
    """No page is free."""


@frozen(eq=False)
class PageTable:
    """The pages of all sequences, for the layers with one window. Kernels read it during a step."""

    window: int  # positions that the layers look back on; 0: all
    n_pages: int  # in the cache of each layer
    pages: NDArray[np.int32]  # [n_seq, n]: the page that has positions PAGE * i .. PAGE * (i + 1) of a sequence
    versions: NDArray[np.int64]  # [n_seq]: changes with each row of `pages`

    @classmethod
    def new(cls, window: int, n_ctx: int, n_batch: int, n_seq: int, n_cells: int | None = None) -> "PageTable":
        """Return the table of n_seq sequences of up to n_ctx tokens, of which n_batch are appended at once.

        n_cells: positions that the cache has for all sequences together; None: n_ctx for each.
        """
        n_pages = pages_stored(window, n_ctx, n_batch, n_seq, n_cells)
        pages = np.full((n_seq, -(-n_ctx // PAGE)), NO_PAGE, np.int32)
        return cls(window, n_pages, pages, np.zeros(n_seq, np.int64))


def pages_stored(window: int, n_ctx: int, n_batch: int, n_seq: int, n_cells: int | None = None) -> int:
    """Return the pages of a layer's cache, see PageTable.new: for all positions, or for windows and batches.

    The window begins in the middle of a page, and so does the batch. One page more keeps the last tokens before the
    window, so that tokens can be taken back.
    """
    full = -(-n_ctx // PAGE)
    if window and (few := (window + n_batch - 2) // PAGE + 3) < full:
        return n_seq * few
    return n_seq * full if n_cells is None else -(-n_cells // PAGE)


class Node:
    """The tokens of a page that follow those of another page. The root of a tree has no tokens."""

    __slots__ = ("children", "key", "pages", "parent")

    def __init__(self, parent: "Node | None", key: bytes, n_pools: int) -> None:
        self.parent, self.key = parent, key  # the token ids as int32
        self.pages = [NO_PAGE] * n_pools  # the page in each pool
        self.children: dict[bytes, Node] = {}


class Pool:
    """Pages with the same number in one group of caches: how many sequences use each, and which are free.

    The slots of recurrent states are such a pool too.
    """

    def __init__(self, number: int, n_pages: int) -> None:
        self.number = number  # place in Node.pages
        self.uses = [0] * n_pages
        self.nodes: list[Node | None] = [None] * n_pages  # where the index has the page
        self.free = OrderedDict.fromkeys(range(n_pages))  # pages without uses, the next to be taken first

    def take(self, after: int = NO_PAGE) -> int:
        """Return a free page for new rows. It is forgotten what the page held.

        after: the page of the positions before. The page behind it comes first: kernels stream through neighbours.

        Raises CacheFullError if no page is free.
        """
        if not self.free:
            raise CacheFullError(f"the KV cache is full: all of its {len(self.uses)} pages are in use")
        page = after + 1
        if page not in self.free or self.nodes[page] is not None:
            page = next(iter(self.free))
        del self.free[page]
        self.forget(page)
        self.uses[page] = 1
        return page

    def share(self, page: int) -> int:
        """Count one more use of a page. Return the page."""
        self.free.pop(page, None)
        self.uses[page] += 1
        return page

    def release(self, page: int) -> None:
        """Count one use less. A page without uses stays findable until it is taken."""
        self.uses[page] -= 1
        if not self.uses[page]:
            self.free[page] = None
            if self.nodes[page] is None:
                self.free.move_to_end(page, last=False)

    def forget(self, page: int) -> None:
        """Take a page out of the index. A node without any page goes; so does one without its page of all positions."""
        node, self.nodes[page] = self.nodes[page], None
        if node is None:
            return
        node.pages[self.number] = NO_PAGE
        if node.parent is not None and (not self.number or not any(page != NO_PAGE for page in node.pages)):
            node.parent.children.pop(node.key, None)

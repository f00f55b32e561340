"""Pages of the KV cache: which are in use, and which tokens the others still hold.

A page has PAGE positions of one sequence, in the caches of all layers with the same window. Page 7 is in the same place
in each of these caches, so one table serves all of them. A page may belong to several sequences that begin alike.

A page that nobody uses keeps its rows until it is taken for new ones. Until then an index finds it by its tokens and
all tokens before them. The least recently used page is taken first. A sequence releases its last page first, so the
pages at the ends of texts go before the beginnings that other texts may share.
"""

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.frozen import frozen

PAGE = 64  # positions of a page
NO_PAGE = -1  # in place of the number of a page
_MOST_CHILDREN = 64  # that are compared with a text


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


class PrefixIndex:
    """Finds pages by their tokens and by all tokens before. The tokens themselves are compared, no hash of them."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools
        self._roots: dict[Hashable, Node] = {}

    def root(self, key: Hashable) -> Node:
        """Return the root of the texts with this key. A root without texts goes when another one is made."""
        if key not in self._roots:
            self._roots = {known: node for known, node in self._roots.items() if node.children}
            self._roots[key] = Node(None, b"", len(self._pools))
        return self._roots[key]

    def find(self, root: Hashable, ids: Sequence[int]) -> list[Node]:
        """Return the nodes of the first pages of a text, as far as they are known."""
        found: list[Node] = []
        node = self._roots.get(root)
        tokens = np.asarray(ids, np.int32)
        while node is not None and (start := PAGE * len(found)) + PAGE <= len(ids):
            node = node.children.get(tokens[start : start + PAGE].tobytes())
            if node is not None:
                found.append(node)
        return found

    def add(self, parent: Node, ids: Sequence[int], pages: Sequence[int]) -> Node:
        """Return the node of PAGE tokens that follow those of `parent`. It gets the pages that it has none of.

        pages: the page of these tokens in each pool, or NO_PAGE.
        """
        key = np.asarray(ids, np.int32).tobytes()
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(parent, key, len(self._pools))
        for pool, page in zip(self._pools, pages, strict=True):
            if page != NO_PAGE and node.pages[pool.number] == NO_PAGE and pool.nodes[page] is None:
                node.pages[pool.number], pool.nodes[page] = page, node
        return node

    def beside(self, node: Node, ids: Sequence[int]) -> tuple[Node | None, int]:
        """Return which of a node's latest children begins with the most of the given ids, and how many they are."""
        wanted = np.asarray(ids[:PAGE], np.int32)
        best: tuple[Node | None, int] = None, 0
        for key, child in itertools.islice(reversed(node.children.items()), _MOST_CHILDREN):
            same = np.frombuffer(key, np.int32)[: len(wanted)] == wanted
            n = len(same) if same.all() else int(same.argmin())
            if n > best[1]:
                best = child, n
        return best

"""Finds pages by their tokens and by all tokens before. The tokens themselves are compared, no hash of them."""

import itertools
from collections.abc import Hashable, Sequence

import numpy as np

from gguf_run.models.pages import NO_PAGE, PAGE, Node, Pool

_MOST_CHILDREN = 64  # that are compared with a text


class PrefixIndex:
    """Trees of pages, one for each root."""

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

"""Where the bits of a panel's integers are (panels.py), for the kernels that make and read them.

A plane is 64 bytes: 4 for each row. Vectors are stored in parts of 1, 2, 4 or 8 bits, lowest bits first. A part of w
bits takes w planes: vector i is in plane i % w, at bit w * (i // w).

In a paired panel, which has scales of 16 columns and few bits, the sums of both halves of a block fit in 16 bits, and
one product multiplies both with their scales. There vectors 4..7 stand 2 bits higher than vectors 0..3, in the same
planes, so that most of them need no shift. A part of 2 bits has vectors 0, 4, 1, 5 in its first plane and 2, 6, 3, 7 in
the second, from the lowest bits up. A part of 1 bit has vectors 6, 7, 0, 1, 4, 5, 2, 3. The scales:

    k4   [16][2] bytes, of the halves of a block. Low nibbles: scales, high nibbles: minimums
    k3   [16][2] bytes, of the halves of the first of two blocks. Bits 0..5: scales + 32, bits 6..7: the highest bits of
         those of the second block. Then [16] bytes with the low nibbles of those of the second block, first half first
"""

from collections.abc import Iterator

from gguf_run.kernels_cpu.panels.panels import IntPanel

HIGHER = 2  # bits that vectors 4..7 of a paired panel stand higher than vectors 0..3
PARTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # bits of a stored u -> bits of its parts


def is_paired(panel: IntPanel) -> bool:
    """Whether a panel is paired."""
    return panel.scales.name in ("k3", "k4")


def bit_places(panel: IntPanel, i: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (plane, bit of the plane, bit of u, mask) for each part of vector i."""
    first = bit = 0
    for width in PARTS[panel.bits]:
        plane, at = i % width, width * (i // width)
        if is_paired(panel):
            plane, at = (i % 4 // 2, i % 2 * 4 + i // 4 * 2) if width == 2 else (0, (2, 3, 6, 7, 4, 5, 0, 1)[i])
        yield first + plane, at, bit, (1 << width) - 1
        first, bit = first + width, bit + width

"""Panels: the GPU's form of a weight matrix. Each row is cut into units whose quants fill one 16-byte vector load.

Integer panels hold weight = scale * (u - offset) (+ minimum) with unsigned u, or scale * book[u]. They are planes, each
[n_out][n_unit]:

    qs     16 bytes a unit (8 bits: two planes [n_out][2][n_unit])
    high   the bits of u above those of qs, 4 or 8 bytes a unit
    scale  see SCALES
    d      the factors that the scales of 256 weights share: f16 d, or the pair (d, dmin)

A unit is 32 weights, 64 where qs has 2 bits. Weight 16 f + b of a unit (field f, b in 0..15) has

    bits  qs                                high 1 bit: of byte         at bit      high 2 bits: of byte   at bit
    8     byte b of plane f
    4     byte b, bits 4f .. 4f+3           b % 4                       4f + b/4    4f + b % 4             2 (b/4)
    2     byte b, bits 2f .. 2f+1           4 (f/2) + b % 4             4 (f % 2) + b/4

The four bytes of a 32-bit word take their high bits from the same bit of four bytes: one shift and one mask.

Float panels hold the numbers of the file. Their units are 16 bytes too; zeros fill up the rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gguf_run.formats.blocks.coded import CODED_FORMS
from gguf_run.formats.blocks.types import CODEBOOKS
from gguf_run.formats.blocks.unpack import INTEGER_FORMS

VECTOR = 16  # bytes that a thread loads at once
FACTOR = 256  # weights that share d

# How scales are stored: bytes of a unit's scales (0: one for each group), bytes of d for 256 weights.
SCALES = {
    "f16": (2, 0),  # f16 for each 32 weights
    "f16m": (4, 0),  # f16 and an f16 minimum for each 32 weights
    "k4": (4, 4),  # 4 bits and a minimum of 4 bits for each 16 weights
    "k6m": (2, 4),  # a byte and a minimum's byte for each 32 weights
    "k8": (0, 2),  # int8 for each group
    "e8m0": (1, 0),  # an exponent for each 32 weights
}


@dataclass(frozen=True)
class IntPanel:
    """A panel of integers. Kernels are compiled for a panel: they take the object as a constant."""

    bits: int  # of u that are in qs
    high: int  # bits of u above those of qs
    group: int  # weights that share a scale
    scales: str  # a key of SCALES
    offset: int
    book: tuple[int, ...] = ()  # the 16 values that u stands for, int8; none: u stands for itself

    @property
    def unit(self) -> int:
        """Weights of a unit."""
        return 64 if self.bits == 2 else 32

    @property
    def qs_bytes(self) -> int:
        """Bytes of a unit's qs."""
        return self.unit * self.bits // 8

    @property
    def high_bytes(self) -> int:
        """Bytes of a unit's high bits."""
        return self.unit * self.high // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of a unit's scales."""
        return SCALES[self.scales][0] or self.unit // self.group

    @property
    def d_bytes(self) -> int:
        """Bytes of d for FACTOR weights."""
        return SCALES[self.scales][1]

    @property
    def book_words(self) -> tuple[int, ...] | None:
        """The book as four int32."""
        return tuple(np.array(self.book, np.int8).view(np.int32).tolist()) if self.book else None

    def row_bytes(self, n_in: int) -> int:
        """Bytes of a row of n_in weights, all planes together."""
        unit_bytes = self.qs_bytes + self.high_bytes + self.scale_bytes
        return n_in // self.unit * unit_bytes + n_in // FACTOR * self.d_bytes


@dataclass(frozen=True)
class FloatPanel:
    """A panel of floats. Kernels take it as they take an IntPanel."""

    scales: str  # the type: "F32", "F16" or "BF16"
    bits: int
    high: ClassVar = 0
    group: ClassVar = 0
    offset: ClassVar = 0
    book_words: ClassVar = None

    @property
    def unit(self) -> int:
        """Weights of a unit."""
        return 8 * VECTOR // self.bits

    def row_bytes(self, n_in: int) -> int:
        """Bytes of a row of n_in weights, filled up to whole units."""
        return -(-n_in // self.unit) * VECTOR


Panel = IntPanel | FloatPanel


def _int_panel(name: str, bits: int, high: int, scales: str) -> IntPanel:
    form = INTEGER_FORMS[name]
    book = CODEBOOKS.get(form.codebook, ())
    offset = 0 if book or bits == 8 else -form.q_min  # 8 bits stay signed
    assert book or form.q_max + offset < 1 << (bits + high)
    return IntPanel(bits, high, form.group, scales, offset, book)


# fmt: off
_ROWS = (
    ("Q4_0",   4, 0, "f16"),
    ("Q4_1",   4, 0, "f16m"),
    ("Q5_0",   4, 1, "f16"),
    ("Q5_1",   4, 1, "f16m"),
    ("Q8_0",   8, 0, "f16"),
    ("Q2_K",   2, 0, "k4"),
    ("Q3_K",   2, 1, "k8"),
    ("Q4_K",   4, 0, "k6m"),
    ("Q5_K",   4, 1, "k6m"),
    ("Q6_K",   4, 2, "k8"),
    ("IQ4_NL", 4, 0, "f16"),
    ("IQ4_XS", 4, 0, "k8"),
    ("MXFP4",  4, 0, "e8m0"),
)
# fmt: on
PANELS: dict[str, Panel] = {
    "F32": FloatPanel("F32", 32),
    "F16": FloatPanel("F16", 16),
    "BF16": FloatPanel("BF16", 16),
} | {row[0]: _int_panel(*row) for row in _ROWS}


# Types that a panel holds with rounding: INT8's scales to f16, the weights of coded types to f16.
ROUNDED = {"INT8": "Q8_0"} | dict.fromkeys(CODED_FORMS, "F16")


def panel_for(type_name: str) -> Panel:
    """Return the panel of a tensor type, see ROUNDED. Types without a panel of their own are F32, exactly."""
    return PANELS.get(ROUNDED.get(type_name, type_name), PANELS["F32"])


def matrix_bytes(type_name: str, n_in: int, n_out: int) -> int:
    """Return the bytes of a matrix as a panel."""
    return n_out * panel_for(type_name).row_bytes(n_in)

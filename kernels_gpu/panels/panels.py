"""Panels: the GPU's form of a weight matrix. Each row is cut into units whose quants fill one 16-byte vector load.

Integer panels hold weight = scale * (u - offset) (+ minimum) with unsigned u, or scale * book[u], as planes of their
own, each [n_out][n_unit]:

    qs     16 bytes a unit (8 bits: two planes [n_out][2][n_unit])
    high   the bits of u above those of qs, 4 or 8 bytes a unit
    scale  see SCALES
    d      the factors that the scales of 256 weights share: f16 d, or the pair (d, dmin)

A unit is 32 weights, 64 where qs has 2 bits. Weight 16 f + b of a unit (field f, b in 0..15) has

    bits  qs                                high 1 bit: of byte         at bit      high 2 bits: of byte   at bit
    8     byte b of plane f
    4     byte b, bits 4f .. 4f+3           b % 4                       4f + b/4    4f + b % 4             2 (b/4)
    2     byte b, bits 2f .. 2f+1           4 (f/2) + b % 4             4 (f % 2) + b/4

so that the four bytes of a 32-bit word take their high bits from the same bit of four bytes: one shift and one mask.

Float panels hold the numbers of the file; their units are 16 bytes too. Rows are filled up with zeros.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gguf_run.formats.blocks import grids
from gguf_run.formats.blocks.unpack import INTEGER_FORMS

VECTOR = 16  # bytes that a thread loads at once
FACTOR = 256  # weights that share d

# Bytes of scales for a unit of (32, 64) weights, and of d for 256. f16: one per 32 weights. f16m: and a minimum. k4: a
# nibble and a minimum per 16. k6m: a byte and a minimum's byte per 32. k8: an int8 per group. e8m0: an exponent per 32.
SCALES = {"f16": (2, 0), "f16m": (4, 0), "k4": (4, 4), "k6m": (2, 4), "k8": (0, 2), "e8m0": (1, 0)}


@dataclass(frozen=True)
class IntPanel:
    """bits, high: of u in qs and above them. group: weights per scale. book: u stands for a value of it."""

    bits: int
    high: int
    group: int
    scales: str
    offset: int
    book: tuple[int, ...] = ()

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
        return self.unit * self.high // 8

    @property
    def scale_bytes(self) -> int:
        return SCALES[self.scales][0] or self.unit // self.group

    @property
    def d_bytes(self) -> int:
        """Bytes for FACTOR weights."""
        return SCALES[self.scales][1]

    def row_bytes(self, n_in: int) -> int:
        unit_bytes = self.qs_bytes + self.high_bytes + self.scale_bytes
        return n_in // self.unit * unit_bytes + n_in // FACTOR * self.d_bytes

    @property
    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for."""
        book = np.array(self.book or (0,) * 16, np.int8).view(np.int32).tolist()
        names = {"BITS": self.bits, "HIGH": self.high, "GROUP": self.group, "SCALES": self.scales}
        return names | {"OFFSET": self.offset, "BOOK": tuple(book) if self.book else None}


@dataclass(frozen=True)
class FloatPanel:
    """name: F32, F16 or BF16."""

    name: str
    element_bytes: int

    @property
    def unit(self) -> int:
        return VECTOR // self.element_bytes

    def row_bytes(self, n_in: int) -> int:
        return -(-n_in // self.unit) * VECTOR

    @property
    def constants(self) -> dict[str, Any]:
        names = {"BITS": 8 * self.element_bytes, "HIGH": 0, "GROUP": 0, "SCALES": self.name}
        return names | {"OFFSET": 0, "BOOK": None}


Panel = IntPanel | FloatPanel


def _int_panel(name: str, bits: int, high: int, scales: str, book: Any = None) -> IntPanel:
    form = INTEGER_FORMS[name]
    if book is not None:
        return IntPanel(bits, high, form.group, scales, 0, tuple(book().tolist()))
    offset = 0 if bits == 8 else -form.q_min  # 8 bits stay signed
    assert form.q_max + offset < 1 << (bits + high)
    return IntPanel(bits, high, form.group, scales, offset)


# fmt: off
_ROWS: tuple[tuple[Any, ...], ...] = (
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
    ("IQ4_NL", 4, 0, "f16", grids.iq4_nl),
    ("IQ4_XS", 4, 0, "k8", grids.iq4_nl),
    ("MXFP4",  4, 0, "e8m0", grids.e2m1),
)
# fmt: on
PANELS: dict[str, Panel] = {
    "F32": FloatPanel("F32", 4),
    "F16": FloatPanel("F16", 2),
    "BF16": FloatPanel("BF16", 2),
} | {name: _int_panel(name, *row) for name, *row in _ROWS}


def panel_for(type_name: str) -> Panel:
    """The panel that holds a tensor type exactly. Types that have none of their own go through F32."""
    return PANELS.get(type_name, PANELS["F32"])


def matrix_bytes(type_name: str, n_in: int, n_out: int) -> int:
    """Bytes of a matrix as panels: what placement counts with."""
    return n_out * panel_for(type_name).row_bytes(n_in)

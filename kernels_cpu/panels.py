"""Panels: the CPU's form of a weight matrix. 16 rows are interleaved so that one vector load feeds 16 rows.

Integer panels hold weight = scale * (u - offset) (+ minimum) with unsigned u, in blocks of 16 rows x 32 columns:

    scale    [n_groups][16] f16 or f32      n_groups = 1 (a scale per 32 weights) or 2 (per 16)
    minimum  [n_groups][16]                 the same, if the type has minimums
    quants   [planes][16][4] u8             see below; byte c of row r in vector i of all is column 4i+c of the block

    8 bits:  8 vectors                      vector i as it is
    4 bits:  4 vectors                      vector i in the low nibbles of plane i, vector 4+i in its high nibbles
    5 bits:  4 + 1                          ... and bit i of the last plane is the fifth bit of vector i
    6 bits:  4 + 2                          ... and bits 2i, 2i+1 of plane 4 (5) are the top bits of vector i (4+i)

Float panels hold [n_in][16] numbers. Both are lossless: a type whose integers or scales fit no narrower shape takes a
wider one (K-quants: f32 scales, the product of the file's two factors, which f32 holds exactly).
"""

from dataclasses import dataclass

from llvmlite import ir

from gguf_run.formats.unpack import INTEGER_FORMS, IntegerForm
from gguf_run.kernels_cpu.simd import F16, F32, I16

ROWS = 16  # rows of a panel: f32 lanes of a 64-byte vector
BLOCK = 32  # columns of a block of an integer panel


@dataclass(frozen=True)
class IntPanel:
    """bits: width of a stored u, 4, 5, 6 or 8. dot_bits: u is below 2^dot_bits. offset: 0 or a power of two."""

    bits: int
    dot_bits: int
    offset: int
    group: int
    half_scales: bool
    has_minimum: bool

    @property
    def n_groups(self) -> int:
        return BLOCK // self.group

    @property
    def scale_bytes(self) -> int:
        """Bytes of one row of 16 scales."""
        return ROWS * (2 if self.half_scales else 4)

    @property
    def head_bytes(self) -> int:
        """Bytes of all scales and minimums of a block."""
        return self.scale_bytes * self.n_groups * (2 if self.has_minimum else 1)

    @property
    def step_bytes(self) -> int:
        """Bytes of a step of `tile`: a block."""
        return self.block_bytes

    @property
    def block_bytes(self) -> int:
        return self.head_bytes + ROWS * BLOCK * self.bits // 8

    def group_bytes(self, n_in: int) -> int:
        """Bytes of 16 rows of n_in columns."""
        return n_in // BLOCK * self.block_bytes


@dataclass(frozen=True)
class FloatPanel:
    """element: F32, F16, or I16 for the bits of a bfloat16."""

    name: str
    element: ir.Type
    element_bytes: int

    @property
    def step_bytes(self) -> int:
        """Bytes of a step of `tile`: a column."""
        return ROWS * self.element_bytes

    def group_bytes(self, n_in: int) -> int:
        return n_in * ROWS * self.element_bytes


# Types whose scales and minimums stand in the file as f16.
_HALF_SCALES = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"})


def _int_panel(form: IntegerForm) -> IntPanel:
    """The narrowest panel that holds the type exactly."""
    offset = 0
    while offset < -form.q_min:
        offset = max(1, 2 * offset)
    dot_bits = (form.q_max + offset).bit_length()
    half = form.type.name in _HALF_SCALES
    bits = max(4, dot_bits) if dot_bits <= 6 else 8
    return IntPanel(bits, dot_bits, offset, form.group, half, form.has_minimum)


Panel = IntPanel | FloatPanel
FLOAT_PANELS: dict[str, Panel] = {
    "F32": FloatPanel("F32", F32, 4),
    "F16": FloatPanel("F16", F16, 2),
    "BF16": FloatPanel("BF16", I16, 2),
}
# Which panel each tensor type is repacked into. Types that are missing here go through F32.
PANEL_OF: dict[str, Panel] = FLOAT_PANELS | {name: _int_panel(form) for name, form in INTEGER_FORMS.items()}
# Kernels are compiled for a panel given as a literal integer: its place in this list.
PANELS: tuple[Panel, ...] = tuple(dict.fromkeys(PANEL_OF.values()))


def panel_for(type_name: str) -> Panel:
    """The panel that holds a tensor type exactly."""
    return PANEL_OF.get(type_name, FLOAT_PANELS["F32"])


def matrix_bytes(type_name: str, n_in: int, n_out: int) -> int:
    """Bytes of a matrix as panels."""
    return -(-n_out // ROWS) * panel_for(type_name).group_bytes(n_in)


def panel_id(panel: Panel) -> int:
    """The panel's number, the compile-time constant of its kernels."""
    return PANELS.index(panel)

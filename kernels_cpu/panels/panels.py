"""Panels: the CPU's form of a weight matrix. 16 rows are interleaved so that one vector load feeds 16 rows.

Integer panels hold weight = scale * (u - offset) (+ minimum) with unsigned u, as a sequence of spans. A span is 16 rows
x `span` columns: first the scales of all its steps, then the quants of all its steps.

    factors  [1 or 2][16] f16          only where a span's scales share a factor: d, and -dmin if there are minimums
    scales   per step                  see SCALES
    quants   per 32 columns: [planes][16][4] u8

A plane is 64 bytes. Unpacked, a block is eight vectors of 64 bytes: byte c of row r of vector i is column 4i+c. They
are stored in parts of 1, 2, 4 or 8 bits, lowest bits first: a part of w bits takes w planes; vector i is in plane i % w
of them, at bit w * (i // w). So 4 bits are vectors 0..3 in the low nibbles of 4 planes and 4..7 in the high ones; 5
bits are these and a plane with the fifth bits; 6 bits have a part of 4 and one of 2.

Float panels hold [n_in][16] numbers. Both are lossless, and as narrow as the file for the types that people use.
"""

from dataclasses import dataclass

from llvmlite import ir

from gguf_run.formats.blocks import grids
from gguf_run.formats.blocks.unpack import INTEGER_FORMS, IntegerForm
from gguf_run.kernels_cpu.vector.simd import F16, F32, I8, I16

ROWS = 16  # rows of a panel: f32 lanes of a 64-byte vector
BLOCK = 32  # columns of a block of activations, and of a set of planes


@dataclass(frozen=True)
class Scales:
    """How scales are stored. step: columns that are decoded together; field: bytes per row for each scale or, with
    minimums, for each of both; shared: a span has a factor for them. The fields of a step are [field][16] bytes."""

    name: str
    step: int
    shared: bool
    field: float


# k4: a byte, scale in the low and minimum in the high nibble. k6: four numbers of 6 bits in three bytes, whose two top
# bits make the fourth; less 32 if there are no minimums. k8: an int8. e8m0: an exponent, see formats/blocks/scalars.py.
# none: all scales are 1.
SCALES = {
    row.name: row
    for row in (
        Scales("f16", 32, False, 2),
        Scales("f32", 32, False, 4),
        Scales("e8m0", 32, False, 1),
        Scales("none", 32, False, 0),
        Scales("k4", 32, True, 0.5),
        Scales("k6", 64, True, 0.75),
        Scales("k8", 32, True, 1),
    )
}
PARTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # of a stored u: see above


@dataclass(frozen=True)
class IntPanel:
    """bits: width of a stored u, or of its code: u = codebook[code] + offset if there is one. dot_bits: u is below
    2^dot_bits. offset: 0 or a power of two. group: columns per scale. span: columns whose heads stand together."""

    bits: int
    dot_bits: int
    offset: int
    group: int
    scales: Scales
    has_minimum: bool
    span: int
    codebook: tuple[int, ...] = ()

    @property
    def columns(self) -> int:
        """Columns of a step of `tile`."""
        return self.scales.step

    @property
    def n_steps(self) -> int:
        """Steps of a span."""
        return self.span // self.columns

    @property
    def n_factors(self) -> int:
        """Rows of 16 factors at the head of a span."""
        return (1 + self.has_minimum) * self.scales.shared

    @property
    def head_bytes(self) -> int:
        """Bytes of the scales and minimums of a step."""
        return int(ROWS * self.columns // self.group * (1 + self.has_minimum) * self.scales.field)

    @property
    def quants_at(self) -> int:
        """Bytes of a span before its quants."""
        return 2 * ROWS * self.n_factors + self.n_steps * self.head_bytes

    @property
    def step_bytes(self) -> int:
        """Bytes of the quants of a step."""
        return ROWS * self.columns * self.bits // 8

    @property
    def span_bytes(self) -> int:
        return self.quants_at + self.n_steps * self.step_bytes

    def group_bytes(self, n_in: int) -> int:
        """Bytes of 16 rows of n_in columns."""
        return n_in // self.span * self.span_bytes


@dataclass(frozen=True)
class FloatPanel:
    """element: F32, F16, I16 for the bits of a bfloat16, I8 for those of a float of 8 bits."""

    name: str
    element: ir.Type
    element_bytes: int
    columns: int = 1  # of a step of `tile`

    @property
    def step_bytes(self) -> int:
        """Bytes of a step of `tile`: a column."""
        return ROWS * self.element_bytes

    def group_bytes(self, n_in: int) -> int:
        return n_in * ROWS * self.element_bytes


# Types whose scales and minimums stand in the file as f16, or in another form than f32 that has fewer bits.
_HALF_SCALES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0")
_SCALES = dict.fromkeys(_HALF_SCALES, "f16") | {
    "Q2_K": "k4",
    "Q3_K": "k6",
    "Q4_K": "k6",
    "Q5_K": "k6",
    "Q6_K": "k8",
    "IQ4_XS": "k8",
    "MXFP4": "e8m0",
}
_CODEBOOKS = {"IQ4_NL": grids.iq4_nl, "IQ4_XS": grids.iq4_nl, "MXFP4": grids.e2m1, "NVFP4": grids.e2m1}  # of 16 values


def _int_panel(form: IntegerForm) -> IntPanel:
    """The narrowest panel that holds the type exactly."""
    name = form.type.name
    offset = 0
    while offset < -form.q_min:
        offset = max(1, 2 * offset)
    dot_bits = (form.q_max + offset).bit_length()
    scales = SCALES[_SCALES.get(name, "f32")]
    assert scales.shared == form.shared
    bits = max(2, dot_bits) if dot_bits <= 6 else 8
    span = form.type.block_size if form.shared else scales.step
    if name in _CODEBOOKS:
        book = tuple(int(value) for value in _CODEBOOKS[name]())
        return IntPanel(4, dot_bits, offset, form.group, scales, form.has_minimum, span, book)
    return IntPanel(bits, dot_bits, offset, form.group, scales, form.has_minimum, span)


Panel = IntPanel | FloatPanel
FLOAT_PANELS: dict[str, Panel] = {
    "F32": FloatPanel("F32", F32, 4),
    "F16": FloatPanel("F16", F16, 2),
    "BF16": FloatPanel("BF16", I16, 2),
}
# Which panel each tensor type is repacked into. Types that are missing here go through F32.
PANEL_OF: dict[str, Panel] = FLOAT_PANELS | {name: _int_panel(form) for name, form in INTEGER_FORMS.items()}
# Panels of KV caches only (cache_types.py); scales of theirs stand elsewhere.
CACHE_PANELS: dict[str, Panel] = {
    "INT8": IntPanel(8, 8, 128, BLOCK, SCALES["none"], False, BLOCK),
    "E4M3": FloatPanel("E4M3", I8, 1),
    "E5M2": FloatPanel("E5M2", I8, 1),
}
# Kernels are compiled for a panel given as a literal integer: its place in this list.
PANELS: tuple[Panel, ...] = tuple(dict.fromkeys([*PANEL_OF.values(), *CACHE_PANELS.values()]))


def panel_for(type_name: str) -> Panel:
    """The panel that holds a tensor type exactly."""
    return PANEL_OF.get(type_name, FLOAT_PANELS["F32"])


def matrix_bytes(type_name: str, n_in: int, n_out: int) -> int:
    """Bytes of a matrix as panels."""
    return -(-n_out // ROWS) * panel_for(type_name).group_bytes(n_in)


def panel_id(panel: Panel) -> int:
    """The panel's number, the compile-time constant of its kernels."""
    return PANELS.index(panel)

"""Panels: the CPU's form of a weight matrix. 16 rows are interleaved so that one vector load feeds 16 rows.

An integer panel holds weight = scale * (u - offset) (+ minimum) with unsigned u. It is a sequence of spans. A span is
16 rows x `span` columns, cut into steps of scales.step columns: first the scales of all its steps, then their quants.

    factors  [1 or 2][16] f16                where the scales of a span share a factor: d; -dmin if there are minimums
    scales   for each step                   see SCALES
    quants   for each block of 32 columns    [planes][16][4] u8

A plane is 64 bytes: 4 for each row. Unpacked, a block is eight vectors of 64 bytes: byte c of row r of vector i is
column 4i + c. planes.py says where their bits are in the planes. For example

    4 bits   vectors 0..3 in the low nibbles of 4 planes, vectors 4..7 in the high nibbles
    5 bits   the same, and a plane with the fifth bits
    6 bits   a part of 4 bits and a part of 2 bits

A float panel holds [n_in][16] numbers. Both kinds are lossless, and as narrow as the file for the common types.

A coded panel holds the codes of a type of formats/blocks/coded.py: first all scales, f32, filled up to whole cache
lines, then the codes in steps of 64 bytes. A word of 16 bits has the FP8 codes of columns 2i and 2i + 1 of a row. A
byte has codes of 4 bits of both, lowest bits first. An integer panel of type INT8 begins with the scales of its rows,
[16] f32, and has no others.

An integer panel is multiplied with int8 activations. They are blocks of 32 columns, one cache line each:

    byte  0   32 int8 values, never -128
    byte 32   f32 d: number = d * value
    byte 36   i32 -32 * sums of values 0..31, 0..15, 16..31
    byte 48   f32 d * each of these sums (not times -32)
    byte 60   i16 sums of values 0..15, 16..31
"""

from collections.abc import Iterable
from typing import ClassVar

from llvmlite import ir

from gguf_run.formats.blocks.coded import CODED_FORMS, CODES_OF_4_BITS, CodedForm
from gguf_run.formats.blocks.types import CODEBOOKS
from gguf_run.formats.blocks.unpack import INTEGER_FORMS, IntegerForm
from gguf_run.formats.frozen import frozen

ROWS = 16  # rows of a panel: f32 lanes of a 64-byte vector
BLOCK = 32  # columns of a block of activations, and of a set of planes
TOKENS = 8  # tokens of a tile, at most (Isa.tokens). A batch is computed in whole tiles: buffers have spare rows
X_BLOCK_BYTES = 64  # of a block of activations, and where its fields are
X_D, X_SUMS, X_D_SUMS, X_PAIR = 32, 36, 48, 60
X_SUM_FACTOR = -32  # dot products of 6 bits begin at the sum with this factor: their integers have an offset of 32
LARGEST_FINE = 127 * 256 + 127  # a number of two bytes, both signed: see IntPanel.fine


@frozen
class Scales:
    """How scales, and minimums, are stored. The fields of a step are [field][16] bytes."""

    name: str
    step: int  # columns whose scales are decoded together
    shared: bool  # whether a span has a factor for its scales
    field: float  # bytes in a row for each scale (with minimums: for each scale and each minimum)
    types: str = ""  # tensor types with these scales


SCALES = {
    row.name: row
    for row in (
        Scales("f16", 32, False, 2, "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL TQ1_0 TQ2_0 Q1_0 Q2_0"),
        Scales("f32", 32, False, 4),  # all other types
        Scales("f32 64", 64, False, 2, "NF4 FP4"),  # one for 64 columns, over LARGEST_FINE
        Scales("e8m0", 32, False, 1, "MXFP4"),  # an exponent, see formats/blocks/scalars.py
        Scales("none", 32, False, 0),  # all scales are 1
        Scales("row", 32, False, 0, "INT8"),  # one for each row, in front of all spans
        Scales("k4", 32, True, 0.5, "Q2_K"),  # see planes.py
        Scales("k3", 64, True, 0.75, "Q3_K"),  # see planes.py
        # Three bytes: four numbers of 6 bits, the fourth made of the top bits of the bytes.
        Scales("k6", 64, True, 0.75, "Q4_K Q5_K"),
        Scales("k8", 32, True, 1, "Q6_K IQ4_XS"),  # an int8
    )
}


@frozen
class IntPanel:
    """The layout of an integer panel."""

    bits: int  # of a stored u, or of its code
    dot_bits: int  # u is below 2^dot_bits
    offset: int  # 0 or a power of two
    group: int  # columns of a scale
    scales: Scales
    has_minimum: bool
    span: int  # columns of a span
    codebook: tuple[int, ...] = ()  # if not empty: u = codebook[code] + offset
    fine: tuple[int, ...] = ()  # if not empty: 256 * codebook[code] + fine[code] is multiplied, in two products

    @property
    def columns(self) -> int:
        """Columns of a step of `tile`."""
        return self.scales.step

    @property
    def n_steps(self) -> int:
        """Steps of a span."""
        return self.span // self.columns

    @property
    def rows_at(self) -> int:
        """Bytes of a panel before its spans: the scales of its rows."""
        return 4 * ROWS * (self.scales.name == "row")

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
        """Bytes of a span."""
        return self.quants_at + self.n_steps * self.step_bytes

    def group_bytes(self, n_in: int) -> int:
        """Return the bytes of 16 rows of n_in columns."""
        return self.rows_at + n_in // self.span * self.span_bytes


@frozen
class FloatPanel:
    """The layout of a float panel."""

    name: str
    element: ir.Type  # as in memory; bfloat16 and floats of 8 bits are integers: their bits
    element_bytes: int
    columns: int = 1  # of a step of `tile`

    @property
    def step_bytes(self) -> int:
        """Bytes of a step of `tile`: a column."""
        return ROWS * self.element_bytes

    def group_bytes(self, n_in: int) -> int:
        """Return the bytes of 16 rows of n_in columns."""
        return n_in * ROWS * self.element_bytes


@frozen
class CodedPanel:
    """The layout of a coded panel."""

    name: str
    table: tuple[float, ...]  # what codes of 4 bits stand for; (): they are FP8
    span: int  # columns of a scale; 0: all
    shared: bool  # whether 16 rows share their scales

    element: ClassVar = ir.IntType(8)
    step_bytes: ClassVar = 64

    @property
    def columns(self) -> int:
        """Columns of a step."""
        return 8 if self.table else 4

    def n_scales(self, n_in: int) -> int:
        """Return the number of scales of 16 rows of n_in columns."""
        return (n_in // self.span if self.span else 1) * (1 if self.shared else ROWS)

    def group_bytes(self, n_in: int) -> int:
        """Return the bytes of 16 rows of n_in columns."""
        return -(-self.n_scales(n_in) // ROWS) * 4 * ROWS + n_in // self.columns * self.step_bytes


def _coded_panel(form: CodedForm) -> CodedPanel:
    name, shared = form.type.name.removeprefix("FP8_").removesuffix("_128"), form.type.name.endswith("_128")
    table = tuple(form.table.tolist()) if len(form.table) == 16 else ()
    return CodedPanel(name, table, form.type.block_size if table or shared else 0, shared)


def _panel_of_4_bits(form: CodedForm) -> IntPanel:
    """Return a panel whose integers of 16 bits are at most 1 / 65278 of d from the numbers of the table."""
    high, low = zip(*(divmod(round(v * LARGEST_FINE) + 128, 256) for v in form.table.tolist()), strict=True)
    fine = tuple(byte - 128 for byte in low)
    return IntPanel(4, 8, 128, BLOCK, SCALES["f32 64"], False, form.type.block_size, high, fine)


def _int_panel(form: IntegerForm) -> IntPanel:
    """Return the narrowest panel that holds a tensor type exactly."""
    offset = 1 << (-form.q_min - 1).bit_length() if form.q_min < 0 else 0
    dot_bits = (form.q_max + offset).bit_length()
    bits = max(2, dot_bits) if dot_bits <= 6 else 8
    scales = next((row for row in SCALES.values() if form.type.name in row.types.split()), SCALES["f32"])
    assert scales.shared == form.shared
    book = CODEBOOKS.get(form.codebook, ())  # a panel holds the codes
    bits = 4 if book else bits
    span = form.type.block_size if form.shared else scales.step
    return IntPanel(bits, dot_bits, offset, form.group, scales, form.has_minimum, span, book)


# What load_floats leaves out: f16 has e5m2's exponent, but one more bit than e4m3's, with another bias.
FLOAT8_FACTOR = {"E4M3": 256.0, "E5M2": 1.0}
PlainPanel = IntPanel | FloatPanel
Panel = PlainPanel | CodedPanel
FLOAT_PANELS: dict[str, PlainPanel] = {
    "F32": FloatPanel("F32", ir.FloatType(), 4),
    "F16": FloatPanel("F16", ir.HalfType(), 2),
    "BF16": FloatPanel("BF16", ir.IntType(16), 2),
}
PLAIN_PANELS: dict[str, PlainPanel] = FLOAT_PANELS | {name: _int_panel(form) for name, form in INTEGER_FORMS.items()}
# The panel that each tensor type is repacked into. Types that are missing here go through F32.
PANEL_OF: dict[str, Panel] = {**PLAIN_PANELS, **{name: _coded_panel(form) for name, form in CODED_FORMS.items()}}
PANEL_OF |= {name: _panel_of_4_bits(CODED_FORMS[name]) for name in CODES_OF_4_BITS}
# Panels of KV caches only. Their scales are elsewhere (attention/cache_types.py).
CACHE_PANELS: dict[str, PlainPanel] = {
    "INT8": IntPanel(8, 8, 128, BLOCK, SCALES["none"], False, BLOCK),
    "E4M3": FloatPanel("E4M3", ir.IntType(8), 1),
    "E5M2": FloatPanel("E5M2", ir.IntType(8), 1),
}
# Kernels are compiled for a panel given as a literal integer: its place in this list.
PANELS: tuple[Panel, ...] = tuple(dict.fromkeys([*PANEL_OF.values(), *CACHE_PANELS.values()]))


def panel_for(type_name: str) -> Panel:
    """Return the panel that holds a tensor type exactly."""
    return PANEL_OF.get(type_name, FLOAT_PANELS["F32"])


def matrix_bytes(type_name: str, n_in: int, n_out: int) -> int:
    """Return the bytes of a matrix as panels."""
    return -(-n_out // ROWS) * panel_for(type_name).group_bytes(n_in)


def x_stride(n_in: int) -> int:
    """Return the bytes from a row of activation blocks to the next one: an odd number of cache lines.

    The rows of a tile are read side by side. At distances of 4 kB all would fall on the same few places of the
    first-level cache: batches of 4-bit types take 10 % longer with AVX2 (Zen 4), and nothing clear with AVX-512.
    """
    return -(-n_in // BLOCK) * X_BLOCK_BYTES | X_BLOCK_BYTES


def panel_sizes(panel: Panel, n_in: int) -> dict[str, int]:
    """Return the fields of a kernel that describe panels of n_in columns."""
    return {"n_steps": n_in // panel.columns, "group_bytes": panel.group_bytes(n_in)}


def panel_id(panel: Panel) -> int:
    """Return the place of a panel in PANELS, the compile-time constant of its kernels."""
    return PANELS.index(panel)


def main_panel(sizes: Iterable[tuple[str, int]]) -> int:
    """Return the place in PANELS of the panel that holds most bytes of tensors, given as (type, bytes)."""
    total = [0] * len(PANELS)
    for type_name, n_bytes in sizes:
        total[panel_id(panel_for(type_name))] += n_bytes
    return total.index(max(total))

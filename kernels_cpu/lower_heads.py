"""A matrix for each head: the products, and the columns of a head that follow as they are."""

from gguf_run.formats.errors import UnsupportedError
from gguf_run.kernels_cpu.matmul.matmul import matmul
from gguf_run.kernels_cpu.panels.memory import CpuWeight
from gguf_run.kernels_cpu.panels.panels import BLOCK, X_BLOCK_BYTES, IntPanel, panel_id, panel_sizes
from gguf_run.kernels_cpu.rows.embed import copy_columns
from gguf_run.kernels_cpu.tape import Rows, Tape
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import MatmulHeads


def lower_heads(tape: Tape, op: MatmulHeads[CpuWeight]) -> None:
    """Append the product of all heads, and the copy of the other columns if there are any."""
    part, n_in, n_out = op.weight.parts[0], op.weight.n_in, op.weight.n_out
    n_x, n_to, is_int = op.x.width // op.n_head, op.out.width // op.n_head, isinstance(part.panel, IntPanel)
    if is_int and n_x % BLOCK:
        raise UnsupportedError(f"heads of {n_x} columns are no whole blocks of {BLOCK}; convert the model to F16")
    numbers = {"n_out": n_out, "w_head": part.data.nbytes // op.n_head, "out_head": 4 * n_to, "residual_group": 0}
    numbers |= {"x_head": n_x // BLOCK * X_BLOCK_BYTES if is_int else 4 * n_x, **panel_sizes(part.panel, n_in)}
    x: Buffer | Rows = tape.form(op.x, part.panel)
    tape.record(op, matmul(panel_id(part.panel)), w=part.data, x=x, residual=tape.zeros, bias=None, **numbers)
    if n_x > n_in:
        x, out = op.x.columns(n_in, op.x.width - n_in), op.out.columns(n_out, op.out.width - n_out)
        tape.record(op, copy_columns, x=x, out=out, n_copied=n_x - n_in, x_head=4 * n_x, out_head=4 * n_to)

"""What products of heads have beside the matmul kernel: the columns of a head that follow as they are."""

<<<<<<<< HEAD:kernels_cpu/matmul/heads.py
from gguf_run.kernels_cpu.replay.op import row_op
from gguf_run.kernels_cpu.vector.native import f32_at


@row_op("rows n_head n_copied x x_stride x_head out out_stride out_head")
def copy_columns(a, first, end):
    """out = n_copied columns of each head of x. x_head, out_head: bytes from one head to the next."""
    for t in range(first, end):
        for head in range(a.n_head):
            source = f32_at(a.x + t * a.x_stride + head * a.x_head, a.n_copied)
            out = f32_at(a.out + t * a.out_stride + head * a.out_head, a.n_copied)
            for i in range(a.n_copied):
                out[i] = source[i]
========
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
>>>>>>>> foundation:kernels_cpu/lower_heads.py

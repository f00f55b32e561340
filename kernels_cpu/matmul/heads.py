"""What products of heads have beside the matmul kernel: the columns of a head that follow as they are."""

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

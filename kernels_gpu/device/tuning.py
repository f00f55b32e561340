"""Which kernels a GPU likes, and the limits that the kernels set. Without torch: sizes.py counts with these numbers."""

from dataclasses import dataclass

FEW = 8  # the most tokens whose products are those of matmul_decode; more go through f16 and tensor cores
WIDTH = 1024  # columns of a program of the kernels that work on rows
SCRATCH = 1 << 26  # weights that are f16 in memory at a time
ROWS = 32  # buffers have a multiple of this many rows, so that kernels for few tokens need no masks


def padded(n_row: int) -> int:
    """Return the rows of memory for n_row rows."""
    return -(-n_row // ROWS) * ROWS


@dataclass(frozen=True)
class Tuning:
    """How an architecture likes its kernels."""

    # Tokens up to which matmul_mma is faster than dequantizing to memory and multiplying there.
    small: int = 128
    # Of matmul_mma, by the most tokens of a program: tiles of a warp, programs for each multiprocessor.
    mma: tuple[tuple[int, int, int], ...] = ((32, 2, 3), (64, 1, 3))
    tile: tuple[int, int] = (64, 4)  # rows and units of a tile of expert_tile
    # Rows of a program of matmul_decode by the number of tokens.
    rows: tuple[tuple[int, int], ...] = ((1, 4), (2, 2), (4, 2), (8, 1))
    programs: int = 264  # of attention for a few tokens: two for each multiprocessor

    def n_row(self, n_token: int) -> int:
        """Rows of a program of matmul_decode for n_token tokens."""
        return dict(self.rows)[n_token]

    def mma_tiles(self, m: int) -> tuple[int, int]:
        """Return tiles of a warp, and about how many programs, of matmul_mma for m tokens of a program."""
        tiles, n_program = next((tiles, n) for most, tiles, n in self.mma if m <= most)
        return tiles, n_program * self.programs // 2


DEFAULT = Tuning()
AMD = Tuning(small=0)  # matmul_mma is written for NVIDIA's tensor cores
# By compute capability; others take DEFAULT. Computed, not measured: two programs on each multiprocessor of an A100,
# RTX 3090, RTX 4090, H100 and B200. Tiles: 8 to 15 instructions a weight (Q4_K), whose memory is read once.
# Dequantizing: 8 instructions, and four bytes more to write and to read.
TUNINGS = {
    80: Tuning(programs=216),
    86: Tuning(programs=164),
    89: Tuning(programs=256),
    90: Tuning(programs=264),
    100: Tuning(programs=256),
}
MOST_PROGRAMS = max(tuning.programs for tuning in (DEFAULT, *TUNINGS.values()))

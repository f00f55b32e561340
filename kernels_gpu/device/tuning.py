"""Which kernels a GPU likes, and the limits that the kernels set. Without torch: sizes.py counts with these numbers."""

from dataclasses import dataclass

FEW = 8  # the most tokens whose products are those of matmul_decode; more go through f16 and tensor cores
GRAPHS = (1, 2, 4, FEW, 16, 24, 32, 48, 64, 96, 128)  # steps of so many tokens are captured, others are filled up
SHORT = 16  # the most tokens of a run in a step for answers: the last one and guesses behind it
WIDTH = 1024  # columns of a program of the kernels that work on rows
SCRATCH = 1 << 26  # weights that are f16 in memory at a time
ROWS = 32  # buffers have a multiple of this many rows, so that steps can be filled up


def padded(n_row: int) -> int:
    """Return the rows of memory for n_row rows."""
    return -(-n_row // ROWS) * ROWS


@dataclass(frozen=True)
class Tuning:
    """How an architecture likes its kernels."""

    # Tokens up to which matmul_mma is faster than dequantizing to memory and multiplying there.
    small: int = 128
    # Of matmul_mma: the most tokens of a program, tiles of a warp, programs for each multiprocessor.
    mma: tuple[tuple[int, int, int], ...] = ((16, 2, 3), (32, 2, 3), (64, 1, 3))
    tile: tuple[int, int] = (64, 4)  # rows and units of a tile of expert_tile
    dense: tuple[int, int] = (16, 8)  # rows and units of a program that dequantizes to memory
    # Rows of a program of matmul_decode by the number of tokens.
    rows: tuple[tuple[int, int], ...] = ((1, 4), (2, 2), (4, 2), (8, 1))
    programs: int = 264  # of attention: about two for each multiprocessor
    multiprocessors: int = 132

    def n_row(self, n_token: int) -> int:
        """Rows of a program of matmul_decode for n_token tokens."""
        return dict(self.rows)[n_token]

    def mma_tiles(self, m: int) -> tuple[int, int]:
        """Return tiles of a warp, and about how many programs, of matmul_mma for m tokens of a program."""
        return next((tiles, n * self.multiprocessors) for most, tiles, n in self.mma if m <= most)


DEFAULT = Tuning()
AMD = Tuning(small=0)  # matmul_mma is written for NVIDIA's tensor cores
# By compute capability; others take DEFAULT. Computed, not measured: programs for an A100, RTX 3090, RTX 4090, H100 and
# B200. matmul_mma takes 3 to 4.5 instructions a weight (Q4_K) for up to 64 tokens, whose memory is read once.
# Dequantizing takes 8 instructions, and four bytes more to write and to read.
TUNINGS = {
    80: Tuning(programs=216, multiprocessors=108),
    86: Tuning(programs=164, multiprocessors=82),
    89: Tuning(programs=256, multiprocessors=128),
    90: Tuning(programs=264, multiprocessors=132),
    100: Tuning(programs=256, multiprocessors=148),
}
MOST_PROGRAMS = max(tuning.programs for tuning in (DEFAULT, *TUNINGS.values()))
# Numbers that the programs of matmul_mma store for the last one to add: 64 rows a tile of each of four warps.
MOST_SUMS = max(64 * m * t * n * tuning.multiprocessors for tuning in TUNINGS.values() for m, t, n in tuning.mma)

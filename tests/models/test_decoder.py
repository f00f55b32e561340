"""The decoder on tiny models, against a plain float64 implementation of the whole model and against transformers."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_backend import NumpyBackend, NumpyProgram
from plain_model import reference
from tinymodel import ALL_BIASES, AWKWARD_LLAMA, QKV, TINY_GEMMA3, WIDE_LLAMA, Tiny, write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.tensors import Tensor
from gguf_run.models import config as model_config
from gguf_run.models.architectures import Architecture
from gguf_run.models.backend import Results, Run
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder

IDS = [(7 * i * i + 3 * i + 1) % 270 for i in range(40)]
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 32}
# Llama 3's rule for n_rot 32, base 1e4, factor 8, low 1, high 4, original context 64, as its converter writes it.
LLAMA3_FREQS = [1.0, 1.0, 1.293975834596038, 2.765173281967546, 7.6673851260097665, *[8.0] * 11]
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Decoder]:
    """Write a model and open it in a decoder over one NumPy backend."""

    def build(tiny: Tiny, *, dtype: Any = np.float64, backend: Any = None, n_ctx: int = 64, **options: Any) -> Decoder:
        write_tiny(tmp_path / "tiny.gguf", tiny)
        file = GGUFFile.open(tmp_path / "tiny.gguf")
        config = ModelConfig.from_metadata(file.metadata, file.tensors)
        return Decoder(config, file.tensors, [backend or NumpyBackend(dtype)] * config.n_layer, n_ctx, **options)

    return build


def all_logits(decoder: Decoder, ids: Sequence[int], n_outputs: int | None = None) -> np.ndarray:
    blocks = [block.copy() for block in decoder.forward(ids, len(ids) if n_outputs is None else n_outputs)]
    return np.concatenate(blocks) if blocks else np.empty((0, decoder.config.n_vocab))


def plain_freqs(tiny: Tiny) -> np.ndarray:
    return tiny.rope_freq_base ** -(np.arange(tiny.head_dim // 2) / (tiny.head_dim // 2))


SMALLER = IDS[:14]
REFERENCE_CASES = {
    "llama": (Tiny(n_layer=1), plain_freqs(Tiny())),
    "awkward": (AWKWARD_LLAMA, plain_freqs(AWKWARD_LLAMA) / AWKWARD_LLAMA.rope_freqs),
    "linear": (Tiny(n_layer=1, metadata=LINEAR), plain_freqs(Tiny()) / 4),
    "one kv head, bias of q, k and v": (Tiny(n_layer=1, n_head_kv=1, head_dim=10, biases=QKV, seed=3), None),
    "gemma3": (TINY_GEMMA3, plain_freqs(TINY_GEMMA3)),
    "gemma3 linear": (replace(TINY_GEMMA3, metadata=LINEAR), plain_freqs(TINY_GEMMA3) / 4),
    "gemma3 without window": (replace(TINY_GEMMA3, window=0, n_layer=1), plain_freqs(TINY_GEMMA3)),
    "K-quants": (replace(WIDE_LLAMA, n_layer=1, type="Q4_K", types={"attn_v": "Q6_K", "token_embd": "Q8_0"}), None),
    "legacy": (Tiny(n_layer=1, type="Q5_1", types={"ffn_down": "Q4_0"}, biases=ALL_BIASES, tied=False), None),
}


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_logits_are_those_of_a_plain_implementation(case: str, tmp_path: Path, build: Callable[..., Decoder]) -> None:
    tiny, inv_freq = REFERENCE_CASES[case]
    weights = write_tiny(tmp_path / "reference.gguf", tiny)
    expected = reference(tiny, weights, SMALLER, plain_freqs(tiny) if inv_freq is None else inv_freq)
    # Metadata holds float32: eps and bases differ in the 8th digit.
    assert all_logits(build(tiny), SMALLER) == pytest.approx(expected, abs=2e-6)
    # float32 arithmetic has 24 bits; errors add up over widths of some hundreds and a few layers.
    assert all_logits(build(tiny, dtype=np.float32), SMALLER) == pytest.approx(expected, abs=1e-4)


# Logits [0, 50, 100, 200] of the last of 40 tokens: transformers 5.23 in float64, the same weights, its own RoPE code.
TRANSFORMERS = [
    (Tiny(), [-0.0151253, 0.3324508, -0.3101291, 0.4133556]),
    (AWKWARD_LLAMA, [0.2972067, -1.5562425, 1.1700702, -0.0352940]),
    (Tiny(metadata=LINEAR), [-0.2863649, 0.7548892, -0.6383499, 1.5763228]),
    (Tiny(metadata=YARN), [-0.7228239, 0.3090031, -1.0555689, 0.0963749]),
    (Tiny(rope_freqs=LLAMA3_FREQS, biases=(*QKV, "attn_output")), [1.9039654, 0.2687299, 0.1042693, 2.6326982]),
    (TINY_GEMMA3, [1.2412294, 1.4810182, -1.1152259, -1.1046828]),
]


@pytest.mark.parametrize(
    ("tiny", "logits"), TRANSFORMERS, ids=["llama", "awkward", "linear", "yarn", "llama3", "gemma3"]
)
def test_logits_are_those_of_transformers(tiny: Tiny, logits: list[float], build: Callable[..., Decoder]) -> None:
    (last,) = build(tiny).forward(IDS)
    assert last[0, [0, 50, 100, 200]] == pytest.approx(logits, abs=2e-5)


def test_an_architecture_with_fused_tensors_is_one_entry(
    tmp_path: Path, build: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Phi-3 has them: q, k and v in one tensor, gate and up in one that is called ffn_up."""
    tiny = Tiny(n_layer=1)
    weights = write_tiny(tmp_path / "parts.gguf", tiny)
    fusions = {"attn_qkv": QKV, "ffn_up": ("ffn_gate", "ffn_up")}
    tensors: dict[str, Any] = {f"blk.0.{part}.weight": None for parts in fusions.values() for part in parts}
    for name, parts in fusions.items():
        tensors[f"blk.0.{name}.weight"] = np.concatenate([weights[f"blk.0.{part}.weight"] for part in parts])
    fused = Architecture("llama", qkv=("attn_qkv",), gate_up=("ffn_up",), shapes={"ffn_up": ("n_embd", "n_ff+n_ff")})
    expected = all_logits(build(tiny), IDS)
    monkeypatch.setattr(model_config, "architecture", lambda name: fused)
    assert all_logits(build(replace(tiny, tensors=tensors)), IDS) == pytest.approx(expected, abs=1e-10)


@dataclass
class Spy(NumpyBackend):
    """Notes every run of its program: (tokens, n_past, first row, number of rows)."""

    passes: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(np.float64)

    def program(self, *arguments: Any) -> NumpyProgram:
        spy = self

        class SpyProgram(NumpyProgram):
            def run(self, ids: np.ndarray, runs: Sequence[Run], rows: Sequence[int], *more: int) -> Results:
                ((seq, n_past, n_tokens, *_),) = runs
                assert (seq, n_tokens) == (0, len(ids))
                spy.passes.append((n_tokens, n_past, min(rows, default=0), len(rows)))
                return super().run(ids, runs, rows, *more)

        return SpyProgram(self, *arguments)


@pytest.mark.parametrize("tiny", [AWKWARD_LLAMA, TINY_GEMMA3], ids=["llama", "gemma3"])
def test_batches_and_blocks_do_not_change_logits(tiny: Tiny, build: Callable[..., Decoder]) -> None:
    whole = all_logits(build(tiny), IDS)
    for n_batch, n_outputs in [(40, 7), (16, 64), (7, 3), (1, 1)]:
        assert all_logits(build(tiny, n_batch=n_batch, n_outputs=n_outputs), IDS) == pytest.approx(whole, abs=1e-10)
    decoder = build(tiny)
    pieces = [all_logits(decoder, IDS[start:stop]) for start, stop in itertools.pairwise([0, 1, 12, 13, 30, 40])]
    assert np.concatenate(pieces) == pytest.approx(whole, abs=1e-10)
    decoder = build(tiny, n_batch=16, n_outputs=4)
    for n_outputs in (0, 1, 5, 12, 39):
        decoder.rewind(0)
        assert all_logits(decoder, IDS, n_outputs) == pytest.approx(whole[40 - n_outputs :], abs=1e-10)


def test_blocks_are_small_and_unwanted_logits_are_not_computed(
    build: Callable[..., Decoder],
) -> None:
    spy = Spy()
    decoder = build(Tiny(), backend=spy, n_batch=16, n_outputs=4)
    assert list(decoder.forward(IDS, 0)) == []
    assert spy.passes == [(16, 0, 0, 0), (16, 16, 0, 0), (8, 32, 0, 0)]
    decoder.rewind(0)
    spy.passes.clear()
    assert [len(block) for block in decoder.forward(IDS, 19)] == [4, 4, 3, 4, 4]
    assert spy.passes == [(16, 0, 0, 0), (16, 16, 5, 4), (8, 32, 0, 4)]
    assert [len(block) for block in decoder.forward([1])] == [1]
    assert spy.passes[-1] == (1, 40, 0, 1)


def test_batches_without_wanted_logits_run_at_once(build: Callable[..., Decoder]) -> None:
    decoder = build(Tiny(), n_batch=16)
    blocks = decoder.forward(IDS)
    assert decoder.n_past == 32
    assert next(blocks).shape == (1, decoder.config.n_vocab)
    assert decoder.n_past == 40
    assert decoder.forward([], 0) is not None
    assert decoder.n_past == 40


@pytest.mark.parametrize("tiny", [Tiny(), TINY_GEMMA3], ids=["llama", "gemma3"])
def test_rewind_forgets(tiny: Tiny, build: Callable[..., Decoder]) -> None:
    whole = all_logits(build(tiny), IDS)
    decoder = build(tiny)
    all_logits(decoder, IDS[:20])
    all_logits(decoder, [3] * 10)
    decoder.rewind(20)
    assert all_logits(decoder, IDS[20:]) == pytest.approx(whole[20:], abs=1e-10)
    for n_past in (-1, 41):
        with pytest.raises(ValueError, match="40 tokens are in the context"):
            decoder.rewind(n_past)


def test_rope_freqs_are_used(build: Callable[..., Decoder]) -> None:
    plain = all_logits(build(Tiny()), IDS)
    ones = all_logits(build(Tiny(rope_freqs=[1.0] * 16)), IDS)
    factors = all_logits(build(Tiny(rope_freqs=[1.0] * 15 + [0.5])), IDS)
    assert (plain == ones).all()
    assert abs(plain[0] - factors[0]).max() < 1e-12  # position 0 does not turn
    assert abs(plain[-1] - factors[-1]).max() > 1e-3


def test_context_size(build: Callable[..., Decoder]) -> None:
    decoder = build(Tiny(n_ctx=16), n_ctx=41)  # longer than the model was trained for: the caller's affair
    all_logits(decoder, IDS)
    assert len(all_logits(decoder, [1])) == 1
    with pytest.raises(GgufRunError, match=r"41 tokens are in it, 1 more do not fit into 41;.*larger context") as error:
        decoder.forward([1])
    assert "\n" not in str(error.value)
    decoder.rewind(0)
    with pytest.raises(GgufRunError, match="0 tokens are in it, 42 more do not fit into 41"):
        decoder.forward([*IDS, 1, 2])


@pytest.mark.parametrize("id", [-1, 279, 1 << 40])
def test_ids_outside_the_vocabulary(id: int, build: Callable[..., Decoder]) -> None:
    decoder = build(Tiny())
    with pytest.raises(GgufRunError, match=rf"token 1 has the id {id}: the model's ids go from 0 to 278"):
        decoder.forward([5, id])
    assert decoder.n_past == 0


def test_wrong_use(build: Callable[..., Decoder]) -> None:
    decoder = build(Tiny())
    with pytest.raises(ValueError, match="n_outputs is 3, must be from 0 to the number of tokens, 2"):
        decoder.forward([1, 2], 3)
    for option in ({"n_ctx": 0}, {"n_batch": 0}, {"n_outputs": -1}):
        with pytest.raises(GgufRunError, match="must be at least 1"):
            build(Tiny(), **option)


@pytest.mark.parametrize("tied", [True, False])
def test_progress_and_release(tied: bool, build: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str] = []
    monkeypatch.setattr(Tensor, "release", lambda tensor: released.append(tensor.name))
    loaded: list[int] = []
    tiny = Tiny(tied=tied, biases=ALL_BIASES, n_layer=1)
    decoder = build(tiny, progress=loaded.append)
    n_matrix_values = 96 * (128 + 64 + 64 + 128 + 3 * 160) + 279 * 96 * (1 if tied else 2)
    n_vector_values = 3 * 96 + (128 + 64 + 64 + 96 + 160 + 160 + 96)
    assert sum(loaded) == 4 * (n_matrix_values + n_vector_values)
    # The table of embeddings is read from the file when tokens run; pages that another use touched are released.
    assert ("token_embd.weight" in released) == tied
    assert len(set(released)) == len(released) == 18
    decoder.close()


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_bad_rope_freqs(bad: float, build: Callable[..., Decoder]) -> None:
    with pytest.raises(FormatError, match=r"rope_freqs.weight has values that are not positive"):
        build(Tiny(rope_freqs=[1.0] * 15 + [bad]))


def test_buffers_for_logits_are_small(build: Callable[..., Decoder]) -> None:
    """n_batch rows of a large vocabulary would take hundreds of megabytes."""
    decoder = build(Tiny(), n_batch=32, n_outputs=4)
    program: Any = decoder._program
    assert program.memory(program.result).shape == (4, decoder.config.n_vocab)
    # Once the rows are chosen only they are computed: the last layer's ffn and the output.
    names = [type(op).__name__ for op in program.after]
    assert names == ["Outputs", "RmsNorm", "MatmulGated", "Matmul", "RmsNorm", "Matmul"]

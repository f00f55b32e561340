"""benchmarks/make_model.py: shapes and mixes against published figures, weights, vocabularies, and whole files."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import make_model
import numpy as np
import pytest
from click.testing import CliRunner, Result
from make_model import PURE, SHAPES, Shape, main, mix_of, tensors_of, vocabulary, write_model
from random_blocks import RandomBlocks
from tinymodel import Tiny, write_tiny
from tinymodel import vocabulary as tiny_vocabulary

from gguf_run.formats.blocks.dequantizer import dequantize
from gguf_run.formats.blocks.types import type_by_name
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime import Model
from gguf_run.runtime.quantize.file_types import FILE_TYPES
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

TINY = Shape("1M", 3, 256, 4, 2, 64, 512, 290, 512, 1e4, False)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with 273 tokens, BOS 1 and EOS 2."""
    path = tmp_path_factory.mktemp("vocab") / "bpe.gguf"
    write_tiny(path, Tiny(extra_tokens=0))
    return path


def make(path: Path, vocab: Path, shape: Shape = TINY, type: str = "Q4_K_M", seed: int = 0) -> Path:
    with GGUFFile.open(vocab) as file:
        write_model(path, shape, mix_of(type), file, seed)
    return path


# Shapes and mixes.


@pytest.mark.parametrize(
    ("name", "n_params"), [("llama-135m", 134_515_008), ("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248)]
)
def test_shapes_have_the_real_models_parameters(name: str, n_params: int) -> None:
    assert sum(math.prod(ne) for _, ne in SHAPES[name].tensors()) == n_params


def test_experts_take_the_place_of_the_ffn() -> None:
    tensors = dict(SHAPES["qwen3moe-2b"].tensors())
    assert tensors["blk.11.ffn_down_exps.weight"] == (768, 2048, 32)
    assert tensors["blk.0.ffn_gate_inp.weight"] == (2048, 32)
    assert not {"blk.0.ffn_gate.weight", "blk.0.ffn_gate_exps.bias"} & tensors.keys()
    for type in ("Q4_K_M", "Q8_0"):
        types = {tensor.name: tensor.type.name for tensor in tensors_of(SHAPES["qwen3moe-2b"], mix_of(type))}
        assert types["blk.0.ffn_gate_inp.weight"] == "F32"
        assert types["blk.0.ffn_gate_exps.weight"] == type.removesuffix("_M")


@pytest.mark.parametrize(("type", "bits"), [("Q4_K_M", 4.894), ("Q5_K_M", 5.704), ("Q6_K", 6.563), ("Q8_0", 8.501)])
def test_mixes_have_the_size_of_llama_quantizes(type: str, bits: float) -> None:
    """Bits per weight that llama.cpp publishes for Llama-3.1-8B."""
    tensors = tensors_of(SHAPES["llama-8b"], mix_of(type))
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    assert 8 * n_bytes / sum(tensor.n_elements for tensor in tensors) == pytest.approx(bits, abs=6e-4)


def test_rows_that_blocks_do_not_divide() -> None:
    """The types of a real file with such rows, Gemma 3 270M in Q4_K_M."""
    shape = Shape("270M", 18, 640, 4, 1, 256, 2048, 262144, 32768, 1e6, True)
    found = Counter(t.type.name for t in tensors_of(shape, mix_of("Q4_K_M")) if len(t.ne) > 1)
    assert found == {"Q4_K": 27, "Q6_K": 9, "Q5_0": 81, "Q8_0": 10}


def test_the_matrix_of_the_logits_gets_the_output_type() -> None:
    def types(tied: bool) -> dict[str, str]:
        shape = Shape("", 1, 256, 1, 1, 256, 256, 512, 9, 1e4, tied)
        return {t.name: t.type.name for t in tensors_of(shape, mix_of("Q4_K_M"))}

    assert types(True)["token_embd.weight"] == "Q6_K"
    assert "output.weight" not in types(True)
    assert (types(False)["token_embd.weight"], types(False)["output.weight"]) == ("Q4_K", "Q6_K")
    assert types(False)["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(("width", "wanted", "expected"), [
    (96, "Q4_K", "Q5_0"), (96, "Q5_K", "Q5_1"), (96, "Q6_K", "Q8_0"), (96, "Q3_K", "Q4_0"), (96, "IQ2_S", "IQ4_NL"),
    (96, "NVFP4", "F16"), (80, "Q4_K", "F16"), (80, "IQ4_NL", "F16"), (80, "F32", "F32"), (512, "IQ1_M", "IQ1_M"),
])  # fmt: skip
def test_fallback(width: int, wanted: str, expected: str) -> None:
    shape = Shape("", 1, width, 1, 1, width, width, 8, 9, 1e4, True)
    assert {t.type.name for t in tensors_of(shape, mix_of(wanted)) if len(t.ne) > 1} == {expected}


def test_every_pure_type_has_a_file_type() -> None:
    assert {"Q4_0", "Q8_0", "Q6_K", "IQ1_M", "MXFP4", "F16", "BF16", "F32"} <= set(PURE)
    assert not {"Q8_1", "Q8_K", "I8", "F64"} & set(PURE)
    for name in PURE:
        kind = next(kind for kind in FILE_TYPES.values() if kind.id == mix_of(name).file_type)
        assert name in (kind.default, kind.name)
        assert mix_of(name.lower()) == mix_of(name)


# Weights.


@pytest.mark.parametrize("name", PURE)
def test_weights_are_random_numbers_of_the_size_of_real_ones(name: str) -> None:
    type = type_by_name(name)
    blocks = RandomBlocks(type, np.random.default_rng(1)).draw((1 << 18) // type.block_size)
    weights = dequantize(blocks, type).astype(np.float64)
    assert np.isfinite(weights).all()
    assert 0.018 < weights.std() < 0.024
    assert abs(weights.mean()) < 0.0005
    assert abs(weights).max() < 0.2
    # nothing repeats, and groups of 16 have a mean near 0 (in Q3_K less near, its numbers go from -4 to 3)
    rows = weights.reshape(256, -1)
    assert len(np.unique(rows, axis=0)) == 256
    assert abs(np.corrcoef(rows) - np.eye(256)).max() < 0.25
    assert weights.reshape(-1, 16).mean(1).std() < 1.4 * weights.std() / 4


def test_scales_differ_from_block_to_block_in_size_and_sign() -> None:
    type = type_by_name("Q4_1")
    fields = RandomBlocks(type, np.random.default_rng(1)).draw(1000).view(type.dtype)[:, 0]
    d = fields["d"].astype(np.float64)
    assert 0.4 < (d > 0).mean() < 0.6
    assert abs(d).max() / abs(d).min() > 2.5
    assert np.allclose(fields["m"], -7.5 * d, rtol=0.01)


# Vocabularies.


def test_a_vocabulary_is_filled_up(vocab: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", vocab)
    with GGUFFile.open(path) as made, GGUFFile.open(vocab) as source:
        tokens = list(made.metadata["tokenizer.ggml.tokens"])
        known = list(source.metadata["tokenizer.ggml.tokens"])
        assert tokens == known + [f"[PAD{i}]" for i in range(len(known), 290)]
        types = made.metadata["tokenizer.ggml.token_type"].tolist()
        assert types == source.metadata["tokenizer.ggml.token_type"].tolist() + [1] * (290 - len(known))
        for key in source.metadata:
            if key.startswith("tokenizer.") and key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
                value, expected = made.metadata[key], source.metadata[key]
                assert (value if isinstance(value, str | int | float) else list(value)) == (
                    expected if isinstance(expected, str | int | float) else list(expected)
                )
                assert made.metadata.type_name(key) == source.metadata.type_name(key)
        text = "the other <|im_start|>\n and öäü 🙂 thereon"
        ids = Tokenizer.from_metadata(made.metadata).encode(text)
        assert ids == Tokenizer.from_metadata(source.metadata).encode(text)


def test_a_vocabulary_is_cut_with_what_needs_its_end(vocab: Path, tmp_path: Path) -> None:
    """Merges come with their results: 10 of 15 are left."""
    n_bytes = len(tiny_vocabulary(Tiny(extra_tokens=0))["tokens"]) - 15
    path = make(tmp_path / "m.gguf", vocab, Shape("", 1, 256, 4, 2, 64, 256, n_bytes + 10, 512, 1e4, True), "F16")
    with GGUFFile.open(path) as made, GGUFFile.open(vocab) as source:
        assert list(made.metadata["tokenizer.ggml.merges"]) == list(source.metadata["tokenizer.ggml.merges"])[:10]
        tokenizer = Tokenizer.from_metadata(made.metadata)
        ids = tokenizer.encode("the ou our of", add_special=False)
        assert max(ids) < n_bytes + 10
        assert tokenizer.decode(ids) == "the ou our of"
    with GGUFFile.open(vocab) as source:
        keys = vocabulary(source, 2)
    assert keys["tokenizer.ggml.bos_token_id"] == ("u32", 1)
    assert "tokenizer.ggml.eos_token_id" not in keys  # it is 2
    assert [len(keys[f"tokenizer.ggml.{name}"][1]) for name in ("tokens", "token_type", "merges")] == [2, 2, 0]


@pytest.mark.parametrize("n_vocab", [300, 400, 600])
def test_sentencepiece_vocabularies_keep_their_scores(tmp_path: Path, n_vocab: int) -> None:
    write_tiny(tmp_path / "spm.gguf", Tiny(vocab="spm"))
    with GGUFFile.open(tmp_path / "spm.gguf") as source:
        keys = vocabulary(source, n_vocab)
        known = source.metadata["tokenizer.ggml.scores"].tolist()
    type, scores = keys["tokenizer.ggml.scores"]
    assert type == "array[f32]"
    assert scores[: len(known)] == known[:n_vocab]
    assert len(scores) == n_vocab
    assert "tokenizer.ggml.merges" not in keys


# Files.


@pytest.mark.parametrize("type", ["Q4_K_M", "Q5_K_M", "Q4_0", "F16"])
def test_the_model_runs(type: str, vocab: Path, tmp_path: Path) -> None:
    with Model.load(make(tmp_path / "m.gguf", vocab, type=type), n_ctx=64, n_threads=2) as model:
        logits = model.logits(model.tokenize("the other"))
        assert np.isfinite(logits).all()
        assert 0.05 < logits.std() < 5
        assert "".join(model.generate("the", max_tokens=4, temperature=0)) is not None


def test_the_file_as_the_gguf_package_reads_it(vocab: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(make(tmp_path / "m.gguf", vocab))
    values = {name: field.contents() for name, field in reader.fields.items()}
    expected: dict[str, Any] = {
        "general.architecture": "llama", "general.file_type": 15, "general.size_label": "1M", "llama.block_count": 3,
        "llama.embedding_length": 256, "llama.feed_forward_length": 512, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 64, "llama.context_length": 512,
        "llama.vocab_size": 290, "llama.rope.freq_base": 1e4, "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors} == dict(TINY.tensors())
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.n_elements > 512:
            assert 0.015 < weights.std() < 0.025
        else:
            assert (weights == 1).all()


def test_large_tensors_are_drawn_in_pieces(vocab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No piece repeats another."""
    monkeypatch.setattr(make_model, "_CHUNK", 1000)
    with GGUFFile.open(make(tmp_path / "m.gguf", vocab, type="Q8_0")) as file:
        blocks = file.tensors["token_embd.weight"].blocks().reshape(-1, 34)
        assert len(np.unique(blocks, axis=0)) == len(blocks) == 290 * 256 // 32


def test_the_seed_decides(vocab: Path, tmp_path: Path) -> None:
    first, again, other = (
        make(tmp_path / f"{i}.gguf", vocab, seed=seed).read_bytes() for i, seed in enumerate((7, 7, 8))
    )
    assert first == again
    assert len(first) == len(other)
    assert first != other


def test_no_part_of_a_file_is_left_behind(vocab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make(tmp_path / "m.gguf", vocab).read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RandomBlocks, "draw", fail)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path / "m.gguf", vocab, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == before


# The command line.


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_command(vocab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_model, "SHAPES", {**SHAPES, "llama-1b": TINY})
    monkeypatch.chdir(tmp_path)
    result = invoke("llama-1b", "q4_k_m", "--vocab", vocab)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "llama-1b-Q4_K_M.gguf: 1 MB\n"
    assert (tmp_path / "llama-1b-Q4_K_M.gguf").read_bytes() == make(tmp_path / "m.gguf", vocab).read_bytes()
    invoke("llama-1b", "q4_k_m", "--vocab", vocab, "--seed", 3, "-o", tmp_path / "o.gguf")
    assert (tmp_path / "o.gguf").read_bytes() == make(tmp_path / "m.gguf", vocab, seed=3).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["llama-1b", "Q9_K"], 2, "type 'Q9_K': allowed are the mixes Q2_K_S"),
        (["llama-1b", "Q8_K"], 2, "type 'Q8_K'"),
        (["llama-2b", "Q4_0"], 2, "llama-2b"),
        (["llama-1b", "Q4_0", "--vocab", "gone.gguf"], 1, "gone.gguf"),
        (["llama-1b", "Q4_0", "--vocab", "empty.gguf"], 2, "empty.gguf: the file has no vocabulary"),
        (["llama-1b", "Q4_0", "--seed", "-1"], 2, "seed"),
    ],
)
def test_bad_arguments(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggufbuild import write

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty.gguf", {"general.architecture": "llama"})
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty.gguf"]

"""What is fuzzed: whole files in memory, and the readers that must take or refuse whatever becomes of them."""

import base64
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ggufbuild import T, Typed
from hftokenizers import TEKKEN
from mutate import Gguf, Sealed
from tinymodel import TINY_GEMMA3, Tiny, metadata_of, random_weights, tiny_moe, vocabulary

from gguf_run.formats.compiler.cachedir import read_own
from gguf_run.formats.compiler.machine_code import Code
from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.imatrix import Imatrix
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.safetensors import DTYPES, read_safetensors
from gguf_run.models.config import ModelConfig
from gguf_run.runtime import Model
from gguf_run.runtime.cli.info_report import file_lines
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
from gguf_run.runtime.engine.session_file import KIND as SESSION
from gguf_run.runtime.engine.session_file import SessionHeader, check_session, hash_model, open_session
from gguf_run.runtime.evaluate.logits_file import KIND as LOGITS
from gguf_run.runtime.evaluate.logits_file import LogitsFile, LogitsHeader
from gguf_run.runtime.info.contents import file_facts, memory_facts
from gguf_run.runtime.load.kv_scales import read_scales
from gguf_run.runtime.load.options import LoadOptions
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

TEXT = "<|im_start|>the and of\n ▁ é 1234<|im_end|> \0 <unk>"
Content = bytes | Gguf | Sealed
REFUSALS: list[str] = []  # what `refused` caught


@dataclass(frozen=True)
class Target:
    """Files of a folder, one of which is changed, and what reads them."""

    files: Callable[[], Mapping[str, Content]]
    use: Callable[[Path], None]
    seconds: int = 5  # of processor time that a mutant may take


@contextmanager
def refused() -> Iterator[None]:
    """The block may raise what a user may see: an error of ours, or the system's about a file, in one plain line."""
    text = None
    try:
        yield
    except GgufRunError as error:
        text = str(error)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else f"names no file: {error!r}\n"
    if text is None:
        return
    REFUSALS.append(text)
    assert text.isprintable(), f"is no plain line: {text[:300]!r}"
    assert 0 < len(text) < 1100, f"is too long: {text[:100]!r}, {len(text)} characters"


def gguf_of(tiny: Tiny, vocab: dict[str, Any] | None = None) -> Gguf:
    """Return the parts of a tiny model's file."""
    keys = vocab or vocabulary(tiny)
    pairs: list[tuple[str | bytes, Any]] = [("general.architecture", tiny.arch), ("general.name", "tiny")]
    pairs += [(f"{tiny.arch}.{key}", value) for key, value in metadata_of(tiny).items()]
    for key, value in keys.items():
        is_types = key == "token_type"
        pairs.append((f"tokenizer.ggml.{key}", Typed("[i32]", value) if is_types else value))
    weights = random_weights(tiny, len(keys["tokens"])) | dict(tiny.tensors)
    tensors = [T(name, w.shape[::-1], "F32", w.astype("<f4").tobytes()) for name, w in weights.items() if w is not None]
    return Gguf(tuple(pairs), tuple(tensors))


SMALL_GEMMA3 = replace(TINY_GEMMA3, n_layer=2, n_embd=32, n_ff=32, head_dim=16)
SMALL = Tiny(n_layer=1, n_embd=32, n_head=2, n_head_kv=1, head_dim=16, n_ff=32)


def unigram() -> dict[str, Any]:
    tokens = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        "▁the",
        "▁a",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    types = [3, 3, 2, *[1] * 29, *[6] * 256]
    keys = {"model": "t5", "tokens": tokens, "token_type": types, "scores": [-0.5 * i for i in range(len(tokens))]}
    # A trie that makes "a" of "Q": from unit 0 (base 256) to unit 256 ^ 81, from there to unit 512.
    units = [256 << 10, *[0] * 767]
    units[256 ^ 81] = (512 ^ 256 ^ 81) << 10 | 256 | 81
    units[512] = 1 << 31 | 2
    charsmap = struct.pack("<I768I", 4 * 768, *units) + b"?\0a\0"
    return keys | {"precompiled_charsmap": Typed("[u8]", list(charsmap)), "unknown_token_id": 2, "eos_token_id": 1}


def wordpiece() -> dict[str, Any]:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁the", *(f"▁{c}" for c in "abcdefgh"), *"abcdefgh"]
    keys = {"model": "bert", "tokens": tokens, "token_type": [3, 2, 3, 3, *[1] * (len(tokens) - 4)]}
    return keys | {"bos_token_id": 2, "eos_token_id": 3, "unknown_token_id": 1}


@cache
def ggufs() -> dict[str, Content]:
    return {
        "llama.gguf": gguf_of(SMALL),
        "gemma3.gguf": gguf_of(SMALL_GEMMA3),
        "moe.gguf": gguf_of(tiny_moe(1)),
        "t5.gguf": gguf_of(SMALL, unigram()),
        "bert.gguf": gguf_of(SMALL, wordpiece()),
    }


def use_text(metadata: Mapping[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    stream = tokenizer.stream()
    for id in range(min(tokenizer.n_vocab, 400)):
        stream.push(id)
        assert tokenizer.token_text(id) is not None


def use_gguf(folder: Path) -> None:
    for path in folder.glob("*.gguf"):
        with refused(), GGUFFile.open(path) as file:
            for tensor in file.tensors.values():
                tensor.blocks()[-1:].tobytes()
            facts = file_facts(file) | {"memory": memory_facts(file, LoadOptions(), [])}
            json.dumps(facts, allow_nan=False)
            for line in file_lines(facts, False):
                assert "\n" not in line, line
            hash_model(file)
            with refused():
                use_text(file.metadata)


def use_model(folder: Path) -> None:
    for path in folder.glob("*.gguf"):
        with refused(), Model.load(path, n_threads=1, device="cpu", n_ctx=32) as model:
            "".join(model.generate("the a", max_tokens=2, temperature=1.0, seed=1))


def use_imatrix(folder: Path) -> None:
    for path in folder.iterdir():
        with refused():
            for values in Imatrix.open(path).entries.values():
                assert np.isfinite(values).all()


def imatrices() -> dict[str, Content]:
    pairs = (("imatrix.datasets", ["a"]), ("imatrix.chunk_count", 2), ("imatrix.chunk_size", 64))
    sums = np.arange(8, dtype="<f4").tobytes()
    tensors = (T("a.in_sum2", (8,), "F32", sums), T("a.counts", (1,), "F32", sums[4:8]))
    tensors += (T("b.in_sum2", (4, 2), "F32", sums), T("b.counts", (1, 2), "F32", sums[4:12]))
    entry = struct.pack("<i1sii8f", 1, b"a", 2, 8, *range(8))
    return {
        "i.gguf": Gguf(pairs, tensors),
        "i.dat": struct.pack("<i", 2) + entry * 2 + struct.pack("<ii1s", 3, 1, b"t"),
    }


def use_safetensors(folder: Path) -> None:
    for path in folder.iterdir():
        with refused():
            for array in read_safetensors(path).arrays.values():
                array.array().tobytes()


def safetensors_of(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    names = {dtype: name for name, dtype in reversed(DTYPES.items())}
    for name, array in arrays.items():
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values())


def a_safetensors() -> dict[str, Content]:
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(0, np.float16), "c": np.arange(4, dtype=np.int64)}
    return {"model.safetensors": safetensors_of(arrays, {"format": "pt"})}


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "rope_theta": 1e4, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": [2, 0], "torch_dtype": "float32",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}  # fmt: skip
CARD = b"---\nlicense: mit\nlanguage:\n- en\n- no\ntags: [a, b]\nbase_model: x/y\nname: tiny\n---\n# Tiny\n"


def tokenizer_json() -> bytes:
    keys = vocabulary(SMALL)
    special = [{"id": id, "content": keys["tokens"][id], "special": True} for id in range(3)]
    special.append(
        {"id": len(keys["tokens"]) - 1, "content": "<tool>", "special": False, "rstrip": True, "lstrip": True}
    )
    vocab = {token: id for id, token in enumerate(keys["tokens"][:-1])}
    data = {
        "version": "1.0", "added_tokens": special, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>",
            "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"<|im_start|>":
            {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}},
        "decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": vocab, "merges": keys["merges"]},
    }  # fmt: skip
    return json.dumps(data).encode()


def tokenizer_model() -> bytes:
    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    keys = vocabulary(TINY_GEMMA3)
    types = {1: 1, 2: 2, 3: 3, 5: 5, 6: 6}
    rows = zip(keys["tokens"], keys["scores"], keys["token_type"], strict=True)
    pieces = [field(1, text.encode()) + b"\x15" + struct.pack("<f", s) + bytes([24, types[t]]) for text, s, t in rows]
    return (
        b"".join(field(1, piece) for piece in pieces) + field(2, bytes([24, 2, 192, 2, 0])) + field(3, bytes([24, 1]))
    )


def checkpoint(*, parts: bool) -> dict[str, Content]:
    """Return the files of a llama: with tokenizer.json in one file, or with tokenizer.model and an index."""
    vocab = vocabulary(TINY_GEMMA3 if parts else SMALL)
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    whole |= {f"blk.0.{ours}.weight": f"model.layers.0.{theirs}.weight" for ours, theirs in names.items()}
    weights = random_weights(SMALL, len(vocab["tokens"]))
    arrays = {theirs: weights[ours].astype(np.float16) for ours, theirs in whole.items()}
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": "{{ x }}"}
    settings |= {"added_tokens_decoder": {"3": {"content": "<|im_start|>", "special": True}}}
    files: dict[str, Content] = {
        "config.json": json.dumps(CONFIG | {"vocab_size": len(vocab["tokens"])}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [2, 0], "temperature": 0.5, "top_k": 3}).encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": b'{"eos_token": "</s>"}',
        "README.md": CARD,
    }
    if not parts:
        return files | {"tokenizer.json": tokenizer_json(), "model.safetensors": safetensors_of(arrays, {})}
    files |= {"tokenizer.model": tokenizer_model(), "added_tokens.json": b'{"<|im_start|>": 3}'}
    placed = {name: f"model-0000{1 + ('mlp' in name)}-of-00002.safetensors" for name in arrays}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}).encode()
    for file in set(placed.values()):
        files[file] = safetensors_of({name: arrays[name] for name in arrays if placed[name] == file}, {"format": "pt"})
    return files


def tekken() -> dict[str, Content]:
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"the"]
    entries = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(tokens)]
    special = [{"rank": i, "token_str": f"<{i}>", "is_control": True} for i in range(10)]
    config = {"pattern": TEKKEN, "default_vocab_size": len(tokens) + 10, "default_num_special_tokens": 10}
    data = {"config": config, "vocab": entries, "special_tokens": special}
    config_json = json.dumps(CONFIG | {"vocab_size": len(tokens) + 10}).encode()
    return {"config.json": config_json, "tekken.json": json.dumps(data).encode()}


def use_checkpoint(folder: Path) -> None:
    for vocab_only in (True, False) if (folder / "README.md").exists() else (True,):
        with refused(), open_checkpoint(folder, vocab_only=vocab_only) as file:
            for tensor in file.tensors.values():
                tensor.blocks()
            with refused():
                use_text(file.metadata)


@cache
def small_config() -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "m.gguf").write_bytes(gguf_of(SMALL).data())
        with GGUFFile.open(Path(folder) / "m.gguf") as file:
            return ModelConfig.from_metadata(file.metadata, file.tensors)


def scales() -> dict[str, Content]:
    facts = {
        "format": "gguf-run kv-scales",
        "version": 1,
        "layers": [{"k_max": [1.0], "v_max": [2], "k": "f16", "v": "f16"}],
    }
    return {"scales.json": json.dumps(facts).encode()}


def use_scales(folder: Path) -> None:
    with refused():
        for layer in read_scales(folder / "scales.json", small_config()):
            for kind in "kv":
                assert all(0 < scale < float("inf") for scale in layer.scales("fp8_e4m3", kind) or ())


HEADER = SessionHeader("ab", "m.gguf", "f16", ids=[])


def session() -> dict[str, Content]:
    metadata = {"model_hash": "ab", "model": "m.gguf", "cache": "f16", "messages": '[{"role": "user", "content": "a"}]'}
    ids = np.array([1, 2, 3], "<i4").tobytes()
    arrays = [("ids", "I32", (3,), ids), *((f"{il}.{kind}", "U8", (96,), bytes(96)) for il in (0, 1) for kind in "kv")]
    return {"s.session": Sealed(SESSION, metadata, tuple(arrays))}


def use_session(folder: Path) -> None:
    with refused():
        header, parts = open_session(folder / "s.session")
        check_session(folder / "s.session", header, HEADER, 64, 100)
        assert all(data.nbytes >= 0 for _, _, data in parts)


def logits() -> dict[str, Content]:
    header = LogitsHeader(5, 8, 2, 3, "a", "b", "c", "m")
    arrays = {name: np.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in header.arrays.items()}
    *rows, sums = arrays.values()
    sums[:] = [[zlib.crc32(values[i].tobytes()) for values in rows] for i in range(header.n_chunk)]
    stored = tuple((name, *header.arrays[name], values.tobytes()) for name, values in arrays.items())
    return {"l.logits": Sealed(LOGITS, {key: str(value) for key, value in vars(header).items()}, stored)}


def use_logits(folder: Path) -> None:
    with refused(), LogitsFile(folder / "l.logits") as file:
        for i in range(min(3, file.header.n_chunk)):
            for block in file.chunk(i):
                assert block.logits.shape[1] == file.header.n_vocab


def use_code(folder: Path) -> None:
    with refused():
        data = read_own(folder / "f.o")
        try:
            Code.unsealed(data, "kernels-1/f.o")
        except ValueError as error:
            raise GgufRunError(str(error)) from None
        assert data == Code("i8", bytes(300)).sealed("kernels-1/f.o")


TARGETS = {
    "gguf": Target(ggufs, use_gguf),
    "model": Target(lambda: {"llama.gguf": ggufs()["llama.gguf"]}, use_model, 120),  # it may compile kernels
    "imatrix": Target(imatrices, use_imatrix),
    "safetensors": Target(a_safetensors, use_safetensors),
    "checkpoint": Target(lambda: checkpoint(parts=False), use_checkpoint),
    "shards": Target(lambda: checkpoint(parts=True), use_checkpoint),
    "tekken": Target(tekken, use_checkpoint),
    "scales": Target(scales, use_scales),
    "session": Target(session, use_session),
    "logits": Target(logits, use_logits),
    "code": Target(lambda: {"f.o": Code("i8", bytes(300)).sealed("kernels-1/f.o")}, use_code),
}

"""Tokenizers of checkpoints in GGUF metadata: the same ids as by the original, roles, templates, and damaged files."""

import base64
import itertools
import json
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import hftokenizers
import numpy as np
import pytest
from hftokenizers import KINDS, texts
from spmfile import PIECES, message, pieces_file
from tinyvocab import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.formats.gguf.writer import GGUFWriter
from gguf_run.runtime.convert.back.config import generation_config
from gguf_run.runtime.convert.vocabulary import tiktoken as convert_tiktoken
from gguf_run.runtime.convert.vocabulary.metadata import tokenizer_metadata
from gguf_run.runtime.convert.vocabulary.vocabulary import ConversionWarning
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::gguf_run.runtime.tokenizers.tokenizer.TwoBosWarning")

G = "tokenizer.ggml."


def through_file(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """Write the metadata to a GGUF file and build the tokenizer from what is read again."""
    with GGUFWriter(path, {"general.architecture": "llama"} | metadata, []):
        pass
    with GGUFFile.open(path) as file:
        return Tokenizer.from_metadata(file.metadata)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_as_the_original(kind: str, tmp_path: Path) -> None:
    original = hftokenizers.write(tmp_path, kind)
    metadata = tokenizer_metadata(tmp_path, {})
    assert (metadata[f"{G}model"], metadata[f"{G}pre"]) == KINDS[kind][1:]
    converted = through_file(metadata, tmp_path / "vocab.gguf")
    special = hftokenizers.special_names(original)
    for text in texts(250, special=special):
        assert converted.encode(text) == original.encode(text).ids, text


def test_types_and_padding(tmp_path: Path) -> None:
    original = hftokenizers.write(tmp_path, "llama-2")
    n = original.get_vocab_size()
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": n + 3, "model_type": "llama"})
    tokens, types = metadata[f"{G}tokens"], metadata[f"{G}token_type"]
    assert tokens[-3:] == [f"[PAD{n}]", f"[PAD{n + 1}]", f"[PAD{n + 2}]"]
    assert types[-4:].tolist() == [USER_DEFINED, UNUSED, UNUSED, UNUSED]
    assert types[[0, 1, 3, 260]].tolist() == [CONTROL, CONTROL, BYTE, NORMAL]
    assert (metadata[f"{G}scores"].dtype, types.dtype) == (np.float32, np.int32)


def test_tokens_beyond_the_embedding_are_left_out(tmp_path: Path) -> None:
    n = hftokenizers.write(tmp_path, "gpt-2").get_vocab_size()
    with pytest.warns(
        ConversionWarning, match=f"1 tokens such as '<tool>' are left out: config.json says vocab_size {n - 1}"
    ):
        metadata = tokenizer_metadata(tmp_path, {"vocab_size": n - 1})
    assert len(metadata[f"{G}tokens"]) == n - 1


def test_tokens_that_only_tokenizer_config_adds(tmp_path: Path) -> None:
    n = hftokenizers.write(tmp_path, "gpt-2").get_vocab_size()
    added = {str(n): {"content": "<call>"}, str(n + 1): {"content": "<stop>", "special": True}, "3": {"content": "no"}}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": n + 3})
    assert metadata[f"{G}tokens"][n:] == ["<call>", "<stop>", f"[PAD{n + 2}]"]
    assert metadata[f"{G}token_type"][n:].tolist() == [USER_DEFINED, CONTROL, UNUSED]
    assert metadata[f"{G}tokens"][3] != "no"
    assert Tokenizer.from_metadata(metadata).encode("a<call>b<stop>")[1::2] == [n, n + 1]


def test_roles(tmp_path: Path) -> None:
    hftokenizers.write(
        tmp_path, "gpt-2", bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"}, add_bos_token=True
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2, 0]}')
    metadata = tokenizer_metadata(tmp_path, {"pad_token_id": 1, "eos_token_id": 0, "unk_token_id": None})
    found = {key.removeprefix(G): value for key, value in metadata.items() if key.endswith("_id")}
    assert found == {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 0, "eom_token_id": 5, "padding_token_id": 1}
    assert metadata[f"{G}add_bos_token"] is False  # as its post-processor does


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 5}, {}, [2, 5]),
        ({"eos_token_id": [5, 2, 7]}, {}, [2, 5, 7]),
        ({"eos_token_id": [5, 7]}, {"eos_token_id": None}, [2, 5, 7]),
        ({"eos_token_id": 2}, {"eos_token_id": 6}, [2, 6]),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 6, 7]}, [2, 5, 6, 7]),
        ({}, {"eos_token_id": [5, 6, 7, 8, 9, 10, True, None, -1, 10**6]}, [2, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_all_ends_of_an_answer(
    config: dict[str, Any], generation: dict[str, Any], ends: list[int], tmp_path: Path
) -> None:
    hftokenizers.write(tmp_path, "gpt-2", eos_token="<|im_end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    many = pytest.warns(ConversionWarning, match="ends of an answer, such as .* which llama.cpp does not read")
    with many if len(ends) > 3 else nullcontext():
        metadata = tokenizer_metadata(tmp_path, config)
    by_name = {0, 2}  # "<|endoftext|>" and "<|im_end|>" always end an answer
    assert through_file(metadata, tmp_path / "vocab.gguf").stop_ids == {*ends, *by_name}
    assert set(np.ravel(generation_config(metadata)["eos_token_id"])) >= set(ends)


def test_what_is_put_around_texts_counts_most(tmp_path: Path) -> None:
    tokenizer = hftokenizers.around(hftokenizers.write(tmp_path, "gpt-2"), "<|im_start|> $A <|im_end|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "add_eos_token": false}')
    metadata = tokenizer_metadata(tmp_path, {})
    assert [metadata[G + key] for key in ("bos_token_id", "eos_token_id", "eot_token_id")] == [1, 2, 0]
    assert Tokenizer.from_metadata(metadata).encode("of") == tokenizer.encode("of").ids


def test_chat_templates(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "A"}, {"name": "tool use", "template": "B"}, {"name": 3}]
    hftokenizers.write(tmp_path, "gpt-2", chat_template=templates)
    found = lambda: {k: v for k, v in tokenizer_metadata(tmp_path, {}).items() if "chat_template" in k}  # noqa: E731
    many = {"tokenizer.chat_template.tool_use": "B", "tokenizer.chat_templates": ["tool_use"]}
    assert found() == many | {"tokenizer.chat_template": "A"}
    (tmp_path / "chat_template.jinja").write_text("C")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("D")
    assert found() == {
        "tokenizer.chat_template.tool_use": "B", "tokenizer.chat_template.rag": "D",
        "tokenizer.chat_templates": ["tool_use", "rag"], "tokenizer.chat_template": "C",
    }  # fmt: skip
    hftokenizers.write(tmp_path, "gpt-2")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates" / "rag.jinja").unlink()
    (tmp_path / "chat_template.json").write_text('{"chat_template": "E"}')
    assert found() == {"tokenizer.chat_template": "E"}


def test_an_unknown_pre_tokenizer_gets_the_nearest_name(tmp_path: Path) -> None:
    hftokenizers.write(tmp_path, "qwen-2")
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace(r"\\p{N}|", r"\\p{N}{1,5}|"))
    with pytest.warns(
        ConversionWarning, match='no known pre-tokenizer cuts text as this one does; "dbrx" comes nearest'
    ):
        assert tokenizer_metadata(tmp_path, {})[f"{G}pre"] == "dbrx"


def test_an_expression_that_takes_for_ever(tmp_path: Path) -> None:
    hftokenizers.write(tmp_path, "qwen-2")
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace(r"\\p{N}|", r"( +)+x|"))
    with pytest.raises(FormatError, match="pre_tokenizer fails"):
        tokenizer_metadata(tmp_path, {})


@pytest.mark.parametrize(
    ("model_type", "name"), [("llama", "smollm"), ("starcoder2", "starcoder"), ("granite", "refact")]
)
def test_of_equal_names_the_usual_one(model_type: str, name: str, tmp_path: Path) -> None:
    hftokenizers.write(tmp_path, "smollm")
    assert tokenizer_metadata(tmp_path, {"model_type": model_type})[f"{G}pre"] == name


def test_merges_that_are_not_all_possible_ones(tmp_path: Path) -> None:
    hftokenizers.write(tmp_path, "gemma")
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    made = [left + right for left, right in data["model"]["merges"]]
    del data["model"]["merges"][next(i for i, token in enumerate(made) if made.count(token) > 1)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.warns(ConversionWarning, match=r"it has \d+ of \d+ possible merges"):
        tokenizer_metadata(tmp_path, {})


def test_gemma_4_keeps_its_merges(tmp_path: Path) -> None:
    """Its merges do not name all pairs, so scores would join otherwise. What the text shows stays in the text."""
    data = json.loads(hftokenizers.trained("gemma"))
    data["model"]["merges"] = data["model"]["merges"][::-2]
    data["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                             "invert": False}  # fmt: skip
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    n = len(data["model"]["vocab"])
    data["added_tokens"] += [{"id": n + 1, "content": "<|channel>", **special}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        metadata = tokenizer_metadata(tmp_path, {"model_type": "gemma4_text"})
    assert (metadata[f"{G}model"], metadata[f"{G}token_type"][n + 1]) == ("gemma4", USER_DEFINED)
    original, converted = hftokenizers.Tokenizer.from_str(json.dumps(data)), through_file(metadata, tmp_path / "v.gguf")
    for text in texts(250, special=("<|channel>", "<tool>", "<s>")):
        assert converted.encode(text) == original.encode(text).ids, text


def tiktoken_file(n: int) -> bytes:
    """Bytes, pairs and triples of them: n ranks."""
    letters = [bytes([byte]) for byte in b"etaoinshr dlu,.\n\xc3\xa9"]
    tokens = [bytes([byte]) for byte in range(256)]
    for repeat in range(2, 6):
        tokens += map(b"".join, itertools.product(letters, repeat=repeat))
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens[:n]))


def test_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    data = tiktoken_file(50256)
    (tmp_path / "x.tiktoken").write_bytes(data)
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": 50260})
    assert (metadata[f"{G}model"], metadata[f"{G}pre"]) == ("gpt2", "gpt-2")
    assert metadata[f"{G}tokens"][50256:50258] == ["<|endoftext|>", "[PAD50257]"]
    assert metadata[f"{G}token_type"][50255:50258].tolist() == [NORMAL, CONTROL, UNUSED]
    assert metadata[f"{G}eos_token_id"] == 50256
    ranks = {base64.b64decode(line.split()[0]): i for i, line in enumerate(data.splitlines())}
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    original = tiktoken.Encoding("x", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    converted = Tokenizer.from_metadata(metadata)
    for text in [*texts(50, seed=8), "the notes are in the house, édén. sharedhdshort"]:
        assert converted.encode(text, add_special=False) == original.encode(text), text


def test_special_tokens_of_llama_3() -> None:
    """Which its tiktoken file does not list: ids as in its published files."""
    names = convert_tiktoken._KNOWN[128000][1]
    ids = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|eom_id|>": 8, "<|eot_id|>": 9,
           "<|python_tag|>": 10, "<|reserved_special_token_3|>": 11, "<|reserved_special_token_247|>": 255}  # fmt: skip
    assert {name: names.index(name) for name in ids} == ids
    assert len(set(names)) == 256


def test_tekken(tmp_path: Path) -> None:
    tokens = [base64.b64decode(line.split()[0]) for line in tiktoken_file(600).splitlines()]
    data = {
        "config": {"pattern": hftokenizers.TEKKEN, "default_vocab_size": 520, "default_num_special_tokens": 20},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(tokens)],
    }
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": 520})
    assert (metadata[f"{G}pre"], metadata[f"{G}bos_token_id"], metadata[f"{G}add_bos_token"]) == ("tekken", 1, True)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("[INST]et") == [1, 3, 20 + tokens.index(b"et")]
    assert tokenizer.decode(tokenizer.encode("é\n"), skip_special=True) == "é\n"


def changed(change: Callable[[dict[str, Any]], Any], kind: str = "gpt-2") -> bytes:
    data = json.loads(hftokenizers.trained(kind))
    change(data)
    return json.dumps(data).encode()


def vocab(data: dict[str, Any]) -> Any:
    return data["model"]["vocab"]


JSON = "tokenizer.json"

BAD_FILES: list[tuple[str, Callable[[], bytes], str]] = [
    (JSON, lambda: b"{", "tokenizer.json: is not JSON"),
    (JSON, lambda: b"[" * 100_000, "tokenizer.json: is not JSON"),
    (JSON, lambda: b"\xff", "tokenizer.json: is not JSON"),
    (JSON, lambda: b"[]", "holds no JSON object"),
    (JSON, lambda: b"{}", "there is no model in it"),
    (JSON, lambda: changed(lambda d: d["model"].update(type="WordLevel")), "the model is 'WordLevel': BPE,"),
    (JSON, lambda: changed(lambda d: d["model"].update(vocab=[])), "vocab must be an object"),
    (JSON, lambda: changed(lambda d: d["model"].update(merges=[])), "the model has no merges"),
    (JSON, lambda: changed(lambda d: vocab(d).update(x=-1)), "token 'x' has the id -1: 0 to 4194303"),
    (JSON, lambda: changed(lambda d: vocab(d).update(x=10**30)), "token 'x' has the id 1000000"),
    (JSON, lambda: changed(lambda d: vocab(d).update(x=True)), "token 'x' has the id True"),
    (JSON, lambda: changed(lambda d: vocab(d).update(zzz=300)), "and 'zzz' have the same id 300"),
    (JSON, lambda: changed(lambda d: d["model"].update(merges=[["a"]])), r"merge 0 is \['a'\], not"),
    (JSON, lambda: changed(lambda d: d["model"].update(merges=["a b c"])), "merge 0 is a b c, not"),
    (JSON, lambda: changed(lambda d: d["model"].update(merges=None)), "the model has no merges"),
    (JSON, lambda: changed(lambda d: d["model"].update(end_of_word_suffix="</w>")), "BPE with end_of_word"),
    (JSON, lambda: changed(lambda d: d.update(added_tokens=[{"id": 1}])), "an added token is"),
    (JSON, lambda: changed(lambda d: d["added_tokens"][0].update(id=9)), "token '<|endoftext|>' with id 9"),
    (JSON, lambda: changed(lambda d: d["added_tokens"][-1].update(id=9)), "added token '<tool>' with id 9 cont"),
    (JSON, lambda: changed(lambda d: d["pre_tokenizer"].update(type="Xyz")), "a step is|not understood"),
    (JSON, lambda: changed(lambda d: d.update(pre_tokenizer=[1])), "a step is"),
    (JSON, lambda: changed(lambda d: vocab(d)[5].append(1), "t5"), "not .token, score."),
    (JSON, lambda: changed(lambda d: vocab(d)[5].__setitem__(1, float("nan")), "t5"), "is no number"),
    (JSON, lambda: changed(lambda d: vocab(d).append(["a", -1.0]), "t5"), "stands there twice"),
    (JSON, lambda: changed(lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": 3}), "t5"),
     "precompiled_charsmap is no base64"),
    ("tokenizer_config.json", lambda: b"nul", "tokenizer_config.json: is not JSON"),
    ("chat_template.jinja", lambda: b"\xff", "chat_template.jinja: no UTF-8"),
    ("tokenizer.model", lambda: b"\x0a\xff\xff\xff\xff\x0f", "field 1 does not fit into 6 bytes"),
    ("tokenizer.model", lambda: b"\x0a" + b"\xff" * 11, "a number is cut off or longer than 64 bits"),
    ("tokenizer.model", lambda: message((1, message((1, b"\xff"), (2, -1.0)))), "token 0 is no UTF-8"),
    ("tokenizer.model", lambda: message((1, message((1, b"a"), (3, 9)))), "token 0 has the score 0.0 and the type 9"),
    ("tokenizer.model", lambda: pieces_file(PIECES, message((3, 4)), b""), "a SentencePiece model of type 4"),
    ("tokenizer.model", lambda: b"YQ== 0\nYg== 2\n", 'line 2 is .*"base64 1" must stand there'),
    ("tokenizer.model", lambda: b"YQ== 0\nYg== 1\n", "2 ranks are of no known vocabulary"),
    ("tekken.json", lambda: b"{}", "default_vocab_size and .default_num_special_tokens are missing"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json"])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    """A pipe that nobody writes to, a device without an end, a folder."""
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        make(tmp_path / name)
        with pytest.raises(GgufRunError, match=f"{name}: is a (device or pipe|directory), not a file"):
            tokenizer_metadata(tmp_path, {})
        Path.unlink(tmp_path / name) if make is not Path.mkdir else Path.rmdir(tmp_path / name)


@pytest.mark.parametrize("kind", ["llama-2", "t5"])
def test_a_token_of_megabytes(kind: str, tmp_path: Path) -> None:
    data = json.loads(hftokenizers.trained(kind))
    token, model = "ab" * 750_000, data["model"]
    if kind == "t5":
        model["vocab"].append([token, -5.0])
    else:
        model["vocab"] |= {token: 2000, token[:-1]: 2001}
        model["merges"].append([token[:-1], token[-1]])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match="1500000 characters: at most 1024 are allowed"):
        tokenizer_metadata(tmp_path, {})


def test_a_gigantic_vocabulary(tmp_path: Path) -> None:
    hftokenizers.write(tmp_path, "gpt-2")
    with pytest.raises(FormatError, match="vocab_size is 10000000000: a number from 1 to 4194304 is allowed"):
        tokenizer_metadata(tmp_path, {"vocab_size": 10**10})


@pytest.mark.parametrize(("name", "content", "text"), BAD_FILES)
def test_bad_files(name: str, content: Callable[[], bytes], text: str, tmp_path: Path) -> None:
    if not name.startswith("t") or name == "tokenizer_config.json":
        hftokenizers.write(tmp_path, "gpt-2")
    (tmp_path / name).write_bytes(content())
    with pytest.raises((FormatError, UnsupportedError), match=text) as raised:
        tokenizer_metadata(tmp_path, {})
    assert "\n" not in str(raised.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"there is no tokenizer: one of tokenizer.json, tokenizer.model"):
        tokenizer_metadata(tmp_path, {})
    with pytest.raises(FormatError, match="vocab_size is -1: a number from 1 to 4194304"):
        tokenizer_metadata(tmp_path, {"vocab_size": -1})


@pytest.mark.parametrize("kind", ["gpt-2", "llama-2", "t5", "bert"])
def test_any_part_missing_works_or_is_refused(kind: str, tmp_path: Path) -> None:
    """Each value of tokenizer.json, one after the other, replaced by something else."""
    data = json.loads(hftokenizers.trained(kind))
    path = tmp_path / "tokenizer.json"
    places = [(data, key) for key in data] + [(data["model"], key) for key in data["model"]]
    for parent, key in places:
        kept = parent[key]
        for value in (None, 3, "x", [], {}, [[]], {"a": {}}, [3]):
            parent[key] = value
            path.write_text(json.dumps(data))
            with warnings.catch_warnings(), suppress(FormatError, UnsupportedError):
                warnings.simplefilter("ignore")
                Tokenizer.from_metadata(tokenizer_metadata(tmp_path, {})).encode("a <tool> é")
        parent[key] = kept

"""The tokenizer as a whole: special tokens, BOS and EOS, decoding, streaming, real models, and damaged metadata."""

import hashlib
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real
from hypothesis import given, settings
from hypothesis import strategies as st
from tinyvocab import (
    CHARACTER,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    bpe_metadata,
    slow_split,
    spelled,
    spm_metadata,
)

from gguf_run.formats.errors import FormatError, GgufRunError, UnsupportedError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.tokenizers.special import SpecialTokens
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer, TwoBosWarning

SPECIAL = {"<|im_end|>": CONTROL, "<tool>": USER_DEFINED, "<?>": UNKNOWN}


def tiny(**changes: Any) -> Tokenizer:
    return Tokenizer.from_metadata(bpe_metadata(special=SPECIAL, **changes))


def text_ids(text: str) -> list[int]:
    """Ids where nothing is merged: bpe_metadata numbers the 256 stand-ins in the order of tinyvocab.CHARACTER."""
    order = bpe_metadata()["tokenizer.ggml.tokens"]
    return [order.index(character) for character in spelled(text)]


def load(path: Path) -> Tokenizer:
    with GGUFFile.open(path) as file:
        return Tokenizer.from_metadata(file.metadata)


class TestSpecialTokens:
    def test_parsed(self) -> None:
        tokenizer = tiny()
        end, tool, unknown = (tokenizer.n_vocab - 3 + i for i in range(3))
        assert tokenizer.encode("a<|im_end|><tool>b<?>") == [*text_ids("a"), end, tool, *text_ids("b"), unknown]

    def test_user_defined_tokens_are_always_found(self) -> None:
        tokenizer = tiny()
        expected = [*text_ids("a<|im_end|>"), tokenizer.n_vocab - 2, *text_ids("b<?>")]
        assert tokenizer.encode("a<|im_end|><tool>b<?>", parse_special=False) == expected

    def test_a_well_known_name_is_a_control_token_whatever_its_type(self) -> None:
        tokenizer = Tokenizer.from_metadata(bpe_metadata(special={"<end_of_turn>": NORMAL}))
        assert tokenizer.encode("<end_of_turn>") == [tokenizer.n_vocab - 1]
        assert tokenizer.decode([tokenizer.n_vocab - 1], skip_special=True) == ""

    def test_the_longest_token_wins_over_the_first(self) -> None:
        tokens = ["ab", "bcd", "d", "abc"]
        assert SpecialTokens(tokens, [0, 1, 2]).split("abcdxd") == ["a", 1, "x", 2]
        assert SpecialTokens(tokens, [0, 1, 2, 3]).split("abcdxabc") == ["a", 1, "x", 3]

    @given(
        st.lists(st.text("ab<é", min_size=1, max_size=4), min_size=1, max_size=6, unique=True),
        st.text("ab<é", max_size=30),
    )
    def test_as_the_slow_way(self, tokens: list[str], text: str) -> None:
        found = SpecialTokens(tokens, range(len(tokens))).split(text)
        assert found == slow_split(text, [(token, id) for id, token in enumerate(tokens)])

    def test_white_space_beside_some_is_theirs(self) -> None:
        tokenizer = tiny(lstrip_token_ids=[256], rstrip_token_ids=[257])
        end, tool = 256, 257
        assert tokenizer.encode("a \n<|im_end|> b <tool>\u3000\tc") == [
            *text_ids("a"), end, *text_ids(" b "), tool, *text_ids("c")
        ]  # fmt: skip
        assert tokenizer.encode("<tool> <|im_end|>") == [tool, end]
        assert tokenizer.encode("<tool>\x1f") == [tool, *text_ids("\x1f")]

    def test_phi_3_is_known_by_its_name(self) -> None:
        metadata = bpe_metadata(special=SPECIAL | {"<|endoftext|>": CONTROL}) | {"general.name": "Phi-3 mini"}
        tokenizer = Tokenizer.from_metadata(metadata)
        assert tokenizer.encode("<|im_end|> a<|endoftext|> ") == [256, *text_ids("a"), 259, *text_ids(" ")]
        # As llama.cpp, it takes ASCII blanks only; with gguf-convert's list all white space, as the tokenizers package.
        assert tokenizer.encode("<|im_end|> \t\n\v\f\r\u3000a") == [256, *text_ids("\u3000a")]
        listed = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.rstrip_token_ids": [256]})
        assert listed.encode("<|im_end|> \u3000a") == [256, *text_ids("a")]

    def test_some_must_stand_alone(self) -> None:
        tokenizer = Tokenizer.from_metadata(bpe_metadata(special={"if": USER_DEFINED}, single_word_token_ids=[256]))
        assert tokenizer.encode("if elif if_ (if) ifé") == [
            256, *text_ids(" elif if_ ("), 256, *text_ids(") ifé")
        ]  # fmt: skip


class TestBosAndEos:
    @pytest.mark.parametrize(
        ("pre", "changes", "before", "after"),
        [
            ("gpt-2", {"bos_token_id": 5, "eos_token_id": 6}, [], []),
            ("gpt-2", {"bos_token_id": 5, "eos_token_id": 6, "add_bos_token": True}, [5], []),
            ("gpt-2", {"bos_token_id": 5, "eos_token_id": 6, "add_eos_token": True}, [], [6]),
            ("llama-bpe", {"bos_token_id": 5}, [5], []),
            ("llama-bpe", {"bos_token_id": 5, "add_bos_token": False}, [], []),
            ("tekken", {"bos_token_id": 5}, [5], []),
            ("llama-bpe", {}, [], []),
            ("gpt-2", {"bos_token_id": 0xFFFFFFFF, "eos_token_id": -1, "add_bos_token": True}, [], []),
        ],
    )
    def test_bpe(self, pre: str, changes: dict[str, Any], before: list[int], after: list[int]) -> None:
        tokenizer = tiny(pre=pre, **changes)
        assert tokenizer.encode("a") == [*before, *text_ids("a"), *after]
        assert tokenizer.encode("") == [*before, *after]
        assert tokenizer.encode("a", add_special=False) == text_ids("a")

    def test_spm_defaults(self) -> None:
        tokenizer = Tokenizer.from_metadata(spm_metadata({"a": -1.0}))
        assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos, tokenizer.add_eos) == (1, 2, True, False)
        assert tokenizer.stop_ids == {2}

    def test_a_chat_prompt_has_bos_once(self) -> None:
        tokenizer = Tokenizer.from_metadata(spm_metadata({"a": -1.0}, add_eos_token=True, add_space_prefix=False))
        assert tokenizer.encode_chat("a") == tokenizer.encode_chat("<s>a") == [1, 259]
        with pytest.warns(
            TwoBosWarning, match="the text begins with <s>, and the tokenizer puts another one before it"
        ):
            assert tokenizer.encode("<s>a") == [1, 1, 259, 2]
        assert tiny(bos_token_id=5).encode_chat("a") == text_ids("a")

    def test_several_tokens_before_a_text(self) -> None:
        tokenizer = tiny(bos_token_id=5, bos_token_ids=[5, 6], add_bos_token=True)
        assert tokenizer.encode("a") == tokenizer.encode_chat("a") == [5, 6, *text_ids("a")]
        assert tokenizer.encode("a", add_special=False) == text_ids("a")
        both = tiny(bos_token_id=256, bos_token_ids=[256, 6], add_bos_token=True)
        assert both.encode_chat("<|im_end|>a") == [256, *text_ids("a")]
        with pytest.warns(TwoBosWarning, match=r"the text begins with <\|im_end\|>"):
            assert both.encode("<|im_end|>a") == [256, 6, 256, *text_ids("a")]


class TestStopIds:
    @pytest.mark.parametrize(
        ("special", "changes", "names"),
        [
            ({"<|eot_id|>": CONTROL, "<|eom_id|>": CONTROL, "<x>": CONTROL}, {}, {"<|eot_id|>", "<|eom_id|>"}),
            ({"<x>": CONTROL, "<y>": CONTROL}, {"eos_token_id": 256, "eot_token_id": 257}, {"<x>", "<y>"}),
            ({"<|im_end|>": USER_DEFINED, "<|endoftext|>": NORMAL}, {}, {"<|im_end|>", "<|endoftext|>"}),
            ({"</s>": CONTROL}, {}, {"</s>"}),
            ({"</s>": USER_DEFINED}, {}, set()),
            ({"<|file_sep|>": CONTROL, "<PAD>": CONTROL, "<PRE>": CONTROL}, {}, {"<|file_sep|>", "<PAD>"}),
            ({"<|end|>": CONTROL, "<|call|>": CONTROL}, {}, {"<|end|>", "<|call|>"}),
            ({"<|end|>": CONTROL, "<|call|>": CONTROL, "<|return|>": CONTROL}, {}, {"<|call|>", "<|return|>"}),
        ],
    )  # fmt: skip
    def test_names(self, special: dict[str, int], changes: dict[str, Any], names: set[str]) -> None:
        tokenizer = Tokenizer.from_metadata(bpe_metadata(special=special, **changes))
        assert {tokenizer.token_text(id) for id in tokenizer.stop_ids} == names

    def test_all_that_a_list_names(self) -> None:
        assert tiny(eos_token_id=1, eos_token_ids=[1, 256, 7]).stop_ids == {1, 256, 7}

    def test_structure_of_an_answer_is_shown(self) -> None:
        tokenizer = Tokenizer.from_metadata(bpe_metadata(special={"<|channel|>": CONTROL}))
        assert tokenizer.decode([tokenizer.n_vocab - 1], skip_special=True) == "<|channel|>"


class TestDecode:
    @given(st.text(st.characters(codec="utf-8"), max_size=50))
    def test_reverses_encode(self, text: str) -> None:
        bpe, spm = tiny(bos_token_id=256), Tokenizer.from_metadata(spm_metadata({"▁a": -1.0, "a": -2.0, "▁": -3.0}))
        assert bpe.decode(bpe.encode(text)) == text
        spm_text = text.replace("▁", " ")  # which is how it spells a space
        assert spm.decode(spm.encode(text, add_special=False, parse_special=False)) == spm_text
        assert spm.decode(spm.encode(text, parse_special=False), skip_special=True) == spm_text

    def test_pieces(self) -> None:
        special = {"<c>": CONTROL, "<u>": USER_DEFINED, "unused": UNUSED, "未": NORMAL}
        tokenizer = Tokenizer.from_metadata(bpe_metadata(special=special))
        ids = range(tokenizer.n_vocab - 4, tokenizer.n_vocab)
        assert [tokenizer.piece(id) for id in ids] == [b"<c>", b"<u>", b"", "未".encode()]
        assert [tokenizer.piece(id, skip_special=True) for id in ids] == [b"", b"<u>", b"", "未".encode()]
        assert tokenizer.token_text(text_ids("é")[0]) == r"\xc3"

    def test_space_prefix_is_removed_once(self) -> None:
        tokenizer = Tokenizer.from_metadata(spm_metadata({"▁": -1.0, "▁a": 0.0, "a": -2.0}))
        a, space_a = tokenizer.encode("a", add_special=False)[0], tokenizer.encode(" a", add_special=False)
        assert tokenizer.decode([1, a, a]) == "<s>a a"
        assert tokenizer.decode(space_a) == " a"
        stream = tokenizer.stream()
        assert stream.push(a) == " a"

    def test_invalid_bytes(self) -> None:
        tokenizer = tiny()
        ids = text_ids("aé")[:2] + text_ids("b")
        assert tokenizer.decode(ids) == "a\ufffdb"

    @pytest.mark.parametrize("id", [-1, 10**9])
    def test_unknown_id(self, id: int) -> None:
        with pytest.raises(GgufRunError, match=f"token id {id} is not in the vocabulary: 0 to 258 are"):
            tiny().decode([id])

    def test_lone_surrogates_become_replacement_characters(self) -> None:
        tokenizer = tiny()
        assert tokenizer.decode(tokenizer.encode("a\udcffb\ud83d\ude00")) == "a\ufffdb😀"


class TestStream:
    @given(st.lists(st.one_of(st.binary(max_size=3), st.text(max_size=2).map(lambda t: t.encode(errors="replace")))))
    def test_equals_decoding_at_once(self, parts: list[bytes]) -> None:
        tokenizer = tiny()
        order = {token: id for id, token in enumerate(bpe_metadata()["tokenizer.ggml.tokens"])}
        data = b"".join(parts)
        ids = [order[CHARACTER[byte]] for byte in data]
        stream = tokenizer.stream()
        shown = ""
        whole = data.decode(errors="replace")
        for id in ids:
            shown += stream.push(id)
            assert whole.startswith(shown)
        assert shown + stream.flush() == whole

    def test_holds_back_half_a_character(self) -> None:
        stream = tiny().stream()
        assert [stream.push(id) for id in text_ids("€a")] == ["", "", "€", "a"]
        assert stream.flush() == ""
        stream.push(text_ids("€")[0])
        assert stream.flush() == "\ufffd"

    def test_control_tokens_are_hidden(self) -> None:
        tokenizer = tiny()
        end, tool = tokenizer.n_vocab - 3, tokenizer.n_vocab - 2
        assert tokenizer.stream().push(end) == ""
        assert tokenizer.stream().push(tool) == "<tool>"
        assert tokenizer.stream(skip_special=False).push(end) == "<|im_end|>"


# Ids by llama.cpp v0.5.0 without BOS, special tokens parsed; a second list where it is another one if they are not.
SMOLLM2_IDS: list[tuple[str, list[int], list[int] | None]] = [
    ("", [], None),
    ("Hello world", [19556, 905], None),
    (" 1234  3.14", [216, 33, 34, 35, 36, 256, 35, 30, 33, 36], None),
    ("don't DON'T we'll", [12420, 982, 422, 2154, 23, 68, 392, 3060], None),
    ("日本語 한국어 Привет",
     [23274, 115, 40993, 179, 120, 248, 216, 33085, 246, 181, 130, 251, 183, 240, 129, 5470, 249, 46879, 16464, 32547],
     None),
    ("👨\u200d👩\u200d👧", [10813, 235, 118, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117], None),
    ("a\r\n\r\n\tb   c\n\n", [81, 18682, 197, 82, 256, 265, 1116], None),
    ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2],
     [44, 108, 306, 79, 3738, 108, 46, 4093, 198, 6004, 44, 108, 306, 79, 486, 108, 46]),
    ("\0\x1b\x7f\xa0", [190, 212, 217, 15442], None),
    ("ſ½٣", [144, 140, 16738, 164, 113], None),
]  # fmt: skip
GEMMA3_IDS: list[tuple[str, list[int], list[int] | None]] = [
    ("", [], None),
    ("Hello world", [9259, 1902], None),
    (" 1234  3.14", [236743, 236770, 236778, 236800, 236812, 138, 236800, 236761, 236770, 236812], None),
    ("don't DON'T we'll", [13246, 236789, 236745, 52402, 236789, 236774, 692, 236789, 859], None),
    ("日本語 한국어 Привет", [94951, 50413, 237430, 15745, 8362], None),
    ("👨\u200d👩\u200d👧", [243874, 237243, 243767, 237243, 244814], None),
    ("a\r\n\r\n\tb   c\n\n", [236746, 251, 107, 251, 107, 255968, 236763, 139, 236755, 108], None),
    ("<start_of_turn>user\nhi<end_of_turn>\n", [105, 2364, 107, 2202, 106, 107],
     [236820, 3041, 236779, 1340, 236779, 887, 236813, 2364, 107, 2202, 236820, 643, 236779, 1340, 236779, 887, 236813,
      107]),
    ("<b>x</b> </table>", [200, 236781, 209, 236743, 176], None),
    ("\0\x1b\x7f\xa0", [238, 239473, 251541, 432, 398], None),
    ("ſ½٣", [238071, 238612, 242044], None),
]  # fmt: skip


def check_real(tokenizer: Tokenizer, table: list[tuple[str, list[int], list[int] | None]]) -> None:
    for text, parsed, plain in table:
        assert tokenizer.encode(text, add_special=False) == parsed, text
        assert tokenizer.encode(text, add_special=False, parse_special=False) == (plain or parsed), text
        assert tokenizer.decode(parsed) == text


def digest(ids: list[int]) -> str:
    return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()


def test_smollm2() -> None:
    tokenizer = load(real.smollm2())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eot, tokenizer.add_bos) == (1, 2, 2, False)
    assert tokenizer.stop_ids == {0, 2, 4}
    check_real(tokenizer, SMOLLM2_IDS)
    text = real.wiki_text()
    ids = tokenizer.encode(text)
    assert len(ids) == 303_415
    assert digest(ids) == "18e663b61dd00f49796c8a6ae498b7dbe009cac4a2eaf3c67fa7d81baf47d945"
    assert tokenizer.decode(ids) == text


def test_gemma3() -> None:
    tokenizer = load(real.gemma3())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eot, tokenizer.add_bos) == (2, 1, 106, True)
    assert tokenizer.stop_ids == {1, 106}
    check_real(tokenizer, GEMMA3_IDS)
    text = real.wiki_text()
    ids = tokenizer.encode(text)
    assert (len(ids), ids[0]) == (295_216, 2)
    assert digest(ids) == "3064d7015b6a7f09ba7995cd9c0447b711f60ea4b870d013101b5c5253474511"
    assert tokenizer.decode(ids, skip_special=True) == text


BAD_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, r"tokenizer.ggml.model is missing"),
    ({"model": 3}, r"tokenizer.ggml.model must be a string, but is int"),
    ({"model": "rwkv"}, r"tokenizer.ggml.model is 'rwkv': gpt2, llama, gemma4, t5, bert are supported"),
    ({"pre": 1}, r"tokenizer.ggml.pre must be a string, but is int"),
    ({"tokens": None}, r"tokenizer.ggml.tokens is missing"),
    ({"tokens": []}, r"tokenizer.ggml.tokens is empty"),
    ({"tokens": "abc"}, r"tokenizer.ggml.tokens is no array of strings, but str 'abc'"),
    ({"tokens": np.arange(3)}, r"tokenizer.ggml.tokens is no array of strings, but ndarray"),
    ({"tokens": ["a", 7]}, r"tokenizer.ggml.tokens: entry 1 is no string, but int 7"),
    ({"tokens": ["a", "\ud800"]}, r"tokenizer.ggml.tokens holds characters that UTF-8 cannot express"),
    ({"tokens": ["a", "b", "a"]}, r"tokens 0 and 2 are the same text 'a'"),
    ({"token_type": [1, 2]}, r"tokenizer.ggml.token_type has 2 entries for 259 tokens"),
    ({"token_type": "x"}, r"tokenizer.ggml.token_type is no array of numbers, but str 'x'"),
    ({"token_type": [[1], [2, 3]]}, r"tokenizer.ggml.token_type is no array of numbers, but list"),
    ({"token_type": [0.5] * 259}, r"token_type holds float64 numbers: integers are allowed"),
    ({"merges": None}, r"tokenizer.ggml.merges is missing"),
    ({"merges": ["a b", "ab"]}, r"tokenizer.ggml.merges: entry 1 is 'ab', not \"left right\""),
    ({"merges": ["a b", 3]}, r"tokenizer.ggml.merges: entry 1 is no string, but int 3"),
    ({"bos_token_id": 259}, r"bos_token_id is 259: the vocabulary has the ids 0 to 258"),
    ({"eos_token_id": -2}, r"eos_token_id is -2: the vocabulary"),
    ({"eot_token_id": "x"}, r"eot_token_id must be a token's id, but is str 'x'"),
    ({"lstrip_token_ids": [259]}, r"lstrip_token_ids must be a list of ids from 0 to 258"),
    ({"eos_token_ids": [-1]}, r"eos_token_ids must be a list of ids from 0 to 258"),
    ({"bos_token_ids": "x"}, r"bos_token_ids must be a list of ids from 0 to 258"),
    ({"rstrip_token_ids": 3}, r"rstrip_token_ids must be a list of ids from 0 to 258"),
    ({"eos_token_id": True}, r"eos_token_id must be a token's id, but is bool True"),
    ({"add_bos_token": 1}, r"add_bos_token must be true or false, but is int 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_METADATA)
def test_bad_metadata(changes: dict[str, Any], message: str) -> None:
    metadata = bpe_metadata(special=SPECIAL)
    for key, value in changes.items():
        metadata[f"tokenizer.ggml.{key}"] = value
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises((FormatError, UnsupportedError), match=message) as caught:
        Tokenizer.from_metadata(metadata)
    assert "\n" not in str(caught.value)


def test_empty_tokens_get_names() -> None:
    tokenizer = Tokenizer.from_metadata(bpe_metadata(special={"": NORMAL}))
    assert tokenizer.token_text(tokenizer.n_vocab - 1) == "[EMPTY_256]"


_ANY = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 300), st.just(2**63), st.floats(), st.text(max_size=3),
    st.lists(st.one_of(st.text(max_size=3), st.integers(0, 9)), max_size=4),
    st.just(np.zeros((2, 2))), st.just(np.zeros(259, np.int32)), st.just(["a"] * 259),
)  # fmt: skip
_KEYS = [
    "model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id", "eot_token_id",
    "unknown_token_id", "fim_pad_token_id", "add_bos_token", "add_eos_token", "add_space_prefix",
]  # fmt: skip


@given(st.booleans(), st.dictionaries(st.sampled_from(_KEYS), _ANY, min_size=1, max_size=3))
@settings(max_examples=500)
def test_any_metadata_works_or_is_refused(spm: bool, changes: dict[str, Any]) -> None:
    metadata = spm_metadata({"a": -1.0}) if spm else bpe_metadata(special=SPECIAL)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(FormatError, UnsupportedError):
            tokenizer = Tokenizer.from_metadata(metadata)
            tokenizer.decode(tokenizer.encode("a <|im_end|> é"))

"""How byte-level BPE cuts a text into words: the names in `tokenizer.ggml.pre`, and what each of them means.

A pre-tokenizer is a list of regular expressions. Each of them cuts every part of the text into its matches and the
texts between the matches. The names are llama.cpp's. Where llama.cpp's expressions differ from those that a model was
trained with (marks and letter cases of gpt-4o and tekken), the expressions here are the model's.
"""

import warnings
from collections.abc import Iterable
from types import MappingProxyType

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from gguf_run.formats.frozen import frozen

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_SPACE = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_SPACE}"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_SYMBOLS}|{_SPACE}"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_LINES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_LINES}"

# A word is upper-case letters and then lower-case ones; letters without case and marks count as both.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(upper: str, lower: str, contraction: str, digits: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{lead}{upper}*{lower}+{contraction}|{lead}{upper}+{lower}*{contraction}"
    return rf"{words}|{digits}|{_SYMBOLS}[\r\n/]*|{_LINES}"


_GPT4O = _cased(_UPPER, _LOWER, f"(?:{_CONTRACTION})?", r"\p{N}{1,3}")
_TEKKEN = _cased(_UPPER, _LOWER, "", r"\p{N}")
_NO_HAN = (rf"[{_UPPER}&&[^\p{{Han}}]]", rf"[{_LOWER}&&[^\p{{Han}}]]")
_KIMI = r"\p{Han}+|" + _cased(*_NO_HAN, f"(?:{_CONTRACTION})?", r"\p{N}{1,3}").replace("/]*", "]*")

_MARKED = r"[\p{L}\p{M}]"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_MARKED}+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"
_GRANITE = _cased(rf"[{_MARKED}&&[^a-z]]", rf"[{_MARKED}&&[^A-Z]]", f"(?:{_CONTRACTION})?", r"\p{N}{1,3}")

_KANJI_KANA = r"[一-龥぀-ゟ゠-ヿ]+"
_PUNCTUATED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK3 = (r"\p{N}{1,3}", _KANJI_KANA, rf"{_PUNCTUATED}[\r\n]*|{_LINES}")
_CJK = r"[一-龥ࠀ-一가-퟿]+"  # the second range holds the scripts from Samaritan on, and some spaces
_CASED_LETTERS = (
    "[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]"
)
_EAST_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff"
    "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _KANJI_KANA
)
# Groups of three digits, counted from the right. The text before a number stays with its first group, for the next
# steps to cut. A match begins at the start or behind a digit only: otherwise a long text without digits would be
# searched again from each character.
_THREES = r"(?<!\P{N})\P{N}*+\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@frozen
class PreTokenizer:
    """A way to cut a text into words."""

    steps: tuple[str, ...]  # regular expressions in Oniguruma's syntax
    whole_words: bool = False  # a word that is a token is taken as it is, without merges
    add_bos: bool = False  # a text begins with BOS if the metadata does not say otherwise

    def build(self) -> Sequence:
        """Return an object of the tokenizers package that cuts a text and spells every word in bytes."""
        splits = [Split(Regex(step), "isolated") for step in self.steps]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


class PreTokenizerWarning(UserWarning):
    """The pre-tokenizer of a file is not known: text may be cut into other tokens than the model was trained on."""


_DEFAULT = PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

TABLE = (
    ("default", _DEFAULT),
    ("gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de "
     "jina-v2-code roberta-bpe gigachat a.x-4.0 mellum modern-bert", PreTokenizer((_GPT2,))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", PreTokenizer((r"\p{N}", _GPT2))),
    ("falcon", PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
     PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("glm4 glm5", PreTokenizer((_LLAMA3,), whole_words=True)),
    ("minicpm5", PreTokenizer((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), whole_words=True)),
    ("jais-2", PreTokenizer((
        _LLAMA3.removesuffix(_SPACE)
        + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"\s",
    ))),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2", PreTokenizer((_QWEN2,))),
    ("qwen35", PreTokenizer((_QWEN35,))),
    ("ufakzeka", PreTokenizer((_QWEN2.removeprefix(f"{_CONTRACTION}|"),))),
    ("laguna", PreTokenizer((r"[^\n]+|\n+", _QWEN2))),
    ("seed-coder", PreTokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",))),
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizer((
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|{_SPACE}",
    ))),
    ("exaone-moe", PreTokenizer((
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_SYMBOLS}[\r\n/]?"
        rf"|\s*[\r\n]|{_SPACE}",
    ))),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_GPT4O,))),
    ("kimi-k2", PreTokenizer((_KIMI,), whole_words=True)),
    ("granite-embed-multi-97m", PreTokenizer((_GRANITE,), whole_words=True)),
    ("tekken", PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True)),
    ("deepseek-llm", PreTokenizer((
        r"[\r\n]", rf"\s?{_CASED_LETTERS}+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+", r"\s+$", _CJK, r"\p{N}+",
    ))),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer(_DEEPSEEK3)),
    ("youtu", PreTokenizer((_YOUTU, _cased(_MARKED, _MARKED, f"(?:{_CONTRACTION})?", r"\p{N}")), whole_words=True)),
    ("tiny_aya cohere2moe", PreTokenizer((
        _THREES, _cased(_MARKED, _MARKED, f"(?:{_CONTRACTION})?", r"\p{N}{1,3}"),
    ))),
    ("afmoe", PreTokenizer((_THREES, _EAST_ASIAN, _DEEPSEEK3[2]))),
    ("spark2_5", PreTokenizer((
        r"\p{N}{1,3}", _KANJI_KANA, rf"{_PUNCTUATED}|[\r\n]|{_SPACE}", r"\p{N}",
    ))),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_BLOOM,))),
    ("viking", PreTokenizer((_BLOOM, r"\p{N}"))),
    ("chameleon", PreTokenizer((
        r"<sentinel:[0-9]+>", r"IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2,
    ), add_bos=True)),
    ("superbpe", PreTokenizer((r"\p{N}+", r"(?=(?:[0-9]{3})+(?![0-9]))"))),
)  # fmt: skip

PRE_TOKENIZERS = MappingProxyType({name: pre for names, pre in TABLE for name in names.split()})


def pre_tokenizer(name: str | None, merges: Iterable[str]) -> PreTokenizer:
    """Return the row for a value of `tokenizer.ggml.pre`. PreTokenizerWarning and the nearest row if it is not known.

    merges: of the vocabulary, "left right" each. They show which row is nearest.
    """
    if name is not None and name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    from gguf_run.runtime.tokenizers.nearest import nearest

    fault = "names no pre-tokenizer" if name is None else f"names the pre-tokenizer {name!r}, which is not known"
    cuts = {names.split()[0]: pre.build().pre_tokenize_str for names, pre in TABLE}
    known, n_cut, n_tried = nearest(cuts, (pair.replace(" ", "", 1) for pair in merges))
    fits = f", which fits the vocabulary best (it cuts {n_cut} of {n_tried} tokens apart)" if n_tried else ""
    warnings.warn(
        f'the file {fault} (tokenizer.ggml.pre): text is cut as for "{known}"{fits}, answers may be worse',
        PreTokenizerWarning,
        stacklevel=2,
    )
    return PreTokenizer(PRE_TOKENIZERS[known].steps)

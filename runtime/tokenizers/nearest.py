"""Which known pre-tokenizer comes nearest to the unknown one that a vocabulary was made with.

No token reaches over a cut, so a pre-tokenizer that cuts tokens apart is another one. One that hardly cuts at all
leaves all tokens whole, too. So the one is taken that cuts most where tokens meet, less what it cuts of tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sized

from gguf_run.runtime.tokenizers.merge import BYTE_CHARACTERS

_FEWEST, _N_TRIED = 100, 3000  # tokens
# A token that is cut counts as a twelfth of all tokens. Any share from a tenth to a fifteenth finds the right one for
# the vocabularies of GPT-OSS, Llama 3, DeepSeek-V3 and Qwen3.6, and for those of the tests.
_SHARE = 12
_DIGITS = ("12", "1234")  # which meet in no vocabulary that has them one by one


def nearest(cuts: Mapping[str, Callable[[str], Sized]], tokens: Iterable[str]) -> tuple[str, int, int]:
    """Return the name of a pre-tokenizer, and how many tokens it cuts apart, of how many that were tried.

    cuts: the pre-tokenizers to choose from. A function cuts a text into parts.
    tokens: a byte-level vocabulary without special tokens. If it is small, the answer is "default".
    """
    texts = [text for token in dict.fromkeys(tokens) if (text := _text(token))]
    texts = texts[:: len(texts) // _N_TRIED + 1]
    if len(texts) < _FEWEST:
        return "default", 0, 0
    joined = [*_DIGITS, *(f"{a}{b}" for a, b in zip(texts, texts[len(texts) // 2 :] + texts, strict=False))]
    n_cut, score = {}, {}
    for name, cut in cuts.items():
        n_cut[name] = sum(len(cut(text)) > 1 for text in texts)
        score[name] = sum(len(cut(text)) for text in joined) - n_cut[name] * len(texts) // _SHARE
    name = max(score, key=lambda name: score[name])
    return name, n_cut[name], len(texts)


def _text(token: str) -> str:
    """Return the text of a token, "" if it is no whole text."""
    try:
        return bytes(BYTE_CHARACTERS[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return ""

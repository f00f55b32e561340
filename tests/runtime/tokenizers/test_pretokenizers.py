"""Each pre-tokenizer cuts one awkward text as llama.cpp v0.5.0 does; gpt-4o, kimi-k2 and tekken as their models do."""

import json

import hftokenizers
import pytest
from tinyvocab import bpe_metadata

from gguf_run.runtime.tokenizers.nearest import nearest
from gguf_run.runtime.tokenizers.pretokenizers import PRE_TOKENIZERS, TABLE, PreTokenizerWarning, pre_tokenizer
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

TEXT = "I'LL don't x=12345,\n\n  ÉT\t日本k 3.14Bc!\n/ ٣ नमस्ते =a'S\n"

# The first name of each row. Names of the other rows were also compared with llama.cpp on 1500 random texts.
WORDS = {
    "default": "I|'|LL| don|'|t| x|=|123|45|,|\n\n | ÉT|\t|日本k| |3|.|14|Bc|!|\n|/| |٣| नमस|्|त|े| |=|a|'|S|\n",
    "gpt-2": "I|'|LL| don|'t| x|=|12345|,|\n\n | ÉT|\t|日本k| 3|.|14|Bc|!|\n|/| ٣| नमस|्|त|े| =|a|'|S|\n",
    "smollm": "I|'|LL| don|'t| x|=|1|2|3|4|5|,|\n\n | ÉT|\t|日本k| |3|.|1|4|Bc|!|\n|/| |٣| नमस|्|त|े| =|a|'|S|\n",
    "falcon": "I|'|LL| don|'|t| x|=|123|45|,|\n\n | ÉT|\t|日本k| 3|.|14|Bc|!|\n|/| ٣| नमस|्|त|े| |=|a|'|S|\n",
    "llama-bpe": "I|'LL| don|'t| x|=|123|45|,\n\n| | ÉT|\t日本k| |3|.|14|Bc|!\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "dbrx": "I|'LL| don|'t| x|=|123|45|,\n\n| | ÉT|\t日本k| |3|.|14|Bc|!\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "glm4": "I|'LL| don|'t| x|=|123|45|,\n\n| | ÉT|\t日本k| |3|.|14|Bc|!\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "minicpm5": "I|'LL| don|'t| x|=|123|45|,\n\n| | ÉT|\t日本k| |3|.|14|Bc|!\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "jais-2": "I|'LL| don|'t| x|=|123|45|,\n\n| | ÉT|\t日本k| |3|.|14|Bc|!\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "qwen2": "I|'LL| don|'t| x|=|1|2|3|4|5|,\n\n| | ÉT|\t日本k| |3|.|1|4|Bc|!\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "qwen35": "I|'LL| don|'t| x|=|1|2|3|4|5|,\n\n| | ÉT|\t日本k| |3|.|1|4|Bc|!\n|/| |٣| नमस्ते| =|a|'S|\n",
    "ufakzeka": "I|'LL| don|'t| x|=|1|2|3|4|5|,\n\n| | ÉT|\t日本k| |3|.|1|4|Bc|!\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "laguna": "I|'LL| don|'t| x|=|1|2|3|4|5|,|\n\n| | ÉT|\t日本k| |3|.|1|4|Bc|!|\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "seed-coder": "I|'LL| don|'t| x|=|1|2|3|4|5|,|\n\n| | ÉT|\t日本k| |3|.|1|4|Bc|!|\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "bailingmoe": "I|'LL| don|'t| x|=|1|2|3|4|5|,\n\n| | ÉT|\t日本k| |3|.|1|4|Bc|!\n|/| |٣| नमस|्त|े| =|a|'S|\n",
    "exaone-moe": "I|'LL| don|'t| x|=|1|2|3|4|5|,\n|\n| | ÉT|\t日本k| |3|.|1|4|Bc|!\n|/| |٣| नमस्ते| =|a|'S|\n",
    "gpt-4o": "I'LL| don't| x|=|123|45|,\n\n| | ÉT|\t日本k| |3|.|14|Bc|!\n/| |٣| नमस्ते| =|a'S|\n",
    "kimi-k2": "I'LL| don't| x|=|123|45|,\n\n| | ÉT|\t|日本|k| |3|.|14|Bc|!\n|/| |٣| नमस्ते| =|a'S|\n",
    "granite-embed-multi-97m": "I'LL| don't| x|=|123|45|,\n\n| | É|T|\t日本k| |3|.|14|Bc|!\n/| |٣| नमस्ते| =|a'S|\n",
    "tekken": "I|'LL| don|'t| x|=|1|2|3|4|5|,\n\n| | ÉT|\t日本k| |3|.|1|4|Bc|!\n/| |٣| नमस्ते| =|a|'S|\n",
    "deepseek-llm": "I|'|LL| don|'|t| x|=|12345|,|\n|\n| | É|T|\t|日本|k| |3|.|14|Bc|!|\n|/| |٣| |नमस्ते| =|a|'|S|\n",
    "deepseek-coder": "I|'|LL| don|'|t| x|=|1|2|3|4|5|,|\n|\n| | ÉT|\t|日本|k| |3|.|1|4|Bc|!|\n|/| |٣| |नमस|्|त|े| =|a|'|S|\n",  # noqa: E501
    "deepseek-v3": "I|'LL| don|'t| x|=|123|45|,\n\n| | ÉT|\t|日本|k| |3|.|14|Bc|!\n|/| |٣| नमस्ते| =|a|'S|\n",
    "youtu": "I'LL| don't| x|=|1|2|3|4|5|,\n\n| | ÉT|\t|日本|k| |3|.|1|4|Bc|!\n/| |٣| नमस्ते| =|a'S|\n",
    "tiny_aya": "I'LL| don't| x|=|12|345|,\n\n| | ÉT|\t日本k| |3|.|14|Bc|!\n/| |٣| नमस्ते| =|a'S|\n",
    "afmoe": "I|'LL| don|'t| x|=|12|345|,\n\n| | ÉT|\t|日本|k| |3|.|14|Bc|!\n|/| |٣| नमस्ते| =|a|'S|\n",
    "spark2_5": "I|'LL| don|'t| x|=|1|2|3|4|5|,|\n|\n| | ÉT|\t|日本|k| |3|.|1|4|Bc|!|\n|/| |٣| नमस्ते| =|a|'S|\n",
    "poro-chat": "I'LL| don't| x=12345|,\n\n | ÉT|\t|日本k| 3|.|14Bc|!\n|/| ٣| नमस्ते| =a'S|\n",
    "viking": "I'LL| don't| x=|1|2|3|4|5|,\n\n | ÉT|\t|日本k| |3|.|1|4|Bc|!\n|/| |٣| नमस्ते| =a'S|\n",
    "chameleon": "I|'|LL| don|'|t| x|=|1|2|3|4|5|,|\n|\n|  |ÉT|\t|日本k| |3|.|1|4|Bc|!|\n|/| |٣| नमस|्|त|े| |=|a|'|S|\n",
    "superbpe": "I'LL don't x=|12|345|,\n\n  ÉT\t日本k |3|.|14|Bc!\n/ |٣| नमस्ते =a'S\n",
}


def test_every_row_has_its_words() -> None:
    assert [names.split()[0] for names, _ in TABLE] == list(WORDS)
    assert len(PRE_TOKENIZERS) == sum(len(names.split()) for names, _ in TABLE), "a name stands in two rows"


@pytest.mark.parametrize("name", WORDS)
def test_words(name: str) -> None:
    found = PRE_TOKENIZERS[name].build().pre_tokenize_str(TEXT)
    assert "|".join(TEXT[start:end] for _, (start, end) in found) == WORDS[name]


@pytest.mark.parametrize(
    ("names", "whole_words", "add_bos"),
    [("llama-bpe llama3 tekken", True, True), ("glm4 youtu", True, False), ("smollm qwen2 gpt-2 dbrx", False, False)],
)
def test_flags(names: str, whole_words: bool, add_bos: bool) -> None:
    for name in names.split():
        assert (PRE_TOKENIZERS[name].whole_words, PRE_TOKENIZERS[name].add_bos) == (whole_words, add_bos)


def test_an_unknown_name_is_named() -> None:
    with pytest.warns(PreTokenizerWarning, match="names the pre-tokenizer 'qwen9', which is not known"):
        tokenizer = Tokenizer.from_metadata(bpe_metadata(pre="qwen9"))
    assert tokenizer.encode("1234") == Tokenizer.from_metadata(bpe_metadata(pre="default")).encode("1234")


def test_a_missing_name() -> None:
    with pytest.warns(PreTokenizerWarning, match="names no pre-tokenizer"):
        assert pre_tokenizer(None, ["a b"]).steps == PRE_TOKENIZERS["default"].steps


@pytest.mark.parametrize("kind", [kind for kind, (_, model, _) in hftokenizers.KINDS.items() if model == "gpt2"])
def test_a_vocabulary_shows_its_pre_tokenizer(kind: str) -> None:
    merges = [" ".join(pair) for pair in json.loads(hftokenizers.trained(kind))["model"]["merges"]]
    cuts = {names.split()[0]: pre.build().pre_tokenize_str for names, pre in TABLE}
    name, n_cut, n_tried = nearest(cuts, (pair.replace(" ", "") for pair in merges))
    assert PRE_TOKENIZERS[name].steps == PRE_TOKENIZERS[hftokenizers.KINDS[kind][2]].steps
    assert n_cut < n_tried / 200
    fits = rf'text is cut as for "{name}", which fits the vocabulary best \(it cuts {n_cut} of {n_tried} tokens apart\)'
    with pytest.warns(PreTokenizerWarning, match=fits):
        assert pre_tokenizer("qwen9", merges).steps == PRE_TOKENIZERS[name].steps


def test_kimis_words_by_case_and_han() -> None:
    cut = PRE_TOKENIZERS["kimi-k2"].build().pre_tokenize_str
    text = "getUserName 中文字hello don't//\n a/b我's Ⅷ12345"
    words = "get|User|Name| |中文字|hello| don't|//\n| a|/b|我|'s| |Ⅷ12|345"
    assert "|".join(text[start:end] for _, (start, end) in cut(text)) == words


def test_long_runs_of_spaces_are_cut_as_powers_of_two() -> None:
    words = [word for word, _ in PRE_TOKENIZERS["jais-2"].build().pre_tokenize_str("a" + " " * 30 + "b")]
    assert [len(word) for word in words] == [1, 16, 8, 4, 1, 2]

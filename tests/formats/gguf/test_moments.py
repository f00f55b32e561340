"""Second moments: the file's form, experts of few tokens, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ggufbuild import T, Typed, write

from gguf_run.formats.errors import FormatError, GgufRunError
from gguf_run.formats.gguf.imatrix import Imatrix
from gguf_run.formats.gguf.moments import Moments

Q, K, EXPERTS = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_down_exps.weight"
FIRSTS = {K: Q, Q: Q, EXPERTS: EXPERTS}
META = {"imatrix.inputs": Typed("[string]", [FIRSTS[name] for name in sorted(FIRSTS)])}
COUNTS = {Q: [20], K: [20], EXPERTS: [6, 0, 3]}
RNG = np.random.default_rng(0)
ROWS = {name: [RNG.standard_normal((t, 5)).astype(np.float32) for t in counts] for name, counts in COUNTS.items()}


def file(folder: Path, meta: dict[str, Any] = META, **changed: np.ndarray) -> Path:
    """Write a file. changed: tensors that are other than they must be, by the last part of their names."""
    tensors = []
    for name in FIRSTS:
        products = [(x.T @ x) for x in ROWS[FIRSTS[name]]]
        data = {"in_sum2": np.array([np.diag(h) for h in products])}
        data["counts"] = np.array(COUNTS[name], np.float32)[:, None]
        if FIRSTS[name] == name:
            data["in_moments"] = np.array([h[np.triu_indices(5)] for h in products])
        for end, values in (data | {key: changed[key] for key in changed.keys() & data.keys()}).items():
            tensors.append(T(f"{name}.{end}", values.shape[::-1], data=values.astype(np.float32)))
    return write(folder / "full.gguf", meta, tensors)


def test_shared_inputs(tmp_path: Path) -> None:
    with Moments.open(file(tmp_path)) as moments:
        assert [moments.group(name) for name in (Q, K, "other.weight")] == [Q, Q, None]
        assert moments.n_tokens(K) == 20
        x = ROWS[Q][0].astype(np.float64)
        for name in (Q, K):
            assert moments.mean(name) == pytest.approx(x.T @ x / 20, rel=1e-5)
        assert np.array_equal(moments.mean(Q), moments.mean(Q).T)
        assert moments.imatrix.sums.keys() == Imatrix.open(tmp_path / "full.gguf").sums.keys()


def test_experts_of_few_tokens_are_shrunk_to_their_layer(tmp_path: Path) -> None:
    layer = np.concatenate(ROWS[EXPERTS]).astype(np.float64)
    with Moments.open(file(tmp_path)) as moments:
        for expert, x in enumerate(ROWS[EXPERTS]):
            a = len(x) / (len(x) + 5)
            own = x.T @ x / max(len(x), 1)
            assert moments.mean(EXPERTS, expert) == pytest.approx(a * own + (1 - a) * layer.T @ layer / 9, rel=1e-5)
            assert moments.n_tokens(EXPERTS, expert) == len(x)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no second moments: make it with gguf-imatrix --full"):
        Moments.open(file(tmp_path, {}))
    for names in ([Q], [Q, Q, "other"], 7):
        meta = {"imatrix.inputs": Typed("[string]", names) if isinstance(names, list) else names}
        with pytest.raises(FormatError, match=r"imatrix\.inputs has other names"):
            Imatrix.open(file(tmp_path, meta))
    with pytest.raises(FormatError, match=r"in_moments.* has 1 rows of 14 values, .* needs 1 of 15"):
        Moments.open(file(tmp_path, in_moments=np.zeros((1, 14))))


def test_values_without_meaning(tmp_path: Path) -> None:
    tensors = [T(f"{Q}.in_sum2", (2, 1)), T(f"{Q}.counts", (1, 1), data=np.ones((1, 1), np.float32))]
    meta = {"imatrix.inputs": Typed("[string]", [Q])}
    values = np.array([[1, np.nan, 1]], np.float32)
    path = write(tmp_path / "nan.gguf", meta, [*tensors, T(f"{Q}.in_moments", (3, 1), data=values)])
    with Moments.open(path) as moments, pytest.raises(FormatError, match=r"attn_q\.weight.* are not finite"):
        moments.mean(Q)
    tensors[1] = T(f"{Q}.counts", (1, 1), data=np.zeros((1, 1), np.float32))
    path = write(tmp_path / "none.gguf", meta, [*tensors, T(f"{Q}.in_moments", (3, 1))])
    with Moments.open(path) as moments, pytest.raises(GgufRunError, match="has read no token"):
        moments.mean(Q)

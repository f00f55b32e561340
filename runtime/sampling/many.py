"""The rows of a step sampled together: one compiled call, whose threads share the rows.

It gives what Sampler.sample gives row by row. Options that few people use are left to Sampler.sample.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from gguf_run.kernels_cpu.replay.team import Team
from gguf_run.kernels_cpu.sampling.choose import BAD, ROW, RowChooser
from gguf_run.runtime.sampling.bias import forbid
from gguf_run.runtime.sampling.candidates import Candidates
from gguf_run.runtime.sampling.choice import Choice
from gguf_run.runtime.sampling.filters import GREEDY
from gguf_run.runtime.sampling.sampler import Sampler

# The options of a sampler as a ROW, b"" if Sampler.sample must do it; and the arrays that it has addresses of.
_Packed = tuple[bytes, NDArray[np.int64], NDArray[np.float64]]
COMPILED = ("penalties", "top_k", "top_p", "min_p", "temperature")  # samplers of a compiled row, in this order


class Row(NamedTuple):
    """What a row of logits is sampled with."""

    sampler: Sampler
    drafts: Sequence[int] = ()  # tokens behind those that the sampler has accepted, as if they had been accepted
    mask: NDArray[np.uint32] | None = None  # see Sampler.sample


class ManySampler:
    """Samples rows of n_vocab logits on the threads of a team. The team must not run anything else meanwhile."""

    def __init__(self, team: Team, n_vocab: int) -> None:
        self._chooser, self._n_vocab = RowChooser(team, n_vocab), n_vocab
        self._packed: WeakKeyDictionary[Sampler, _Packed] = WeakKeyDictionary()

    def sample(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> list[int | Exception]:
        """Return for each row the id of its next token, for Sampler.accept, or the error of this row alone.

        logits: f32[len(rows), n_vocab], which stay as they are.
        What a row gets does not depend on the others.
        """
        if logits.shape != (len(rows), self._n_vocab) or logits.dtype != np.float32 or logits.strides[1] != 4:
            raise ValueError(f"logits are {logits.dtype}{logits.shape}; allowed: float32{(len(rows), self._n_vocab)}")
        chosen = self._chosen(rows, logits)
        return [_alone(row, logits[i]) if chosen[i] == BAD else chosen[i] for i, row in enumerate(rows)]

    def sample_top(
        self, rows: Sequence[Row], logits: NDArray[np.float32], ids: NDArray[np.intp]
    ) -> list[int | Exception]:
        """Return what `sample` does, from the largest logits of each row alone: see Sampler.sample.

        logits, ids: [len(rows), n], the largest first.
        """
        logits, ids = logits[:, : self._n_vocab], ids[:, : self._n_vocab]  # behind them nothing is left
        order = ids.argsort(axis=1)
        by_id, ids_by_id = np.take_along_axis(logits, order, axis=1), np.take_along_axis(ids, order, axis=1)
        for i, row in enumerate(rows):
            if row.mask is not None:
                by_id[i] = forbid(by_id[i], ids_by_id[i], self._checked(row.mask))
        chosen = self._chosen([row._replace(mask=None) for row in rows], by_id)
        return [
            _alone(row, Candidates(logits[i], ids[i], True)) if at == BAD else int(ids_by_id[i, at])
            for i, (row, at) in enumerate(zip(rows, chosen, strict=True))
        ]

    def _chosen(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> list[int]:
        """Return the column of the next token of each row; BAD if Sampler.sample must choose it."""
        for sampler in (row.sampler for row in rows if row.sampler not in self._packed):
            self._packed[sampler] = _pack(sampler, self._n_vocab)
        fields = [self._packed[row.sampler][0] for row in rows]
        chosen = [BAD] * len(rows)
        if at := [i for i, one in enumerate(fields) if one]:
            table = np.frombuffer(bytearray().join(fields), ROW)
            table["logits"] = logits.ctypes.data + np.array(at) * logits.strides[0]
            recent = self._fill(table, [rows[i] for i in at])
            table["recent"] += recent.ctypes.data
            self._chooser.run(table, logits.shape[1])
            for i, id, log_sum in zip(at, table["id"].tolist(), table["log_sum"].tolist(), strict=True):
                n = rows[i].sampler.params.logprobs
                chosen[i] = id if n is None or id == BAD else Choice.of(logits[i], id, n, log_sum)
        return chosen

    def _fill(self, table: NDArray[np.void], rows: Sequence[Row]) -> NDArray[np.int32]:
        """Fill in what differs from step to step. Return the recent tokens of all rows."""
        table["position"] = [row.sampler.state.n_past + len(row.drafts) for row in rows]
        table["mask"] = [0 if row.mask is None else self._checked(row.mask).ctypes.data for row in rows]
        recent: list[int] = []
        for i in np.flatnonzero(table["n_recent"]):
            n_before = len(recent)
            recent += [*rows[i].sampler.state.recent, *rows[i].drafts][-int(table["n_recent"][i]) :]
            table["recent"][i], table["n_recent"][i] = 4 * n_before, len(recent) - n_before
        return np.minimum(np.array(recent, np.int32), self._n_vocab)

    def _checked(self, mask: NDArray[np.uint32]) -> NDArray[np.uint32]:
        words = (self._n_vocab + 31) // 32
        if mask.shape != (words,) or mask.dtype != np.uint32 or not mask.flags.c_contiguous:
            raise ValueError(f"a mask is {mask.dtype}{mask.shape}; allowed: uint32({words},), contiguous")
        return mask


def _pack(sampler: Sampler, n_vocab: int) -> _Packed:
    params, stages = sampler.params, sampler.stages
    fields, bias_ids = np.zeros(1, ROW), np.array([*params.logit_bias], np.int64)
    biases = np.array([*params.logit_bias.values()], np.float64)
    divisor = params.temperature if "temperature" in stages else 1.0
    is_greedy = divisor < GREEDY  # then top_k = 1 does it
    if (
        stages != tuple(name for name in COMPILED if name in stages)
        or sampler.selector is not None
        or params.logits_processors
        or (params.dynatemp_range > 0 and "temperature" in stages)
        or max(params.logit_bias, default=0) >= n_vocab
    ):
        return b"", bias_ids, biases
    values = {
        "bias_ids": bias_ids.ctypes.data,
        "biases": biases.ctypes.data,
        "n_bias": len(biases),
        "n_recent": params.repeat_last_n if "penalties" in stages else 0,
        "seed": sampler.seed - (sampler.seed >> 63 << 64),  # the same bits, as an int64
        "top_k": 1 if is_greedy else min(params.top_k, n_vocab) if "top_k" in stages else 0,
        "is_summed": params.logprobs is not None,
        "top_p": params.top_p if "top_p" in stages else 1.0,
        "log_min_p": math.log(params.min_p) if "min_p" in stages else -math.inf,
        "temperature": 1.0 if is_greedy else divisor,
        "repeat_penalty": params.repeat_penalty,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
    }
    for name, value in values.items():
        fields[name] = value
    return fields.tobytes(), bias_ids, biases


def _alone(row: Row, logits: NDArray[np.float32] | Candidates) -> int | Exception:
    """Sample a row with options that are not compiled, or tell why it has no choice."""
    try:
        return row.sampler.sample(logits, row.mask, row.drafts)
    except Exception as error:  # of a logits processor, too
        return error

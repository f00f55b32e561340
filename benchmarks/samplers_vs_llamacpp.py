"""Runs llama.cpp's samplers on made-up logits. Writes the tokens that are left and their probabilities as JSON.

    python benchmarks/samplers_vs_llamacpp.py tests/runtime/sampling/sampler_cases.json [--library FOLDER]

Each case has the options, the logits (made by `logits` from n, seed and spread), the context, and one row for each
token drawn: the ids that are left, their probabilities, and the id that llama.cpp drew.
"""

import argparse
import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peer
from numpy.typing import NDArray


class _Token(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float))


class _Tokens(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.POINTER(_Token)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


class _Bias(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int32), ("bias", ctypes.c_float))


class _Vector(ctypes.Structure):
    """A std::vector of libstdc++, only for reading."""

    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("capacity", ctypes.c_void_p))

    @classmethod
    def of(cls, array: Any) -> "_Vector":
        start = ctypes.addressof(array)
        vector = cls(start, start + ctypes.sizeof(array), start + ctypes.sizeof(array))
        vector.array = array
        return vector


_INT, _FLOAT, _POINTER, _SIZE, _U32 = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
_DRY = "_Z30llama_sampler_init_dry_testingffiiRKSt6vectorIS_IiSaIiEESaIS1_EE"
_FUNCTIONS = {
    "llama_sampler_apply": (None, (_POINTER, ctypes.POINTER(_Tokens))),
    "llama_sampler_accept": (None, (_POINTER, _INT)),
    "llama_sampler_free": (None, (_POINTER,)),
    "llama_sampler_init_logit_bias": (_POINTER, (_INT, _INT, ctypes.POINTER(_Bias))),
    "llama_sampler_init_penalties": (_POINTER, (_INT, _INT, _FLOAT, _FLOAT, _FLOAT)),
    _DRY: (_POINTER, (_FLOAT, _FLOAT, _INT, _INT, ctypes.POINTER(_Vector))),
    "llama_sampler_init_top_n_sigma": (_POINTER, (_FLOAT,)),
    "llama_sampler_init_top_k": (_POINTER, (_INT,)),
    "llama_sampler_init_typical": (_POINTER, (_FLOAT, _SIZE)),
    "llama_sampler_init_top_p": (_POINTER, (_FLOAT, _SIZE)),
    "llama_sampler_init_min_p": (_POINTER, (_FLOAT, _SIZE)),
    "llama_sampler_init_xtc": (_POINTER, (_FLOAT, _FLOAT, _SIZE, _U32)),
    "llama_sampler_init_temp_ext": (_POINTER, (_FLOAT, _FLOAT, _FLOAT)),
    "llama_sampler_init_temp": (_POINTER, (_FLOAT,)),
    "llama_sampler_init_dist": (_POINTER, (_U32,)),
    "llama_sampler_init_mirostat": (_POINTER, (_INT, _U32, _FLOAT, _FLOAT, _INT)),
    "llama_sampler_init_mirostat_v2": (_POINTER, (_U32, _FLOAT, _FLOAT)),
    "llama_sampler_init_adaptive_p": (_POINTER, (_FLOAT, _FLOAT, _U32)),
}

DEFAULTS: dict[str, Any] = {
    "repeat_penalty": 1.0, "repeat_last_n": 64, "frequency_penalty": 0.0, "presence_penalty": 0.0,
    "dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": 64, "top_n_sigma": -1.0,
    "top_k": 40, "typical_p": 1.0, "top_p": 0.95, "min_p": 0.05, "xtc_probability": 0.0, "xtc_threshold": 0.1,
    "temperature": 0.8, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "mirostat": 0, "mirostat_tau": 5.0,
    "mirostat_eta": 0.1, "adaptive_target": -1.0, "adaptive_decay": 0.9, "samplers": "edskypmxt",
}  # fmt: skip
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits(n: int, seed: int, spread: float) -> NDArray[np.float32]:
    """Return numbers of a logistic distribution, the same on every machine."""
    mixed = (np.arange(1, n + 1, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed * 40503)) ** 2 >> 16
    u = ((mixed % 999983) + 0.5) / 999983
    return (spread * np.log(u / (1 - u))).astype(np.float32)


def context(seed: int, n_vocab: int, n: int) -> list[int]:
    """Return a context in which many tokens repeat."""
    random = np.random.default_rng(seed)
    words = [random.integers(0, n_vocab, random.integers(1, 6)).tolist() for _ in range(4)]
    return [id for i in random.integers(0, 4, n) for id in words[i]][:n]


def cases() -> list[dict[str, Any]]:
    """Return options: of each sampler, on small and large vocabularies, of chains, and of samplers with memory."""
    alone: list[dict[str, Any]] = [
        {"logit_bias": {"3": 5.0, "0": -2.5, "7": float("-inf")}},
        *({"top_k": k} for k in (1, 5, 40, 1000)),
        *({"top_p": p} for p in (0.0, 0.3, 0.9, 0.99)),
        *({"min_p": p} for p in (0.01, 0.2, 1.0)),
        *({"typical_p": p} for p in (0.1, 0.5, 0.95)),
        *({"top_n_sigma": n} for n in (0.5, 1.0, 2.0)),
        *({"xtc_probability": 1.0, "xtc_threshold": t} for t in (0.01, 0.05, 0.3, 0.6)),
        *({"temperature": t} for t in (0.0, 0.1, 1.7)),
        *({"dynatemp_range": r, "dynatemp_exponent": e} for r in (0.5, 2.0) for e in (0.5, 1.0, 2.0)),
    ]  # fmt: skip
    back: list[dict[str, Any]] = [
        {"repeat_penalty": 1.3},
        {"repeat_penalty": 0.7, "repeat_last_n": 8},
        {"frequency_penalty": 0.5, "presence_penalty": -0.25},
        {"repeat_penalty": 1.1, "frequency_penalty": -0.3, "presence_penalty": 1.0, "repeat_last_n": 20},
        {"dry_multiplier": 0.8},
        {"dry_multiplier": 2.0, "dry_base": 1.2, "dry_allowed_length": 1, "dry_penalty_last_n": 16},
        {"dry_multiplier": 0.5, "dry_base": 1.0, "dry_allowed_length": 0},
        {"dry_multiplier": 0.8, "breakers": [[1], [2, 3]]},
    ]
    chains: list[dict[str, Any]] = [
        {}, {"top_k": 0}, {"typical_p": 0.7, "xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"top_n_sigma": 1.0, "temperature": 1.5, "dynatemp_range": 0.5},
        {"samplers": "tkpm", "temperature": 2.0}, {"samplers": "mx", "xtc_probability": 1.0, "min_p": 0.02},
        {"samplers": "kypt", "typical_p": 0.9}, {"repeat_penalty": 1.2, "dry_multiplier": 0.8, "top_k": 10},
        {"samplers": "ke", "top_k": 12, "repeat_penalty": 2.0},
        {"samplers": "ydsp", "typical_p": 0.9, "dry_multiplier": 1.0},
        {"temperature": 0.0, "typical_p": 0.3}, {"temperature": 0.0, "xtc_probability": 1.0, "xtc_threshold": 0.01},
    ]  # fmt: skip
    memory: list[dict[str, Any]] = [
        *({"mirostat": v, "mirostat_tau": t, "mirostat_eta": e} for v in (1, 2) for t, e in ((5.0, 0.1), (2.0, 0.5))),
        *({"samplers": "ma", "min_p": 0.02, "adaptive_target": t, "adaptive_decay": d}
          for t in (0.1, 0.5, 0.9) for d in (0.5, 0.9)),
    ]  # fmt: skip
    kinds: list[tuple[dict[str, Any], list[dict[str, Any]], list[tuple[int, float]], int]] = [
        (OFF, alone, [(9, 2.0), (50, 1.0), (50, 4.0)], 1),
        (OFF, back, [(9, 2.0), (30, 1.0), (30, 3.0)], 1),
        ({}, chains, [(50, 1.0), (50, 3.0), (3000, 2.5)], 1),
        ({"temperature": 1.0}, memory, [(60, 1.0), (60, 3.0)], 8),
    ]
    found: list[dict[str, Any]] = []
    for base, options, shapes, steps in kinds:
        for option in options:
            for n, spread in shapes:
                seed = len(found)
                case: dict[str, Any] = {
                    "options": base | option,
                    "n": n,
                    "spread": spread,
                    "seed": seed,
                    "steps": steps,
                }
                if options is back or "e" in option.get("samplers", "") or "dry_multiplier" in option:
                    case["context"] = context(seed, n, 40)
                case["breakers"] = case["options"].pop("breakers", [])
                found.append(case)
    return found


class Chain:
    """Samplers of llama.cpp in the order of its own tools."""

    def __init__(self, library: ctypes.CDLL, case: dict[str, Any]) -> None:
        self._library, self._kept = library, []
        p, seed = DEFAULTS | case["options"], 1
        rows = [_Vector.of((ctypes.c_int32 * len(breaker))(*breaker)) for breaker in case["breakers"]]
        vectors = _Vector.of((_Vector * len(rows))(*rows))
        self._kept += [*rows, vectors]
        pairs = [_Bias(int(id), bias) for id, bias in p.get("logit_bias", {}).items()]
        biases = (_Bias * len(pairs))(*pairs)
        penalties = p["repeat_last_n"], p["repeat_penalty"], p["frequency_penalty"], p["presence_penalty"]
        create: dict[str, tuple[Any, ...]] = {
            "e": ("llama_sampler_init_penalties", case["n"], *penalties),
            "d": (_DRY, p["dry_multiplier"], p["dry_base"], p["dry_allowed_length"], p["dry_penalty_last_n"], vectors),
            "s": ("llama_sampler_init_top_n_sigma", p["top_n_sigma"]),
            "k": ("llama_sampler_init_top_k", p["top_k"]),
            "y": ("llama_sampler_init_typical", p["typical_p"], 0),
            "p": ("llama_sampler_init_top_p", p["top_p"], 0),
            "m": ("llama_sampler_init_min_p", p["min_p"], 0),
            "x": ("llama_sampler_init_xtc", p["xtc_probability"], p["xtc_threshold"], 0, seed),
            "t": ("llama_sampler_init_temp_ext", p["temperature"], p["dynatemp_range"], p["dynatemp_exponent"]),
            "a": ("llama_sampler_init_adaptive_p", p["adaptive_target"], p["adaptive_decay"], seed),
        }  # fmt: skip
        last = {
            0: ("llama_sampler_init_dist", seed),
            1: ("llama_sampler_init_mirostat", case["n"], seed, p["mirostat_tau"], p["mirostat_eta"], 100),
            2: ("llama_sampler_init_mirostat_v2", seed, p["mirostat_tau"], p["mirostat_eta"]),
        }[p["mirostat"]]
        order = "t" if p["mirostat"] else p["samplers"]
        if not p["dry_multiplier"]:
            order = order.replace("d", "")  # the function for tests expects that it is on
        calls: list[tuple[Any, ...]] = (
            [("llama_sampler_init_logit_bias", case["n"], len(biases), biases)] if len(biases) else []
        )
        calls += [create[letter] for letter in order] + ([] if "a" in order else [last])
        self._samplers = [getattr(library, name)(*arguments) for name, *arguments in calls]
        for id in case.get("context", ()):
            self.accept(id)

    def accept(self, id: int) -> None:
        for sampler in self._samplers:
            self._library.llama_sampler_accept(sampler, id)

    def step(self, values: NDArray[np.float32]) -> tuple[list[int], list[float], int]:
        """Return ids and probabilities of the tokens that are left (without those of -inf), and the drawn id."""
        tokens = (_Token * len(values))(*(_Token(id, float(value), 0.0) for id, value in enumerate(values)))
        array = _Tokens(tokens, len(values), -1, False)
        for sampler in self._samplers:
            self._library.llama_sampler_apply(sampler, ctypes.byref(array))
        left = sorted((array.data[i].id, array.data[i].logit) for i in range(array.size))
        left = [(id, logit) for id, logit in left if logit > -np.inf]
        weights = np.exp(np.array([logit for _, logit in left]) - max(logit for _, logit in left))
        probabilities = [float(f"{p:.5g}") for p in weights / weights.sum()]
        return [id for id, _ in left], probabilities, array.data[array.selected].id

    def free(self) -> None:
        for sampler in self._samplers:
            self._library.llama_sampler_free(sampler)


def run(library: ctypes.CDLL, case: dict[str, Any]) -> dict[str, Any]:
    """Return a case with its rows."""
    chain, rows = Chain(library, case), []
    for step in range(case["steps"]):
        row = chain.step(logits(case["n"], case["seed"] + step, case["spread"]))
        chain.accept(row[2])
        rows.append(row)
    chain.free()
    return case | {"rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--library", type=Path, help="folder of libllama and the ggml libraries")
    options = parser.parse_args(arguments)
    folder = options.library or peer.library_folder()
    ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(next(folder.glob("libggml.v*.so"))), ctypes.RTLD_GLOBAL)
    library = peer._open(next(folder.glob("libllama.v*.so")), _FUNCTIONS)
    done = [run(library, case) for case in cases()]
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in done)
    options.output.write_text(f"[\n{lines}\n]\n")
    print(f"{len(done)} cases")


if __name__ == "__main__":
    main()

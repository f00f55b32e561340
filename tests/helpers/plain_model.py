"""A whole model in plain float64 Python: the oracle of the decoder. It shares no code with what it checks."""

from collections.abc import Sequence

import numpy as np
from tinymodel import Tiny


def reference(
    tiny: Tiny,
    w: dict[str, np.ndarray],
    ids: Sequence[int],
    inv_freq: np.ndarray,
    inputs: dict[str, list[np.ndarray]] | None = None,
) -> np.ndarray:
    """Return the logits of all tokens in float64: one token, one head and one pair at a time, without cache or masks.

    inv_freq: frequencies of the layers without a window. Layers with a window use the base 1e4.
    inputs: gets the inputs of each matrix by the tensor's name, one vector for each token.
    """
    w = {name: values.astype(np.float64) for name, values in w.items()}
    is_gemma, half = tiny.arch == "gemma3", tiny.head_dim // 2

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x * w[f"{name}.weight"] / np.sqrt(np.dot(x, x) / len(x) + tiny.rms_eps)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        if inputs is not None:
            inputs.setdefault(f"{name}.weight", []).append(x)
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def turn(x: np.ndarray, position: int, freqs: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        for i in range(half):
            a, b = (i, i + half) if is_gemma else (2 * i, 2 * i + 1)
            turned = complex(x[a], x[b]) * np.exp(1j * position * freqs[i])
            out[a], out[b] = turned.real, turned.imag
        return out

    def heads(x: np.ndarray, position: int, name: str, freqs: np.ndarray) -> list[np.ndarray]:
        parts = np.split(x, len(x) // tiny.head_dim)
        parts = [norm(part, f"{name}_norm") if is_gemma else part for part in parts]
        return [turn(part, position, freqs) for part in parts]

    xs = [w["token_embd.weight"][id] * (np.sqrt(tiny.n_embd) if is_gemma else 1) for id in ids]
    for il in range(tiny.n_layer):
        block = f"blk.{il}"
        local = bool(tiny.window) and (il + 1) % 6 != 0
        freqs = 1e4 ** -(np.arange(half) / half) if local else inv_freq
        normed = [norm(x, f"{block}.attn_norm") for x in xs]
        q, k = (
            [heads(linear(x, f"{block}.{name}"), i, f"{block}.{name}", freqs) for i, x in enumerate(normed)]
            for name in ("attn_q", "attn_k")
        )
        v = [np.split(linear(x, f"{block}.attn_v"), tiny.n_head_kv) for x in normed]
        for i, x in enumerate(xs):
            seen = [j for j in range(i + 1) if not local or i - j < tiny.window]
            parts = []
            for head in range(tiny.n_head):
                shared = head // (tiny.n_head // tiny.n_head_kv)
                e = np.exp([np.dot(q[i][head], k[j][shared]) / np.sqrt(tiny.head_dim) for j in seen])
                parts.append(sum(e[n] * v[j][shared] for n, j in enumerate(seen)) / e.sum())
            y = linear(np.concatenate(parts), f"{block}.attn_output")
            x = x + (norm(y, f"{block}.post_attention_norm") if is_gemma else y)
            h = norm(x, f"{block}.ffn_norm")
            gate = linear(h, f"{block}.ffn_gate")
            if is_gemma:
                gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            else:
                gate = gate / (1 + np.exp(-gate))
            y = linear(gate * linear(h, f"{block}.ffn_up"), f"{block}.ffn_down")
            xs[i] = x + (norm(y, f"{block}.post_ffw_norm") if is_gemma else y)
    output = "output" if "output.weight" in w else "token_embd"
    return np.array([linear(norm(x, "output_norm"), output) for x in xs])

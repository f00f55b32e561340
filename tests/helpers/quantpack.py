"""Writes quantized checkpoints, packed bit by bit after the descriptions of their formats, not with the decoders."""

import json
from pathlib import Path

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "I8": "i1", "U8": "u1", "U32": "<u4",
          "F8_E4M3": "u1", "F8_E5M2": "u1"}  # fmt: skip


def write_safetensors(path: Path, tensors, metadata=None) -> None:
    """tensors: name -> (dtype in the file, array of the values or, for BF16 and F8, of the bits)."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, array) in tensors.items():
        octets = np.ascontiguousarray(array).astype(DTYPES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(np.shape(array)), "data_offsets": [len(data), len(data + octets)]}
        data += octets
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_checkpoint(folder: Path, quantization, tensors, metadata=None) -> Path:
    """A folder with config.json and the weights."""
    folder.mkdir(exist_ok=True, parents=True)
    config = {"model_type": "llama", **({"quantization_config": quantization} if quantization else {})}
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors, metadata)
    return folder


def packed_projections(tensors, pack):
    """Return the exact values of a model's tensors, and what a checkpoint stores: projections packed, others as F16.

    pack: of values and the name without ".weight": returns what is stored, and its exact values.
    """
    exact, stored = {}, {}
    for name, values in tensors.items():
        if name.endswith("_proj.weight"):
            parts, exact[name] = pack(values.astype(np.float64), name.removesuffix(".weight"))
            stored |= parts
        else:
            exact[name] = values.astype(np.float16)
            stored[name] = ("F16", exact[name])
    return exact, stored


def pack_bits(codes, n_bits: int) -> np.ndarray:
    """Codes [n, columns] -> I32[n * n_bits / 32, columns]: one long number for each column, cut into words."""
    words = np.zeros((-(-len(codes) * n_bits // 32), codes.shape[1]), np.int64)
    for column in range(codes.shape[1]):
        number = 0
        for i, code in enumerate(codes[:, column].tolist()):
            number |= code << (i * n_bits)
        for w in range(len(words)):
            words[w, column] = number >> (32 * w) & 0xFFFFFFFF
    return words.astype(np.uint32).view(np.int32)


def bf16(x) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits of x cut to bfloat16, and the values of these bits."""
    bits = (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def gptq(codes, zero, scale, groups, *, n_bits: int, v2: bool, name: str):
    """codes, zero, scale by output: [n_out, n_in], [n_out, n_group] twice; groups int[n_in]."""
    stored = zero.T if v2 else zero.T - 1
    return {
        f"{name}.qweight": ("I32", pack_bits(codes.T, n_bits)),
        f"{name}.qzeros": ("I32", pack_bits(stored.T, n_bits).T),
        f"{name}.scales": ("F16", scale.T),
        f"{name}.g_idx": ("I32", groups),
    }


def awq_words(codes) -> np.ndarray:
    """[rows, columns] -> I32[rows, columns / 8]: from the lowest nibble on columns 0 2 4 6 1 3 5 7."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def awq_gemm(codes, zero, scale, name: str):
    return {
        f"{name}.qweight": ("I32", awq_words(codes.T)),
        f"{name}.qzeros": ("I32", awq_words(zero.T)),
        f"{name}.scales": ("F16", scale.T),
    }


def awq_gemv(codes, zero, scale, name: str):
    """Pack rows without reordering. Zeros and scales are filled up to whole words, here with one more than needed."""
    n_group = zero.shape[1]
    wide = -(-n_group // 8) * 8 + 8
    zeros, scales = np.zeros((len(zero), wide), np.int64), np.zeros((len(zero), wide), np.float16)
    zeros[:, :n_group], scales[:, :n_group] = zero, scale
    return {
        f"{name}.qweight": ("I32", pack_bits(codes.T, 4).T),
        f"{name}.qzeros": ("I32", pack_bits(zeros.T, 4).T),
        f"{name}.scales": ("F16", scales),
    }


def marlin(codes, scale, name: str):
    """Pack as IST-DASLab/marlin's _get_perms and pack do, with code written for this test."""
    n_out, n_in = codes.shape
    order = []
    for thread in range(32):
        for tile in range(4):
            eight = [
                16 * row + thread // 4 + 8 * half + 256 * tile
                for half in (0, 1)
                for row in (2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4) + 8, 2 * (thread % 4) + 9)
            ]
            order += [eight[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    tiles = codes.T.reshape(n_in // 16, 16, n_out // 16, 16).transpose(0, 2, 1, 3).reshape(n_in // 16, -1)
    tiles = tiles.reshape(-1, 1024)[:, order].reshape(tiles.shape)
    if scale.shape[1] > 1:
        of_scales = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        of_scales = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    s = scale.T.reshape(-1, len(of_scales))[:, of_scales].reshape(-1, n_out)
    return {f"{name}.B": ("I32", pack_bits(tiles.T, 4).T), f"{name}.s": ("F16", s)}


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nibble_pairs(codes) -> np.ndarray:
    """[..., n] -> U8[..., n / 2], the even columns in the low nibbles."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def e4m3(bits) -> np.ndarray:
    """Values of F8_E4M3 bits (no NaN), by the definition: sign, 4 bits of exponent less 7, 3 of mantissa."""
    bits = np.asarray(bits, np.int64)
    sign, exponent, mantissa = np.where(bits & 128, -1.0, 1.0), bits >> 3 & 15, bits & 7
    return sign * np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))

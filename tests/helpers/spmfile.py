"""SentencePiece's file, written field by field."""

import struct
from typing import Any


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(*fields: tuple[int, Any]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            out += varint(number << 3) + varint(value)
    return out


def pieces_file(tokens: dict[str, tuple[float, int]], trainer: bytes, normalizer: bytes) -> bytes:
    pieces = [(1, message((1, token.encode()), (2, score), (3, kind))) for token, (score, kind) in tokens.items()]
    return message(*pieces, (2, trainer), (3, normalizer), (4, message((1, b"self test"))))


PIECES = {"<unk>": (0.0, 2), "<s>": (0.0, 3), "</s>": (0.0, 3), "<0x41>": (0.0, 6), "▁a": (-1.5, 1), "a": (-2.0, 1),
          "<fim>": (0.0, 4), "b": (-3.0, 5)}  # fmt: skip

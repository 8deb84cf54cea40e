"""Changes that get past a reader's first look: inside JSON, headers, archives and chunks rather than on their bytes.

Each takes the bytes, a random generator and `flip`, the fuzzer's own change of bytes, and returns other bytes.
"""

from __future__ import annotations

import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

Flip = Callable[[bytes], bytes]
Mutator = Callable[[bytes, random.Random, Flip], bytes]
DEEP = [f"{'[' * depth}{']' * depth}" for depth in (200, 900, 950, 970, 985, 2000)]
DEEP += ['{"a":' * 950 + "1" + "}" * 950]
RAW = [
    "NaN",
    "Infinity",
    "-1e999",
    "1e999",
    "1" * 400,
    "1" * 5000,
    '"\\ud800"',
    '{"a": 1, "a": 2}',
    "true",
    "null",
    "[]",
]
RAW += [str(10**9), str(2**63), str(10**30), "-1", "0", "-5.5", '"../../../etc/passwd"', '"/dev/zero"', '"\\n\\u0000"']
RAW += [
    '"' + "x" * 5000 + '"',
    "[[[[]]]]",
    "1e300",
    "5e-324",
    "[1000000000]",
    "{}",
    '""',
    "1",
    "65536",
    '"none"',
    *DEEP,
]
HERE = "<here>"
NUMBERS = (float("nan"), float("inf"), -1.0, 0.0, 3e38, 1e-45, 1e300, 65504.0)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
PNG = b"\x89PNG\r\n\x1a\n"


def json_text(data: bytes, rng: random.Random, flip: Flip) -> bytes:
    """A value of a JSON text replaced, taken out, renamed, moved or nudged."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return flip(data)
    if not isinstance(content, dict | list) or rng.random() < 0.1:
        return flip(data)
    try:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _change(content, rng)
        text = json.dumps(content)
    except (ValueError, RecursionError):
        return flip(data)
    while f'"{HERE}"' in text:
        text = text.replace(f'"{HERE}"', rng.choice(RAW), 1)
    return text.encode()


def _change(content: Any, rng: random.Random) -> None:
    parent, key = _place(content, rng)
    if parent is None:
        return
    value = parent[key]
    kind = rng.choice(("raw", "raw", "nudge", "delete", "rename", "other", "wrap"))
    if kind == "nudge" and isinstance(value, int | float) and abs(value) < 1e300:
        parent[key] = rng.choice((value + 1, value - 1, value * 2, -value, value / 2, float(value), str(value)))
    elif kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        name = rng.choice((key + "x", key.upper(), "../" + key, "\n" + key, "x" * 3000, ""))
        parent[name] = parent.pop(key)
    elif kind == "other":
        other, place = _place(content, rng)
        parent[key] = json.loads(json.dumps(other[place])) if other else HERE
    elif kind == "wrap":
        parent[key] = rng.choice(([value], {"a": value}, [value, value]))
    else:
        parent[key] = HERE


def _place(content: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container inside, and one of its keys: the deeper, the rarer."""
    found: tuple[Any, Any] = (None, None)
    while isinstance(content, dict | list) and content:
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        found = (content, key)
        content = content[key]
        if rng.random() < 0.25:
            break
    return found


def safetensors_file(data: bytes, rng: random.Random, flip: Flip) -> bytes:
    """The header changed and its length written anew; a number or the type of a tensor changed."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = rng.choice(("header", "header", "header", "number", "type", "bytes"))
    if kind == "type":
        return _retyped(data, rng, flip)
    if kind == "bytes" or len(data) < 8:
        return flip(data)
    if kind == "header":
        header = json_text(header, rng, flip)
    elif len(rest) >= 8:
        at = rng.randrange(0, len(rest) - 7, 4)
        number = rng.choice(NUMBERS)
        wide = struct.pack("<d", number) if abs(number) > 1e39 or rng.random() < 0.3 else struct.pack("<f", number)
        rest = rest[:at] + wide + rest[at + len(wide) :]
    return struct.pack("<Q", len(header)) + header + rest


def _retyped(data: bytes, rng: random.Random, flip: Flip) -> bytes:
    try:
        tensors = safetensors.torch.load(data)
        name = rng.choice(sorted(tensors))
        tensors[name] = tensors[name].to(rng.choice(DTYPES))
        if rng.random() < 0.5:
            tensors[name].view(-1)[-1:] = rng.choice(NUMBERS)
        return safetensors.torch.save(tensors)
    except Exception:  # whatever a damaged file makes of it
        return flip(data)


def image(data: bytes, rng: random.Random, flip: Flip) -> bytes:
    """A chunk of a PNG changed and its checksum written anew; of other formats the bytes."""
    if not data.startswith(PNG) or rng.random() < 0.2:
        return flip(data)
    chunks, at = [], len(PNG)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return flip(data)
    number = rng.randrange(len(chunks))
    name, content = chunks[number]
    kind = rng.choice(("content", "content", "name", "twice", "delete"))
    if kind == "content":
        chunks[number] = (name, flip(content))
    elif kind == "name":
        named = (
            b"IHDR",
            b"PLTE",
            b"IDAT",
            b"IEND",
            b"tRNS",
            b"tEXt",
            b"zTXt",
            b"iTXt",
            b"iCCP",
            b"eXIf",
            b"acTL",
            b"fcTL",
        )
        chunks[number] = (rng.choice(named), content)
    elif kind == "twice":
        chunks.insert(number, chunks[number])
    else:
        del chunks[number]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return PNG + b"".join(parts)


def words(*known: str) -> Mutator:
    """A mutator of texts, which puts words that mean something in the place of others."""
    tokens = [
        word.encode("utf-8", "surrogatepass")
        for word in (*known, *RAW, "\t", "\x7f", "\u2028", "\xa0", "\ufeff", "'''")
    ]

    def mutate(data: bytes, rng: random.Random, flip: Flip) -> bytes:
        if rng.random() < 0.4:
            return flip(data)
        parts = re.split(rb"([\s,=/:\"]+)", data)
        at = rng.randrange(len(parts))
        chosen = rng.choice(tokens)
        parts[at] = rng.choice((chosen, chosen + parts[at], parts[at] + chosen))
        return b"".join(parts)

    return mutate


def plain(data: bytes, rng: random.Random, flip: Flip) -> bytes:
    """The fuzzer's own changes alone."""
    return flip(data)

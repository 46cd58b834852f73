"""A file's bytes changed by a seeded hand: flipped, cut, doubled, of hostile values, of lies about sizes."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

NUMBERS: list[Any] = [0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]
NUMBERS += [0.5, -0.0, 1e308, float("nan"), float("inf")]
TEXTS = ["", "\0", "../../outside", "/etc/passwd", "\ud800", "a" * 5000, "model", "{{ 7 * 7 }}", "__class__"]
TEXTS += ["!!python/object/apply:os.system ['touch CANARY']", "__import__('os').system('touch CANARY')"]


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, runs replaced, cut, doubled or put in; sometimes several at once."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        size = min(rng.choice((1, 2, 4, 8, 64, 1024)), len(out) - at)
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + size]
        elif kind == 4:
            out[at:at] = out[at : at + size] * rng.choice((1, 1, 1, 50))
        elif kind == 5:
            number = rng.choice([n for n in NUMBERS if isinstance(n, int)]) % 2**64
            width, code = rng.choice(((4, "<I"), (8, "<Q")))
            out[at : at + width] = struct.pack(code, number % 256**width)
        else:
            text = rng.choice([*TEXTS, "\ufeff", "[" * 50_000, "- " * 20_000, "\r\n\r\n"])
            out[at:at] = text.encode("utf-8", "surrogatepass")
    return bytes(out)


def value(rng: random.Random) -> Any:
    """Something that does not belong there."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice((None, True, False))
    if kind == 3:
        return [value(rng) for _ in range(rng.randrange(4))]
    if kind == 4:
        return {rng.choice(TEXTS): value(rng) for _ in range(rng.randrange(4))}
    deep: Any = 1
    for _ in range(rng.choice((3, 100, 400))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def tree_changed(tree: Any, rng: random.Random) -> Any:
    """One place of a JSON value replaced, removed, doubled or renamed."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        key = rng.choice(list(tree))
        kind = rng.randrange(8)
        rest = {k: v for k, v in tree.items() if k != key}
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {rng.choice((*TEXTS, *tree)): tree[key]}
        if kind == 2:
            return tree | {rng.choice(TEXTS): value(rng)}
        return tree | {key: tree_changed(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.9:
        at = rng.randrange(len(tree))
        kind = rng.randrange(5)
        if kind == 0:
            return tree[:at] + tree[at + 1 :]
        if kind == 1:
            return tree[:at] + [tree[at]] * rng.choice((2, 100)) + tree[at:]
        return tree[:at] + [tree_changed(tree[at], rng)] + tree[at + 1 :]
    return value(rng)


def json_changed(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return bytes_changed(data, rng)
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree = tree_changed(tree, rng)
    text = json.dumps(tree)
    if rng.random() < 0.05:
        text = rng.choice(("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000, text + text, text[:-1]))
    return text.encode()


def lines_changed(data: bytes, rng: random.Random) -> bytes:
    """A JSONL file with one line changed."""
    if rng.random() < 0.3:
        return bytes_changed(data, rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_changed(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def yaml_changed(data: bytes, rng: random.Random) -> bytes:
    """JSON is YAML: changed as such, or with what only YAML has."""
    import yaml

    if rng.random() < 0.4:
        return json_changed(json.dumps(yaml.safe_load(data)).encode(), rng)
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
    )
    put = rng.choice(
        (
            bomb,
            bomb + "grid: *m\n",
            "grid: &g [*g]\n",
            "model: !!python/object/apply:os.system ['touch CANARY']\n",
            "model: !!python/name:os.system\n",
            "? [a, b]\n: c\n",
            "name: 2001-01-01\n",
            "\t- x\n",
            "<<: {grid: 1}\n",
            "- " * 3000 + "x\n",
        )
    )
    return (put.encode() + data) if rng.random() < 0.7 else bytes_changed(put.encode() + data, rng)


def safetensors_changed(data: bytes, rng: random.Random) -> bytes:
    """The bytes, or the header as JSON with its length set right again."""
    if rng.random() < 0.4:
        return bytes_changed(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.3:  # what lies about sizes and places while the file is whole
        tree = json.loads(header)
        name = rng.choice([key for key in tree if key != "__metadata__"])
        entry = tree[name]
        kind = rng.randrange(6)
        if kind == 0:
            entry["shape"] = [rng.choice((2**40, 2**62, -1, 0)), *entry["shape"]]
        elif kind == 1:
            entry["data_offsets"] = [0, rng.choice((len(body), 2**50, -4))]
        elif kind == 2:
            entry["dtype"] = rng.choice(("F8_E4M3", "F64", "BOOL", "I8", "C64", "XX"))
        elif kind == 3:
            entry["data_offsets"] = [entry["data_offsets"][0]] * 2
            entry["shape"] = [0]
        elif kind == 4:
            entry["shape"] = entry["shape"][::-1] if len(entry["shape"]) > 1 else [1, *entry["shape"]]
        else:
            tree[name + "x"] = dict(entry)
        header = json.dumps(tree).encode()
    else:
        header = json_changed(header, rng)
    return struct.pack("<Q", len(header)) + header + body


class _Runs:
    """A pickle that would run `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def bin_changed(data: bytes, rng: random.Random) -> bytes:
    """The archive's bytes, its pickle, an evil pickle, or a member that unpacks to a hundred megabytes."""
    if rng.random() < 0.4:
        return bytes_changed(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind = rng.randrange(5)
    name = next(name for name in members if name.endswith("data.pkl"))
    packing = zipfile.ZIP_STORED
    if kind <= 1:
        members[name] = bytes_changed(members[name], rng)
    elif kind == 2:
        code = "open('CANARY', 'w')"
        evil = rng.choice(
            ((os.system, "touch CANARY"), (eval, code), (exec, code), (Path.touch, Path("CANARY")))
        )
        members[name] = pickle.dumps({"a": _Runs(*evil)}, protocol=rng.choice((2, 4)))
    elif kind == 3:
        chosen = rng.choice(list(members))
        members[chosen] = bytes_changed(members[chosen], rng)
    elif rng.random() < 0.05:
        members[rng.choice(list(members))] = bytes(100 << 20)
        packing = zipfile.ZIP_DEFLATED
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()

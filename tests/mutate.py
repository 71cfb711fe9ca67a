"""Files made wrong on purpose: bytes, lines, values, and what the formats of updp's files have of their own."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import yaml

SPLICED = 0.1  # of the mutants, how many have a part of another file
DEEP = 3000
NUMBERS = (
    0, 1, -1, 2, 3, 7, 1.5, -0.0, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf, 2**31, 2**63, -(2**63), 2**64,
    10**17, 10**18, 10**30, 10**400, 65536, 65537,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "\n", "é", "\u202e", "\ufeff", "\ud800", "٣", "²", "1²", "1/0", "1/3", "9/1", "0x10", "1e999", "no",
    "~", "all", "keep", "drop", "negate", "*", "**", "stages.*", "features[0:0]", "features[5:2]", "[", "a.b", "..",
    "a..b", "__class__", "forward", "training", "../../../../../../etc/passwd", "/dev/zero", "/", "C:\\x", "file://x",
    "{{7*7}}", "<script>alert(1)</script>", "]]>", "%s%n", "a" * 70_000, "\u0300" * 500, "identity", "batchnorm",
    "os:system",
)  # fmt: skip
RAW = (
    "&a [1, 2]", "*a", "&a [*a]", "!!python/object/apply:os.system ['true']", "!!int '3'", "!!binary aGk=", "? x",
    "|\n  text", ">\n  text", "{a: 1, a: 2}", "{<<: {a: 1}}", "{? [1] : 2}", "---\n", "...\n", "%YAML 9.9\n", "0o777",
    "0x" + "f" * 15, "0x" + "f" * 100, "1" * 18, "1" * 5000, "1e400", ".inf", ".nan", "2026-01-01", "1_000", "@x", "`x",
    "{a: &b [x, x, x], b: &c [*b, *b, *b], c: &d [*c, *c, *c]}", "[" * DEEP, "[" * DEEP + "]" * DEEP, "{a: " * DEEP,
    "- " * DEEP, "\t- x", "NaN", "Infinity", '"\\ud800"', '"\\', "[1,,2]", "{}", "[]", "null", "true",
)  # fmt: skip


class Raw(str):
    """Text that is written as it is, whether it is one value or not."""


class Pairs(list[tuple[str, Any]]):
    """A mapping that may have a key twice."""


# --- bytes and lines --------------------------------------------------------------------------------------------------


def bytes_mutated(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """Flip, cut, insert, double, or splice with another file, up to four times."""
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 30, 300, len(data)))
        what = rng.randrange(7)
        if what == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif what == 1:
            data = data[:at] + data[at + length :]
        elif what == 2:
            data = data[:at] + rng.randbytes(min(length, 64)) + data[at:]
        elif what == 3:
            data = data[:at] + data[at : at + length] * rng.choice((2, 3, 50 if length < 1000 else 2)) + data[at:]
        elif what == 4:
            data = (
                data[:at] + rng.choice((b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\r")) * length + data[at + length :]
            )
        elif what == 5:
            data = data[:at]
        else:
            other = rng.choice(others)
            data = data[:at] + other[rng.randrange(len(other) + 1) :]
        data = data[: 1 << 21]
    return data


def lines_mutated(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """Leave out, repeat, swap, indent lines; put other words in the place of words."""
    lines = data.decode("utf-8", "replace").split("\n")
    for _ in range(rng.randint(1, 3)):
        at, what = rng.randrange(len(lines)), rng.randrange(6)
        if what == 0 and len(lines) > 1:
            del lines[at]
        elif what == 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif what == 2:
            lines[at] = rng.choice((" ", "  ", "\t", "- ", "? ", ": ", "# ")) + lines[at]
        elif what == 3:
            theirs = rng.choice(others).decode("utf-8", "replace").split("\n")
            lines[at] = rng.choice(theirs)
        else:
            lines[at] = _words_mutated(lines[at], rng)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _words_mutated(line: str, rng: Random) -> str:
    words = list(re.finditer(r"[\w.*]+", line))
    if not words:
        return line + rng.choice(RAW)
    word = rng.choice(words)
    new = rng.choice((rng.choice(RAW), rng.choice(TEXTS), str(rng.choice(NUMBERS)), rng.choice(words).group()))
    return line[: word.start()] + new + line[word.end() :]


# --- values -----------------------------------------------------------------------------------------------------------


def ordered(value: Any) -> Any:
    """Plain data with every mapping as its pairs."""
    if isinstance(value, dict):
        return Pairs((str(key), ordered(item)) for key, item in value.items())
    return [ordered(item) for item in value] if isinstance(value, list) else value


def emitted(value: Any) -> str:
    """The text of plain data: JSON, which is YAML; what is `Raw` as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {emitted(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(emitted, value)) + "]"
    return str(value) if isinstance(value, int) and value > 10**300 else json.dumps(value)


def values_mutated(tree: Any, rng: Random, others: Sequence[Any]) -> Any:
    """The same tree after some changes; the tree itself is used up."""
    root = [tree]
    for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 4))):
        places = list(_places(root))
        holder, index = rng.choice(places)
        _change(holder, index, rng, others, places)
        if not root:
            return None
    return root[0]


def _places(value: Any) -> list[tuple[Any, int]]:
    found = [(value, index) for index in range(len(value))]
    for item in value:
        inner = item[1] if isinstance(value, Pairs) else item
        if isinstance(inner, list):
            found += _places(inner)
    return found


def _change(holder: Any, index: int, rng: Random, others: Sequence[Any], places: list[tuple[Any, int]]) -> None:
    key, old = holder[index] if isinstance(holder, Pairs) else (None, holder[index])
    what = rng.randrange(12)
    if what == 0:
        del holder[index]
    elif what == 1:
        holder.insert(rng.randrange(len(holder) + 1), holder[index])
    elif what == 2 and key is not None:
        holder[index] = (rng.choice((*map(str, TEXTS), key + "s", key.upper(), key[:-1])), old)
    elif what == 3:
        new = [old, old] if rng.random() < 0.5 else Pairs([(str(key or "a"), old)])
        holder[index] = new if key is None else (key, new)
    else:
        new = _value(old, rng, others, places)
        holder[index] = new if key is None else (key, new)


def _value(old: Any, rng: Random, others: Sequence[Any], places: list[tuple[Any, int]]) -> Any:
    """Another value for a place; often of the same type, so that what is behind the first check is reached too."""
    if rng.random() < 0.3 and (alike := [item for item in map(_item, places) if type(item) is type(old)]):
        return _copy(rng.choice(alike))
    if isinstance(old, int | float) and not isinstance(old, bool) and rng.random() < 0.5:
        if abs(old) > 1e300:  # neither a float nor, perhaps, a text can be made of it
            return rng.choice((*NUMBERS, -old, old + 1, bool(old)))
        return rng.choice((*NUMBERS, -old, old + 1, old * 1000, float(old), str(old), bool(old)))
    if isinstance(old, str) and rng.random() < 0.5:
        return rng.choice((*TEXTS, old + "x", old[:-1], old.upper(), f"{old}.{old}", old * 3))
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return Raw(rng.choice(RAW))
    if kind == 3:
        return rng.choice((None, True, False, [], Pairs(), [[]], [None], Pairs([("", None)]), [0] * 3000))
    if kind == 4 and others:
        places = _places([rng.choice(others)])
    return _copy(_item(rng.choice(places)))


def _item(place: tuple[Any, int]) -> Any:
    holder, index = place
    return holder[index][1] if isinstance(holder, Pairs) else holder[index]


def _copy(value: Any) -> Any:
    if isinstance(value, Pairs):
        return Pairs((key, _copy(item)) for key, item in value)
    return [_copy(item) for item in value] if isinstance(value, list) else value


def text_mutated(data: bytes, rng: Random, others: Sequence[bytes], read: Callable[[bytes], Any] = json.loads) -> bytes:
    """A YAML or JSON file after changes of its bytes, its lines or its values."""
    what = rng.random()
    if what < 0.2:
        return bytes_mutated(data, rng, others)
    if what < 0.4:
        return lines_mutated(data, rng, others)
    theirs = [ordered(read(rng.choice(others)))] if rng.random() < SPLICED else []
    return emitted(values_mutated(ordered(read(data)), rng, theirs)).encode("utf-8", "surrogatepass")


def yaml_mutated(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    return text_mutated(data, rng, others, _read_yaml)


def _read_yaml(data: bytes) -> Any:
    return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


# --- safetensors ------------------------------------------------------------------------------------------------------


def split_tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the rest of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined_tensors(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def tensors_mutated(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """A safetensors file after changes of its bytes, its header, one tensor's entry, or the texts in its metadata."""
    what = rng.random()
    if what < 0.1:
        return bytes_mutated(data, rng, others)
    header, rest = split_tensors(data)
    metadata = header.get("__metadata__", {})
    if what < 0.2:
        return rng.choice((0, 1, 7, len(data), 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    if what < 0.3:
        return joined_tensors(emitted(values_mutated(ordered(header), rng, [])).encode("utf-8", "replace"), rest)
    if what < 0.5:
        header = _entry_mutated(header, rng)
    elif what < 0.6:
        rest = bytes_mutated(rest, rng, others)
        rest = rest.ljust(len(data), b"\0")[: len(split_tensors(data)[1])]  # of the right length: other numbers
    elif metadata:
        _metadata_mutated(metadata, rng, [split_tensors(other)[0].get("__metadata__", {}) for other in others])
    return joined_tensors(json.dumps(header).encode(), rest)


def _entry_mutated(header: dict[str, Any], rng: Random) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return header
    name = rng.choice(names)
    entry = dict(header[name])
    what = rng.randrange(6)
    if what == 0:
        kinds = ("F16", "BF16", "F64", "I64", "BOOL", "U8", "F8_E4M3", "C64", "F4", "I16", "U64", "X", "")
        entry["dtype"] = rng.choice(kinds)
    elif what == 1:
        shape = list(entry["shape"])
        entry["shape"] = rng.choice(
            (shape[::-1], [*shape, 1], shape[1:], [0], [2**40, 2**40], [-1], [2**62, 4], shape * 9)
        )
    elif what == 2:
        first, last = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(([last, first], [first, last + 4], [0, 2**63], [-1, 3], [first], [0, last]))
    elif what == 3:
        new = rng.choice((*TEXTS[:40], name + ".x", name.partition(".")[2]))
        return {new if key == name else key: value for key, value in header.items()}
    elif what == 4:
        other = rng.choice(names)
        header = {**header, name: header[other], other: header[name]}
        return header
    else:
        return {key: value for key, value in header.items() if key != name}
    return {**header, name: entry}


def _metadata_mutated(metadata: dict[str, str], rng: Random, others: Sequence[dict[str, str]]) -> None:
    name = rng.choice((*metadata, *(("spec", "subnet", "certificate", "ties") * 2)))
    old = metadata.get(name, "{}").encode()
    theirs = [other[name].encode() for other in others if name in other] or [old]
    if rng.random() < 0.15:
        metadata[name] = rng.choice((*TEXTS[:40], *RAW, *map(str, NUMBERS)))
    elif name == "spec":
        metadata[name] = yaml_mutated(old, rng, theirs).decode("utf-8", "replace")
    elif rng.random() < 0.1:
        metadata.pop(name, None)
    else:
        try:
            metadata[name] = text_mutated(old, rng, theirs).decode("utf-8", "replace")
        except ValueError:  # a text that is not JSON
            metadata[name] = bytes_mutated(old, rng, theirs).decode("utf-8", "replace")
    for key, value in metadata.items():  # half characters are for JSON to refuse, not for this program
        metadata[key] = value.encode("utf-8", "replace").decode()
    if rng.random() < 0.9:  # or all that is told is that the spec was changed
        metadata["spec_hash"] = hashlib.sha256(metadata.get("spec", "").encode()).hexdigest()


# --- npz --------------------------------------------------------------------------------------------------------------

_SAID = (
    ("'|O'", "(3,)"), ("'|u1'", "(10000000000,)"), ("'|u1'", "(4611686018427387904, 4)"), ("'<U2000000000'", "(2,)"),
    ("'|u1'", "(-5,)"), ("'|u1'", "()"), ("[('a', '<i4'), ('b', '|O')]", "(2,)"), ("'<M8[s]'", "(2,)"),
    ("'|V0'", "(2000000000,)"), ("'<U0'", "(2,)"), ("'<U0'", "(300000000,)"), ("'|S0'", "(10000000000000,)"),
    ("'<i8'", "(True,)"), ("('<i8', (3, 3))", "(1,)"), ("'>i8'", "(3,)"), ("',u1'", "(3,)"), ("'|u1'", "3"),
    ("[" * 400 + "]" * 400, "(3,)"), ("'|u1'", "(" * 900 + ")" * 900),
)  # fmt: skip
_HEADERS = (
    *(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}" for descr, shape in _SAID),
    *("__import__('os').system('true')", "{'descr': '<f8', 'shape': (2,), }", "(" * 5000, "{", "", "1+1j", "-" * 3000),
)


def npz_mutated(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """A packed set after changes of the zip, of an array's header, or of its numbers."""
    if rng.random() < 0.25:
        return bytes_mutated(data, rng, others)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(members))
        name, content = members[at]
        what = rng.randrange(9)
        if what < 3:
            members[at] = (name, _npy(_npy_header(content, rng), content, rng))
        elif what < 5:
            members[at] = (name, _numbers_mutated(content, rng))
        elif what == 5:
            members[at] = (name, bytes_mutated(content, rng, [rng.choice(members)[1]]))
        elif what == 6:
            new = rng.choice(("data", "data.npy.npy", "../label.npy", "classes.npy", "offset", "é.npy", "a" * 3000))
            members[at] = (new, content)
        elif what == 7:
            members[at] = (name, rng.choice(members)[1])
        else:
            content = rng.choice((b"", b"\x80\x04K\x01.", b"PK\x03\x04", b"\x93NUMPY", content * 2, content))
            members[at] = (name, content)
    return _zipped(members, rng)


def _zipped(members: list[tuple[str, bytes]], rng: Random) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members:
            if name not in archive.NameToInfo:
                archive.writestr(name, content)
    data = file.getvalue()
    if rng.random() < 0.1:  # a way of packing that is not there, or a password
        at = data.rfind(b"PK\x01\x02")
        patch = rng.choice(
            ((8, b"\x01"), (10, b"\x63"), (10, b"\x0c"), (10, b"\x0e"), (24, b"\xff\xff\xff\x7f"), (42, b"\xff" * 4))
        )
        data = data[: at + patch[0]] + patch[1] + data[at + patch[0] + len(patch[1]) :]
    return data


def _npy_header(content: bytes, rng: Random) -> str:
    own = content[10 : 10 + struct.unpack("<H", content[8:10])[0]].decode("latin1") if len(content) > 10 else "{}"
    if rng.random() < 0.6:
        return rng.choice(_HEADERS)
    return _words_mutated(own, rng)


def _npy(header: str, content: bytes, rng: Random) -> bytes:
    start = 10 + struct.unpack("<H", content[8:10])[0] if len(content) > 10 else 0
    text = header.encode("utf-8", "replace")[:60_000] + b"\n"
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + content[start:]


def _numbers_mutated(content: bytes, rng: Random) -> bytes:
    """Other numbers in an array, its header as it was."""
    start = 10 + struct.unpack("<H", content[8:10])[0] if len(content) > 10 else 0
    values = bytearray(content[start:])
    for _ in range(rng.randint(1, 4)):
        if len(values) >= 8:
            at = rng.randrange(len(values) // 8) * 8
            values[at : at + 8] = struct.pack(
                "<q", rng.choice((0, 1, -1, 255, 2**31, 2**63 - 1, -(2**63), 0xD800, 0x110000))
            )
    return content[:start] + bytes(values)

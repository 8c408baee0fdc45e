"""Packed weights in safetensors files: tensors "<name>.codes", ... and, in the metadata, the numbers of each weight as JSON.

The format is written and read here, in the forty lines that it takes: nothing is executed, every offset is checked against the
file before a byte is read, and any library that knows safetensors can read the result.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch

from ._packed import TENSORS, PackedWeight

_VERSION = "1"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 100_000_000


def save(path: str | os.PathLike, weights: dict[str, PackedWeight | torch.Tensor]) -> None:
    """Writes packed weights, and tensors beside them, to one safetensors file.

    Raises:
        ValueError: a name is taken twice, or a dtype has no name in safetensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, dict] = {}

    def add(name: str, t: torch.Tensor) -> None:
        if name in tensors:
            raise ValueError(f"quant.save: two tensors are called {name!r}")
        if t.dtype not in _NAMES:
            raise ValueError(f"quant.save: {name!r} is {t.dtype}, which safetensors has no name for")
        tensors[name] = t.detach().cpu().contiguous()

    for name, weight in weights.items():
        if isinstance(weight, PackedWeight):
            described[name] = weight.numbers()
            for part, t in weight.tensors().items():
                add(f"{name}.{part}", t)
        else:
            add(name, weight)
    header: dict[str, object] = {"__metadata__": {"mlcore.version": _VERSION, "mlcore.packed": json.dumps(described)}}
    at = 0
    for name, t in tensors.items():
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    scratch = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    with open(scratch, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    scratch.replace(path)


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, PackedWeight | torch.Tensor]:
    """Reads what save() wrote.

    Raises:
        ValueError: the file is truncated, corrupted, no safetensors file, or its metadata contradicts its tensors. One line.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        return _parse(data, device)
    except _Broken as error:
        raise ValueError(f"quant.load: {path}: {error}") from None
    except ValueError as error:  # PackedWeight's own rules
        raise ValueError(f"quant.load: {path}: {error}") from None


class _Broken(Exception):
    pass


def _need(ok: bool, text: str) -> None:
    if not ok:
        raise _Broken(text)


def _json(text: bytes | str, what: str) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise _Broken(f"{what} is not JSON") from None
    _need(isinstance(found, dict), f"{what} must be an object")
    return found


def _whole(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _parse(data: bytes, device) -> dict[str, PackedWeight | torch.Tensor]:
    _need(len(data) >= 8, f"a file of {len(data)} bytes has no header")
    size = int.from_bytes(data[:8], "little")
    _need(
        size <= min(_MOST_HEADER, len(data) - 8), f"the header says {size} bytes, the file has {len(data) - 8} after its length"
    )
    header = _json(data[8 : 8 + size], "the header")
    metadata = header.pop("__metadata__", None)
    _need(isinstance(metadata, dict) and isinstance(metadata.get("mlcore.packed"), str), "the metadata has no mlcore.packed")
    version = metadata.get("mlcore.version")
    _need(version == _VERSION, f"mlcore.version must be {_VERSION!r}; got {version!r}")
    body = memoryview(data)[8 + size :]
    tensors = _tensors(header, body, device)
    result: dict[str, PackedWeight | torch.Tensor] = {}
    for name, numbers in _json(metadata["mlcore.packed"], "mlcore.packed").items():
        result[name] = _weight(name, numbers, tensors)
    return result | tensors


def _tensors(header: dict, body: memoryview, device) -> dict[str, torch.Tensor]:
    tensors, end = {}, 0
    for name, entry in header.items():
        _need(isinstance(entry, dict), f"{name!r} must be an object")
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        _need(isinstance(dtype, str) and dtype in _DTYPES, f"{name!r} has dtype {dtype!r}, none of {', '.join(_DTYPES)}")
        _need(_whole(shape) and len(shape) <= 8, f"{name!r} has shape {shape!r}")
        _need(_whole(offsets) and len(offsets) == 2, f"{name!r} has data_offsets {offsets!r}")
        wanted = math.prod(shape) * _DTYPES[dtype].itemsize
        _need(
            offsets[0] == end and offsets[1] - offsets[0] == wanted,
            f"{name!r} has data_offsets {offsets}, not [{end}, {end + wanted}]",
        )
        end = offsets[1]
        _need(end <= len(body), f"truncated: {name!r} ends at byte {end} of {len(body)}")
        raw = (
            torch.frombuffer(bytearray(body[offsets[0] : end]), dtype=torch.uint8)
            if wanted
            else torch.empty(0, dtype=torch.uint8)
        )
        if dtype == "BOOL":
            _need(not wanted or int(raw.max()) <= 1, f"{name!r} has booleans other than 0 and 1")
        tensors[name] = raw.view(_DTYPES[dtype]).reshape(shape).to(device)
    _need(end == len(body), f"{len(body) - end} bytes follow the last tensor")
    return tensors


def _weight(name: str, numbers: object, tensors: dict[str, torch.Tensor]) -> PackedWeight:
    _need(isinstance(numbers, dict), f"mlcore.packed of {name!r} must be an object")
    wanted = {"shape", "bits", "group_size", "offset", "format", "layout"}
    _need(
        numbers.keys() == wanted,
        f"mlcore.packed of {name!r} must have {', '.join(sorted(wanted))}; got {', '.join(sorted(numbers))}",
    )
    _need(_whole(numbers["shape"]), f"mlcore.packed of {name!r} has shape {numbers['shape']!r}")
    _need(
        all(isinstance(numbers[key], str) for key in ("format", "layout")),
        f"mlcore.packed of {name!r}: format and layout must be text",
    )
    parts = {part: tensors.pop(f"{name}.{part}", None) for part in TENSORS}
    for part in ("codes", "scales"):
        _need(parts[part] is not None, f"{name}.{part} is missing")
    return PackedWeight(**parts, **(numbers | {"shape": tuple(numbers["shape"])})).check_finite()

"""Packed weights in safetensors files: tensors "<name>.codes", ... and, in the metadata, the numbers of each weight as JSON.

The safetensors package reads and writes them (`pip install mlcore[quant]`): nothing is executed, and it checks every
offset. Here the metadata is held against the tensors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ._packed import TENSORS, PackedWeight

_VERSION = "1"


def _safetensors(caller: str):
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(f"{caller}: needs the package safetensors: pip install mlcore[quant]") from None
    return safetensors


def save(path: str | os.PathLike, weights: dict[str, PackedWeight | torch.Tensor]) -> None:
    """Writes packed weights, and tensors beside them, to one safetensors file. What was at path before is lost only when the
    new file is whole.

    Raises:
        ValueError: a name is taken twice, or a dtype has no name in safetensors.
        ImportError: the package safetensors is not installed.
    """
    package = _safetensors("quant.save")
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, dict] = {}

    def add(name: str, t: torch.Tensor) -> None:
        if name in tensors:
            raise ValueError(f"quant.save: two tensors are called {name!r}")
        tensors[name] = t.detach().cpu().clone(memory_format=torch.contiguous_format)  # no two may share memory

    for name, weight in weights.items():
        if isinstance(weight, PackedWeight):
            described[name] = weight.numbers()
            for part, t in weight.tensors().items():
                add(f"{name}.{part}", t)
        else:
            add(name, weight)
    scratch = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    metadata = {"mlcore.version": _VERSION, "mlcore.packed": json.dumps(described)}
    try:
        package.torch.save_file(tensors, scratch, metadata)
        scratch.replace(path)
    except (ValueError, KeyError, package.SafetensorError) as error:
        raise ValueError(f"quant.save: {path}: {_line(error)}") from None
    finally:
        scratch.unlink(missing_ok=True)


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, PackedWeight | torch.Tensor]:
    """Reads what save() wrote.

    Raises:
        ValueError: the file is truncated, corrupted, no safetensors file, or its metadata contradicts its tensors. One line.
        OSError: the file can't be opened.
        ImportError: the package safetensors is not installed.
    """
    package = _safetensors("quant.load")
    try:
        with package.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- file is no dict
        return _weights(metadata, tensors)
    except (_Broken, ValueError, package.SafetensorError) as error:  # ValueError: PackedWeight's own rules
        raise ValueError(f"quant.load: {path}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Broken(Exception):
    pass


def _need(ok: bool, text: str) -> None:
    if not ok:
        raise _Broken(text)


def _weights(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, PackedWeight | torch.Tensor]:
    _need("mlcore.packed" in metadata, "the metadata has no mlcore.packed")
    version = metadata.get("mlcore.version")
    _need(version == _VERSION, f"mlcore.version must be {_VERSION!r}; got {version!r}")
    try:
        described = json.loads(metadata["mlcore.packed"])
    except (ValueError, RecursionError):
        raise _Broken("mlcore.packed is not JSON") from None
    _need(isinstance(described, dict), "mlcore.packed must be an object")
    return {name: _weight(name, numbers, tensors) for name, numbers in described.items()} | tensors


def _weight(name: str, numbers: object, tensors: dict[str, torch.Tensor]) -> PackedWeight:
    _need(isinstance(numbers, dict), f"mlcore.packed of {name!r} must be an object")
    wanted = {"shape", "bits", "group_size", "offset", "format", "layout"}
    got = ", ".join(sorted(numbers))
    _need(numbers.keys() == wanted, f"mlcore.packed of {name!r} must have {', '.join(sorted(wanted))}; got {got}")
    shape = numbers["shape"]
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    _need(whole, f"mlcore.packed of {name!r} has shape {shape!r}")
    text = all(isinstance(numbers[key], str) for key in ("format", "layout"))
    _need(text, f"mlcore.packed of {name!r}: format and layout must be text")
    parts = {part: tensors.pop(f"{name}.{part}", None) for part in TENSORS}
    for part in ("codes", "scales"):
        _need(parts[part] is not None, f"{name}.{part} is missing")
    return PackedWeight(**parts, **(numbers | {"shape": tuple(shape)})).check_finite()

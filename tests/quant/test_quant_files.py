"""mlcore.quant.save and load: what was saved comes back, other readers understand it, and a broken file is one clear error."""

from __future__ import annotations

import json
import random

import pytest
import torch

from mlcore import quant
from mlcore.quant import PackedWeight, pack


def weights():
    w = torch.randn(20, 70)
    return {
        "a.weight": pack(w, "int4", group_size=32),
        "b.weight": pack(w, "int3", group_size=9, symmetric=False),
        "c.weight": pack(w, "nf4", group_size=64),
        "d.weight": pack(w, "ternary"),
        "e.weight": pack(w, "codebook", entries=5, tables=2),
        "empty": pack(torch.randn(0, 5), "int8"),
        "bias": torch.randn(20).bfloat16(),
        "steps": torch.tensor(3),
    }


@pytest.fixture
def file(tmp_path):
    quant.save(tmp_path / "w.safetensors", weights())
    return tmp_path / "w.safetensors"


def test_round_trip(tmp_path):
    saved = weights()
    quant.save(tmp_path / "w.safetensors", saved)
    loaded = quant.load(tmp_path / "w.safetensors")
    assert loaded.keys() == saved.keys()
    for name, want in saved.items():
        got = loaded[name]
        if isinstance(want, PackedWeight):
            assert got.numbers() == want.numbers()
            assert all(torch.equal(t, want.tensors()[part]) for part, t in got.tensors().items())
        else:
            assert torch.equal(got, want) and got.dtype == want.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_other_readers(file):
    import safetensors

    with safetensors.safe_open(file, "pt") as f:
        assert f.get_tensor("bias").shape == (20,)
        described = json.loads(f.metadata()["mlcore.packed"])
    assert described["a.weight"]["bits"] == 4 and described["a.weight"]["group_size"] == 32
    assert described["a.weight"]["layout"] == "panel16"


def load_error(path) -> str:
    with pytest.raises(ValueError) as caught:
        quant.load(path)
    text = str(caught.value)
    assert text.startswith(f"quant.load: {path}: ") and "\n" not in text
    return text


def test_every_truncation(file):
    data = file.read_bytes()
    for size in [*range(0, 24), *range(24, len(data), 97), len(data) - 1]:
        file.write_bytes(data[:size])
        load_error(file)
    file.write_bytes(data + b"x")
    load_error(file)


def test_any_corruption_is_an_error_or_a_valid_weight(file):
    """A flipped byte of the header may leave a valid file; then every PackedWeight in it has passed its checks."""
    data, rng = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        broken[rng.randrange(header)] = rng.randrange(256)
        file.write_bytes(broken)
        try:
            for weight in quant.load(file).values():
                if isinstance(weight, PackedWeight):
                    weight.dequantize()
        except ValueError as error:
            assert str(error).startswith(f"quant.load: {file}: ")
            refused += 1
    assert refused > 200


def rewrite(file, change) -> None:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    packed = json.loads(header["__metadata__"]["mlcore.packed"])
    change(header, packed)
    if "mlcore.packed" in header.get("__metadata__", {}):
        header["__metadata__"]["mlcore.packed"] = json.dumps(packed)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, p: h.pop("__metadata__"), "the metadata has no mlcore.packed"),
        (lambda h, p: h["__metadata__"].update({"mlcore.version": "9"}), "mlcore.version must be '1'; got '9'"),
        (lambda h, p: p["a.weight"].update(bits=5), "codes must be"),
        (lambda h, p: p["a.weight"].update(bits="4"), "numbers must be integers"),
        (lambda h, p: p["a.weight"].update(group_size=-1), "group_size must be at least 1"),
        (lambda h, p: p["a.weight"].update(group_size=10**30), "must be"),
        (lambda h, p: p["a.weight"].update(shape=[20]), r"shape must be \(N, K\)"),
        (lambda h, p: p["a.weight"].update(shape=[10**12, 10**12]), "codes must be"),
        (lambda h, p: p["a.weight"].update(layout="x"), "layout must be one of"),
        (lambda h, p: p["a.weight"].update(format=[1]), "format and layout must be text"),
        (lambda h, p: p["a.weight"].pop("bits"), "must have bits, format"),
        (lambda h, p: p.update(ghost=p["a.weight"]), "ghost.codes is missing"),
        (lambda h, p: h["a.weight.codes"].update(dtype="F5"), "header"),
        (lambda h, p: h["a.weight.codes"].update(shape=[-1]), "header"),
        (lambda h, p: h["a.weight.codes"].update(data_offsets=[0, 10**15]), "header|offset"),
        (lambda h, p: h["bias"].update(data_offsets=[0, 40]), "header|offset|mismatch"),
    ],
)
def test_wrong_metadata(file, change, message):
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        quant.load(file)
    load_error(file)


def test_nan_scales_are_refused(tmp_path):
    packed = pack(torch.randn(4, 8), "int4")
    packed.scales[0, 0, 0] = torch.nan
    quant.save(tmp_path / "w", {"w": packed})
    assert "scales must be finite" in load_error(tmp_path / "w")


def test_names(tmp_path):
    packed = pack(torch.randn(4, 8), "int4")
    with pytest.raises(ValueError, match=r"two tensors are called 'w.codes'"):
        quant.save(tmp_path / "w", {"w": packed, "w.codes": torch.ones(1)})
    with pytest.raises(ValueError, match=r"quant\.save"):
        quant.save(tmp_path / "w", {"w": torch.ones(1, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())

"""`pip install .`: the wheel is built from the sdist alone, without torch and CUDA, quickly; it is small, holds what it should,
and is tied to no torch.
"""

import ast
import re
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import ROOT, ok, run, tool

from mlcore import _C

pytestmark = pytest.mark.slow

OPS = sorted({op for op, *_ in _C.table()})


@pytest.fixture(scope="module")
def names(wheel) -> list[str]:
    return zipfile.ZipFile(wheel.path).namelist()


@pytest.fixture(scope="module")
def extension(installed) -> Path:
    (path,) = installed.glob("_C.*.so")
    return path


def test_build_takes_less_than_three_minutes_on_two_cores(wheel):
    """pip's own installation of the build tools included. Processor time, so that the machine's other work doesn't count."""
    assert wheel.cpu_seconds <= 2 * 180, f"{wheel.cpu_seconds:.0f} s of processor time, {wheel.seconds:.0f} s on the clock"


def test_size(wheel):
    assert wheel.path.stat().st_size <= 5 << 20


def test_sources_stay_out(names):
    assert [n for n in names if n.endswith((".cu", ".cuh", ".cc", ".h", ".inl", ".inc", ".json"))] == []
    assert [n for n in names if not n.startswith(("mlcore/", "mlcore-"))] == []
    (library,) = [n for n in names if ".so" in n]
    assert re.fullmatch(r"mlcore/_C\.[\w.-]+\.so", library)


def test_every_python_file_is_in(names):
    package = {f"mlcore/{p.relative_to(ROOT / 'python' / 'mlcore')}" for p in (ROOT / "python" / "mlcore").rglob("*.py")}
    kernels = {f"mlcore/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    assert package | kernels == {n for n in names if n.endswith(".py")}


def test_metadata(wheel, names):
    archive = zipfile.ZipFile(wheel.path)
    metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
    torch = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert len(torch) == 1 and re.fullmatch(r"torch>=[\d.]+", torch[0]), (
        "torch alone is required, and no version of it is excluded"
    )
    license_text = archive.read(next(n for n in names if n.endswith("/LICENSE"))).decode()
    assert "Apache License" in license_text and "END OF TERMS AND CONDITIONS" in license_text


def test_no_torch_symbol(extension):
    for line in ok(run([tool("nm"), "-D", "-C", extension])).splitlines():
        assert not re.search(r"\b(torch|c10|at|caffe2)::|\b(aoti_)?torch_", line), line


def test_only_the_c_api_is_exported(extension):
    exported = [line.split()[-1] for line in ok(run([tool("nm"), "-D", "--defined-only", extension])).splitlines()]
    assert [name for name in exported if re.match(r"_ZN?K?6mlcore", name)] == []
    assert {name for name in exported if not name.startswith("_Z")} >= {
        "PyInit__C",
        "mlc_last_error",
        *(f"mlc_{op}_fwd" for op in OPS),
    }


def test_links_torchs_openmp_by_its_plain_name(extension):
    dynamic = ok(run([tool("readelf"), "-d", "-W", extension]))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libgomp.so.1" in needed
    assert {n.split(".so")[0] for n in needed} <= {
        "libgomp",
        "libstdc++",
        "libm",
        "libgcc_s",
        "libpthread",
        "libc",
        "ld-linux-x86-64",
    }
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def test_installed_package_works(wheel_python, installed):
    assert not installed.is_relative_to(ROOT)
    code = """
        import importlib, mlcore, torch
        x = torch.randn(7, 33, requires_grad=True)
        y = mlcore.ops.rms_norm(x)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (33,), eps=1e-6))
        y.sum().backward()
        for op, _, backend, _ in mlcore._C.table():
            assert op in str(mlcore.explain(op, x))
            importlib.import_module(f"mlcore.kernels.{op}.{op}_ref")
        print("fine")
    """
    lines = [line[8:] for line in code.splitlines()]
    assert ok(run([wheel_python, "-c", "\n".join(lines)])) == "fine\n"
    shown = ok(run([wheel_python, "-m", "mlcore"]))
    for word in ("cpu", "cuda", "triton", "reference", *OPS):
        assert re.search(rf"^{word}\b", shown, re.MULTILINE), f"`python -m mlcore` says nothing of {word}"


def test_files_of_the_package_parse_for_the_oldest_python(names, wheel):
    archive = zipfile.ZipFile(wheel.path)
    for name in names:
        if name.endswith(".py"):
            ast.parse(archive.read(name), name, feature_version=(3, 10))

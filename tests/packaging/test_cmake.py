"""The plain CMake way: build and install without Python, find_package(mlcore) from another project, headers in C, what
MLCORE_CUDA does with and without a CUDA compiler, and per-ISA objects that keep to themselves.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import native_flags, ok, run, tool

from mlcore import _C

pytestmark = pytest.mark.slow

CONSUMER = Path(__file__).parent / "consumer"
OPS = sorted({op for op, *_ in _C.table()})
NVCC = shutil.which("nvcc")


# Installation and use.


def test_installed_files(native):
    files = {str(p.relative_to(native.prefix)) for p in native.prefix.rglob("*") if p.is_file() or p.is_symlink()}
    libraries = {f for f in files if ".so" in f}
    assert {Path(f).name for f in libraries} == {"libmlcore.so", "libmlcore.so.0", "libmlcore.so.0.1.0"}
    headers = {f for f in files if f.startswith("include/")}
    assert headers >= {f"include/mlcore/{name}.h" for name in ("mlcore", "api", "dlpack", *OPS)}
    assert all(f.startswith("include/mlcore/") for f in headers)
    others = files - libraries - headers
    assert all("cmake/mlcore" in f for f in others), others


def test_ctest(native):
    log = ok(run([tool("ctest"), "--test-dir", native.build]))
    assert "100% tests passed" in log and "out of 2" in log, log


@pytest.fixture(scope="module")
def consumer(native, tmp_path_factory) -> Path:
    build = tmp_path_factory.mktemp("consumer")
    cmake = tool("cmake")
    ok(run([cmake, "-S", CONSUMER, "-B", build, *native_flags(), f"-DCMAKE_PREFIX_PATH={native.prefix}"]))
    ok(run([cmake, "--build", build]))
    return build


def test_cpp_program_computes_and_reads_errors(consumer):
    assert ok(run([consumer / "cpp_consumer"])).splitlines() == [
        "worst error below 1e-5: yes",
        "status 1: rms_norm: weight must be (C) = (77); got (76)",
        "status 1: rms_norm: x must be given",
    ]


def test_c_program_computes(consumer):
    assert ok(run([consumer / "c_consumer"])) == "1.200 1.600 0.000 0.000, rstd 0.400\n"


def test_bad_isa_reaches_the_c_caller_as_an_error(consumer):
    done = run([consumer / "cpp_consumer"], MLCORE_ISA="sse9")
    assert done.returncode == 1
    assert done.stdout == 'failed: MLCORE_ISA must be scalar, avx2 or avx512; got "sse9"\n'


@pytest.mark.parametrize("header", ["mlcore", "api", "dlpack", *OPS])
@pytest.mark.parametrize("standard", ["c11", "c++17"])
def test_header_stands_alone(native, header, standard):
    language = "c++" if standard.startswith("c++") else "c"
    compiler = tool("c++" if language == "c++" else "cc")
    flags = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", f"-I{native.prefix}/include"]
    source = f"#include <mlcore/{header}.h>\n#include <mlcore/{header}.h>\n"
    done = subprocess.run([compiler, "-x", language, *flags, "-"], input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# MLCORE_CUDA. run() hides the machine's CUDA compiler.


def configure(source: Path, build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    return run([tool("cmake"), "-S", source, "-B", build, *native_flags(), *options], **environment)


def test_auto_without_a_cuda_compiler_is_a_cpu_build(native):
    assert "mlcore: no CUDA kernels (MLCORE_CUDA=AUTO)" in native.log


def test_on_without_a_cuda_compiler_is_a_clear_error(source, tmp_path):
    done = configure(source, tmp_path, "-DMLCORE_CUDA=ON")
    assert done.returncode != 0
    text = " ".join(done.stderr.split())
    assert "MLCORE_CUDA=ON, but no CUDA compiler was found; set CUDACXX or CMAKE_CUDA_COMPILER, or use AUTO" in text


def test_unknown_value_is_a_clear_error(source, tmp_path):
    done = configure(source, tmp_path, "-DMLCORE_CUDA=maybe")
    assert done.returncode != 0 and "MLCORE_CUDA must be AUTO, ON or OFF; got maybe" in " ".join(done.stderr.split())


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia/version"), reason="this machine has a GPU driver")
def test_auto_without_a_driver_is_a_cpu_build(source, tmp_path):
    done = configure(source, tmp_path, CUDACXX=NVCC)
    assert "mlcore: no CUDA kernels (MLCORE_CUDA=AUTO)" in ok(done)


CUDA_ROWS = sorted({f"{op}_{pass_name}" for op, pass_name, backend, _ in _C.table() if backend == "cuda"})


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.skipif(not CUDA_ROWS, reason="kernels.inc has no CUDA rows")
def test_cuda_module_builds_binds_every_row_and_refuses_cpu_tensors(source, tmp_path):
    """On any machine with nvcc: the library loads without a driver, and its launchers check before they launch."""
    options = [
        "-DMLCORE_CUDA=ON",
        "-DMLCORE_PYTHON=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_CUDA_ARCHITECTURES=90-virtual",
    ]
    ok(configure(source, tmp_path, *options, CUDACXX=NVCC))
    ok(run([tool("cmake"), "--build", tmp_path, "--target", "_cuda"], CUDACXX=NVCC))
    (module,) = tmp_path.glob("_cuda.*.so")
    dynamic = ok(run([tool("readelf"), "-d", "-W", tmp_path / "libmlcore_cuda.so"]))
    assert "libcudart" not in dynamic, "cudart must be static, or the library is tied to one CUDA release"
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("mlcore._cuda", {str(module)!r})
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
print(*sorted(name for name in dir(cuda) if not name.startswith("_") and name != "launch"))
x, r = torch.ones(4, 8), torch.ones(4)
try:
    cuda.rms_norm_fwd(x, None, None, 1e-6, x, None, r)
except ValueError as error:
    print(error)
"""
    names, error = ok(run([sys.executable, "-c", code])).splitlines()
    assert names.split() == CUDA_ROWS
    assert re.fullmatch("rms_norm: x must be on a CUDA device; got .*", error)


# Objects: what is compiled for a newer CPU must not be what an older one runs.


def objects(native, pattern: str) -> list[Path]:
    found = sorted(p for p in native.build.rglob("*.o") if re.search(pattern, p.name))
    assert found, f"no object matches {pattern}"
    return found


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_units_of_an_isa_define_symbols_of_its_namespace_only(native, isa):
    """Any other symbol, a weak copy of an inline function above all, may be the one that the linker keeps for every CPU. A name
    that mentions the namespace, if only in a template argument, is this ISA's own.
    """
    if not list(native.build.rglob("*_avx512.cc.o")):
        pytest.skip("x86 only")
    for path in objects(native, rf"_{isa}\.cc\.o$"):
        for line in ok(run([tool("nm"), "--defined-only", "--extern-only", path])).splitlines():
            name = line.split()[-1]
            owned = f"{len(isa)}{isa}" in name  # as the namespace is mangled
            assert owned or name == "DW.ref.__gxx_personality_v0", f"{path.name} defines {name}"


def test_only_avx512_units_use_avx512_and_only_simd_units_avx(native):
    if not list(native.build.rglob("*_avx512.cc.o")):
        pytest.skip("x86 only")
    objdump = tool("objdump")
    for path in objects(native, r"\.cc\.o$"):
        code = ok(run([objdump, "-d", "--no-show-raw-insn", path]))
        if not path.name.endswith("_avx512.cc.o"):
            assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|\{%k[1-7]\}", code), f"{path.name} uses AVX-512"
        if not re.search(r"_avx(2|512)\.cc\.o$", path.name):
            assert not re.search(r"%ymm|\tv[a-z0-9]+ ", code), f"{path.name} uses AVX"
        else:
            assert "%zmm" in code or "%ymm" in code

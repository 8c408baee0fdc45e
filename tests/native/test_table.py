"""The house rules. An op is one word everywhere: every op of kernels.inc fills all its slots, nothing stands in a slot without
a row, no op reaches into another, and data flows nn -> ops -> kernels. Reads the tree; computes nothing.
"""

import ast
import re
from pathlib import Path

import pytest

from mlcore import _C

ROOT = Path(__file__).resolve().parents[2]
KERNELS, PACKAGE = ROOT / "kernels", ROOT / "python" / "mlcore"

TABLE = _C.table()
OPS = sorted({op for op, *_ in TABLE})
DTYPES = {"float32", "bfloat16", "float16", "float64", "int8", "uint8"}

# Every op has these, whatever its backends.
SLOTS = [
    "kernels/{op}/README.md",
    "kernels/{op}/__init__.py",
    "kernels/{op}/{op}.h",
    "kernels/{op}/{op}.cc",
    "kernels/{op}/{op}_cpu.inl",
    "kernels/{op}/{op}_ref.py",
    "python/mlcore/ops/{op}.py",
    "tests/ops/test_{op}.py",
    "bench/bench_{op}.py",
]


def files(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in suffixes and "__pycache__" not in p.parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("op", OPS)
def test_slot_is_filled(op, slot):
    path = ROOT / slot.format(op=op)
    assert path.exists(), f"{op} has no {slot.format(op=op)}"
    assert path.stat().st_size > 0 or path.name == "__init__.py", f"{relative(path)} is empty"


def test_rows_are_unique_and_well_formed():
    keys = [(op, pass_name, backend) for op, pass_name, backend, _ in TABLE]
    assert len(keys) == len(set(keys))
    for op, pass_name, backend, dtypes in TABLE:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", op) and re.fullmatch(r"[a-z][a-z0-9_]*", pass_name)
        assert backend in ("cpu", "cuda", "triton")
        assert dtypes and set(dtypes.split()) <= DTYPES, f"{op} {pass_name} {backend}: {dtypes}"


def test_cpu_rows_are_bound():
    for op, pass_name, backend, _ in TABLE:
        if backend == "cpu":
            assert callable(getattr(_C, f"{op}_{pass_name}"))


def test_other_rows_repeat_passes_of_the_cpu():
    """All backends of a pass take the same arguments: the CPU kernel, which always is there, sets them."""
    cpu = {(op, pass_name) for op, pass_name, backend, _ in TABLE if backend == "cpu"}
    assert {(op, pass_name) for op, pass_name, *_ in TABLE} == cpu


@pytest.mark.parametrize("op, pass_name", [(o, p) for o, p, b, _ in TABLE if b == "cuda"])
def test_cuda_row_has_its_function(op, pass_name):
    sources = "".join(p.read_text() for p in files(KERNELS / op, ".cu", ".cuh"))
    assert re.search(rf"\bmlc_cuda_{op}_{pass_name}\(", sources), f"no mlc_cuda_{op}_{pass_name} in kernels/{op}/*.cu"


@pytest.mark.parametrize("op, pass_name", [(o, p) for o, p, b, _ in TABLE if b == "triton"])
def test_triton_row_has_its_function(op, pass_name):
    tree = ast.parse((KERNELS / op / f"{op}_triton.py").read_text())
    assert pass_name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# No orphans.


def test_every_kernel_folder_has_rows():
    folders = {
        p.name for p in KERNELS.iterdir() if p.is_dir() and p.name != "__pycache__" and any(files(p, ".py", ".h", ".cc"))
    }
    assert folders == set(OPS)


def test_every_backend_file_has_rows():
    announced = {(op, backend) for op, _, backend, _ in TABLE}
    for path in files(KERNELS, ".cu", ".py"):
        op = path.parent.name
        if path.name == f"{op}.cu":
            assert (op, "cuda") in announced, f"{relative(path)}: no MLC_CUDA row in kernels.inc"
        if path.name == f"{op}_triton.py":
            assert (op, "triton") in announced, f"{relative(path)}: no MLC_TRITON row in kernels.inc"


def test_every_ops_file_is_an_op():
    assert {p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_")} == set(OPS)


def test_every_op_test_names_its_op():
    for path in (ROOT / "tests" / "ops").glob("test_*.py"):
        assert path.stem.removeprefix("test_").startswith(tuple(OPS)), f"{relative(path)} names no op"


def test_public_header_serves_every_op():
    header = (ROOT / "csrc" / "include" / "mlcore" / "mlcore.h").read_text()
    assert set(re.findall(r'#include "mlcore/(\w+)\.h"', header)) - {"api", "dlpack"} == set(OPS)


# Who may reach whom.


def test_no_op_includes_another():
    for path in files(KERNELS, ".h", ".cc", ".inl", ".cu", ".cuh"):
        op = path.parent.name
        for included in re.findall(r'^\s*#\s*include\s*[<"]([^">]+)', path.read_text(), re.MULTILINE):
            parts = Path(included).parts
            other = Path(parts[1]).stem if parts[0] == "mlcore" and len(parts) > 1 else parts[0]
            assert other == op or other not in OPS, f"{relative(path)} includes {included}"


def test_infrastructure_knows_no_op():
    """csrc/ holds no operator maths; only the public header and the binding, which are made of the table, name ops."""
    for path in files(ROOT / "csrc", ".h", ".cc", ".inl", ".cuh"):
        if path.name == "mlcore.h":
            continue
        for included in re.findall(r'^\s*#\s*include\s*[<"]([^">]+)', path.read_text(), re.MULTILINE):
            assert not set(Path(included).with_suffix("").parts) & set(OPS), f"{relative(path)} includes {included}"


def imports(path: Path, package: tuple[str, ...]) -> set[str]:
    """Absolute names of what a module of `package` imports, at any depth of its text."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            names |= {".".join((*base, alias.name)) for alias in node.names}
    return names


def module_package(path: Path) -> tuple[str, ...]:
    if path.is_relative_to(KERNELS):
        return ("mlcore", "kernels", *path.relative_to(KERNELS).parent.parts)
    return ("mlcore", *path.relative_to(PACKAGE).parent.parts)


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def test_no_op_imports_another():
    for path in files(KERNELS, ".py"):
        op = path.parent.name
        others = [f"mlcore.kernels.{other}" for other in OPS if other != op]
        for name in imports(path, module_package(path)):
            assert not within(name, *others), f"{relative(path)} imports {name}"


# Each layer and what it must not know: the layers above it.
UPWARD = {
    "kernels": ("mlcore.ops", "mlcore.nn", "mlcore.models", "mlcore.integrations", "mlcore._registry"),
    "python/mlcore/ops": ("mlcore.nn", "mlcore.models", "mlcore.integrations"),
    "python/mlcore/nn": ("mlcore.models", "mlcore.integrations", "mlcore._C", "mlcore.kernels"),
    "python/mlcore/models": ("mlcore._C", "mlcore.kernels"),
}


@pytest.mark.parametrize("layer", UPWARD)
def test_layers_reach_down_only(layer):
    for path in files(ROOT / layer, ".py"):
        for name in imports(path, module_package(path)):
            assert not within(name, *UPWARD[layer]), f"{relative(path)} imports {name}"


def test_torch_stays_out_of_the_native_code():
    for path in files(ROOT / "csrc", ".h", ".cc", ".inl", ".cuh") + files(KERNELS, ".h", ".cc", ".inl", ".cu", ".cuh"):
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', path.read_text()), relative(path)


def test_one_file_knows_openmp():
    users = {
        relative(p)
        for p in files(ROOT / "csrc", ".h", ".cc", ".inl") + files(KERNELS, ".h", ".cc", ".inl")
        if re.search(r"#\s*include\s*<omp\.h>|#\s*pragma\s+omp|\bomp_\w+\(", p.read_text())
    }
    assert users == {"csrc/core/parallel.cc"}


def test_algorithms_use_no_standard_library_templates():
    """A std:: template in a file compiled for AVX-512 may be the copy that the linker keeps for every CPU."""
    for path in files(KERNELS, ".inl") + files(ROOT / "csrc" / "core", ".inl") + files(ROOT / "csrc" / "core" / "simd", ".h"):
        code = re.sub(r"//.*", "", path.read_text())
        assert "std::" not in code, f"{relative(path)} uses std::"


def test_no_machine_paths():
    """Text speaks of mlcore alone."""
    suffixes = (".py", ".h", ".cc", ".inl", ".cu", ".cuh", ".md", ".toml", ".cmake", ".txt", ".inc")
    folders = [ROOT / name for name in ("csrc", "kernels", "python", "cmake", "bench", "examples", "tools")]
    for path in [p for folder in folders if folder.exists() for p in files(folder, *suffixes)] + sorted(ROOT.glob("*.*")):
        if path.suffix in suffixes:
            found = re.search(r"/(home|root|work|opt|Users)/\w", path.read_text())
            assert not found, f"{relative(path)}: {found.group()}"

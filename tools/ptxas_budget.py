"""Registers, spills and shared memory of every CUDA kernel against the budget in kernels/ptxas_budget.json; needs no GPU.

    python tools/ptxas_budget.py            compares: a kernel above its budget fails, one below it asks for --update
    python tools/ptxas_budget.py --update   writes what this nvcc gives

Results are kept under build/ptxas by the hash of their sources. Another nvcc release than the budget's allocates registers
differently, so figures are then shown and not compared.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = ROOT / "kernels" / "ptxas_budget.json"
ARCHITECTURES = ("sm_80", "sm_90a")
# As cmake/cuda.cmake builds them.
FLAGS = ["-std=c++17", "-O3", "-Icsrc", "-Icsrc/include", "-Ikernels", "--expt-relaxed-constexpr"]

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")

Figures = dict[str, int]  # registers, spill (bytes stored and loaded), stack, shared (static)


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return shutil.which("nvcc")


@functools.cache
def release() -> str:
    """nvcc's release, such as 13.0."""
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [_short(line) for line in text.splitlines()]


def _short(name: str) -> str:
    """A demangled kernel without its return type, namespaces and parameters: rms_norm_fwd<float, 4, 4>."""
    name = name.replace("(anonymous namespace)::", "").replace("mlcore::", "").replace("cuda::", "").removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def parse(report: str) -> dict[str, dict[str, Figures]]:
    """Architecture -> kernel -> figures, from what `nvcc -Xptxas -v` prints."""
    found: list[tuple[str, str, Figures]] = []
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            found.append((entry[2], entry[1], {}))
        elif found and (spill := _SPILL.search(line)):
            found[-1][2].update(stack=int(spill[1]), spill=int(spill[2]) + int(spill[3]))
        elif found and (used := _USED.search(line)):
            shared = _SHARED.search(line)
            found[-1][2].update(registers=int(used[1]), shared=int(shared[1]) if shared else 0)
    result: dict[str, dict[str, Figures]] = {}
    for (arch, _, figures), name in zip(found, _demangle([f[1] for f in found])):
        result.setdefault(arch, {})[name] = figures
    return result


def measure(source: Path) -> dict[str, dict[str, Figures]]:
    """The figures of one .cu file; compiled only where its sources have changed."""
    folders = ROOT / "csrc" / "cuda", ROOT / "csrc" / "core", ROOT / "csrc" / "include" / "mlcore", source.parent
    inputs = sorted(
        p for d in folders for p in d.glob("*") if p.suffix in (".h", ".cuh", ".cu") and not p.name.startswith("emu")
    )
    digest = hashlib.sha256(" ".join([release(), *FLAGS, *ARCHITECTURES]).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    cache = ROOT / "build" / "ptxas" / f"{source.stem}-{digest.hexdigest()[:16]}.json"
    if cache.exists():
        return json.loads(cache.read_text())
    cache.parent.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    command = [nvcc(), *FLAGS, "-fatbin", *targets, "-Xptxas", "-v", str(source), "-o", str(cache.with_suffix(".fatbin"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    cache.with_suffix(".fatbin").unlink(missing_ok=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    result = parse(done.stderr + done.stdout)
    cache.write_text(json.dumps(result))
    return result


def sources() -> list[Path]:
    """Every kernels/<op>/*.cu."""
    return sorted(ROOT.glob("kernels/*/*.cu"))


def compare(measured: dict, budget: dict) -> tuple[list[str], list[str]]:
    """(failures, improvements): one line for each figure of each kernel that differs from its budget."""
    failures, improvements = [], []
    for op, by_arch in measured.items():
        for arch, kernels in by_arch.items():
            allowed = budget.get(op, {}).get(arch, {})
            for name, figures in kernels.items():
                if name not in allowed:
                    failures.append(f"{op} {arch} {name}: not in the budget")
                    continue
                for key, value in figures.items():
                    line = f"{op} {arch} {name}: {key} {value}, budget {allowed[name][key]}"
                    if value > allowed[name][key]:
                        failures.append(line)
                    elif value < allowed[name][key]:
                        improvements.append(line)
            failures += [f"{op} {arch} {name}: in the budget, but no such kernel" for name in allowed.keys() - kernels.keys()]
    failures += [f"{op}: in the budget, but no such .cu file" for op in budget.keys() - measured.keys()]
    return failures, improvements


def load_budget() -> tuple[str, dict]:
    """(nvcc release, op -> architecture -> kernel -> figures) as checked in."""
    content = json.loads(BUDGET.read_text())
    return content["nvcc"], content["kernels"]


def write_budget(measured: dict) -> None:
    """One line a kernel, so that a change reads well in a diff."""
    text = json.dumps({"nvcc": release(), "kernels": measured}, indent=1, sort_keys=True)
    text = re.sub(r"\{\s*(\"registers\"[^}]*?)\s*\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text)
    BUDGET.write_text(text + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the measured figures as the budget")
    args = parser.parse_args(argv)
    if nvcc() is None:
        print("ptxas_budget: no nvcc on the path")
        return 1
    measured = {source.stem: measure(source) for source in sources()}
    if args.update:
        write_budget(measured)
        return 0
    budget_release, budget = load_budget()
    failures, improvements = compare(measured, budget)
    if budget_release != release():
        print(f"the budget is for nvcc {budget_release}, this is {release()}: shown, not compared")
        print("\n".join(failures + improvements))
        return 0
    for line in failures:
        print(f"over budget: {line}")
    for line in improvements:
        print(f"better than the budget (--update keeps it): {line}")
    print(f"{len(measured)} ops, {len(failures)} over budget, {len(improvements)} better")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

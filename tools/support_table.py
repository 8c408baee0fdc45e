"""Writes the table of kernels between the markers of README.md from kernels/kernels.inc. `--check` fails where it is stale."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r'^MLC_(CPU|CUDA|TRITON)\((\w+), (\w+), "([^"]+)"\)', re.MULTILINE)
MARKED = re.compile(r"(<!-- kernels -->\n).*?(<!-- /kernels -->)", re.DOTALL)
BACKENDS = {"CPU": "CPU (scalar, AVX2, AVX-512)", "CUDA": "CUDA", "TRITON": "Triton"}


def table() -> str:
    ops: dict[str, dict[str, list[str]]] = {}
    dtypes: dict[str, str] = {}
    for backend, op, pass_name, names in ROW.findall((ROOT / "kernels" / "kernels.inc").read_text()):
        ops.setdefault(op, {}).setdefault(backend, []).append(pass_name)
        dtypes[op] = names.replace(" ", ", ")
    lines = [f"| Op | {' | '.join(BACKENDS.values())} | dtypes |", "| --- " * (len(BACKENDS) + 2) + "|"]
    for op in sorted(ops):
        cells = [" + ".join(ops[op].get(b, [])).replace("fwd", "forward").replace("bwd", "backward") or "no" for b in BACKENDS]
        lines.append(f"| [`{op}`](kernels/{op}/README.md) | {' | '.join(cells)} | {dtypes[op]} |")
    lines += ["", "Second derivatives and forward-mode AD are no kernel's: where an op offers them, they are its reference's."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the table is stale")
    check = parser.parse_args(argv).check
    readme = ROOT / "README.md"
    text = readme.read_text()
    fresh = MARKED.sub(lambda m: f"{m[1]}\n{table()}\n\n{m[2]}", text)
    if check and fresh != text:
        print("README.md: the table of kernels is stale; run python tools/support_table.py", file=sys.stderr)
        return 1
    if not check:
        readme.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())

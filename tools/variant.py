"""A second build of mlcore beside the installed one, with other CMake options, and a Python that sees it.

    python tools/variant.py sanitize MLCORE_SANITIZE=ON   ->   build/sanitize/venv/bin/python

The variant's environment holds mlcore alone and reads every other package from the environment that runs this file. Both
builds are editable installs of the same tree, so a second call compiles what changed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(home: Path, *, site_packages: list[str]) -> Path:
    """Makes (once) a virtual environment without pip that also reads site_packages; returns its Python."""
    python = home / "bin" / "python"
    if not python.exists():
        venv.EnvBuilder(symlinks=True).create(home)
    (library,) = home.glob("lib/python*/site-packages")
    (library / "base.pth").write_text("".join(f"{path}\n" for path in site_packages))
    return python


def here() -> list[str]:
    """The site-packages folders that the running Python reads."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def build(name: str, defines: list[str]) -> Path:
    """Builds and installs the variant into build/<name>; returns its Python."""
    home = ROOT / "build" / name
    python = environment(home / "venv", site_packages=here())
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    options = [f"--config-settings=build-dir={home / 'cmake'}", *(f"--config-settings=cmake.define.{d}" for d in defines)]
    done = subprocess.run([*pip, "--no-build-isolation", *options, "-e", str(ROOT)], stdout=sys.stderr)
    if done.returncode != 0:
        raise SystemExit(f"variant {name}: the build failed")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a folder under build/")
    parser.add_argument("defines", nargs="*", metavar="OPTION=VALUE", help="CMake options")
    args = parser.parse_args()
    print(build(args.name, args.defines))


if __name__ == "__main__":
    main()

"""`pip install -e .`: both trees, python/mlcore and kernels, are read from where they are edited."""

import shutil
import sys

import pytest
import variant
from conftest import ok, run

pytestmark = pytest.mark.slow

# The native part is the wheel's, already built: this is about Python files.
STUB = """
cmake_minimum_required(VERSION 3.24)
project(mlcore LANGUAGES NONE)
install(FILES "{extension}" DESTINATION mlcore COMPONENT python)
"""


@pytest.fixture(scope="module")
def tree(source, installed, tmp_path_factory):
    home = tmp_path_factory.mktemp("editable")
    tree = home / "mlcore"
    shutil.copytree(source, tree)
    (extension,) = installed.glob("_C.*.so")
    (tree / "CMakeLists.txt").write_text(STUB.format(extension=extension))
    python = variant.environment(home / "venv", site_packages=variant.here())
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    ok(run([*pip, "-e", tree]))
    return tree, python


EDITED = {
    "python/mlcore/ops/rms_norm.py": "mlcore.ops.rms_norm",
    "kernels/rms_norm/rms_norm_ref.py": "mlcore.kernels.rms_norm.rms_norm_ref",
}


@pytest.mark.parametrize("path", EDITED)
def test_edits_are_seen(tree, path):
    root, python = tree
    module = EDITED[path]
    with open(root / path, "a") as file:
        file.write("\nEDITED = 42\n")
    code = (
        f"import importlib, sys; importlib.import_module({module!r}); m = sys.modules[{module!r}]; print(m.__file__, m.EDITED)"
    )
    assert ok(run([python, "-c", code])).split() == [str(root / path), "42"]

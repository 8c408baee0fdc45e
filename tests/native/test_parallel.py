"""One OpenMP runtime, torch's: it is shared whatever the import order, torch.set_num_threads governs it, processes that fork
after its use go on, and no result depends on the number of threads.
"""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mlcore import _C, ops

PREAMBLE = """
import importlib.util, sys

def load_extension_alone():
    # mlcore._C without mlcore/__init__.py, which imports torch first
    spec = importlib.util.spec_from_file_location("mlcore._C", EXTENSION)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mlcore._C"] = module
    spec.loader.exec_module(module)
    return module

def openmp_runtimes():
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "/" in line}
    return sorted(p for p in paths if any(name in p.rsplit("/", 1)[-1] for name in ("libgomp", "libomp", "libiomp")))
"""


def python(code: str, timeout: float = 120) -> str:
    """The output of a fresh interpreter that runs the code."""
    code = f"EXTENSION = {_C.__file__!r}\n" + PREAMBLE + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("order", ["torch first", "extension first", "mlcore"])
def test_one_runtime_that_torch_governs(order):
    imports = {
        "torch first": "import torch; C = load_extension_alone()",
        "extension first": "C = load_extension_alone(); import torch",
        "mlcore": "import mlcore, torch; from mlcore import _C as C",
    }[order]
    output = python(f"""
        {imports}
        torch.randn(300, 300) @ torch.randn(300, 300)
        print(len(openmp_runtimes()), openmp_runtimes())
        for n in (1, 3, 2):
            torch.set_num_threads(n)
            print(C.num_threads())
    """)
    runtimes, *threads = output.splitlines()
    assert runtimes.startswith("1 "), f"OpenMP runtimes in the process: {runtimes}"
    assert threads == ["1", "3", "2"]


def test_default_is_torchs():
    show = "import mlcore, torch; print(mlcore._C.num_threads(), torch.get_num_threads())"
    assert python(f"import os; os.environ['OMP_NUM_THREADS'] = '1'; {show}") == "1 1"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_set_num_threads_is_obeyed(threads):
    for n in (1, 2, 5, 1):
        threads(n)
        assert _C.num_threads() == n


def test_setting_reaches_new_threads(threads):
    """torch passes it to OpenMP when torch first works in a thread; mlcore must not run with another number before that."""
    threads(3)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_C.num_threads).result() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_thread_count(threads, dtype):
    torch.manual_seed(0)
    x, residual = torch.randn(517, 301).to(dtype), torch.randn(517, 301).to(dtype)
    weight = torch.randn(301)
    results = []
    for n in (1, 2, 3, 8):
        threads(n)
        leaves = [t.clone().requires_grad_() for t in (x, weight, residual)]
        y, s = ops.rms_norm(leaves[0], leaves[1], residual=leaves[2])
        (y.float().square().sum() + s.float().sum()).backward()
        results.append([y.detach(), s.detach()] + [t.grad for t in leaves])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# Forked children. libgomp's pool doesn't survive a fork: a child that opened a parallel region would wait for ever (as torch's
# own loops do, hence no torch arithmetic here).

WORK = """
    import torch, mlcore, zlib
    torch.set_num_threads(4)
    x = torch.randn(2000, 512)
    def work():
        return zlib.crc32(mlcore.ops.rms_norm(x).numpy())
    here = work()
"""


def test_data_loader_workers_run_serially_and_finish():
    output = python(
        WORK
        + """
    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, i):
            return mlcore._C.num_threads(), work()

    for threads, checksums in torch.utils.data.DataLoader(Items(), num_workers=2, batch_size=2, multiprocessing_context="fork"):
        assert threads.tolist() == [1, 1], threads
        assert checksums.tolist() == [here, here]
    print("done")
    """
    )
    assert output == "done"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use_does_not_hang():
    output = python(
        WORK
        + """
    import os
    child = os.fork()
    if child == 0:
        os._exit(0 if work() == here and work() == here and mlcore._C.num_threads() == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert work() == here  # the parent's pool is unharmed
    print("done", mlcore._C.num_threads())
    """
    )
    assert output == "done 4"

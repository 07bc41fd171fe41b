"""The library in a process: forks, Python threads, the floating-point state, memory, and what an import costs."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from problems import Problem, arrays, results
from rnnfast import functional, reference

# A layer and a call that keeps several threads busy; `digest()` is what it returns, bit by bit.
CALL = """
import os, sys, threading
import numpy as np
import rnnfast

rnnfast.set_num_threads(2)
layer = rnnfast.LSTM(64, 96, num_layers=2, seed=0).eval()
x = np.random.default_rng(0).normal(size=(40, 32, 64)).astype("float32")

def digest(_=None):
    return layer(x)[0].tobytes()

def train():
    y, state, tape = rnnfast.functional.forward("lstm", x, None, layer.parameters(), num_layers=2)
    dx, dstate, gradients = rnnfast.functional.backward(tape, y)
    return dx.tobytes() + gradients["weight_hh_l1"].tobytes()
"""


def python(script: str, *options: str, **environment: str) -> str:
    """What a script prints in a fresh interpreter; a hang or an error fails the test."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, *options, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=inherited | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- Forks and threads -----------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
def test_forked_child_computes_the_same() -> None:
    """After its parent used threads, which a child does not inherit; and the parent goes on with its own."""
    python(
        CALL
        + """
expected = digest(), train()
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if (digest(), train()) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (digest(), train()) == expected
"""
    )


@needs_fork
def test_fork_in_the_middle_of_a_call() -> None:
    """While another Python thread computes, so that the child's copy of the team is one at work."""
    python(
        CALL
        + """
expected, stop = digest(), threading.Event()

def work():
    while not stop.is_set():
        assert digest() == expected

worker = threading.Thread(target=work)
worker.start()
for _ in range(30):
    child = os.fork()
    if child == 0:
        os._exit(0 if digest() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
worker.join()
"""
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    """As a data loader's workers do: the parent computes, then its children, then the parent again."""
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    script = tmp_path / "script.py"
    script.write_text(
        CALL
        + f"""
import multiprocessing

if __name__ == "__main__":
    expected = digest()
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        assert pool.map(digest, range(4)) == [expected] * 4
        assert digest() == expected
        assert pool.map(digest, range(4)) == [expected] * 4
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_many_python_threads_at_once() -> None:
    """Inference on one layer and training on explicit tapes, from more threads than the machine has cores."""
    python(
        CALL
        + """
from concurrent.futures import ThreadPoolExecutor

expected = digest(), train()
with ThreadPoolExecutor(8) as pool:
    futures = [pool.submit(f) for _ in range(40) for f in (digest, train)]
    found = [future.result() for future in futures]
assert found == list(expected) * 40
"""
    )


def test_threads_come_and_go() -> None:
    """The number of threads changes between calls and while another thread calls."""
    python(
        CALL
        + """
expected, stop = digest(), threading.Event()

def change():
    while not stop.is_set():
        for n in (1, 4, 2, 3):
            rnnfast.set_num_threads(n)

changer = threading.Thread(target=change)
changer.start()
found = [digest() for _ in range(50)]
stop.set()
changer.join()
assert found == [expected] * 50
"""
    )


def test_python_ends_while_threads_compute() -> None:
    """Daemon threads that come back from the kernels when it is too late for Python."""
    python(
        CALL
        + """
import time

def work():
    while True:
        digest(), train()

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""
    )


def test_number_of_threads_from_the_environment() -> None:
    """RNNFAST_NUM_THREADS, then OMP_NUM_THREADS, then the cores that the process may use."""
    script = "import rnnfast; print(rnnfast.get_num_threads())"
    assert python(script, RNNFAST_NUM_THREADS="3", OMP_NUM_THREADS="5") == "3"
    assert python(script, OMP_NUM_THREADS="5") == "5"
    assert 1 <= int(python(script)) <= (os.cpu_count() or 1)


def test_a_call_keeps_to_its_threads() -> None:
    """`threads=` of one call, by the processor time that anybody but the caller has used; and no bit changes."""
    python(
        CALL
        + """
import time
from rnnfast import functional

def others(**threads):
    before = time.process_time() - time.thread_time()
    options = dict(num_layers=2, bidirectional=True, **threads)
    y, _, tape = functional.forward("lstm", x, None, both.parameters(), reset=starts, **options)
    dx, _, _ = functional.backward(tape, y, **threads)
    return time.process_time() - time.thread_time() - before, y.tobytes() + dx.tobytes()

both = rnnfast.LSTM(64, 64, num_layers=2, bidirectional=True, seed=0)
starts = np.arange(40 * 32).reshape(40, 32) % 7 == 0
_, bits = others()
for threads in (dict(), dict(threads=2)):  # on a busy machine a call may find itself alone
    assert any(used > 0.002 and found == bits for used, found in (others(**threads) for _ in range(100))), threads
time.sleep(0.3)  # the team goes to sleep
used, found = others(threads=1)
assert used < 0.002 and found == bits, used
try:
    others(threads=0)
except ValueError as error:
    assert "threads must be at least 1, got 0" in str(error)
else:
    raise AssertionError
"""
    )


def test_a_lent_team_may_be_smaller_than_asked_for() -> None:
    """Packs kept for two threads are none for the one that comes."""
    python(
        """
import ctypes
import numpy as np
import rnnfast
from rnnfast import _core, functional

rnnfast.set_num_threads(2)
rng = np.random.default_rng(0)
params = {name: rng.standard_normal((3200, 800), np.float32) / 30 for name in ("weight_ih_l0", "weight_hh_l0")}
x, packs = rng.standard_normal((25, 1, 800), np.float32), {}  # so much that a busy machine makes no difference

def bits(**options):
    return functional.forward("lstm", x, None, params, tape=False, **options)[0].tobytes()

alone = bits(threads=1)
assert bits(snapshot=packs) == alone
entered = []

def parallel(body, data, count, flags):
    entered.append(count)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)(data)

lender = [
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(parallel),
    ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0),
    ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1),
]
_core.lend_threads(*(ctypes.cast(function, ctypes.c_void_p).value for function in lender))
assert bits(snapshot=packs) == alone and entered == [2], entered
_core.lend_threads(0, 0, 0)
"""
    )


# ---- Floating-point state --------------------------------------------------------------------------------------------

# Where fegetenv of the C library puts the control bits (rounding, exception masks, flush to zero): offset, mask.
# The bits left out are the exceptions that have occurred, which every computation may set.
CONTROL = {"x86_64": (28, 0xFFC0), "aarch64": (0, 0xFFFFFFFF)}


def control_word() -> int:
    offset, mask = CONTROL[platform.machine()]
    environment = ctypes.create_string_buffer(64)
    assert ctypes.CDLL("libm.so.6").fegetenv(environment) == 0
    return int.from_bytes(environment.raw[offset : offset + 4], "little") & mask


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_denormal_numbers_survive_a_call(dtype: str, target: str) -> None:
    """NumPy's own arithmetic does not flush to zero afterwards."""
    a = arrays(Problem("lstm", "rows for many threads"), dtype)
    results(functional, "lstm", a)
    smallest = np.full(100, np.finfo(dtype).smallest_subnormal)
    assert (smallest * 4 / 2 == 2 * np.finfo(dtype).smallest_subnormal).all()


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in CONTROL, reason="unknown fenv_t")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_call_leaves_the_floating_point_state(dtype: str, target: str) -> None:
    before = control_word()
    results(functional, "gru", arrays(Problem("gru", "rows for many threads"), dtype))
    assert control_word() == before


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in CONTROL, reason="unknown fenv_t")
def test_import_leaves_the_floating_point_state() -> None:
    """Unlike a shared library that was linked with -ffast-math."""
    python(
        f"""
import ctypes, numpy

def control_word():
    environment = ctypes.create_string_buffer(64)
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    offset, mask = {CONTROL[platform.machine()]}
    return int.from_bytes(environment.raw[offset : offset + 4], "little") & mask

before = control_word()
import rnnfast
assert control_word() == before
"""
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", reference.CELLS)
def test_denormal_inputs(cell: str, dtype: str, target: str) -> None:
    """Flushed to zero or not: every result is a number, and one that they could not move."""
    problem = Problem(cell, "panel + 1", layers=2, state="given", scale=float(np.finfo(dtype).tiny) / 64)
    a = arrays(problem, dtype)
    assert (np.abs(a.x) < np.finfo(dtype).tiny).all()
    found = results(functional, cell, a)
    zero = results(functional, cell, a._replace(x=np.zeros_like(a.x)))
    for name in found:
        assert np.isfinite(found[name]).all()
        np.testing.assert_allclose(found[name], zero[name], rtol=0, atol=float(np.finfo(dtype).tiny) * 1e3)


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_calls_do_not_leak() -> None:
    """Peak memory and Python's own count stay where they are after the first calls; one tape is 2 MB."""
    python(
        CALL
        + """
import resource, tracemalloc

def all_calls():
    digest()
    train()
    layer.train()
    y, _ = layer(x)
    layer.backward(y)
    layer(x)
    layer.zero_gradients()
    layer.eval()
    stream = layer.stream(batch=32)
    stream(x[0])
    stream.copy()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for _ in range(10):
    all_calls()
before = peak()
for _ in range(100):
    all_calls()
assert peak() - before < 4e6, peak() - before

tracemalloc.start()
all_calls()
before, _ = tracemalloc.get_traced_memory()
for _ in range(20):
    all_calls()
after, _ = tracemalloc.get_traced_memory()
assert after - before < 20_000, after - before
"""
    )


# ---- Import ----------------------------------------------------------------------------------------------------------


def test_import_brings_numpy_alone() -> None:
    script = """
import numpy, sys
before = set(sys.modules)
import rnnfast
news = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(news - sys.stdlib_module_names - {"numpy", "rnnfast"}))
"""
    assert python(script, "-W", "error") == ""


def test_import_costs_at_most_60_ms_more_than_numpy() -> None:
    """In processor time, which other processes do not stretch; the best of five."""
    script = """
import numpy, time
start = time.process_time()
import rnnfast
print(time.process_time() - start)
"""
    assert min(float(python(script)) for _ in range(5)) <= 0.060

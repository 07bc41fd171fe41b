"""The C++ tests that need no build tree: compiled here with the system's compiler, and run.

The rest of tests/cpp (every target at full optimisation, sanitizers, aarch64) is CONTRIBUTING's, through CMake and
ctest.
"""

import concurrent.futures
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests" / "cpp"
WARNINGS = ["-std=c++20", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
# As CMakeLists.txt compiles csrc/kernels.cpp.
NO_RUNTIME = ["-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables"]
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
X86 = platform.machine() in ("x86_64", "AMD64")
COMPILERS = {name: path for name in ("g++", "clang++") if (path := shutil.which(name))}


@pytest.fixture(scope="module")
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or next(iter(COMPILERS.values()), None)
    if found is None:
        pytest.skip("no C++ compiler: c++, g++ and clang++ are not on the PATH")
    return found


def compiled(compiler: str, name: str, to: Path, *flags: str) -> Path:
    subprocess.run([compiler, *WARNINGS, *flags, str(SOURCES / f"{name}.cpp"), "-o", str(to)], check=True)
    return to


def passes(program: Path, *arguments: str) -> str:
    """Runs a test program to its closing line, 'N passed, 0 failed', with N > 0."""
    run = subprocess.run([str(program), *arguments], stdout=subprocess.PIPE, text=True)
    if "needs AVX" in run.stdout:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout
    assert re.search(r"^[1-9]\d* passed, 0 failed$", run.stdout, re.M), run.stdout
    return run.stdout


def test_backward_is_the_exact_derivative_of_forward(compiler: str, tmp_path: Path) -> None:
    passes(compiled(compiler, "dual", tmp_path / "dual", "-O1"))


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("dc = dc + (dho - dho * (tanh_c * tanh_c));", "dc = dc + (dho - dh * (tanh_c * tanh_c));"),
        ("dc = dc + dr;", "dc = dc - dr;"),
        ("dp[2] = da[O] * c;", "dp[2] = da[O] * c_prev;"),
        ("return dh * (h - h * h);", "return dh * (h - h);"),
    ],
)
def test_a_wrong_derivative_is_found(compiler: str, tmp_path: Path, line: str, wrong: str) -> None:
    equations = (ROOT / "csrc" / "cells.hpp").read_text()
    assert line in equations
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "cells.hpp").write_text(equations.replace(line, wrong))
    shutil.copytree(SOURCES, tmp_path / "tests" / "cpp")
    program = tmp_path / "dual"
    subprocess.run([compiler, "-std=c++20", "-w", tmp_path / "tests" / "cpp" / "dual.cpp", "-o", program], check=True)
    assert subprocess.run([program], stdout=subprocess.DEVNULL).returncode == 1


@pytest.mark.parametrize("flags", ["-march=x86-64-v4", "-march=x86-64-v3", "", "-DRNNFAST_SCALAR"])
def test_activation_errors_are_as_stated(compiler: str, tmp_path: Path, flags: str) -> None:
    if flags.startswith("-march") and not X86:
        pytest.skip(f"{flags} is for x86-64")
    program = compiled(compiler, "activations", tmp_path / "activations", "-O2", *KERNEL_FLAGS, *flags.split())
    passes(program, str(ROOT / "csrc" / "vec.hpp"))


@pytest.fixture(scope="module")
def objects(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The kernels for this machine's best instruction set and the scalar ones, dispatch.cpp, and the kernels' test."""
    csrc, folder = ROOT / "csrc", tmp_path_factory.mktemp("objects")
    best = ["-march=native"] if X86 else []
    table = ["-DRNNFAST_TARGET=baseline", '-DRNNFAST_TARGET_NAME="native"', *best]
    scalar = ["-DRNNFAST_TARGET=scalar", '-DRNNFAST_TARGET_NAME="scalar"', "-DRNNFAST_SCALAR"]
    jobs = {
        "kernels_baseline.o": [str(csrc / "kernels.cpp"), *NO_RUNTIME, *table],
        "kernels_scalar.o": [str(csrc / "kernels.cpp"), *NO_RUNTIME, *scalar],
        "dispatch.o": [str(csrc / "dispatch.cpp")],
        "test.o": [str(SOURCES / "kernels.cpp")],
    }

    def compile_object(name: str) -> Path:
        command = [compiler, *WARNINGS, "-O1", *KERNEL_FLAGS, "-c", *jobs[name], "-o", str(folder / name)]
        subprocess.run(command, check=True)
        return folder / name

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_object, jobs))


def test_integers_are_exact_and_workers_change_nothing(compiler: str, objects: list[Path], tmp_path: Path) -> None:
    program = tmp_path / "kernels"
    subprocess.run([compiler, *map(str, objects), "-pthread", "-o", str(program)], check=True)
    said = passes(program)
    assert "native: holds" in said
    assert "scalar: holds" in said


def test_a_kernels_object_defines_one_symbol_and_runs_nothing_at_load(objects: list[Path]) -> None:
    """What two targets' objects both defined, the linker would take from either: an illegal instruction, or slow code."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not on the PATH")
    for path in objects[:2]:
        listing = subprocess.run([nm, "--defined-only", str(path)], stdout=subprocess.PIPE, text=True, check=True)
        symbols = [line.split()[-2:] for line in listing.stdout.splitlines()]
        assert [name for kind, name in symbols if kind.isupper() or kind in "uvw"] == [path.stem]
        assert not [name for _, name in symbols if "GLOBAL__sub_I" in name]


def test_the_thread_team_keeps_its_laws(compiler: str, tmp_path: Path) -> None:
    passes(compiled(compiler, "threads", tmp_path / "threads", "-O1", str(ROOT / "csrc" / "threads.cpp"), "-pthread"))


@pytest.mark.parametrize("source", ["kernels", "dispatch", "threads"])
@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_sources_compile_without_a_warning(name: str, source: str, tmp_path: Path) -> None:
    if name not in COMPILERS:
        pytest.skip(f"{name} is not on the PATH")
    define = ["-DRNNFAST_TARGET=baseline", '-DRNNFAST_TARGET_NAME="baseline"']
    subprocess.run([name, *WARNINGS, *define, "-fsyntax-only", str(ROOT / "csrc" / f"{source}.cpp")], check=True)


def test_the_equations_compile_as_device_code(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    subprocess.run([nvcc, "-std=c++17", "-c", str(SOURCES / "device.cu"), "-o", str(tmp_path / "device.o")], check=True)

"""Who may know whom, checked by reading the sources: the rules in CONTRIBUTING.md, one test a rule."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "rnnfast"

# What each file may include of ours. A file that is not named here has no place yet: give it one.
INCLUDES = {
    "cells.hpp": set(),
    "vec.hpp": set(),
    "gemm.hpp": {"vec.hpp"},
    "sequence.hpp": {"cells.hpp", "gemm.hpp", "kernels.hpp"},
    "learning.hpp": {"kernels.hpp", "vec.hpp"},
    "kernels.cpp": {"learning.hpp", "sequence.hpp"},
    "kernels.hpp": set(),
    "dispatch.cpp": {"kernels.hpp"},
    "threads.hpp": set(),
    "threads.cpp": {"threads.hpp"},
    "bindings.cpp": {"kernels.hpp", "threads.hpp"},
}
DEVICE_INCLUDES = {"cells.hpp"}
PER_TARGET = (
    "cells.hpp",
    "vec.hpp",
    "gemm.hpp",
    "sequence.hpp",
    "learning.hpp",
    "kernels.cpp",
    "kernels.hpp",
)  # compiled once per CPU target
FRAMEWORKS = {"torch": "torch.py", "onnx": "onnx.py", "onnxruntime": "onnx.py", "jax": "jax.py", "flax": "jax.py", "sklearn": "estimators.py"}


def included(path: Path, opening: str = '"') -> list[str]:
    """The names in a file's #include "..." or #include <...> lines."""
    closing = {'"': '"', "<": ">"}[opening]
    return re.findall(rf"^\s*#\s*include\s*{opening}([^{closing}]+){closing}", path.read_text(), re.M)


def code(path: Path) -> str:
    """A C++ file without its comments and string literals."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', "", path.read_text(), flags=re.S)


def sources() -> list[Path]:
    return sorted(p for p in CSRC.iterdir() if p.suffix in (".hpp", ".cpp"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_a_file_includes_what_its_place_allows(path: Path) -> None:
    assert set(included(path)) <= INCLUDES[path.name]


def test_the_equations_include_nothing() -> None:
    assert "#include" not in code(CSRC / "cells.hpp")


def test_device_code_sees_the_equations_alone() -> None:
    assert {Path(name).name for name in included(ROOT / "tests" / "cpp" / "device.cu")} <= DEVICE_INCLUDES


@pytest.mark.parametrize("name", PER_TARGET)
def test_code_of_a_target_uses_nothing_of_the_standard_library(name: str) -> None:
    """An inline function that two targets share is one that the linker may take from the wrong one."""
    c_headers = {"stddef.h", "stdint.h", "string.h", "immintrin.h", "xmmintrin.h", "arm_neon.h"}
    assert set(included(CSRC / name, "<")) <= c_headers
    assert "std::" not in code(CSRC / name)


def test_python_is_known_to_the_bindings_alone() -> None:
    knowing = {path.name for path in sources() if re.search(r"pybind11|Python\.h|PyObject", code(path))}
    assert knowing <= {"bindings.cpp"}


def test_the_equations_stand_once_in_cpp_and_once_in_python() -> None:
    """Nothing but cells.hpp applies an activation, nothing but vec.hpp computes one; in Python nothing but the oracle
    does, and torch's operations where torch is to differentiate or transform them.
    """
    applying = {path.name for path in sources() if re.search(r"\b(sigmoid|tanh)\s*\(", code(path))}
    assert applying == {"cells.hpp", "vec.hpp"}
    assert re.search(r"\b(exp|expf|tanhf?)\s*\(", code(CSRC / "cells.hpp").replace("M::tanh", "")) is None
    in_python = {p.name for p in PACKAGE.glob("*.py") if re.search(r"\bnp\.tanh\b|\b_?sigmoid\(", p.read_text())}
    assert in_python <= {"reference.py", "conv.py", "torch.py"}  # conv.py's are a feed-forward layer's outputs; torch.py's are to be differentiated


def test_every_cell_has_its_line_in_each_list() -> None:
    """A cell is one struct; the C++ list, the border's enum and the oracle's table name the same eight."""
    import rnnfast.functional
    import rnnfast.reference

    kinds = re.search(r"enum CellKind \{([^}]*)\}", (CSRC / "kernels.hpp").read_text())
    assert kinds is not None
    names = tuple(name.strip().lower() for name in kinds[1].split(",") if "CELL_KINDS" not in name)
    assert names == tuple(rnnfast.functional.CELLS) == tuple(rnnfast.reference.CELLS)
    cases = re.findall(r"case (\w+):\s+return f\(Sequence<", (CSRC / "kernels.cpp").read_text())
    assert tuple(case.lower() for case in cases) == names


# ---- Python ----------------------------------------------------------------------------------------------------------


def imports(path: Path, *, at_import_only: bool) -> set[str]:
    """What a module imports: 'numpy', and of ours '.functional'. Imports for type checking do not count."""

    def walk(node: ast.AST) -> set[str]:
        found: set[str] = set()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if at_import_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.Import):
                found |= {alias.name for alias in child.names}
            elif isinstance(child, ast.ImportFrom):
                if child.level == 0:
                    found.add(child.module or "")
                elif child.module is None:
                    found |= {"." + alias.name for alias in child.names}
                else:
                    found.add("." + child.module)
            found |= walk(child)
        return found

    raw = walk(ast.parse(path.read_text()))
    return {name if name.startswith(".") else name.split(".")[0] for name in raw}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.name)
def test_a_framework_is_known_to_its_own_file_alone(path: Path) -> None:
    if path.name == "bench.py":
        return  # measures frameworks, and is built on none
    known = imports(path, at_import_only=False) & FRAMEWORKS.keys()
    assert {FRAMEWORKS[name] for name in known} <= {path.name}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.name)
def test_a_module_costs_numpy_and_the_standard_library(path: Path) -> None:
    """Everything else is imported where it is used; cli.py is not even to cost NumPy before it knows its arguments."""
    if path.name in FRAMEWORKS.values():
        pytest.skip("a framework's own file")
    others = {name for name in imports(path, at_import_only=True) if not name.startswith(".")}
    assert others - set(sys.stdlib_module_names) <= {"numpy"}


def test_the_oracle_stands_alone() -> None:
    ours = {name for name in imports(PACKAGE / "reference.py", at_import_only=False) if name.startswith(".")}
    assert ours == set()
    for path in PACKAGE.glob("*.py"):
        assert ".reference" not in imports(path, at_import_only=True) or path.name == "__init__.py", path.name


def test_layers_stand_on_functional_and_functional_on_the_core() -> None:
    def ours(name: str) -> set[str]:
        return {i for i in imports(PACKAGE / name, at_import_only=False) if i.startswith(".")}

    assert ours("functional.py") <= {"._core"}
    assert ours("layers.py") <= {"._core", ".functional", ".module"}
    assert ours("module.py") == set()
    knowing = {path.name for path in modules() if "._core" in ours(path.name)}
    assert knowing == {"functional.py", "layers.py", "dense.py", "losses.py", "optim.py", "torch.py", "bench.py"}


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {path.stem: {i[1:] for i in imports(path, at_import_only=True) if i.startswith(".")} for path in modules()}
    order = tuple(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(graph) <= set(order)


def test_importing_rnnfast_imports_numpy_alone() -> None:
    script = "import sys, numpy; before = set(sys.modules); import rnnfast; print(*set(sys.modules) - before)"
    said = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout
    tops = {name.split(".")[0] for name in said.split()}
    assert tops - set(sys.stdlib_module_names) <= {"rnnfast", "numpy"}


def test_the_core_links_to_the_runtime_alone() -> None:
    """No OpenMP and no BLAS: their thread pools are not ours to start."""
    import rnnfast._core

    ldd = shutil.which("ldd")
    if ldd is None:
        pytest.skip("ldd is not on the PATH")
    needed = subprocess.run([ldd, rnnfast._core.__file__], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert re.search(r"omp|blas|mkl", needed) is None


# ---- The README ------------------------------------------------------------------------------------------------------


def test_the_readme_shows_two_commands_and_an_example_that_runs() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M) == [
        "pip install . && rnnfast lm train\n",
        "pip install '.[test]' && pytest\n",
    ]
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    said = subprocess.run([sys.executable, "-c", example], stdout=subprocess.PIPE, text=True, check=True).stdout
    error = re.search(r"mean squared error ([\d.]+)", said)
    assert error is not None
    assert float(error[1]) < 0.1  # guessing leaves 1


# ---- A build tree, where there is one --------------------------------------------------------------------------------


def kernel_objects() -> list[Path]:
    return sorted((ROOT / "build").glob("**/kernels_*.dir/csrc/kernels.cpp.o"))


def test_each_kernels_object_of_a_build_tree_defines_one_symbol() -> None:
    """tests/test_cpp.py asks the same of an object that it compiles itself, where no tree is at hand."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not on the PATH")
    found = kernel_objects()
    if not found:
        pytest.skip("no build tree: cmake --preset dev makes one")
    for path in found:
        suffix = re.search(r"kernels_(\w+)\.dir", str(path))
        assert suffix is not None
        listing = subprocess.run([nm, "-g", "--defined-only", str(path)], stdout=subprocess.PIPE, text=True, check=True)
        assert [line.split()[-1] for line in listing.stdout.splitlines()] == [f"kernels_{suffix[1]}"], path

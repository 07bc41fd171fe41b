"""Real projects under rnnfast.torch.installed(), where they are installed: what they predict after training, against themselves on torch."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import rnnfast.torch as fast

PROJECTS = ("darts", "neuralforecast", "pytorch_forecasting", "gluonts", "sb3_contrib")


@pytest.fixture(scope="module")
def projects() -> ModuleType:
    """bench/projects.py, which says how each is trained."""
    path = Path(__file__).parent.parent / "bench" / "projects.py"
    spec = importlib.util.spec_from_file_location("projects", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["projects"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_predicts_the_same(projects: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip(name)
    calls: list[Any] = []
    stack = fast._core.stack_backward
    monkeypatch.setattr(fast._core, "stack_backward", lambda *args: calls.append(None) or stack(*args))
    monkeypatch.chdir(tmp_path)
    projects.hush()
    record = projects.compare(name, quick=True, rounds=1)
    assert record["difference"] < projects.TOLERANCE and record["torch against itself"] == 0
    assert len(calls) > 3  # it has trained on our kernels

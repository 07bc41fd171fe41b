"""Data-parallel training over gloo: two processes, each with half a batch, get the gradients of one with the whole."""

import csv
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rnnfast
import rnnfast.torch as fast
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rnnfast.dense import Embedding, Linear
from rnnfast.graph import Graph
from rnnfast.lm import train
from rnnfast.losses import mean_squared_error
from rnnfast.optim import SGD
from rnnfast.training import Run, fit, load_checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


class Tagger(nn.Module):
    """An LSTM between two of torch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.out = nn.Embedding(7, 4), fast.LSTM(4, 6, 2, bidirectional=True), nn.Linear(12, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.lstm(self.embedding(tokens))[0])
        return y


def problem() -> tuple[Tagger, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Tagger().double(), torch.randint(7, (5, 8)), torch.randint(3, (5, 8))


def gradients(model: nn.Module, tokens: torch.Tensor, tags: torch.Tensor) -> list[torch.Tensor]:
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tags.flatten()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def native(folder: Path, rows: slice = slice(None), replicas: Any = None) -> Graph:
    """A model of rnnfast's own, a few steps of stateful training on some rows of 4, with clipping, validation and a checkpoint of the state."""
    x = np.linspace(-2, 2, 5 * 4 * 3).reshape(5, 4, 3)
    layer = rnnfast.LSTM(3, 6, dtype="float64", learn_initial_state=True, seed=0)
    model = Graph({"h": (layer, "x"), "y": (Linear(6, 3, dtype="float64", seed=1), "h")})
    batches = [(x[:, rows] * k, np.sin(x)[:, rows]) for k in (1, 2, 3)]
    fit(
        model, batches, mean_squared_error, SGD(model, 0.5), epochs=2, clip=0.1, stateful=True, patience=9, every=2, validation=[(x, np.cos(x))],
        history=folder / "history.csv", checkpoint=folder, stop_after=5, progress=False, replicas=replicas,
    )  # fmt: skip
    return model


def history(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "history.csv").read_text().splitlines()))


TINY = {
    "layers": 2, "hidden": 7, "embedding": 4, "seq_length": 9, "batch_size": 2, "steps": 6, "every": 2, "dropout": 0.5,
    "text": str(Path(__file__).resolve()),
}  # fmt: skip  # a process draws an odd count of random numbers, of which two come from one


def worker(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank, timeout=timedelta(seconds=60))
    model, tokens, tags = problem()
    rows = slice(4 * rank, 4 * rank + 4)
    found = gradients(DistributedDataParallel(model), tokens[:, rows], tags[:, rows])
    torch.save(found, folder / f"{rank}.pt")
    static = DistributedDataParallel(problem()[0], static_graph=True, gradient_as_bucket_view=True)
    torch.save(gradients(static, tokens[:, rows], tags[:, rows]), folder / f"static{rank}.pt")
    accumulating = DistributedDataParallel(problem()[0])
    with accumulating.no_sync():
        gradients(accumulating, tokens[:, rows][:, :2], tags[:, rows][:, :2])
    found = gradients(accumulating, tokens[:, rows][:, 2:], tags[:, rows][:, 2:])
    torch.save([d / 2 for d in found], folder / f"accumulated{rank}.pt")
    sharded = problem()[0]
    mesh = init_device_mesh("cpu", (2,))
    for part in (sharded.lstm, sharded):
        fully_shard(part, mesh=mesh)
    found = gradients(sharded, tokens[:, rows], tags[:, rows])
    torch.save([d.full_tensor() for d in found], folder / f"sharded{rank}.pt")
    with fast.Replicas() as replicas:  # of the group that is there
        graph = native(folder / "native", slice(2 * rank, 2 * rank + 2), replicas)
        np.savez(folder / f"{rank}.npz", **graph.state_dict())
        drawn = replicas.joined(graph["h"].generator.random((1, 1)))
        assert drawn.shape == (1, 2) and drawn[0, 0] != drawn[0, 1]  # each has a random stream of its own
        for name, parts in {"whole": [6], "parts": [2, 1, 3]}.items():
            for i, steps in enumerate(parts):
                log = io.StringIO()
                train(folder / name, TINY if i == 0 else {}, resume=i > 0, stop_after=steps, sample_every=0, log=log, replicas=replicas)
                assert bool(log.getvalue()) == (rank == 0)
        sparse = Embedding(5, 2, sparse=True)
        with pytest.raises(ValueError, match="no sparse gradients"):
            fit(sparse, [], mean_squared_error, SGD(sparse, 1), steps=1, replicas=replicas)
        interrupted(rank, replicas)
    assert dist.is_initialized()  # it was not Replicas' own
    dist.destroy_process_group()
    os._exit(0)  # FSDP's caches keep the group's threads alive, and one that lives when Python ends may abort it


def interrupted(rank: int, replicas: fast.Replicas) -> None:
    """Ctrl-C in one process ends all after the same step."""
    layer = Linear(1, 1, seed=0)
    seen: list[Run] = []

    def interrupt(run: Run) -> None:
        seen.append(run)
        if run.step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)

    batches = [(np.ones((1, 2, 1), np.float32), np.zeros((1, 2, 1), np.float32))]
    with pytest.raises(KeyboardInterrupt):
        fit(
            layer, batches, mean_squared_error, SGD(layer, 0.1), steps=9, callbacks=[interrupt], checkpoint=Path(os.environ["RNNFAST_TEST_FOLDER"]),
            progress=False, replicas=replicas,
        )  # fmt: skip
    assert seen[-1].step == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written."""
    path = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RNNFAST_TEST_FOLDER", str(path / "interrupted"))
        mp.spawn(worker, (port, path), nprocs=2)
    return path


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("way", ["", "static", "accumulated", "sharded"], ids=["DDP", "DDP of a static graph", "DDP, in two parts", "FSDP"])
def test_two_processes_get_the_gradients_of_one(folder: Path, way: str) -> None:
    whole = gradients(*problem())
    for rank in range(2):
        parts = torch.load(folder / f"{way}{rank}.pt")
        assert len(parts) == len(whole)
        for part, one in zip(parts, whole):
            torch.testing.assert_close(part, one, rtol=1e-12, atol=1e-12)


def test_native_models_train_in_two_processes_as_in_one(folder: Path, tmp_path: Path) -> None:
    """Weights, history and checkpoint, the carried state of all rows among them."""
    one = native(tmp_path).state_dict()
    for rank in range(2):
        many = np.load(folder / f"{rank}.npz")
        assert set(many) == set(one)
        for name, array in one.items():
            np.testing.assert_allclose(many[name], array, rtol=1e-12, atol=1e-12)
    for a, b in zip(load_checkpoint(folder / "native")[:2], load_checkpoint(tmp_path)[:2]):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-12, atol=1e-12)
    for p, q in zip(history(folder / "native"), history(tmp_path), strict=True):
        assert all(p[name] == q[name] for name in ("step", "epoch", "loss", "validation", "gradient_norm"))


def test_many_processes_resume_bit_for_bit(folder: Path) -> None:
    """Under dropout: every process has random streams of its own, and finds them again."""
    whole, parts = (load_checkpoint(folder / name) for name in ("whole", "parts"))
    for a, b in zip(whole[:2], parts[:2]):
        assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}
    assert whole[2]["generators"] == parts[2]["generators"]
    assert sorted(p.name for p in (folder / "whole").iterdir()) == sorted(p.name for p in (folder / "parts").iterdir())


def test_the_example_goes_on_under_torchrun_where_one_process_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets where one process gets that trains to the end."""
    script = Path(__file__).parent.parent / "examples" / "torch_ddp_lm.py"
    words = ["--text", str(script), "--batch", "4", "--length", "20", "--hidden", "16", "--layers", "2"]
    saved = []
    for name, steps in (("one", 4), ("many", 2)):
        monkeypatch.setattr(sys, "argv", [str(script), *words, "--out", str(tmp_path / name), "--steps", str(steps)])
        runpy.run_path(str(script), run_name="__main__")
        saved.append(torch.load(tmp_path / name))
    run = tmp_path / "run.py"
    run.write_text(f"""import gc, runpy
from pathlib import Path
gc.disable()  # chance ends no thread
runpy.run_path({str(script)!r}, run_name="__main__")
threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
assert "pt_gloo_runloop" not in threads, threads  # one that lives when Python ends may take the process with it
""")  # where there is no /proc, nothing is seen
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(run), *words]
    done = subprocess.run([*command, "--out", str(tmp_path / "many"), "--steps", "4"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per byte") == 1 and done.stdout.startswith("step 4: ")
    whole, begun, resumed = saved[0], saved[1], torch.load(tmp_path / "many")
    assert (begun["step"], resumed["step"]) == (2, 4)
    for name, p in whole["model"].items():
        moved = float((p - begun["model"][name]).norm())
        assert 0 <= float((p - resumed["model"][name]).norm()) < 0.01 * moved  # Adam magnifies what rounding makes of a gradient near 0


def test_lm_train_under_torchrun(tmp_path: Path) -> None:
    """Against one process on the same text: the same history, one talker, one writer."""
    options = {**TINY, "dropout": 0.0}
    words = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rnnfast.cli", "lm", "train"]
    done = subprocess.run([*command, *words, "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 1 and "Traceback" not in done.stderr
    train(tmp_path / "one", options, log=io.StringIO())
    for p, q in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert p["step"] == q["step"]
        for name in ("loss", "validation"):
            assert abs(float(p[name]) - float(q[name])) < 1e-3

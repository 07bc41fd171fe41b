"""Data-parallel training over gloo: two processes, each with half a batch, get the gradients of one with the whole."""

import socket
from pathlib import Path

import pytest
import rnnfast.torch as fast
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
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


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    model, tokens, tags = problem()
    rows = slice(4 * rank, 4 * rank + 4)
    found = gradients(DistributedDataParallel(model), tokens[:, rows], tags[:, rows])
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_processes_get_the_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    whole = gradients(*problem())
    for rank in range(2):
        parts = torch.load(tmp_path / f"{rank}.pt")
        assert len(parts) == len(whole)
        for part, one in zip(parts, whole):
            torch.testing.assert_close(part, one, rtol=1e-12, atol=1e-12)

"""A character model in torch, trained on any number of processes and machines with DistributedDataParallel, on rnnfast's kernels.

    python examples/torch_ddp_lm.py --text FILE                                    one process
    torchrun --nproc-per-node 2 examples/torch_ddp_lm.py --text FILE               two on this machine
    torchrun --nnodes 4 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/torch_ddp_lm.py --text FILE

Every process trains on its own rows of one batch; DDP averages the gradients over gloo. The checkpoint (--out, written by process 0 alone, read by
all) holds model, optimizer and step: the same command again goes on from it. The global batch must be a multiple of the processes.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

import rnnfast.torch
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # DDP would import it later, when it keeps the group's threads alive: they may abort Python's end
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Model(nn.Module):
    """Bytes (B, T) -> logits of the next ones (B, T, 256), and the state."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, hidden)
        self.lstm = rnnfast.torch.LSTM(hidden, hidden, layers, batch_first=True)
        self.out = nn.Linear(hidden, 256)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.lstm(self.embedding(x))[0])
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("ddp_lm.pt"))
    for name, value in {"steps": 500, "batch": 32, "length": 100, "hidden": 128, "layers": 1, "every": 50}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if args.batch % world:
        parser.error(f"--batch {args.batch} must be a multiple of the {world} processes")
    if world > 1:
        dist.init_process_group("gloo")
    train(args, world, rank)
    if world > 1:
        gc.collect()  # DDP goes in circles, and would keep the group's threads alive as well
        dist.destroy_process_group()


def train(args: argparse.Namespace, world: int, rank: int) -> None:
    """A function of its own, so that at its end nothing but circles holds the group."""
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()
    model = Model(args.hidden, args.layers)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    first = 0
    if args.out.exists():
        saved = torch.load(args.out)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    replica = DistributedDataParallel(model) if world > 1 else model
    for step in range(first, args.steps):
        starts = torch.randint(len(text) - args.length, (args.batch,), generator=torch.Generator().manual_seed(step))  # the same in every process
        rows = text[starts[rank::world, None] + torch.arange(args.length + 1)]
        loss = nn.functional.cross_entropy(replica(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            mean = loss.detach().clone()
            if world > 1:
                dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step + 1}: {mean.item() / world / 0.693147:.3f} bits per byte", flush=True)
                part = args.out.with_suffix(".part")
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, part)
                part.replace(args.out)


if __name__ == "__main__":
    main()

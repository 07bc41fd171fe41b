"""Real projects, unchanged, on torch and on rnnfast under installed(): the same results, and the ratio of the training times.

    python bench/projects.py [--only darts ...] [--threads 1] [--rounds 2]

Each project is trained from one seed with its own code on small data that it ships or that is made from the seed, then predicts. One JSON line a
project: the largest difference of its predictions relative to their size (the command fails above the tolerance), the best training time of either
side over interleaved rounds, and torch / ours (above 1: ours is faster). What is not installed is skipped. Installing them needs a torch that is
pinned first, or pip brings another one:

    pip install torch==2.13.0 && echo torch==2.13.0 > pins && pip install -c pins darts neuralforecast pytorch-forecasting 'gluonts[torch]' sb3-contrib
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import rnnfast.torch
import torch

TOLERANCE = 2e-3  # float32 through some dozens of steps of Adam
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}

Result = tuple[np.ndarray[Any, Any], float]  # predictions, seconds of training


@contextlib.contextmanager
def clock() -> Iterator[list[float]]:
    """A list that holds the block's seconds after it."""
    took: list[float] = []
    start = time.perf_counter()
    yield took
    took.append(time.perf_counter() - start)


def series(rows: int, length: int) -> np.ndarray[Any, Any]:
    """(rows, length): seasons of 12 and 7 steps, a trend and noise."""
    t, rng = np.arange(length), np.random.default_rng(0)
    season = np.sin(2 * np.pi * t / 12 + rng.uniform(0, 6, (rows, 1))) + 0.5 * np.sin(2 * np.pi * t / 7)
    return (5 + season + 0.01 * t + 0.1 * rng.standard_normal((rows, length))).astype(np.float32)


def darts(quick: bool) -> Result:
    """RNNModel, an LSTM of float32 on 8 series."""
    from darts import TimeSeries
    from darts.models import RNNModel

    data = [TimeSeries.from_values(row) for row in series(8, 120 if quick else 300)]
    model = RNNModel(
        24, model="LSTM", hidden_dim=16 if quick else 64, n_rnn_layers=2, dropout=0.1, training_length=48, batch_size=32, random_state=0,
        n_epochs=1 if quick else 3, pl_trainer_kwargs=QUIET,
    )  # fmt: skip
    with clock() as took:
        model.fit(data)
    return np.stack([p.values() for p in model.predict(12, series=data)]), took[0]


def neuralforecast(quick: bool) -> Result:
    """LSTM and GRU on the package's own AirPassengers."""
    from neuralforecast import NeuralForecast
    from neuralforecast.models import GRU, LSTM
    from neuralforecast.utils import AirPassengersDF

    steps, hidden = (5, 16) if quick else (60, 64)
    common = dict(h=12, input_size=48, encoder_hidden_size=hidden, max_steps=steps, random_seed=1, recurrent=True, **QUIET)
    forecast = NeuralForecast(models=[LSTM(**common), GRU(**common)], freq="ME")
    with clock() as took:
        forecast.fit(AirPassengersDF)
    return forecast.predict()[["LSTM", "GRU"]].to_numpy(), took[0]


def pytorch_forecasting(quick: bool) -> Result:
    """RecurrentNetwork, whose LSTM is the package's own subclass of torch's."""
    import lightning.pytorch as lightning
    import pandas as pd
    from pytorch_forecasting import RecurrentNetwork, TimeSeriesDataSet

    rows = series(8, 80 if quick else 200)
    frame = pd.DataFrame(
        {"value": rows.reshape(-1), "t": np.tile(np.arange(rows.shape[1]), len(rows)), "row": np.repeat(np.arange(len(rows)), rows.shape[1]).astype(str)}
    )
    data = TimeSeriesDataSet(
        frame, time_idx="t", target="value", group_ids=["row"], max_encoder_length=36, max_prediction_length=12,
        time_varying_unknown_reals=["value"],
    )  # fmt: skip
    torch.manual_seed(0)
    lightning.seed_everything(0, verbose=False)
    model = RecurrentNetwork.from_dataset(data, cell_type="LSTM", hidden_size=16 if quick else 64, rnn_layers=2, dropout=0.1, learning_rate=0.01)
    trainer = lightning.Trainer(max_epochs=1, limit_train_batches=5 if quick else 30, gradient_clip_val=0.1, **QUIET)
    loader = data.to_dataloader(train=True, batch_size=32)
    with clock() as took:
        trainer.fit(model, loader)
    model.eval()
    x, _ = next(iter(data.to_dataloader(train=False, batch_size=32)))
    with torch.no_grad():
        return model(x).prediction.numpy(), took[0]


def gluonts(quick: bool) -> Result:
    """DeepAR; its predictions are samples, drawn from one seed."""
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import DeepAREstimator

    rows = series(8, 120 if quick else 300)
    data = ListDataset([{"start": "2020-01-01", "target": row} for row in rows], freq="D")
    np.random.seed(0)  # noqa: NPY002  (the package's own source of windows)
    torch.manual_seed(0)
    estimator = DeepAREstimator(
        freq="D", prediction_length=12, context_length=36, num_layers=2, hidden_size=16 if quick else 64, batch_size=32,
        num_batches_per_epoch=5 if quick else 30, trainer_kwargs={"max_epochs": 1, **QUIET, "enable_checkpointing": True},
    )  # fmt: skip
    with clock() as took:
        predictor = estimator.train(data)
    torch.manual_seed(1)
    return np.stack([f.mean for f in predictor.predict(data, num_samples=20)]), took[0]


def sb3_contrib(quick: bool) -> Result:
    """RecurrentPPO: rollouts at T = 1 and training with resets, on CartPole; what is compared are the policy's weights."""
    from sb3_contrib import RecurrentPPO

    policy = {"lstm_hidden_size": 16 if quick else 64}
    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=64, batch_size=64, n_epochs=2, seed=0, device="cpu", policy_kwargs=policy)
    with clock() as took:
        model.learn(128 if quick else 1024)
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()]).numpy(), took[0]


PROJECTS: dict[str, Callable[[bool], Result]] = {
    "darts": darts, "neuralforecast": neuralforecast, "pytorch_forecasting": pytorch_forecasting, "gluonts": gluonts, "sb3_contrib": sb3_contrib,
}  # fmt: skip


def compare(name: str, quick: bool = False, rounds: int = 2) -> dict[str, Any]:
    """The record of one project: how far its predictions differ, and both training times."""
    found: dict[str, list[Result]] = {"torch": [], "rnnfast": []}
    for _ in range(rounds):
        found["torch"].append(PROJECTS[name](quick))
        with rnnfast.torch.installed():
            found["rnnfast"].append(PROJECTS[name](quick))
    a, b = (found[side][0][0] for side in found)
    again = found["torch"][-1][0]
    size = float(np.abs(a).max())
    seconds = {side: min(took for _, took in results) for side, results in found.items()}
    return {
        "name": name, "version": importlib.metadata.version(name.replace("_", "-")), "threads": torch.get_num_threads(),
        "difference": float(np.abs(a - b).max()) / size, "torch against itself": float(np.abs(a - again).max()) / size,
        **{f"{side} s": round(s, 3) for side, s in seconds.items()}, "ratio": round(seconds["torch"] / seconds["rnnfast"], 2),
    }  # fmt: skip


def hush() -> None:
    """Frameworks talk; the JSON is for reading."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.WARNING)  # frameworks undo the levels of their loggers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PROJECTS, default=list(PROJECTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hush()
    os.chdir(tempfile.mkdtemp())  # some write logs where they stand
    failed = False
    for name in args.only:
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed", file=sys.stderr)
            continue
        record = compare(name, args.quick, args.rounds)
        print(json.dumps(record), flush=True)
        failed = failed or record["difference"] > TOLERANCE
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

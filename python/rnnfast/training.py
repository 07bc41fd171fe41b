"""The training loop, its history, and checkpoints that survive whatever stops it.

run         one training, from its first step to its last, in one process after another or in many at once
replicas    processes that train one model together, each on its own rows of every batch
row         what is noted now and then: step, epoch, loss, validation, learning rate, gradient norm, speed, seconds
checkpoint  DIR/last: model.safetensors (weights under torch's key names), training.safetensors (the optimizer's
            moments, the carried state), config.json (counters, random streams, checksums, the user's config);
            DIR/previous is the one before. A new one is written beside, synced, and moved into place.
It does not know what the model computes or what the loss means.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .data import Batch, InputError
from .module import Array, Module
from .optim import Optimizer, clip_global_norm

Loss = Callable[[Any, Any], tuple[float, Any]]
_COLUMNS = ("step", "epoch", "loss", "validation", "learning_rate", "gradient_norm", "per_second", "seconds")


class CheckpointError(InputError):
    """A checkpoint is missing, truncated, corrupt or of another model; the message says which file.

    >>> load_checkpoint("/nowhere")
    Traceback (most recent call last):
    ...
    rnnfast.training.CheckpointError: /nowhere holds no checkpoint
    """


@dataclass
class Run:
    """A training as callbacks see it, after every step. Setting `stop` ends it after the step.

    step counts updates, batch those of this epoch; loss, norm and rate are the last update's; rows is the history;
    seconds counts time in all processes of the run; state is the carried state of a stateful run.

    >>> from rnnfast.dense import Linear
    >>> layer = Linear(1, 1, seed=0)
    >>> Run(layer, Optimizer(layer, 0.1)).step
    0
    """

    model: Module
    optimizer: Optimizer
    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss: float = math.nan
    gradient_norm: float = math.nan
    learning_rate: float = math.nan
    seconds: float = 0.0
    stop: bool = False
    state: Any = None
    rows: list[dict[str, float]] = field(default_factory=list)
    best: float = math.inf
    stale: int = 0  # validations since the best one
    best_weights: dict[str, Array] | None = None
    _sum: float = 0.0  # of losses since the last row
    _count: int = 0


class Replicas(Protocol):
    """What `fit` asks of processes that train one model together; `rnnfast.torch.Replicas` is it over torch.distributed."""

    rank: int
    size: int

    def total(self, array: Array) -> None:
        """Puts the sum over all processes in the array's place."""

    def joined(self, array: Array) -> Array:
        """All processes' arrays side by side along axis 1, in order of rank; the same in each."""


# ---- files


def write_csv(path: str | os.PathLike[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file, written beside and moved into place, so that it is never half of one; its folder is made.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_csv(Path(folder, "a.csv"), [("day", "sold"), (1, 3)])
    ...     Path(folder, "a.csv").read_text().split()
    ['day,sold', '1,3']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".writing")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    os.replace(beside, target)


def _write(path: Path, data: bytes) -> dict[str, int]:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    folder: str | os.PathLike[str],
    weights: Mapping[str, Array],
    training: Mapping[str, Array],
    config: Mapping[str, Any],
) -> Path:
    """Writes FOLDER/last so that at every moment it or FOLDER/previous is complete; returns its path.

    config must be what JSON can hold. Raises OSError where the folder cannot be written; what was there stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_checkpoint(folder, {"weight": np.ones(2)}, {}, {"hidden": 3})
    ...     weights, training, config = load_checkpoint(folder)
    >>> weights["weight"].tolist(), config["hidden"]
    ([1.0, 1.0], 3)
    """
    from safetensors.numpy import save

    root = Path(folder)
    new, last, previous = root / ".writing", root / "last", root / "previous"
    root.mkdir(parents=True, exist_ok=True)
    if new.exists():
        shutil.rmtree(new)
    new.mkdir()
    files = {}
    for name, arrays in (("model.safetensors", weights), ("training.safetensors", training)):
        files[name] = _write(new / name, save({key: np.asarray(value, order="C") for key, value in arrays.items()}))
    _write(new / "config.json", (json.dumps({**config, "files": files}, indent=1, allow_nan=False) + "\n").encode())
    _sync(new)
    if last.exists():
        if previous.exists():
            shutil.rmtree(previous)
        os.replace(last, previous)
    os.replace(new, last)
    _sync(root)
    return last


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    """(weights, training, config) of FOLDER/last, or of FOLDER/previous where a save was cut off in between.

    Every file is compared with its length and checksum. Raises CheckpointError (an InputError) with the file's name.

    >>> load_checkpoint("/nowhere")
    Traceback (most recent call last):
    ...
    rnnfast.training.CheckpointError: /nowhere holds no checkpoint
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    root = Path(folder)
    at = next((path for path in (root / "last", root / "previous") if path.is_dir()), None)
    if at is None:
        raise CheckpointError(f"{root} holds no checkpoint")
    hint = f"; {root / 'previous'} is the one before it" if at.name == "last" and (root / "previous").is_dir() else ""
    try:
        config = json.loads((at / "config.json").read_bytes())
        files = config["files"]
        if not isinstance(config, dict) or set(files) != {"model.safetensors", "training.safetensors"}:
            raise ValueError
    except OSError as error:
        raise CheckpointError(f"{at / 'config.json'}: {error.strerror or error}{hint}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{at / 'config.json'} is corrupt{hint}") from error
    arrays = []
    for name in ("model.safetensors", "training.safetensors"):
        try:
            data = (at / name).read_bytes()
            if len(data) != files[name]["bytes"]:
                raise CheckpointError(f"{at / name} is truncated or corrupt: {len(data)} bytes{hint}")
            if zlib.crc32(data) != files[name]["crc32"]:
                raise CheckpointError(f"{at / name} is corrupt: its checksum differs{hint}")
            arrays.append(load(data))
        except OSError as error:
            raise CheckpointError(f"{at / name}: {error.strerror or error}{hint}") from error
        except (SafetensorError, KeyError, TypeError) as error:
            raise CheckpointError(f"{at / name} is corrupt{hint}") from error
    return arrays[0], arrays[1], config


def _pack(value: Any, arrays: dict[str, Array], name: str) -> Any:
    """A state of any structure as JSON that names its arrays."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: _pack(part, arrays, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, tuple):
        return [_pack(part, arrays, f"{name}.{i}") for i, part in enumerate(value)]
    arrays[name] = np.asarray(value)
    return name


def _unpack(plan: Any, arrays: Mapping[str, Array]) -> Any:
    if isinstance(plan, dict):
        return {key: _unpack(part, arrays) for key, part in plan.items()}
    if isinstance(plan, list):
        return tuple(_unpack(part, arrays) for part in plan)
    return None if plan is None else arrays[plan]


def _each(change: Callable[[Array], Array], state: Any) -> Any:
    """A state of any structure with every array changed."""
    if isinstance(state, Mapping):
        return {key: _each(change, part) for key, part in state.items()}
    if isinstance(state, tuple):
        return tuple(_each(change, part) for part in state)
    return None if state is None else change(np.asarray(state))


def _streams(model: Module) -> list[Any]:
    """The bit generators of a model's random streams."""
    return [leaf.generator.bit_generator for leaf in model.leaves() if leaf.generator is not None]


def _save(run: Run, folder: str | os.PathLike[str], config: Mapping[str, Any], replicas: Replicas | None) -> None:
    """The checkpoint is of the whole batch, as one process would have written it."""
    state = run.state if replicas is None else _each(replicas.joined, run.state)
    if replicas is not None and replicas.rank > 0:
        return
    arrays = {f"optimizer.{name}": array for name, array in run.optimizer.state_dict().items()}
    arrays.update({f"best.{name}": array for name, array in (run.best_weights or {}).items()})
    counters = {name: getattr(run, name) for name in ("step", "epoch", "batch", "seconds", "stale")}
    counters |= {"sum": run._sum, "count": run._count, "state": _pack(state, arrays, "state")}
    counters["best"] = run.best if math.isfinite(run.best) else None  # JSON has no infinity and no NaN
    counters["rows"] = [{name: v if math.isfinite(v) else None for name, v in row.items()} for row in run.rows]
    content = {"config": config, "run": counters, "generators": [stream.state for stream in _streams(run.model)]}
    save_checkpoint(folder, run.model.state_dict(), arrays, content)


def _restore(run: Run, folder: str | os.PathLike[str], replicas: Replicas | None) -> None:
    weights, arrays, config = load_checkpoint(folder)

    def put(weights: Mapping[str, Array], moments: Mapping[str, Array], states: Sequence[Any]) -> None:
        run.model.load_state_dict(weights)
        run.optimizer.load_state_dict(moments)
        for stream, state in zip(_streams(run.model), states, strict=True):
            stream.state = state

    before = run.model.state_dict(), run.optimizer.state_dict(), [stream.state for stream in _streams(run.model)]
    try:
        start = "optimizer."
        put(weights, {k[len(start) :]: v for k, v in arrays.items() if k.startswith(start)}, config["generators"])
        counters = dict(config["run"])
        run._sum, run._count = counters.pop("sum"), counters.pop("count")
        run.state = _unpack(counters.pop("state"), arrays)
        if replicas is not None:
            rank, size = replicas.rank, replicas.size
            run.state = _each(lambda part: np.ascontiguousarray(np.split(part, size, axis=1)[rank]), run.state)
        best, rows = counters.pop("best"), counters.pop("rows")
        run.best = math.inf if best is None else best
        run.rows = [{name: math.nan if v is None else v for name, v in row.items()} for row in rows]
        for name, value in counters.items():
            setattr(run, name, value)
        start = "best."
        run.best_weights = {k[len(start) :]: v for k, v in arrays.items() if k.startswith(start)} or None
    except (KeyError, ValueError, TypeError) as error:
        put(*before)
        raise CheckpointError(f"the checkpoint in {folder} is of another model: {error}") from error


def _average(replicas: Replicas, model: Module) -> None:
    """Gradients of the mean over the whole batch, from those of the means over equal parts."""
    for leaf in model.leaves():
        if leaf.flat.size:
            replicas.total(leaf.flat_gradient)
            leaf.flat_gradient[...] /= replicas.size


def _apart(replicas: Replicas, model: Module) -> None:
    """Random streams of every process's own, from those of the first: a jump commutes with whatever was drawn."""
    for stream in _streams(model) if replicas.rank > 0 else ():
        half = stream.state.get("has_uint32")  # of the latest number drawn one half waits, which a jump forgets
        stream.state = stream.jumped(replicas.rank).state
        if half:
            upper = int(stream.advance(-1).random_raw()) >> 32
            stream.state = stream.state | {"has_uint32": 1, "uinteger": upper}


# ---- the loop


@contextmanager
def _interrupt_later(wanted: bool) -> Iterator[list[int]]:
    """Within it the first Ctrl-C only fills the list, so that a step is finished; the second one interrupts at once."""
    caught: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handler(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _batch(item: Any) -> Batch:
    return item if isinstance(item, Batch) else Batch(*item)


def _call(model: Any, batch: Batch, state: Any) -> tuple[Any, Any]:
    if model.recurrent:
        y, state = model(batch.x, state, batch.lengths, batch.reset)
        return y, state
    return model(batch.x), None


def evaluate(model: Any, data: Iterable[Any], loss: Loss, *, stateful: bool = False) -> float:
    """The mean loss of a model over batches, in eval mode, each weighing as many as its rows; NaN for no batch.

    >>> from rnnfast.dense import Linear
    >>> from rnnfast.losses import mean_squared_error
    >>> layer = Linear(1, 1, seed=0)
    >>> layer.flat[:] = 1, 0
    >>> evaluate(layer, [(np.ones((1, 2, 1), np.float32), np.zeros((1, 2, 1)))], mean_squared_error)
    1.0
    """
    was_training, total, count, state = model.training, 0.0, 0, None
    model.eval()
    try:
        for item in data:
            batch = _batch(item)
            y, state = _call(model, batch, state if stateful else None)
            rows = np.shape(batch.x)[1] if np.ndim(batch.x) > 1 else 1
            total, count = total + rows * loss(y, batch.target)[0], count + rows
    finally:
        model.train(was_training)
    return total / count if count else math.nan


def _batches(data: Any, epoch: int, start: int) -> Iterator[Any]:
    """The batches of an epoch from number `start` on."""
    source = data(epoch) if callable(data) else data
    return iter(source.batches(start)) if hasattr(source, "batches") else islice(iter(source), start, None)


def fit(
    model: Any,
    data: Any,
    loss: Loss,
    optimizer: Optimizer,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    validation: Iterable[Any] | Callable[[], float] | None = None,
    every: int | None = None,
    clip: float | None = None,
    stateful: bool = False,
    patience: int | None = None,
    callbacks: Sequence[Callable[[Run], None]] = (),
    history: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    config: Mapping[str, Any] | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    progress: bool = True,
    replicas: Replicas | None = None,
) -> Run:
    """Trains a model: forward, loss, backward, clip, update, for `epochs` epochs or `steps` steps.

    data        batches (x, target) or Batch(x, target, lengths, reset), gone through once an epoch; a function of
                the epoch's number that gives them (so that a shuffle can depend on it); or a Stream
    loss        loss(y, target) -> (value, dy): losses.py, or any divergence of the whole sequence
    validation  batches, or a function () -> number; lower is better
    every       steps from one row of the history (with validation) to the next; None: a row an epoch
    clip        the largest global norm of the gradients; None: none, and no norm is taken
    stateful    truncated BPTT: a batch starts with the state that the batch before it ended with; each epoch afresh
    patience    early stopping after so many validations without a new best; the best weights are put back
    callbacks   functions of the Run, called after every step
    history     a CSV file of the rows
    checkpoint  a folder: see save_checkpoint. Written every `checkpoint_every` steps, with every row if None, at
                the end, and after Ctrl-C, which then raises KeyboardInterrupt; `config` is kept in it
    resume      continue from the checkpoint bit for bit as if never stopped; everything else must be given as before
    stop_after  stop, with a checkpoint, once this call has done so many steps
    progress    a tqdm bar
    replicas    many processes: each is given its own rows of every batch, all as many, and the same of all else. Gradients and losses are
                averaged, so that the weights stay alike; the first process validates, writes and shows the bar

    Returns the Run. Raises ValueError for arguments that contradict each other, FloatingPointError for a loss, and under
    clip for a gradient, that is not finite (before it touches the weights), CheckpointError for one that cannot be resumed.

    >>> from rnnfast.dense import Linear
    >>> from rnnfast.losses import mean_squared_error
    >>> from rnnfast.optim import SGD
    >>> x = np.linspace(-1, 1, 20, dtype=np.float32).reshape(10, 2, 1)
    >>> layer = Linear(1, 1, seed=0)
    >>> run = fit(layer, [(x, 3 * x + 1)], mean_squared_error, SGD(layer, 0.5), epochs=50, progress=False)
    >>> [round(float(p), 2) for p in layer.flat]
    [3.0, 1.0]
    """
    if (epochs is None) == (steps is None):
        raise ValueError("fit: give either epochs or steps")
    counts = {"epochs": epochs, "steps": steps, "every": every, "patience": patience, "stop_after": stop_after}
    for name, count in (counts | {"checkpoint_every": checkpoint_every}).items():
        if count is not None and count < 1:
            raise ValueError(f"fit: {name} must be at least 1, got {count}")
    if clip is not None and not clip > 0:
        raise ValueError(f"fit: clip must be above 0, got {clip}")
    if patience is not None and validation is None:
        raise ValueError("fit: patience needs a validation")
    if resume and checkpoint is None:
        raise ValueError("fit: resume needs a checkpoint")
    if id(optimizer.model) != id(model):
        raise ValueError("fit: the optimizer belongs to another model")
    if replicas is not None and any(leaf.rows() is not None for leaf in model.leaves()):
        raise ValueError("fit: replicas share no sparse gradients: every process meets other rows; take sparse=False")

    run = Run(model, optimizer)
    if resume and checkpoint is not None:
        _restore(run, checkpoint, replicas)
    elif checkpoint is not None:
        _save(run, checkpoint, config or {}, replicas)  # an unwritable folder is told now, not after the first hour
    if replicas is not None:
        _apart(replicas, model)
        if replicas.rank > 0:
            history, progress = None, False
    if history is not None:
        _write_rows(history, run.rows)
    run.stop = patience is not None and run.stale >= patience
    last_step = math.inf if steps is None else steps
    stop_at = math.inf if stop_after is None else run.step + stop_after
    saved = run.step
    model.train()
    bar = None
    if progress:
        from tqdm import tqdm  # type: ignore[import-untyped]

        bar = tqdm(total=steps, initial=run.step, unit="step")

    def over() -> bool:
        return run.stop or run.step >= last_step or (epochs is not None and run.epoch >= epochs)

    mark, seen, processes = run.seconds, 0, 1 if replicas is None else replicas.size  # seen: since the last row of this call
    stopping = False  # agreed on by all processes
    quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what is not finite is told by its own error
    with _interrupt_later(checkpoint is not None) as interrupted, quiet:
        try:
            while not over() and run.step < stop_at and not stopping:
                before = run.step
                batches = _batches(data, run.epoch, run.batch)
                item = next(batches, None)
                while item is not None:
                    started = time.perf_counter()
                    batch = _batch(item)
                    optimizer.zero_gradients()
                    y, state = _call(model, batch, run.state)
                    run.loss, dy = loss(y, batch.target)
                    stopping = bool(interrupted)
                    if replicas is not None:
                        sums = np.array([run.loss, stopping], np.float64)
                        replicas.total(sums)
                        run.loss, stopping = float(sums[0] / processes), bool(sums[1])
                    if not math.isfinite(run.loss):
                        raise FloatingPointError(f"the loss is {run.loss} at step {run.step}: try a smaller learning rate")
                    model.backward(dy)
                    if replicas is not None:
                        _average(replicas, model)
                    if clip is not None:
                        run.gradient_norm = clip_global_norm(model, clip)
                        if not math.isfinite(run.gradient_norm):
                            raise FloatingPointError(f"the gradient is not finite at step {run.step}")
                    run.learning_rate = optimizer.rate
                    optimizer.step()
                    run.state = state if stateful else None
                    run.step, run.batch = run.step + 1, run.batch + 1
                    run._sum, run._count = run._sum + run.loss, run._count + 1
                    seen += math.prod(np.shape(batch.x)[:2]) * processes  # T·B
                    item = next(batches, None) if run.step < last_step else None
                    if item is None and (steps is None or run.step < last_step):  # the epoch is over
                        run.epoch, run.batch, run.state = run.epoch + 1, 0, None
                    run.seconds += time.perf_counter() - started

                    ended = run.batch == 0 or run.step >= last_step
                    if (run.step % every == 0 or run.step >= last_step) if every else ended:
                        rate = seen / max(run.seconds - mark, 1e-9)
                        _add_row(run, validation, rate, stateful, loss, history, patience is not None, replicas)
                        mark, seen = run.seconds, 0
                        if patience is not None and run.stale >= patience:
                            run.stop = True
                        if checkpoint is not None and checkpoint_every is None:
                            _save(run, checkpoint, config or {}, replicas)
                            saved = run.step
                    for callback in callbacks:
                        callback(run)
                    if checkpoint is not None and checkpoint_every and run.step % checkpoint_every == 0:
                        _save(run, checkpoint, config or {}, replicas)
                        saved = run.step
                    if bar is not None:
                        bar.update(1)
                        bar.set_postfix_str(f"loss {run.loss:.4g}", refresh=False)
                    stopping = stopping or (replicas is None and bool(interrupted))
                    if over() or run.step >= stop_at or stopping:
                        break
                if run.step == before:
                    raise ValueError("fit: data gave no batch")
        finally:
            if bar is not None:
                bar.close()
        if run.best_weights is not None and over():
            model.load_state_dict(run.best_weights)
            saved = -1
        if checkpoint is not None and saved != run.step:
            _save(run, checkpoint, config or {}, replicas)
        if replicas is not None:
            replicas.total(np.zeros(1))  # nobody goes on before the checkpoint is whole
    if stopping:
        raise KeyboardInterrupt
    return run


def _add_row(
    run: Run, validation: Any, rate: float, stateful: bool, loss: Loss, history: Any, keep_best: bool, replicas: Replicas | None
) -> None:  # fmt: skip
    value = math.nan
    if validation is not None:
        if replicas is None or replicas.rank == 0:
            of_batches = not callable(validation)
            value = float(evaluate(run.model, validation, loss, stateful=stateful) if of_batches else validation())
        if replicas is not None:
            told = np.array([value if replicas.rank == 0 else 0.0])
            replicas.total(told)
            value = float(told[0])
        run.stale = 0 if value < run.best else run.stale + 1
        if value < run.best:
            run.best, run.best_weights = value, run.model.state_dict() if keep_best else None
    numbers = (run.step, run.epoch, run._sum / run._count, value, run.learning_rate, run.gradient_norm)
    run.rows.append(dict(zip(_COLUMNS, (*numbers, rate, run.seconds), strict=True)))
    run._sum, run._count = 0.0, 0
    if history is not None:
        _write_rows(history, run.rows)


def _write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, float]]) -> None:
    """The whole history; NaN is an empty cell."""
    every = [[row[name] for name in _COLUMNS] for row in rows]
    write_csv(path, [_COLUMNS, *(["" if v != v else v if isinstance(v, int) else f"{v:.6g}" for v in values] for values in every)])

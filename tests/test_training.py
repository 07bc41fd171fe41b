"""fit: it learns, notes, stops early, and resumes bit for bit; checkpoints: whatever happens, one good one is left."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rnnfast import training
from rnnfast.data import Batch, Stream
from rnnfast.dense import Dropout, Linear
from rnnfast.graph import Graph
from rnnfast.layers import GRU, LSTM
from rnnfast.losses import mean_squared_error
from rnnfast.optim import SGD, Adam, Optimizer, linear
from rnnfast.training import CheckpointError, Run, evaluate, fit, load_checkpoint, save_checkpoint


def line(count: int = 6) -> list[Any]:
    """Batches of y = 3 x + 1."""
    x = np.random.default_rng(0).standard_normal((count, 8, 2, 1)).astype(np.float32)
    return [(part, 3 * part + 1) for part in x]


def net(seed: int = 0) -> tuple[Graph, Optimizer]:
    """Every kind of state that a checkpoint must hold: recurrent layers, two random streams, moments, a schedule."""
    model = Graph(
        {
            "a": (LSTM(1, 4, num_layers=2, dropout=0.3, seed=seed), "x"),
            "d": (Dropout(0.2, seed=seed), "a"),
            "b": (GRU(4, 3, seed=seed), "d"),
            "y": (Linear(3, 1, seed=seed), "b"),
        }
    )
    return model, Adam(model, linear(0.05, 12))


def wave() -> Stream:
    x = np.sin(np.arange(200) / 5, dtype=np.float32)[:, None]
    return Stream(x[:-1], x[1:], batch_size=3, seq_length=5)


def same(one: Run, two: Run) -> None:
    for a, b in zip(one.model.leaves(), two.model.leaves(), strict=True):
        np.testing.assert_array_equal(a.flat, b.flat)
    for name, array in one.optimizer.state_dict().items():
        np.testing.assert_array_equal(array, two.optimizer.state_dict()[name])
    timed = ("per_second", "seconds")
    rows = [[{name: v for name, v in row.items() if name not in timed} for row in run.rows] for run in (one, two)]
    np.testing.assert_equal(*rows)


# ---- Learning --------------------------------------------------------------------------------------------------------


def test_it_learns_a_line() -> None:
    layer = Linear(1, 1, seed=0)
    run = fit(layer, line(), mean_squared_error, SGD(layer, 0.1), epochs=20, progress=False)
    np.testing.assert_allclose(layer.flat, [3, 1], atol=1e-3)
    assert (run.step, run.epoch, len(run.rows)) == (120, 20, 20)
    losses = [row["loss"] for row in run.rows]
    assert losses == sorted(losses, reverse=True)


def test_it_follows_a_wave_with_its_state_carried() -> None:
    model = Graph({"h": (LSTM(1, 8, seed=1), "x"), "y": (Linear(8, 1, seed=2), "h")})
    run = fit(model, wave(), mean_squared_error, Adam(model, 0.02), steps=300, clip=1.0, stateful=True, progress=False)
    assert run.rows[-1]["step"] == 300 and run.loss < 0.01
    assert sorted(run.state) == ["h"]


def test_a_divergence_of_the_whole_sequence_trains() -> None:
    """Only the sum over time is told to the model."""

    def total(y: Any, target: Any) -> tuple[float, Any]:
        miss = y.sum(axis=0) - target
        return 0.5 * float((miss**2).sum()), np.broadcast_to(miss, y.shape)

    layer = Linear(1, 1, seed=0)
    data = [(x, y.sum(axis=0)) for x, y in line()]
    fit(layer, data, total, SGD(layer, 0.005), epochs=100, progress=False)
    np.testing.assert_allclose(layer.flat, [3, 1], atol=0.05)


def test_lengths_and_resets_reach_the_model() -> None:
    seen = []

    class Spy(GRU):
        def __call__(self, x: Any, state: Any = None, lengths: Any = None, reset: Any = None) -> Any:
            seen.append((lengths, reset, state is None))
            return super().__call__(x, state, lengths, reset)

    model = Spy(1, 1, seed=0)
    x, lengths, reset = np.ones((4, 2, 1), np.float32), np.array([4, 2]), np.ones((4, 2), bool)
    data = [Batch(x, x, lengths, reset), (x, x)]
    fit(model, data, mean_squared_error, SGD(model, 0.1), epochs=2, stateful=True, progress=False)
    assert [(a is lengths, b is reset, c) for a, b, c in seen] == [(True, True, True), (False, False, False)] * 2


def test_data_may_be_a_function_of_the_epoch() -> None:
    epochs: list[int] = []

    def data(epoch: int) -> list[Any]:
        epochs.append(epoch)
        return line(2)

    layer = Linear(1, 1, seed=0)
    run = fit(layer, data, mean_squared_error, SGD(layer, 0.1), steps=5, progress=False)
    assert epochs == [0, 1, 2] and (run.step, run.epoch, run.batch) == (5, 2, 1)


def test_evaluate_leaves_no_trace_and_weighs_rows() -> None:
    layer = Linear(1, 1, seed=0)
    layer.flat[:] = 0
    x = np.ones((3, 1, 1), np.float32)
    both = [(x, x), (np.repeat(x, 3, axis=1), np.repeat(x, 3, axis=1) * 3)]
    assert evaluate(layer, both, mean_squared_error) == (1 + 3 * 9) / 4
    assert layer.training and not layer._tapes and np.isnan(evaluate(layer, [], mean_squared_error))


def test_the_bar_is_tqdms(capsys: pytest.CaptureFixture[str]) -> None:
    layer = Linear(1, 1, seed=0)
    fit(layer, line(), mean_squared_error, SGD(layer, 0.1), steps=3)
    assert "3/3" in capsys.readouterr().err


# ---- Notes and stops -------------------------------------------------------------------------------------------------


def test_the_history_is_a_csv_of_the_rows(tmp_path: Path) -> None:
    layer = Linear(1, 1, seed=0)
    path = tmp_path / "new" / "history.csv"
    run = fit(
        layer,
        line(),
        mean_squared_error,
        SGD(layer, linear(0.1, 10)),
        steps=10,
        every=4,
        clip=1.0,
        validation=line(1),
        history=path,
        progress=False,
    )
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["4", "8", "10"]
    assert [row["learning_rate"] for row in rows] == ["0.07", "0.03", "0.01"]
    for row, kept in zip(rows, run.rows, strict=True):
        assert all(abs(float(row[name]) - kept[name]) <= 1e-5 * abs(kept[name]) for name in kept)
    assert os.listdir(path.parent) == ["history.csv"]


def test_early_stopping_puts_the_best_weights_back() -> None:
    values = iter([5.0, 4.0, 4.5, 3.0, 3.1, 3.2, 3.3, 0.0])
    kept = []

    def validation() -> float:
        kept.append(layer.state_dict())
        return next(values)

    layer = Linear(1, 1, seed=0)
    optimizer = SGD(layer, 0.1)
    run = fit(layer, line(), mean_squared_error, optimizer, epochs=50, validation=validation, patience=3, progress=False)
    assert (run.epoch, run.best, run.stop) == (7, 3.0, True)
    for name, p in layer.parameters().items():
        np.testing.assert_array_equal(p, kept[3][name])


def test_callbacks_see_every_step_and_may_stop() -> None:
    steps: list[int] = []

    def callback(run: Run) -> None:
        steps.append(run.step)
        run.stop = run.step == 4

    layer = Linear(1, 1, seed=0)
    fit(layer, line(), mean_squared_error, SGD(layer, 0.1), epochs=5, callbacks=[callback], progress=False)
    assert steps == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched() -> None:
    layer = Linear(1, 1, seed=0)
    before = layer.flat.copy()
    x = np.ones((1, 1, 1), np.float32)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        fit(layer, [(x, x)], lambda y, t: (np.nan, y), SGD(layer, 0.1), steps=1, progress=False)
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 0"):
        fit(layer, [(x, x)], lambda y, t: (0.0, y * np.nan), SGD(layer, 0.1), steps=1, clip=1.0, progress=False)
    np.testing.assert_array_equal(layer.flat, before)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({}, "either epochs or steps"),
        ({"epochs": 1, "steps": 1}, "either epochs or steps"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1, "every": 0}, "every must be at least 1"),
        ({"steps": 1, "patience": 1}, "patience needs a validation"),
        ({"steps": 1, "resume": True}, "resume needs a checkpoint"),
        ({"steps": 1, "data": []}, "data gave no batch"),
    ),
)
def test_arguments_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    layer = Linear(1, 1, seed=0)
    with pytest.raises(ValueError, match=message):
        fit(layer, options.pop("data", line()), mean_squared_error, SGD(layer, 0.1), progress=False, **options)


@pytest.mark.parametrize("clip", (0, -1.0, np.nan))
def test_a_clip_that_is_no_norm_is_refused_before_anything_is_written(tmp_path: Path, clip: float) -> None:
    layer = Linear(1, 1, seed=0)
    files = {"checkpoint": tmp_path / "run", "history": tmp_path / "history.csv"}
    with pytest.raises(ValueError, match="clip must be above 0"):
        fit(layer, line(), mean_squared_error, SGD(layer, 0.1), steps=1, clip=clip, progress=False, **files)
    assert not os.listdir(tmp_path)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="another model"):
        fit(Linear(1, 1), line(), mean_squared_error, SGD(Linear(1, 1), 0.1), steps=1, progress=False)


# ---- Resuming --------------------------------------------------------------------------------------------------------


def run_of(folder: Path | None, data: Any, seed: int = 0, **options: Any) -> Run:
    model, optimizer = net(seed)
    how = {"clip": 0.5, "stateful": True, "every": 3, "validation": line(1), "progress": False, **options}
    return fit(model, data, mean_squared_error, optimizer, checkpoint=folder, **how)


@pytest.mark.parametrize("data", (wave, line), ids=("a stream", "epochs of batches"))
@pytest.mark.parametrize("stops", ((1, 11), (6, 6), (5, 3, 4), (2,) * 6), ids=str)
def test_a_resumed_run_is_the_run_never_stopped(tmp_path: Path, data: Callable[[], Any], stops: tuple[int, ...]) -> None:
    whole = run_of(tmp_path / "whole", data(), steps=12)
    for n, stop in enumerate(stops):
        part = run_of(tmp_path / "parts", data(), seed=n, steps=12, stop_after=stop, resume=n > 0)
    assert part.step == 12
    same(whole, part)
    one, two = (load_checkpoint(tmp_path / name)[0] for name in ("whole", "parts"))
    assert {name: a.tobytes() for name, a in one.items()} == {name: a.tobytes() for name, a in two.items()}


def test_early_stopping_resumes(tmp_path: Path) -> None:
    values = [5.0, 4.0, 4.5, 4.6, 4.7, 1.0]

    def go(folder: Path, **options: Any) -> Run:
        layer = Linear(1, 1, seed=0)
        noted = iter(values[options.pop("done", 0) :])
        how = {"epochs": 6, "validation": lambda: next(noted), "patience": 3, "progress": False, **options}
        return fit(layer, line(1), mean_squared_error, SGD(layer, 0.1), checkpoint=folder, **how)

    whole = go(tmp_path / "whole")
    go(tmp_path / "parts", stop_after=3)
    part = go(tmp_path / "parts", resume=True, done=3)
    assert whole.epoch == part.epoch == 5
    same(whole, part)
    same(whole, go(tmp_path / "parts", resume=True, done=5))  # it is over, and stays over


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    def interrupt(run: Run) -> None:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path / "parts", wave(), steps=12, callbacks=[interrupt])
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(tmp_path / "parts")[2]["run"]["step"] == 5
    same(run_of(None, wave(), steps=12), run_of(tmp_path / "parts", wave(), steps=12, resume=True))


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, wave(), steps=2)
    layer = Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"is of another model: .*lacks 'weight'"):
        fit(layer, line(), mean_squared_error, SGD(layer, 0.1), steps=1, checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("other", ("optimizer", "streams"))
def test_a_checkpoint_that_is_refused_changes_nothing(tmp_path: Path, other: str) -> None:
    run_of(tmp_path, wave(), steps=2)
    model, optimizer = net(seed=1)
    if other == "optimizer":
        optimizer = SGD(model, 0.1)
    else:
        model["d"].generator = np.random.Generator(np.random.MT19937(0))
    optimizer.step()
    before, drawn = [leaf.flat.copy() for leaf in model.leaves()], model["a"].generator.bit_generator.state
    with pytest.raises(CheckpointError, match="is of another model"):
        fit(model, wave(), mean_squared_error, optimizer, steps=3, checkpoint=tmp_path, resume=True, progress=False)
    for leaf, flat in zip(model.leaves(), before, strict=True):
        np.testing.assert_array_equal(leaf.flat, flat)
    assert optimizer.steps == 1 and model["a"].generator.bit_generator.state == drawn


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def save(folder: Path, number: int) -> None:
    save_checkpoint(folder, {"w": np.full(1000, number)}, {"m": np.full(10, number)}, {"number": number})


def number(folder: Path) -> int:
    weights, moments, config = load_checkpoint(folder)
    assert (weights["w"] == config["number"]).all() and (moments["m"] == config["number"]).all()
    return int(config["number"])


def test_the_one_before_is_kept(tmp_path: Path) -> None:
    for n in (1, 2, 3):
        save(tmp_path, n)
    assert number(tmp_path) == 3 and sorted(os.listdir(tmp_path)) == ["last", "previous"]
    os.rename(tmp_path / "last", tmp_path / "gone")  # as after a stop between the two moves
    assert number(tmp_path) == 2
    save(tmp_path, 4)
    assert number(tmp_path) == 4 and (tmp_path / "previous").is_dir()


@pytest.mark.parametrize("call", ("fsync", "replace", "rmtree"))
@pytest.mark.parametrize("after", range(6))
def test_a_save_cut_off_anywhere_leaves_a_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    where = training.shutil if call == "rmtree" else os
    real, calls = getattr(where, call), iter(range(100))

    def fails(*args: Any) -> Any:
        if next(calls) == after:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(where, call, fails)
        cut_off = {"fsync": 5, "replace": 2, "rmtree": 1}[call] > after
        if cut_off:
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path, 3)
        else:
            save(tmp_path, 3)
    assert number(tmp_path) in ((2, 3) if cut_off else (3,))
    save(tmp_path, 4)
    assert number(tmp_path) == 4


def test_a_process_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom rnnfast.training import save_checkpoint\n"
        "n = 0\nwhile True:\n    n += 1\n"
        "    save_checkpoint(sys.argv[1], {'w': np.full(1000, n)}, {'m': np.full(10, n)}, {'number': n})\n"
        "    print(n, flush=True)\n"
    )
    for delay in range(3):
        child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(3 + 2 * delay):
            said = int(child.stdout.readline())
        child.kill()
        child.wait()
        child.stdout.close()
        assert number(tmp_path) >= said - 1


@pytest.mark.parametrize("name", ("model.safetensors", "training.safetensors", "config.json"))
@pytest.mark.parametrize("harm", ("truncated", "empty", "gone", "flipped", "garbage"))
def test_a_harmed_file_is_named(tmp_path: Path, name: str, harm: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "last" / name
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 0x80]) + data[middle + 1 :]
        path.write_bytes({"truncated": data[:middle], "empty": b"", "flipped": flipped, "garbage": b"\xff" * 99}[harm])
    with pytest.raises(CheckpointError, match=f"last/{name}.*previous is the one before it") as told:
        load_checkpoint(tmp_path)
    assert "\n" not in str(told.value)
    assert number_of_previous(tmp_path) == 1


def number_of_previous(folder: Path) -> int:
    os.rename(folder / "last", folder / "harmed")
    return number(folder)


@pytest.mark.parametrize("content", ("[]", "1", "{}", '{"files": 1}', '{"files": {"model.safetensors": {}}}'))
def test_a_config_of_another_kind_is_corrupt(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "last" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is corrupt"):
        load_checkpoint(tmp_path)


def test_a_config_is_json_that_others_read(tmp_path: Path) -> None:
    run_of(tmp_path, wave(), steps=4, config={"who": "me"})
    text = (tmp_path / "last" / "config.json").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse)["config"] == {"who": "me"}

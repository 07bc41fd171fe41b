"""The command line as a user meets it: real processes on a small real text, their files, words and exit codes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import rnnfast
from rnnfast.data import standard_library
from rnnfast.training import load_checkpoint

SMALL = ["--hidden", "24", "--embedding", "8", "--seq-length", "20", "--batch-size", "4"]
TEXT = ["--text", str(standard_library() / "json")]


def rnn(*words: Any, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-m", "rnnfast.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def good(*words: Any, **options: Any) -> str:
    done = rnn(*words, **options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def refused(*words: Any, says: str, **options: Any) -> None:
    """One line on stderr, exit code 2, no traceback."""
    done = rnn(*words, **options)
    assert done.returncode == 2, done
    assert re.fullmatch(r"rnnfast[a-z ]*: error: [^\n]+\n", done.stderr), done.stderr
    assert re.search(says, done.stderr), done.stderr


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which nobody may change."""
    out = tmp_path_factory.mktemp("cli") / "run"
    good("lm", "train", *TEXT, *SMALL, "--steps", 60, "--out", out)
    return out


# ---- What works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--alone"]], ids=["with torch", "alone"])
def test_bench_prints_peaks_and_shares(options: list[str]) -> None:
    said = good("bench", "--seconds", "0.001", "--threads", 1, *options)
    assert re.search(r"rnnfast [\d.]+\S*, CPU target \S+, threads 1\n", said)
    peaks = {name: float(value) for name, value in re.findall(r"^(float32|float64|bfloat16|int8) +([\d.]+)$", said, re.M)}
    assert len(peaks) == 4
    assert peaks["float32"] > 1.5 * peaks["float64"] or rnnfast.target() == "scalar"
    rows = re.findall(r"^(lstm|gru|rnn_tanh) +\d+ +\d+ +\d+ (inference|training) +[\d.]+ +[\d.]+ +(\d+)%( +[\d.]+ +[\d.]+)?$", said, re.M)
    assert len(rows) == 3 * 4 * 2
    assert all(0 <= int(share) <= 130 for _, _, share, _ in rows)
    assert max(int(share) for _, _, share, _ in rows) > 30
    assert all(bool(torch) == (not options) for *_, torch in rows)


def test_train_says_and_writes_what_it_does(tmp_path: Path) -> None:
    said = good("lm", "train", *TEXT, *SMALL, "--steps", 40, "--sample-every", 20, "--out", tmp_path / "run")
    assert re.search(r"text: .*json, [\d,]+ bytes to learn, [\d,]+ held out", said)
    assert re.search(r"model: lstm 2 x 24, [\d,]+ parameters; 40 steps of 4 x 20 bytes", said)
    assert re.search(r"step +40/40   \d\.\d{3} bits/byte, held out \d\.\d{3}   [\d,]+ bytes/s   0:00 left", said)
    assert re.search(r"done: \d\.\d{4} bits per byte on [\d,]+ held-out bytes", said)
    assert said.count("-" * 72) == 2
    assert {"history.csv", "loss.png", "last/config.json", "last/model.safetensors"} <= set(files(tmp_path / "run"))


def test_sample_goes_on_from_the_prompt(run: Path) -> None:
    words = ("lm", "sample", run, "--prompt", "def ", "--length", 30)
    first, again = good(*words, "--seed", 1), good(*words, "--seed", 1)
    assert first == again and first.startswith("def ") and len(first.encode()) >= 35
    assert good(*words, "--seed", 2) != first
    assert good(*words, "--temperature", 0) == good(*words, "--temperature", 0, "--seed", 5)
    assert good("lm", "sample", run, "--prompt", "naïve ✓ ", "--length", 1).startswith("naïve ✓ ")


def test_sample_into_a_closed_pipe_is_no_error(run: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "rnnfast.cli", "lm", "sample", str(run), "--length", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(60) == 0
    child.stderr.close()


def test_info_says_what_runs() -> None:
    said = good("info")
    for part in (rnnfast.__version__, rnnfast.target(), "threads", "CUDA"):
        assert part in said
    assert re.search(r"threads +1\n", good("info", RNNFAST_NUM_THREADS="1"))


@pytest.mark.parametrize("command", ((), ("lm",), ("lm", "train"), ("lm", "sample"), ("info",)), ids=" ".join)
def test_help_helps(command: tuple[str, ...]) -> None:
    said = good(*command, "--help")
    assert said.startswith("usage: rnnfast")
    if command == ("lm", "train"):
        named = "text cell layers hidden seq-length batch-size steps seed out stop-after resume overwrite learning-rate clip"
        assert all(f"--{name}" in said for name in named.split())


def test_no_run_needs_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib here')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    said = good("lm", "train", *TEXT, *SMALL, "--steps", 2, "--out", tmp_path / "run", PYTHONPATH=path)
    assert "no loss.png: loss_curve needs matplotlib: pip install 'rnnfast[plots]'" in said
    assert "loss.png" not in files(tmp_path / "run")


# ---- Stopping and going on -------------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_never_stopped(run: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    assert "stopped after step 23 of 60" in good("lm", "train", *TEXT, *SMALL, "--steps", 60, "--stop-after", 23, *out)
    good("lm", "train", "--resume", "--stop-after", 10, *out)
    assert "done: " in good("lm", "train", "--resume", *out)
    ours, whole = files(tmp_path / "run"), files(run)
    for name in ("model", "training"):
        assert ours[f"last/{name}.safetensors"] == whole[f"last/{name}.safetensors"]
    tables = [[line.split(b",")[:6] for line in each["history.csv"].splitlines()] for each in (ours, whole)]
    assert tables[0] == tables[1] and len(tables[0]) == 1 + 60 // 4


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGKILL), ids=("Ctrl-C", "kill"))
def test_a_run_cut_off_goes_on_bit_for_bit(tmp_path: Path, number: int) -> None:
    steps = ("--steps", 3000, "--every", 3000, "--sample-every", 0)
    words = ["lm", "train", *TEXT, *SMALL, *map(str, steps), "--checkpoint-every", "50", "--out", str(tmp_path / "cut")]
    child = subprocess.Popen([sys.executable, "-m", "rnnfast.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ready = tmp_path / "cut" / "previous" / "config.json"  # the second checkpoint is step 50's
    end = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    step = load_checkpoint(tmp_path / "cut")[2]["run"]["step"]
    assert 50 <= step < 3000
    if number == signal.SIGINT:
        assert child.returncode == 130
        assert said.strip() == f"rnnfast: interrupted; rnnfast lm train --resume --out {tmp_path / 'cut'} goes on"
    else:
        assert step % 50 == 0
    good("lm", "train", "--resume", "--stop-after", 25, "--out", tmp_path / "cut")
    good("lm", "train", *TEXT, *SMALL, *steps, "--stop-after", step + 25, "--out", tmp_path / "whole")
    for name in ("last/model.safetensors", "last/training.safetensors"):
        assert files(tmp_path / "cut")[name] == files(tmp_path / "whole")[name]


def test_going_on_with_what_is_finished_changes_nothing(run: Path) -> None:
    before = files(run)
    assert "done: " in good("lm", "train", "--resume", "--out", run)
    after = files(run)
    assert {name: after[name] for name in after if name != "loss.png"} == {name: before[name] for name in before if name != "loss.png"}


# ---- What is refused: one line, exit code 2, nothing lost ------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    (
        ("lm train --text {}/gone", "gone does not exist"),
        ("lm train --text {}/empty", "empty is empty"),
        ("lm train --text {}/binary", "binary is binary, not text"),
        ("lm train --text {}/folder", "folder contains no text file"),
        ("lm train --text {}/short", "the text is too short: 16 steps for a batch of 32 x 100"),
        ("lm train --text /dev/zero", "neither a file nor a folder"),
        ("lm train --cell transformer", "invalid choice: 'transformer'"),
        ("lm train --hidden 0", "'0' is not a whole number from 1 on"),
        ("lm train --hidden -5", "'-5' is not a whole number"),
        ("lm train --hidden 2.5", "'2.5' is not a whole number"),
        ("lm train --hidden 100000000", "GiB of memory"),
        ("lm train --hidden 99999999999999999999", "is not a whole number"),
        ("lm train --layers none", "'none' is not a whole number"),
        ("lm train --steps 0", "'0' is not a whole number"),
        ("lm train --stop-after 0", "'0' is not a whole number"),
        ("lm train --seed -1", "'-1' is not a whole number from 0 on"),
        ("lm train --learning-rate nan", "'nan' is not a number above 0"),
        ("lm train --dropout 1", r"'1' is not a number in \[0, 1\)"),
        ("lm train --threads 0", "'0' is not a whole number"),
        ("lm train --out {}/empty", "empty is not a folder"),
        ("lm train --out {}/empty/run", "Not a directory"),
        ("lm train --out /proc/rnnfast", "/proc/rnnfast"),
        ("lm train --resume --out {}/gone", "gone holds no checkpoint"),
        ("lm train --resume --overwrite", "not allowed with"),
        ("lm train --nonsense", "unrecognized arguments: --nonsense"),
        ("lm sample {}/gone", "gone holds no checkpoint"),
        ("lm sample {}/empty", "empty holds no checkpoint"),
        ("lm sample {}/folder", "folder holds no checkpoint"),
        ("lm sample", "required: DIR"),
        ("lm sample {}/gone --temperature -1", "'-1' is not a number from 0 on"),
        ("lm sample {}/gone --temperature nan", "'nan' is not a number"),
        ("lm sample {}/gone --temperature warm", "'warm' is not a number"),
        ("lm sample {}/gone --length 0", "'0' is not a whole number"),
        ("lm", "required: COMMAND"),
        ("", "required: COMMAND"),
        ("nonsense", "invalid choice: 'nonsense'"),
    ),
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, words: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"a short text, no m")
    for name in ("binary", "folder/binary"):
        (tmp_path / name).write_bytes(bytes(range(256)) * 20)
    before = files(tmp_path)
    refused(*words.format(*[tmp_path] * 3).split(), says=says, cwd=tmp_path)
    assert files(tmp_path) == before


def test_a_run_is_not_overwritten_unasked(run: Path) -> None:
    before = files(run)
    refused("lm", "train", *TEXT, *SMALL, "--out", run, says="already holds a run .*: give --resume, --overwrite or another --out")
    refused("lm", "train", "--resume", "--hidden", 25, "--out", run, says="hidden is fixed at 24 .* it cannot become 25")
    refused("lm", "train", "--resume", "--text", standard_library() / "email", "--out", run, says="has changed since")
    assert files(run) == before


@pytest.mark.parametrize("name", ("model.safetensors", "training.safetensors", "config.json"))
@pytest.mark.parametrize("harm", ("truncated", "garbage", "gone"))
def test_a_harmed_checkpoint_is_told_and_left(run: Path, tmp_path: Path, name: str, harm: str) -> None:
    for path, data in files(run).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    victim = tmp_path / "last" / name
    data = victim.read_bytes()
    victim.unlink()
    if harm != "gone":
        victim.write_bytes(data[: len(data) // 2] if harm == "truncated" else b"\x07" * len(data))
    before = files(tmp_path)
    refused("lm", "train", "--resume", "--out", tmp_path, says=name)
    refused("lm", "sample", tmp_path, says=name)
    assert files(tmp_path) == before


def test_a_run_that_diverges_is_told_and_its_checkpoint_left(tmp_path: Path) -> None:
    words = ("lm", "train", *TEXT, *SMALL, "--cell", "rnn", "--steps", 50, "--out", tmp_path / "run")
    refused(*words, "--learning-rate", "1e38", says="the loss is|not finite")
    assert load_checkpoint(tmp_path / "run")[2]["run"]["step"] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused("lm", "train", *TEXT, *SMALL, "--out", tmp_path / "run", says="Permission denied")

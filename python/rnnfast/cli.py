"""The command line: `rnnfast lm train`, `rnnfast lm sample`, `rnnfast forecast`, `rnnfast bench`, `rnnfast info`.

Whatever the user gives that cannot be used ends in one line on stderr and exit code 2; Ctrl-C in 130. The work is
lm.py's and forecast.py's; this file knows only names, defaults and exit codes.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _whole(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} on")
        return value

    return parse


def _number(what: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not allowed(value):  # NaN fits nowhere
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {what}")
        return value

    return parse


_above_0 = _number("above 0", lambda v: 0 < v < float("inf"))
_from_0 = _number("from 0 on", lambda v: 0 <= v < float("inf"))
_share = _number("in [0, 1)", lambda v: 0 <= v < 1)


def _parser() -> argparse.ArgumentParser:
    from .lm import CELLS, RATES, Config

    d = Config()
    rates = ", ".join(f"{rate:g} for {cell}" for cell, rate in RATES.items())
    top = _Parser(prog="rnnfast", description="Fast recurrent networks. See `rnnfast lm train --help`.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="version, CPU target in use, threads, CUDA")
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench",
        help="measure this machine, the kernels on it, and torch where it is installed",
        description="Measures multiply-adds a second on one thread and on all, then every cell at four sizes, forward and training, as a share "
        "of that; and where torch is installed how many times as long it takes on the same weights and inputs. About a minute.",
    )
    bench.set_defaults(run=_bench)
    bench.add_argument("--seconds", metavar="X", type=_above_0, default=0.05, help="length of a block, of which there are three (default: %(default)s)")
    bench.add_argument("--threads", metavar="N", type=_whole(1), help="of the kernels (default: what the machine has)")
    bench.add_argument("--alone", action="store_true", help="without torch")

    lm = commands.add_parser("lm", help="a language model of bytes: train it, sample from it")
    lm_commands = lm.add_subparsers(dest="lm_command", required=True, metavar="COMMAND")

    train = lm_commands.add_parser(
        "train",
        help="train a language model on text",
        description="Trains a language model on text, byte by byte; without arguments on the Python standard library's "
        "own source, in about 5 minutes on 2 cores. Prints bits per byte and samples, and writes checkpoints, "
        "history.csv and (with matplotlib) loss.png. Ctrl-C leaves a checkpoint; --resume goes on from it, bit for "
        "bit as if never stopped. Many processes, and machines, share each batch under torchrun: "
        "`torchrun --nproc-per-node 2 -m rnnfast.cli lm train`.",
    )
    train.set_defaults(run=_train)
    add = train.add_argument
    add("--text", metavar="PATH", help="a text file, or a folder of them (default: the standard library's *.py)")
    add("--out", metavar="DIR", default="rnnfast-lm", help="where the run is kept (default: %(default)s)")
    how = train.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue the run in --out; options keep their values")
    how.add_argument("--overwrite", action="store_true", help="start afresh in an --out that holds a run")
    add("--stop-after", metavar="K", type=_whole(1), help="stop with a checkpoint after K steps of this call")
    model = train.add_argument_group("the model and its training, fixed when the run starts")
    add = model.add_argument
    add("--cell", choices=CELLS, help=f"(default: {d.cell})")
    add("--layers", metavar="N", type=_whole(1), help=f"recurrent layers (default: {d.layers})")
    add("--hidden", metavar="N", type=_whole(1), help=f"units a layer (default: {d.hidden})")
    add("--embedding", metavar="N", type=_whole(1), help=f"numbers a byte (default: {d.embedding})")
    add("--dropout", metavar="P", type=_share, help=f"between layers (default: {d.dropout:g})")
    add("--seq-length", metavar="T", type=_whole(1), help=f"steps of truncated BPTT (default: {d.seq_length})")
    add("--batch-size", metavar="B", type=_whole(1), help=f"places read at once (default: {d.batch_size})")
    add("--steps", metavar="N", type=_whole(1), help=f"updates; the rate falls to 0 over them (default: {d.steps})")
    add("--learning-rate", metavar="X", type=_above_0, help=f"of Adam at the start (default: {rates})")
    add("--clip", metavar="X", type=_above_0, help=f"largest norm of the gradients (default: {d.clip:g})")
    add("--seed", metavar="S", type=_whole(0), help=f"of the weights, dropout and samples (default: {d.seed})")
    add("--every", metavar="K", type=_whole(1), help="steps between rows of history.csv (default: steps/15, <= 250)")
    other = train.add_argument_group("what changes no weight")
    add = other.add_argument
    add("--checkpoint-every", metavar="K", type=_whole(1), default=500, help="(default: %(default)s)")
    add("--sample-every", metavar="K", type=_whole(0), default=500, help="0 for none (default: %(default)s)")
    add("--threads", metavar="N", type=_whole(1), help="of the kernels (default: what the machine has)")

    sample = lm_commands.add_parser("sample", help="write text with a trained model")
    sample.set_defaults(run=_sample)
    add = sample.add_argument
    add("folder", metavar="DIR", help="the --out of a run")
    add("--prompt", metavar="TEXT", default="", help="what the text goes on from")
    add("--length", metavar="N", type=_whole(1), default=500, help="bytes to write (default: %(default)s)")
    add("--temperature", metavar="X", type=_from_0, default=0.7, help="0: always the likeliest (default: %(default)s)")
    add("--seed", metavar="S", type=_whole(0), help="the same seed writes the same text (default: a new one each time)")

    series = commands.add_parser(
        "forecast",
        help="forecast a column of a CSV file",
        description="Trains a recurrent net on a column of a CSV file (rows in the order of time), back-tests it on the last part against "
        "naive and seasonal-naive forecasts, and writes forecasts with intervals and (with matplotlib) a plot beside them.",
    )
    series.set_defaults(run=_forecast)
    add = series.add_argument
    add("csv", metavar="FILE", help="a CSV file with a header; other numeric columns are read, too, never beyond a forecast's origin")
    add("--target", metavar="COLUMN", required=True, help="the column to forecast")
    add("--horizon", metavar="N", type=_whole(1), default=24, help="steps ahead (default: %(default)s)")
    add("--season", metavar="N", type=_whole(1), help="steps of a season, 1 for none (default: found in the data)")
    add("--window", metavar="N", type=_whole(2), help="steps that the net reads (default: two seasons, 24 to 200)")
    add("--test", metavar="SHARE", type=_share, default=0.2, help="the last part, for the back-test (default: %(default)s)")
    add("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="(default: %(default)s)")
    add("--hidden", metavar="N", type=_whole(1), default=32, help="units (default: %(default)s)")
    add("--epochs", metavar="N", type=_whole(1), default=40, help="at most (default: %(default)s)")
    add("--seed", metavar="S", type=_whole(0), default=0, help="of the weights and the order (default: %(default)s)")
    add("--out", metavar="FILE", help="the forecasts (default: FILE-forecast.csv); the plot goes beside it")
    return top


def _forecast(args: argparse.Namespace) -> int:
    from pathlib import Path

    from .data import InputError
    from .forecast import Settings, forecast_series, read_csv, write_forecast
    from .plots import forecast_plot

    source = Path(args.csv)
    out = Path(args.out) if args.out else source.with_name(f"{source.stem}-forecast.csv")
    if out.exists() and out.samefile(source):
        raise InputError(f"--out is {source} itself, which it would overwrite")
    plot = out.with_suffix(".png")
    if plot == out:
        raise InputError(f"--out is for the forecasts, as CSV; the plot goes beside it and would overwrite {out}")
    columns, _ = read_csv(source, args.target)
    settings = Settings(cell=args.cell, hidden_size=args.hidden, epochs=args.epochs, seed=args.seed)
    report = forecast_series(
        columns, args.target, args.horizon, season=args.season, width=args.window, test_fraction=args.test, settings=settings
    )  # fmt: skip
    print(f"{source}: {len(columns[args.target])} rows, season {report.season if report.season > 1 else 'none'}")
    print(f"back-test, {report.origins} forecasts of {args.horizon} steps from the last part; mean absolute errors:")
    for name, error in report.errors.items():
        print(f"    {name:16}{error:.6g}")
    write_forecast(out, report, args.target)
    print(f"forecasts with 80 % intervals: {out}")
    try:
        forecast_plot(columns[args.target], report.forecast, report.low, report.high, plot, args.target)
        print(f"plot: {plot}")
    except ImportError:
        pass  # the plot needs an extra
    return 0


def _info(args: argparse.Namespace) -> int:
    import numpy as np

    import rnnfast

    others = [name for name in rnnfast.targets() if name != rnnfast.target()]
    for name, value in (
        ("rnnfast", rnnfast.__version__),
        ("CPU target", f"{rnnfast.target()} (also here: {', '.join(others) or 'none'})"),
        ("threads", rnnfast.get_num_threads()),
        ("CUDA", "no (this build has no CUDA kernels)"),
        ("Python", f"{sys.version.split()[0]}, NumPy {np.__version__}"),
    ):
        print(f"{name:12}{value}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    import rnnfast

    from . import bench

    if args.threads:
        rnnfast.set_num_threads(args.threads)
    threads = rnnfast.get_num_threads()
    print(f"rnnfast {rnnfast.__version__}, CPU target {rnnfast.target()}, threads {threads}")
    print(f"{'products of':12}{'1 thread':>12}" + (f"{f'{threads} threads':>12}" if threads > 1 else "") + "   10^9 operations a second in registers")
    peaks = {}
    for compute in ("float32", "float64", "bfloat16", "int8"):
        peaks[compute] = [bench.peak(compute, n) / 1e9 for n in sorted({1, threads})]
        print(f"{compute:12}" + "".join(f"{value:12.1f}" for value in peaks[compute]), flush=True)
    print(f"\n{'cell':10}{'T':>5}{'B':>4}{'H':>5} {'mode':10}{'ms':>10}{'GFLOP/s':>9}{'share':>7}{'torch ms':>10}{'ratio':>7}")
    for row in bench.measure(seconds=args.seconds, peers=not args.alone):
        line = f"{row['cell']:10}{row['T']:5}{row['B']:4}{row['H']:5} {row['mode']:10}{row['ms']:10.4g}{row['gflops']:9.1f}"
        line += f"{row['gflops'] / peaks['float32'][-1]:7.0%}"
        if "torch_ms" in row:
            line += f"{row['torch_ms']:10.4g}{row['torch_ms'] / row['ms']:7.2f}"
            line += "  but the outputs differ" if row["difference"] > 1e-4 else ""
        print(line, flush=True)
    return 0


def _train(args: argparse.Namespace) -> int:
    from dataclasses import fields

    import rnnfast

    from .lm import Config, train

    if args.threads:
        rnnfast.set_num_threads(args.threads)
    given = {field.name: getattr(args, field.name) for field in fields(Config) if hasattr(args, field.name)}
    with contextlib.ExitStack() as stack:
        replicas = None
        if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":  # torchrun has started us
            from .torch import Replicas

            replicas = stack.enter_context(Replicas())
        train(
            args.out,
            given,
            resume=args.resume,
            overwrite=args.overwrite,
            stop_after=args.stop_after,
            checkpoint_every=args.checkpoint_every,
            sample_every=args.sample_every,
            replicas=replicas,
        )
    return 0


def _sample(args: argparse.Namespace) -> int:
    import numpy as np

    from .lm import LanguageModel

    model = LanguageModel.load(args.folder)
    prompt = os.fsencode(args.prompt)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out = sys.stdout.buffer
    out.write(decoder.decode(prompt).encode())
    for byte in model.sample(prompt, args.length, args.temperature, np.random.default_rng(args.seed)):
        out.write(decoder.decode(byte).encode())
        out.flush()
    out.write((decoder.decode(b"", final=True) + "\n").encode())
    out.flush()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for what cannot be used, 130 after Ctrl-C.

    >>> main(["lm", "sample", "/nowhere"])  # and on stderr: rnnfast: error: /nowhere holds no checkpoint
    2
    """
    from .data import InputError

    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        kept = args.run is _train and os.path.isdir(os.path.join(args.out, "last"))
        resume = f"; rnnfast lm train --resume --out {args.out} goes on" if kept else ""
        print(f"\nrnnfast: interrupted{resume}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
    except MemoryError as error:
        message = f"not enough memory: {error}"
    except (InputError, FloatingPointError, ImportError) as error:
        message = str(error)
    print(f"rnnfast: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""The command line: it answers `--help` and faults in a YAML file before anything heavy is imported."""

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import agnews_lora
from agnews_lora.errors import AgnewsLoraError, nearest

if TYPE_CHECKING:
    from agnews_lora.config.sweep import Sweep

SUMMARY: Final = "A sweep harness for LoRA text classifiers under a hard budget of trainable parameters."

Run = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code: 2 for what the user can mend, 130 after Ctrl-C.

    Output that gets lost (a closed terminal, a full disk) ends no work: the command goes on without a word. Only one
    whose work is its output fails then.
    """
    with _lasting("stdout") as output, _lasting("stderr"):
        options = parser().parse_args(arguments)
        if sys.flags.optimize > 1:
            print(
                "agnews-lora: Cannot run without docstrings, which transformers reads: Python was started with -OO or "
                "PYTHONOPTIMIZE=2. Start it without.",
                file=sys.stderr,
            )
            return 2
        agnews_lora.set_environment()
        os.environ["MPLBACKEND"] = "agg"  # figures go into files; one of a notebook may be missing here
        if os.environ.get("COLUMNS") == "0":  # of a terminal without a size: Rich would show nothing
            del os.environ["COLUMNS"]
        warnings.simplefilter("ignore")
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it says where its cache is, without a HOME
        command: Run = options.command
        try:
            code = command(options)
            print(end="", flush=True)
        except AgnewsLoraError as error:
            print(f"agnews-lora: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("agnews-lora: interrupted", file=sys.stderr)
            return 130
        if output.lost is None or command in WORKING:
            return code
        if isinstance(output.lost, BrokenPipeError):  # whoever read the output has gone
            return 141
        print(f"agnews-lora: Cannot write the output: {output.lost.strerror}. Free the disk.", file=sys.stderr)
        return 2


class _Lasting:
    """A standard stream that shows what it can. lost: why it shows nothing any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of characters that the terminal's encoding lacks

    def write(self, text: str) -> int:
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # also for what is still in its buffer


@contextmanager
def _lasting(name: str) -> Iterator[_Lasting]:
    """Make a standard stream last, for the time of the block. One that was closed at the start shows nothing."""
    given: TextIO | None = getattr(sys, name)
    stream = _Lasting(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") if given is None else given)
    setattr(sys, name, stream)
    try:
        yield stream
    finally:
        stream.flush()
        setattr(sys, name, given)


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest command or option for an unknown one, under the usage of its command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [word for word in unknown if word.startswith("-")]
            hint = next(
                (hint for word in options if (hint := nearest(word.partition("=")[0], self._option_string_actions))), ""
            )
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = ", ".join(action.choices)
            hint = nearest(value, action.choices) or "."
            raise argparse.ArgumentError(None, f"unknown command {value!r}{hint} There are: {names}")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(prog="agnews-lora", description=SUMMARY)
    top.set_defaults(command=_help)
    top.add_argument("--version", action="version", version=agnews_lora.__version__)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def add(run: Run, summary: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            run.__name__.removeprefix("_"),
            help=summary,
            description=summary,
            epilog=f"example:\n  agnews-lora {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # an example is to be copied: it must not be wrapped
        )
        command.set_defaults(command=run)
        return command

    train = add(_train, "train one experiment", "train embedded")
    train.add_argument("experiment", nargs="?", default="seed", metavar="EXPERIMENT", help="name or path (seed)")

    sweep = add(_sweep, "search for the best adapter; resumes where it stopped", "sweep embedded --trials 20")
    sweep.add_argument(
        "--trials", type=_count, metavar="N", help="trials that are to have ended, beside those of `enqueue`"
    )
    sweep.add_argument("--timeout", type=_seconds, metavar="S", help="stop after S seconds; the next start resumes")
    sweep.add_argument("--new", action="store_true", help="start another study")
    sweep.add_argument(
        "--workers", type=_count, metavar="N", help="train in N processes (Ray actors): one a GPU, or N on the CPU"
    )
    sweep.add_argument(
        "--address", metavar="ADDRESS", help="train on a running Ray cluster, one worker per GPU: auto, or HOST:PORT"
    )
    sweep.add_argument(
        "--patience",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="seconds that a store may be away before the sweep ends (300)",
    )

    status, stop, enqueue = _add_control(add)

    promote = add(_promote, "make the candidate champion, if it passes its checks", "promote embedded")
    which = promote.add_mutually_exclusive_group()
    which.add_argument("--version", type=_count, metavar="N", help="this version instead of the candidate")
    which.add_argument("--rollback", action="store_true", help="make the previous champion champion again")

    predict = add(_predict, "ask the champion", 'predict "Shares of the chip maker rose."')
    predict.add_argument("texts", nargs="*", metavar="TEXT", help="texts; none: a line each from standard input")
    predict.add_argument("--file", type=Path, metavar="FILE", help="read the texts from a file, a line each")
    predict.add_argument("--sweep", default="embedded", metavar="SWEEP", help="whose champion (embedded)")

    serve = add(_serve, "answer over HTTP with the champion", "serve --merged")
    serve.add_argument("--version", type=_count, metavar="N", help="this version instead of the champion")
    serve.add_argument("--merged", action="store_true", help="with the adapter merged into the base's weights: faster")
    serve.add_argument("--host", default="127.0.0.1", metavar="HOST", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=_port, default=5001, metavar="PORT", help="port to listen on (5001)")
    serve.add_argument("--verbose", action="store_true", help="print a line each request")

    export = add(_export, "write the champion as a PEFT folder, or as a whole model", "export --to exported")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    export.add_argument("--merged", action="store_true", help="a whole model, for `transformers.pipeline`")

    budget = add(_budget, "show the largest rank of each preset that fits", "budget agnews --json")

    data = add(_data, "show classes, lengths and duplicates of an experiment's rows", "data embedded")
    data.add_argument("experiment", nargs="?", default="embedded", metavar="EXPERIMENT", help="name or path (embedded)")

    report = add(_report, "write what a sweep found, as HTML and PDF", "report embedded --to reports")
    report.add_argument("--to", type=Path, metavar="DIR", help="where the files go (reports/)")

    ui = add(_ui, "browse the runs in the MLflow UI", "ui --port 5001")
    ui.add_argument("--port", type=_port, default=5000, metavar="PORT", help="on loopback (5000)")

    (doctor := add(_doctor, "show device, versions, stores, and what can be reached", "doctor --quick")).add_argument(
        "--quick", action="store_true", help="only versions, stores and folders, at once"
    )

    for command in (sweep, status, promote, serve, export, budget, report):
        command.add_argument("sweep", nargs="?", default="embedded", metavar="SWEEP", help="name or path (embedded)")
    for command in (sweep, promote, predict, serve, export, report):
        command.add_argument("--tracking", metavar="URL", help="the MLflow server, http://… (mlruns/)")
    for command in (status, promote, predict, export, budget, data, report, doctor):
        command.add_argument("--json", action="store_true", help="as JSON")
    for command in (sweep, status, stop, enqueue):
        command.add_argument(
            "--storage", metavar="URL", help="the study's database, sqlite:///… or postgresql://… (mlruns/optuna.db)"
        )
    for command in (train, sweep):
        how = command.add_mutually_exclusive_group()
        how.add_argument("--quiet", action="store_true", help="show the result alone, without the progress")
        how.add_argument("--json", action="store_true", help="show the result alone, as JSON")
    return top


def _add_control(add: Callable[[Run, str, str], argparse.ArgumentParser]) -> tuple[argparse.ArgumentParser, ...]:
    """The commands that look at a study and steer it."""
    status = add(_status, "show the trials of a sweep, running or not", "status embedded --json")
    stop = add(_stop, "end a trial as pruned, for good; the sweep goes on", "stop t0007 --sweep embedded")
    stop.add_argument("trial", metavar="TRIAL", help="its name or number; it ends at its next evaluation")
    stop.add_argument("--sweep", default="embedded", metavar="SWEEP", help="whose trial (embedded)")
    summary = "train a configuration next; it counts on top of the sweep's own trials"
    enqueue = add(_enqueue, summary, "enqueue embedded targets=qv rank=4 alpha=8 dropout=0.1 learning_rate=1e-3")
    enqueue.add_argument("sweep", nargs="?", default="embedded", metavar="SWEEP", help="name or path (embedded)")
    enqueue.add_argument(
        "values",
        nargs="*",
        metavar="KEY=VALUE",
        help="targets, rank, alpha, dropout, learning_rate, head (or rank_share, alpha_ratio); the rest is drawn",
    )
    return status, stop, enqueue


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but got {text!r}")
    return int(text)


def _port(text: str) -> int:
    number = _count(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"must be a port, 1 to 65535, but got {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, but got {text!r}")
    return seconds


# Commands: each reads its YAML file first, so that a fault in it is reported before anything heavy is imported.


def _loaded_sweep(options: argparse.Namespace) -> "Sweep":
    from agnews_lora.config.sweep import load_sweep

    return load_sweep(options.sweep)


def _help(options: argparse.Namespace) -> int:
    parser().print_help()
    return 0


def _train(options: argparse.Namespace) -> int:
    from agnews_lora.config.experiment import load_experiment

    experiment = load_experiment(options.experiment)
    from agnews_lora.commands import train

    return train.run(experiment, options.quiet, options.json)


def _sweep(options: argparse.Namespace) -> int:
    loaded = _loaded_sweep(options)
    if not any((options.new, options.storage, options.tracking, options.workers, options.address)):
        from agnews_lora.commands import reprint

        if (code := reprint.run(loaded, options.trials, options.json, options.quiet)) is not None:
            return code
    if not (options.json or options.quiet):
        print(f"Loading torch, MLflow, base {loaded.experiment.base} and its data ...", flush=True)
    from agnews_lora.commands import sweep

    names = ("trials", "timeout", "new", "workers", "address", "storage", "tracking", "patience")
    return sweep.run(loaded, options.json, options.quiet, **{name: getattr(options, name) for name in names})


def _status(options: argparse.Namespace) -> int:
    sweep = _loaded_sweep(options)
    from agnews_lora.commands import control

    return control.status(sweep, options.storage, options.json)


def _stop(options: argparse.Namespace) -> int:
    sweep = _loaded_sweep(options)
    from agnews_lora.commands import control

    return control.stop(sweep, options.trial, options.storage)


def _enqueue(options: argparse.Namespace) -> int:
    if "=" in options.sweep:  # without a name
        options.sweep, options.values = "embedded", [options.sweep, *options.values]
    sweep = _loaded_sweep(options)
    from agnews_lora.commands import control

    return control.enqueue(sweep, options.values, options.storage)


def _promote(options: argparse.Namespace) -> int:
    sweep = _loaded_sweep(options)
    from agnews_lora.commands import promote

    if options.rollback:
        return promote.rollback(sweep.experiment, options.tracking, options.json)
    return promote.run(sweep, options.version, options.tracking, options.json)


def _predict(options: argparse.Namespace) -> int:
    experiment = _loaded_sweep(options).experiment
    from agnews_lora.commands import predict

    return predict.run(experiment, options.texts, options.file, options.json, options.tracking)


def _serve(options: argparse.Namespace) -> int:
    experiment = _loaded_sweep(options).experiment
    from agnews_lora.commands import serve

    names = ("version", "merged", "host", "port", "verbose", "tracking")
    return serve.run(experiment, **{name: getattr(options, name) for name in names})


def _export(options: argparse.Namespace) -> int:
    experiment = _loaded_sweep(options).experiment
    from agnews_lora.commands import predict

    return predict.export(experiment, options.to, options.merged, options.tracking, options.json)


def _budget(options: argparse.Namespace) -> int:
    sweep = _loaded_sweep(options)
    from agnews_lora.commands import inspect

    return inspect.budget(sweep, options.json)


def _data(options: argparse.Namespace) -> int:
    from agnews_lora.config.experiment import load_experiment

    experiment = load_experiment(options.experiment)
    from agnews_lora.commands import data

    return data.run(experiment, options.json)


def _report(options: argparse.Namespace) -> int:
    from agnews_lora.commands import report

    return report.run(options.sweep, options.to, options.tracking, options.json)


def _ui(options: argparse.Namespace) -> int:
    from agnews_lora.commands import inspect

    return inspect.ui(options.port)


def _doctor(options: argparse.Namespace) -> int:
    from agnews_lora.commands import inspect

    return inspect.doctor(options.json, options.quick)


# Commands that do more than print.
WORKING: Final = (_train, _sweep, _stop, _enqueue, _promote, _serve, _export, _ui)

"""minidiff train: trains a system stage by stage, draws what it has learned, and evaluates it."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import fields
from pathlib import Path

from minidiff import systems
from minidiff.cli import sampling_options
from minidiff.cli.arguments import (
    add_command,
    add_data,
    add_device,
    add_picture_options,
    add_system,
    count,
    distinct,
    effort,
    minutes,
    named_file,
    natural,
    number,
    picture_options,
    print_table,
    prompts_in,
    setting,
)
from minidiff.data.dataset import DATASETS
from minidiff.errors import UserError
from minidiff.files import check_distinct, check_writable
from minidiff.terminal import say, shell, show
from minidiff.training.ranks import ranks

SHEET, RESULTS = "sheet.png", "results.json"                # in --out, beside the model
EACH = 4                                                    # pictures of each prompt on sheet.png


def add(commands) -> None:
    """Adds the command and its arguments. commands: what `add_subparsers` returned."""
    from minidiff.nn.precision import PRECISIONS
    p = add_command(commands, "train", train, help="Train a system, and evaluate it.",
                    epilog="Ctrl-C saves, and so do SIGTERM and SIGHUP (exit status 1); --resume continues, with the "
                           "same result as a run that was never stopped.")
    add_system(p, default=systems.DEFAULT)
    add_data(p, "what to train on (else MNIST from $MINIDIFF_DATA, the cache or a download, or the 10,000 images that "
                "come with minidiff)")
    p.add_argument("--prompts", type=Path, metavar="FILE",
                   help="a text file with a prompt in each line, for previews (else captions of the data)")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (else runs/SYSTEM)")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--seed", type=natural, help="another seed gives another model (else 0)")
    p.add_argument("--effort", type=effort,
                   help="the share of each stage's own steps to make: 0.1 for a quick look (else 1)")
    p.add_argument("--steps", type=count, help="training steps of every stage (else each stage's own)")
    p.add_argument("--batch", type=count, help="samples in a step (else each stage's own)")
    p.add_argument("--lr", type=number, help="peak learning rate (else each stage's own)")
    p.add_argument("--precision", choices=PRECISIONS,
                   help="what the networks compute in (else float32); half precision is meant for a GPU, and slow "
                        "without one")
    p.add_argument("--schedule", metavar="NAME[:KEY=VALUE,...]",
                   help="the noise schedule, for systems that have a choice; minidiff info lists them")
    p.add_argument("--set", type=setting, action="append", metavar="KEY=VALUE",
                   help="a field of the system's configuration, or of a part of it, such as T=500 or "
                        "unet.widths=[96,192]; repeat it for each field")
    p.add_argument("--needs", type=named_file, action="append", metavar="NAME=FILE",
                   help="the file of a trained system that this one is built on (else its own run in runs/NAME, else "
                        "the weights that come with minidiff)")
    p.add_argument("--images", type=natural, default=1000,
                   help="pictures to evaluate at the end; 0 for no evaluation")
    add_device(p)
    add_picture_options(p)


def train(args: argparse.Namespace) -> int:
    from minidiff.data.dataset import load_dataset
    from minidiff.training.loop import Interrupted, NotSaved
    from minidiff.training.run import START, check_run, run

    started = time.monotonic()
    kind = systems.system_class(args.system)
    args.out, options = args.out or systems.RUNS / kind.name, _train_options(args)
    _check(args)
    check_run(args.out, kind, args.resume, options)         # before the data are loaded
    prompts = prompts_in(args.prompts) if args.prompts else None
    data = ranks().in_turn(lambda: load_dataset(args.data, options=picture_options(args)))
    if prompts:
        data.prompts = prompts
    show(f"system: {kind.name}; data: {data.source} ({len(data)} images); run: {args.out}")
    changes = dict(args.set or []) | ({"schedule": args.schedule} if args.schedule else {})
    try:
        trained = run(args.out, kind, data, options, changes=changes, needed=dict(args.needs or []),
                      resume=args.resume, device=args.device)
        if ranks().rank == 0:
            _finish(trained, data, args, started)
    except Interrupted as stop:
        say(f"{stop}; continue with: {_resume_command(args)}")
        return 1
    except NotSaved as error:
        raise UserError(f"{error}; when that is put right, continue with: {_resume_command(args)}") from error
    except KeyboardInterrupt as stop:
        if (args.out / START).exists():
            stop.args = (f"stopped; continue from the last saved state with: {_resume_command(args)}",)
        raise
    return 0


def _train_options(args: argparse.Namespace):
    """The TrainOptions; None where an option was not given, so that resuming can tell."""
    from minidiff.training.run import TrainOptions
    return TrainOptions(**{f.name: getattr(args, f.name) for f in fields(TrainOptions)})


# ---- after the last step -------------------------------------------------------------------------------------

def _finish(trained, data, args: argparse.Namespace, started: float) -> None:
    """Draws sheet.png, evaluates, and writes results.json; the results of training first, which no failure takes."""
    from minidiff.files import write_json
    from minidiff.training.run import MODEL

    system, path, sheet = trained.system, args.out / MODEL, args.out / SHEET
    results = {"system": system.name, "seconds": trained.seconds, "loss": trained.losses}
    rows = [(f"training, {stage}", minutes(seconds)) for stage, seconds in trained.seconds.items()]
    write_json(args.out / RESULTS, results)
    try:
        drawn = _draw(system, data, sheet)
        report = _judge(system, data, args.images)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}; the training is done, and its weights are in {path}") from error
    if report:
        rows = [*report.rows(), *rows]
        results["evaluation"] = report.as_dict()
    results["seconds in all"] = time.monotonic() - started
    write_json(args.out / RESULTS, results)
    print_table([*rows, ("this command in all", minutes(results["seconds in all"])), ("weights", str(path)),
                 *([("samples", str(sheet))] if drawn else []), ("try", _next_command(system, data, path))])


def _draw(system, data, path: Path) -> bool:
    """Draws EACH pictures of each of the data set's prompts; False where there is nothing to draw."""
    from minidiff import pictures

    prompts = [prompt if system.reads_captions else "" for prompt in data.prompts for _ in range(EACH)]
    if system.options() is None or not prompts:
        return False
    images = system.sample(prompts, seed=0)
    pictures.save(pictures.sheet(images, sampling_options.captions_of(prompts), columns=2 * EACH), path)
    return True


def _judge(system, data, count: int):
    """The report on `count` pictures; None where the system or the data set has no judge, or count is 0."""
    from minidiff import evaluation
    from minidiff.cli.evaluate import judged

    judged_now = data.name in evaluation.JUDGES and data.name != evaluation.PICTURES    # whose judge is trained later
    if system.options() is None or not system.reads_captions or not judged_now or not count:
        return None
    # a judge that compares with the data is given the very data, such as emoji of both styles
    return judged(system, count, {}, 0, data if evaluation.takes_data(data.name) else None)


def _next_command(system, data, path: Path) -> str:
    if system.options() is not None:
        prompt = next(iter(data.prompts), "") if system.reads_captions else ""
        model = ["--model", str(path)]
        return shell(["minidiff", "sample", *([*model, "--", prompt] if prompt.startswith("-") else [prompt, *model])])
    return f"python examples/{system.example}" if system.example else shell(["minidiff", "info", "--model", str(path)])


def _resume_command(args: argparse.Namespace) -> str:
    """The command that continues an interrupted run."""
    words = [*ranks().command(), "minidiff", "train", "--system", args.system, "--resume", "--out", str(args.out)]
    words += ["--data", str(args.data)] if args.data else []
    for name, value in picture_options(args).items():
        words += [f"--{name}"] if value is True else [f"--{name}", _as_text(value)]
    words += ["--prompts", str(args.prompts)] if args.prompts else []
    words += ["--device", args.device] if args.device != "cpu" else []
    words += [word for name, path in args.needs or [] for word in ("--needs", f"{name}={path}")]
    words += ["--images", str(args.images)]
    return shell(words)


def _as_text(value) -> str:
    """(48, 32) as "48x32", (255, 128, 0) as "#ff8000"."""
    if isinstance(value, tuple):
        return "x".join(map(str, value)) if len(value) == 2 else "#" + bytes(value).hex()
    return str(value)


# ---- checks of the arguments ---------------------------------------------------------------------------------

def _check(args: argparse.Namespace) -> None:
    from minidiff.evaluation import check_count
    from minidiff.training.run import MODEL
    from minidiff.training.trainer import TrainConfig
    if args.images:                                         # 0: no evaluation
        check_count(args.images)
    if args.lr is not None:
        TrainConfig(lr=args.lr)                             # UserError where it is out of range
    distinct("--needs", args.needs)
    distinct("--set", args.set, taken=["schedule"] if args.schedule else [])
    writes = {"--out": args.out} | {f"{name} in --out": args.out / name for name in (MODEL, SHEET, RESULTS)}
    folder = os.environ.get("MINIDIFF_DATA") if args.data is None or args.data in DATASETS else args.data
    check_distinct(writes, {"--data": Path(folder) if folder else None, "--prompts": args.prompts,
                            "--captions": args.captions,
                            **{f"--needs {name}": path for name, path in args.needs or []}})
    # the first rank looks whether there is a folder: another rank may look when the first has just made it
    ranks().by_first(lambda: [check_writable(args.out / name) for name in (SHEET, RESULTS) if args.out.is_dir()])
    if args.resume and (args.schedule or args.set):
        raise UserError("--schedule and --set cannot be changed by resuming: leave them out, or start a new run with "
                        "another --out")

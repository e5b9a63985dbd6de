"""minidiff evaluate: how well a model's pictures follow their captions, or how many bits it needs for an image."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
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
    natural,
    picture_reading,
    print_table,
)
from minidiff.errors import UserError, refusals
from minidiff.files import user_path
from minidiff.terminal import progress, show


def add(commands) -> None:
    """Adds the command and its arguments. commands: what `add_subparsers` returned."""
    p = add_command(commands, "evaluate", evaluate,
                    help="Measure how well a model's pictures follow their captions.",
                    epilog="For the digits, a frozen classifier reads the pictures (minidiff train --system "
                           "digit-classifier trains another), and the attributes are measured as for the training "
                           "captions. For emoji, the true picture of each name is known. For your own pictures, a CLIP "
                           "judges: minidiff train --system clip --data FOLDER.")
    p.add_argument("--images", type=count, default=1000,
                   help="how many pictures; FID needs many. With --likelihood, how many test images")
    p.add_argument("--likelihood", action="store_true",
                   help="measure bits/dim on test images instead, of the model without a caption: the variational "
                        "bound over --images of them, the flow's over a tenth")
    p.add_argument("--seed", type=natural, default=0, help="seed of the captions, the noise and the choice of images")
    add_system(p, default=None)
    sampling_options.add(p)
    add_data(p, "the pictures that the model was trained on, or with --likelihood test images")
    add_picture_options(p, sized=False)
    p.add_argument("--judge", type=user_path, metavar="FILE",
                   help="the network that judges: a digit-classifier, or for other pictures a CLIP that was trained on "
                        "the same ones (else the system's own run, else what comes with minidiff)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    add_device(p)


def evaluate(args: argparse.Namespace) -> int:
    from minidiff import evaluation
    from minidiff.files import check_distinct, check_writable, write_json

    _check(args)
    if args.json:
        check_writable(args.json, (".json",))
    kind, path = sampling_options.model_file(args)
    options = {} if args.likelihood else sampling_options.sampling_options(kind, args)
    if not args.likelihood:
        evaluation.check_draws(kind)
    model = systems.load_model(kind, path).to(args.device)
    check_distinct({"--json": args.json}, sampling_options.files_of(model) | {
        "--data": args.data and Path(args.data), "--judge": args.judge,
        "the judge": systems.weights_of("digit-classifier")})
    show(f"model: {model.name} ({path})")
    if args.likelihood:
        report = _likelihood(model, args)
    else:
        sampling_options.print_files(model)
        data = _data(model, args)
        if (data.name if data else evaluation.data_of(model)) == "digits":
            show(f"judge: digit-classifier ({args.judge or systems.weights_of('digit-classifier')})")
        report = judged(model, args.images, options, args.seed, data, args.judge)
    print_table(report.rows())
    if args.json:
        write_json(args.json, report.as_dict())
    return 0


def _data(model, args: argparse.Namespace):
    """The data set that --data names; None without it."""
    from minidiff.data.dataset import load_dataset

    if args.data is None:
        return None
    return load_dataset(args.data, options=picture_reading(args), shape=getattr(model.config, "shape", None))


def judged(model, count: int, options: dict, seed: int, data=None, judge: Path | None = None):
    """The report of the judge of the model's data set, behind a progress bar."""
    from minidiff import evaluation

    with refusals(model.name), ExitStack() as bars:                # closed before an error is printed
        def bar(batches):
            return bars.enter_context(progress(batches, "evaluating", unit="batch"))
        return evaluation.evaluate(model, data=data, judge=judge, count=count, options=options, seed=seed, progress=bar)


def _likelihood(model, args: argparse.Namespace):
    from minidiff.data.dataset import DATASETS, load_dataset
    from minidiff.evaluation.likelihood import likelihood

    model.likelihood_denoiser()                             # UserError where it has none, before data are looked for
    data = args.data or model.notes.get("dataset")
    if data and not args.data and data not in DATASETS:
        source = model.notes.get("data", data)              # a folder's pictures, by the folder's name
        raise UserError(f"this model was trained on {ascii(source)[:80]}, which minidiff does not have: name a folder "
                        "of test pictures with --data")
    test = load_dataset(data, "test", picture_reading(args), shape=getattr(model.config, "shape", None))
    with refusals(model.name):
        return likelihood(model, test, count=args.images, seed=args.seed, progress=progress)


def _check(args: argparse.Namespace) -> None:
    """UserError where options do not go together or are out of range."""
    from minidiff.evaluation import check_count

    for option in (*sampling_options.SHORT, "set"):
        if args.likelihood and getattr(args, option) is not None:
            raise UserError(f"--likelihood draws no pictures: leave out --{option}")
    if not args.likelihood:
        check_count(args.images)                            # likelihood() compares it with the number of test images
    if args.likelihood and args.judge:
        raise UserError("--likelihood is judged by the model itself: leave out --judge")
    if picture_reading(args) and not args.data:
        raise UserError(f"--{next(iter(picture_reading(args)))} says how pictures are read: name them with --data")

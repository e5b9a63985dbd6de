"""minidiff verify: checks the laws of q(x_t | x_0) on a noise schedule, or the laws of a scheduler."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from minidiff.cli.arguments import add_command, natural, setting, whole
from minidiff.errors import UserError, user_code
from minidiff.files import check_distinct
from minidiff.terminal import show


def add(commands) -> None:
    """Adds the command and its arguments. commands: what `add_subparsers` returned."""
    from minidiff.diffusion.schedules import SCHEDULES
    p = add_command(commands, "verify", verify,
                    help="Check the closed-form laws of q(x_t | x_0) on a noise schedule, and the samplers on it.",
                    epilog="The exit status is 1 if a law is broken. "
                           "Example: minidiff verify --betas betas.csv --plot marginals.png")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--schedule", metavar="NAME[:KEY=VALUE,...]",
                       help=f"a registered schedule, such as cosine:offset=0.01: {', '.join(SCHEDULES)} (else cosine)")
    which.add_argument("--betas", type=Path, metavar="FILE", help="your own betas: .npy, .csv or .json")
    which.add_argument("--alpha-bar", type=Path, metavar="FILE", help="your own alpha_bar, in the same file formats")
    which.add_argument("--python", metavar="MODULE:FUNCTION",
                       help="your own function, which returns betas or a minidiff Schedule; it is run")
    which.add_argument("--scheduler", metavar="LIBRARY:NAME",
                       help="another library's scheduler, such as diffusers:DDIMScheduler; a registered sampler, such "
                            "as minidiff:heun; or your own MODULE:FACTORY; it is run")
    p.add_argument("--scheduler-config", type=setting, action="append", metavar="KEY=VALUE",
                   help="an option of --scheduler, such as timestep_spacing=trailing; repeat it for each option. "
                        "Those of a registered sampler: schedule (linear), T (1000), spacing (trailing), predicts, eta")
    p.add_argument("--steps", type=whole(2, 1000), metavar="N",
                   help="the number of steps of --scheduler's runs (else 3, 7, 10, 20 and 50)")
    p.add_argument("-T", type=whole(1, 100_000), metavar="T",
                   help="the number of times of --schedule (else the schedule's own default, 1000)")
    p.add_argument("--seed", type=natural, default=0, help="seed of the random numbers that some laws draw")
    p.add_argument("--plot", type=Path, metavar="FILE",
                   help="plot mean and variance over t, simulated and in closed form, and the SNR (.png, .jpg)")
    p.add_argument("--watch", type=Path, metavar="IMAGE",
                   help="also add noise to this picture step by step, and measure its pixels")
    p.add_argument("-o", "--out", type=Path, metavar="FILE",
                   help="the file for the pictures of --watch (.png, .jpg, .gif; else watch.png)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to a file")


def verify(args: argparse.Namespace) -> int:
    """0 if no law is broken, else 1."""
    run, theirs = _verify_scheduler if args.scheduler else _verify_schedule, args.scheduler or args.python
    with user_code(theirs) if theirs else nullcontext():
        return run(args)


def _verify_schedule(args: argparse.Namespace) -> int:
    from minidiff import pictures
    from minidiff import verify as laws
    from minidiff.files import write_json
    from minidiff.verify import user_schedule, watch

    out = args.out or Path("watch.png")
    _check_schedule_arguments(args, out)
    # absolute paths: the user's code runs next, and may change the current folder
    plot_at, out_at, json_at = (path and path.absolute() for path in (args.plot, args.watch and out, args.json))
    image = watch.load_image(args.watch) if args.watch else None
    schedule, said, betas = _schedule(args)

    show(f"{said}; T = {schedule.T}, alpha_bar from {schedule.alpha_bar[0]:.6g} to {schedule.alpha_bar[-1]:.3g}")
    for note in user_schedule.notes(schedule):
        show(f"note: {note}")
    rows = laws.report(schedule, betas=betas, seed=args.seed)
    if image is not None:
        frames = watch.watch(schedule, image, 37 if out.suffix.lower() == ".gif" else 10, seed=args.seed)
        states = frames if len(frames) <= 10 else frames[::4]
        show("", *watch.table(states).split("\n"))
        rows += watch.rows(states, args.seed)
    show("", *laws.table(rows).split("\n"))
    if args.plot:
        pictures.save(watch.plot(schedule, seed=args.seed), plot_at)
        show(f"plot     {args.plot}")
    if image is not None:
        watch.save(schedule, frames, out_at)
        show(f"watch    {out}")
    if args.json:
        write_json(json_at, laws.as_dict(schedule, rows, source=said, seed=args.seed))
    return int(any(row.verdict == laws.BROKEN for row in rows))


def _schedule(args: argparse.Namespace):
    """The schedule that the options name, as a UserSchedule. It may keep signal at its end: a law reports that."""
    from minidiff.diffusion.schedules import schedule_from
    from minidiff.verify.user_schedule import UserSchedule, from_file, from_function

    if args.python:
        return from_function(args.python)
    if args.betas or args.alpha_bar:
        return from_file(args.betas, "betas") if args.betas else from_file(args.alpha_bar, "alpha_bar")
    name = args.schedule or "cosine"
    return UserSchedule(schedule_from(name, args.T, allow_signal=True), f"the {name} schedule")


def _verify_scheduler(args: argparse.Namespace) -> int:
    """The laws of a scheduler, another library's or one of our samplers."""
    from minidiff import verify as laws
    from minidiff.files import write_json
    from minidiff.verify import scheduler as schedulers

    _check_scheduler_arguments(args)
    json_at = args.json and args.json.absolute()            # the user's code runs next, and may change the folder
    config = dict(args.scheduler_config or [])
    if args.scheduler.startswith("minidiff:"):
        config.setdefault("schedule", "linear")             # so that the heading names it
    scheduler = schedulers.load(args.scheduler, config)
    show(f"{args.scheduler}{''.join(f', {key} {value}' for key, value in config.items())}; "
         f"T = {len(scheduler.alpha_bar)}, predicts {scheduler.predicts}", "")
    rows = schedulers.report(scheduler, [args.steps]) if args.steps else schedulers.report(scheduler)
    show(*laws.table(rows).split("\n"))
    if args.scheduler.startswith("minidiff:"):
        show("note: minidiff verify --schedule NAME tests the registered samplers on that schedule, by more laws")
    if args.json:
        write_json(json_at, {"scheduler": args.scheduler, "config": config, "rows": schedulers.as_dicts(rows)})
    return int(any(row.verdict == laws.BROKEN for row in rows))


# ---- checks of the arguments -------------------------------------------------------------------------------

def _check_schedule_arguments(args: argparse.Namespace, out: Path) -> None:
    from minidiff import pictures
    from minidiff.files import check_writable

    if args.scheduler_config or args.steps:
        raise UserError("--scheduler-config and --steps are read only with --scheduler")
    if args.out and not args.watch:
        raise UserError("-o is read only with --watch, whose picture it names")
    if args.T is not None and (args.betas or args.alpha_bar or args.python):
        raise UserError("-T is read only with --schedule: a table has as many times as it has numbers")
    for path in (args.plot, out if args.watch else None):
        if path:
            pictures.check_writable(path)
    if args.json:
        check_writable(args.json, (".json",))
    check_distinct({"--plot": args.plot, "--out": out if args.watch else None, "--json": args.json},
                   {"--betas": args.betas, "--alpha-bar": args.alpha_bar, "--watch": args.watch})


def _check_scheduler_arguments(args: argparse.Namespace) -> None:
    from minidiff.files import check_writable

    for option, why in (("T", ", which brings its own times"), ("plot", ": it plots the marginals of a schedule"),
                        ("watch", ": it adds noise by a schedule"), ("out", ": it names the picture of --watch")):
        if getattr(args, option) is not None:
            raise UserError(f"{'-T' if option == 'T' else '--' + option} is not read with --scheduler{why}")
    if args.json:
        check_writable(args.json, (".json",))

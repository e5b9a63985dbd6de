"""The command line: minidiff train, sample, evaluate, verify, info.

What the user can put right (an argument, a file, a missing device) is said in one sentence, with exit status 2.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from minidiff import __version__, systems
from minidiff.cli import arguments, verify
from minidiff.cli import ranks as cli_ranks
from minidiff.cli import systems as cli_systems
from minidiff.errors import UserError
from minidiff.training.ranks import rank_and_size, ranks

LONGEST_PROMPT = 2_000                                      # characters; what a caption keeps is far shorter
EVALUATED_SCALE, EVALUATED_STEPS = 2.0, 15                  # guidance and sampling steps, where none are asked for
SAMPLED_SCALE, SAMPLED_STEPS = 3.0, 20                      # the same, of minidiff sample
SHOWN = 64                                                  # samples of a trajectory, at most


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0 done, 1 interrupted and saved, or a law broken, 2 a mistake to put right.
    """
    if rank_and_size()[1] > 1:
        return cli_ranks.together(lambda: _main(argv))
    return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)     # of overflows; what they lead to is checked
        warnings.showwarning = lambda message, *_: print(f"minidiff: {message}", file=sys.stderr)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        if args.command is not train and ranks().size > 1:
            raise UserError(f"mpiexec started {ranks().size} ranks of minidiff, which only train divides among them: "
                            "leave out mpiexec")
        from minidiff.engine.backend import check_device, keep_freed_memory
        if getattr(args, "device", None):
            check_device(args.device)
        keep_freed_memory()
        return args.command(args) or 0
    except UserError as error:
        print(f"minidiff: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:                              # of the user's own code: no status 0 for that
        print(f"minidiff: code that was run asked to exit, with status {stop.code}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminidiff: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:                                 # the reader of our output has gone
        return 1
    except OSError as error:
        print(f"minidiff: {error.filename or 'the system'}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not type(error).__module__.startswith("cupy"):
            raise
        print(f"minidiff: the GPU failed: {' '.join(str(error).split())}; start the command again (train: with "
              "--resume)", file=sys.stderr)
        return 2
    except MemoryError:
        print("minidiff: out of memory: ask for fewer images at a time (--count, --images, --batch)", file=sys.stderr)
        return 2


# --- the commands -----------------------------------------------------------------------------------------

def train(args: argparse.Namespace) -> int:
    from minidiff import pictures
    from minidiff.data import mnist
    from minidiff.files import write_json
    from minidiff.training import main_job as training
    from minidiff.training import run as stages
    from minidiff.training.main_job import TrainConfig
    from minidiff.training.trainer import Interrupted, open_run

    args.out = cli_systems.out_of(args)
    if args.system != cli_systems.MAIN:
        for name in ("steps", "batch", "lr", "precision", "device", "images", "scale", "sample_steps"):
            if getattr(args, name) != args.defaults[name]:
                raise UserError(f"--{name.replace('_', '-')} is read by {cli_systems.MAIN} only: the other systems "
                                "bring their own, and --effort makes their stages shorter or longer")
        return cli_systems.train(args)
    if args.effort != 1:
        raise UserError(f"--effort is read by the other systems only: give {cli_systems.MAIN} its --steps")
    if args.images == 1:
        raise UserError("--images must be 0, for no evaluation, or at least 2, not 1")
    started = time.monotonic()
    config = TrainConfig(steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed, precision=args.precision)
    if (args.out / stages.BEGUN).exists():
        raise UserError(f"{args.out} holds a run of another system: choose another --out")
    open_run(args.out, args.resume)                         # what cannot be written is said before the work
    data = ranks().in_turn(lambda: mnist.load(args.data))
    print(f"training on {data.source} ({len(data)} images); the run is in {args.out}, "
          f"its pictures in {args.out / 'samples.png'}")
    try:
        trainer = training.run(args.out, data, config, resume=args.resume, device=args.device)
    except Interrupted as stop:
        print(f"minidiff: {stop}; go on with: {_resume_command(args)}", file=sys.stderr)
        return 1
    if ranks().rank > 0:
        return 0
    model = trainer.averaged()
    print(f"trained in {_minutes(trainer.seconds)}: {args.out / 'model.safetensors'}")
    sheet = args.out / "sheet.png"
    pictures.save(_sheet_of(model, training.PROMPTS, args.scale), sheet)
    results = {"steps": trainer.n, "loss": sum(trainer.losses[-100:]) / len(trainer.losses[-100:]),
               "train_seconds": trainer.seconds}
    if args.images:
        report = _report(model, args, {"scale": args.scale, "steps": args.sample_steps})
        in_all = time.monotonic() - started
        times = [("training", _minutes(trainer.seconds)), ("this command in all", _minutes(in_all))]
        _print_table([*report.rows(), *times])
        results["evaluation"] = report.as_dict()
    results["seconds"] = time.monotonic() - started
    write_json(args.out / "results.json", results)
    print(f"weights  {args.out / 'model.safetensors'}\nsamples  {sheet}\nloss     {args.out / 'loss.png'}\n"
          f'try      minidiff sample "a bold seven leaning left" --model {args.out / "model.safetensors"}')
    return 0


def _resume_command(args: argparse.Namespace) -> str:
    """The command that goes on with an interrupted run, with the options that it was given."""
    words = [*ranks().command(), "minidiff", "train", "--resume", "--out", str(args.out)]
    for name in ("images", "scale", "sample_steps", "seed"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--data", str(args.data)] if args.data else []
    words += ["--device", args.device] if args.device != "cpu" else []
    return shlex.join(words)


def sample(args: argparse.Namespace) -> int:
    import numpy as np

    from minidiff import pictures
    from minidiff.engine.backend import to_numpy

    if len(args.prompt) > LONGEST_PROMPT:
        print(f"minidiff: the prompt has {len(args.prompt)} characters: the first {LONGEST_PROMPT} were read",
              file=sys.stderr)
    prompt = args.prompt[:LONGEST_PROMPT]
    if args.system != cli_systems.MAIN:
        return cli_systems.sample(args, prompt)
    if args.set:
        raise UserError(f"--set is read by the other systems only: {cli_systems.MAIN} has --scale, --steps, --sampler")
    args.scale = SAMPLED_SCALE if args.scale is None else args.scale
    args.steps, args.sampler = args.steps or SAMPLED_STEPS, args.sampler or "dpm++2m"
    pictures.check_writable(args.out)
    if args.trajectory:
        pictures.check_writable(args.trajectory)
        if args.trajectory.resolve() == args.out.resolve():
            raise UserError(f"--out and --trajectory are both {args.out}: name two files")
    model = _load(args, args.steps)

    from tqdm import tqdm
    title = prompt.strip() or "(no caption)"
    way, started = [], time.monotonic()
    steps = model.trajectory([prompt] * args.count, scale=args.scale, steps=args.steps, seed=args.seed,
                             sampler=args.sampler)
    with tqdm(total=args.steps, unit="step", desc="sampling", dynamic_ncols=True) as bar:
        for state in steps:
            if args.trajectory:
                way.append((state.t, to_numpy(state.x_t[:SHOWN])))                  # (S, B, H, W, C)
            bar.update(bool(state.step))
    images = to_numpy(state.x_t)
    pictures.save(pictures.sheet(images, title=title), args.out)
    print(f"{args.count} x {title[:60]!r} in {time.monotonic() - started:.1f} s: {args.out}")
    if args.trajectory:
        states = np.stack([x_t for _, x_t in way])
        if args.trajectory.suffix.lower() == ".gif":
            pictures.gif(states, args.trajectory, title=title)
        else:
            labels = [f"t = {t}" if t >= 0 else "clean" for t, _ in way]
            pictures.save(pictures.strip(states[:, :8], labels=labels), args.trajectory)
        print(f"trajectory: {args.trajectory}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from minidiff.files import check_writable, write_json

    if args.likelihood and args.train_judge:
        raise UserError("--likelihood asks no judge: leave out --train-judge")
    for option in ("scale", "sample_steps"):
        if args.likelihood and getattr(args, option) is not None:
            raise UserError(f"--likelihood draws no pictures: leave out --{option.replace('_', '-')}")
    if args.system != cli_systems.MAIN and args.likelihood:
        raise UserError(f"--likelihood is measured of {cli_systems.MAIN} only: leave out --system {args.system}")
    if args.set and args.system == cli_systems.MAIN:
        raise UserError(f"--set is read by the other systems only: {cli_systems.MAIN} has --scale and --sample-steps")
    if args.data and not (args.train_judge or args.likelihood):
        raise UserError("--data is read only with --train-judge or --likelihood: the shipped judge brings all that it "
                        "compares with")
    if args.json:
        check_writable(args.json, (".json",))
    if args.system == cli_systems.MAIN:
        args.scale = EVALUATED_SCALE if args.scale is None else args.scale
        args.sample_steps = EVALUATED_STEPS if args.sample_steps is None else args.sample_steps
        options = {"scale": args.scale, "steps": args.sample_steps}
        model = _load(args, args.sample_steps)
    else:
        model, options = cli_systems.captioned(args)
    with cli_systems.refusals(args.system):
        report = _likelihood(model, args) if args.likelihood else _report(model, args, options)
    _print_table(report.rows())
    if args.json:
        write_json(args.json, report.as_dict())
    return 0


def info(args: argparse.Namespace) -> int:
    import numpy
    import scipy

    from minidiff.data import mnist
    from minidiff.engine.backend import check_device
    from minidiff.engine.cuda import launch as cuda
    from minidiff.engine.parallel import cores
    try:
        check_device("cuda")
        gpu = "yes"
    except UserError as error:
        gpu = f"no ({str(error).split(':')[0]})"
    _print_table([
        ("minidiff", f"{__version__} in {Path(__file__).parents[1]}"),
        ("numpy, scipy", f"{numpy.__version__}, {scipy.__version__}"),
        ("cores, GPU", f"{cores()}, {gpu}"),
        ("kernels", ", ".join(f"{family} {max(cuda.versions(family))}" for family in cuda.families())),
        ("data cache", str(mnist.cache_dir())),
        ("systems", cli_systems.trained()),
        *cli_systems.described(args.model),
    ])
    return 0


# --- what they share --------------------------------------------------------------------------------------

def _load(args: argparse.Namespace, steps: int):
    """The model of --model; UserError where it cannot do what is asked of it."""
    from minidiff.systems.text_to_image import TextToImage
    model = TextToImage.load(args.model)
    if steps > model.schedule.T:
        raise UserError(f"--steps must be at most {model.schedule.T}, the times that this model knows, not {steps}")
    return model.to(args.device)


def _report(model, args: argparse.Namespace, options: dict):
    from tqdm import tqdm

    from minidiff.evaluation.judge import cached_judge
    from minidiff.evaluation.judge import evaluate as judge_model

    judge = cached_judge(args.data, train=getattr(args, "train_judge", False))
    with tqdm(desc="evaluating", unit="batch", dynamic_ncols=True) as bar:          # closed before any error is told
        def progress(batches):
            bar.reset(len(batches))
            for batch in batches:
                yield batch
                bar.update()
        return judge_model(model, count=args.images, options=options, seed=args.seed, judge=judge, progress=progress)


def _likelihood(model, args: argparse.Namespace):
    from tqdm import tqdm

    from minidiff.data import mnist
    from minidiff.evaluation.likelihood import likelihood

    return likelihood(model, mnist.load(args.data, "test"), count=args.images, seed=args.seed,
                      progress=lambda items, what: tqdm(items, desc=what, dynamic_ncols=True))


def _sheet_of(model, prompts: Sequence[str], scale: float):
    """Four samples of each prompt, each with its caption."""
    from minidiff import pictures
    captions = [prompt for prompt in prompts for _ in range(4)]
    images = model.sample(captions, scale=scale, seed=0)
    return pictures.sheet(images, [caption or "(no caption)" for caption in captions], columns=8)


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


# --- the arguments ----------------------------------------------------------------------------------------

def _parser() -> argparse.ArgumentParser:
    from minidiff.nn.precision import PRECISIONS
    from minidiff.training.main_job import TrainConfig
    parser = arguments.Parser(
        prog="minidiff", description="Text-to-image diffusion from scratch: train, sample, evaluate.")
    parser.add_argument("--version", action="version", version=f"minidiff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=arguments.Parser)

    def command(name: str, function, help: str, epilog: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=help, description=help, epilog=epilog,
                                formatter_class=arguments.Help)
        p.set_defaults(command=function)
        return p

    p = command("train", train, "Train a model on MNIST and its captions, and evaluate it.",
                "Ctrl-C saves; --resume goes on, and gives the same result as a run that was never stopped.")
    _system(p)
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (else runs/mnist, or runs/SYSTEM)")
    p.add_argument("--effort", type=arguments.effort, default=1.0,
                   help="of --system: the share of its stages' steps to make; 0.1 for a quick look")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--steps", type=arguments.count, default=TrainConfig.steps, help="training steps")
    p.add_argument("--batch", type=arguments.count, default=TrainConfig.batch, help="images in a step")
    p.add_argument("--lr", type=arguments.positive, default=TrainConfig.lr, help="peak learning rate")
    p.add_argument("--precision", choices=PRECISIONS, default=TrainConfig.precision,
                   help="what the network computes in; the half precisions are meant for a GPU, and slow without one")
    p.add_argument("--images", type=arguments.whole(0, 10_000), default=1000,
                   help="images to evaluate at the end; 0 for no evaluation")
    _common(p, scale=EVALUATED_SCALE)
    p.set_defaults(defaults={action.dest: action.default for action in p._actions})

    p = command("sample", sample, "Draw pictures for a caption.",
                'Example: minidiff sample "a bold seven leaning left" --scale 3 --seed 1 --count 16 -o seven.png')
    p.add_argument("prompt", help='a caption, such as "a thin, upright three"; "" for no caption')
    p.add_argument("-o", "--out", type=Path, default=Path("sample.png"), metavar="FILE",
                   help="the picture (.png, .jpg)")
    p.add_argument("--count", type=arguments.count, default=16, help="how many pictures")
    _system(p)
    p.add_argument("--steps", type=arguments.steps,
                   help=f"sampling steps, 1 to 1000: more are finer and slower ({cli_systems.MAIN}: {SAMPLED_STEPS})")
    p.add_argument("--sampler", choices=("dpm++2m", "ddim", "heun", "ddpm"),
                   help=f"the sampler ({cli_systems.MAIN}: dpm++2m)")
    _set(p)
    p.add_argument("--trajectory", type=Path, metavar="FILE",
                   help="also write the way from noise to picture: an animation (.gif) or a strip (.png)")
    _common(p, scale=None, data=False)
    _model(p)

    p = command("evaluate", evaluate, "Measure how well a model's pictures follow their captions.",
                "A frozen classifier reads the digits; the attributes are measured as for the training captions.")
    p.add_argument("--images", type=arguments.two_or_more, default=1000,
                   help="how many pictures; FID wants many. With --likelihood, how many test images")
    p.add_argument("--likelihood", action="store_true",
                   help="measure bits/dim on MNIST's test images instead, of the model without a caption: the "
                        "variational bound over --images of them, the flow's over a tenth")
    _system(p)
    _set(p)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a file, too")
    p.add_argument("--train-judge", action="store_true",
                   help="train the classifier anew from MNIST (once; kept in the cache) in place of the shipped one")
    _common(p, scale=None, sample_steps=None)
    _model(p)

    verify.add(commands)

    p = command("info", info, "Say what is installed, and what a model file holds.", "It changes nothing.")
    _model(p)
    return parser


def _common(p: argparse.ArgumentParser, scale: float | None, data: bool = True,
            sample_steps: int | None = EVALUATED_STEPS) -> None:
    """None is a default that the command fills in, having seen whether the option was given."""
    p.add_argument("--scale", type=arguments.number, default=scale,
                   help="guidance: 0 ignores the caption, 1 follows it, more follows it more strictly"
                        + ("" if scale is not None else f" (else {EVALUATED_SCALE:g}; not with --likelihood)" if data
                           else f" ({cli_systems.MAIN}: {SAMPLED_SCALE:g})"))
    p.add_argument("--seed", type=arguments.natural, default=0, help="another seed, other pictures")
    p.add_argument("--device", default="cpu", help="cpu, or cuda for an NVIDIA GPU")
    if data:
        p.add_argument("--sample-steps", type=arguments.steps, default=sample_steps,
                       help="sampling steps of the pictures that are evaluated"
                            + (f" (else {EVALUATED_STEPS}; not with --likelihood)" if sample_steps is None else ""))
        p.add_argument("--data", type=Path, metavar="DIR",
                       help="folder with MNIST's four files (else $MINIDIFF_DATA, the cache, a download, or the "
                            "10,000 images that come with minidiff)")


def _system(p: argparse.ArgumentParser) -> None:
    p.add_argument("--system", default=cli_systems.MAIN, metavar="NAME",
                   help=f"the system of the literature: {', '.join(systems.SYSTEMS)}")


def _set(p: argparse.ArgumentParser) -> None:
    p.add_argument("--set", type=arguments.setting, action="append", metavar="KEY=VALUE",
                   help="an option of --system's sampling, such as temperature=0.9; once for each. minidiff info "
                        "--model FILE lists a system's, and so does a wrong name")


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", type=Path, metavar="FILE", help="a model.safetensors (else the one shipped)")

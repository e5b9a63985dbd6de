"""Wall-clock from start to 95 % prompt accuracy: minidiff's main job against the recipe that people copy.

    python benchmarks/time_to_quality.py --out runs/quality                   both, up to an hour each
    python benchmarks/time_to_quality.py --out runs/quality --only recipe
    python benchmarks/time_to_quality.py --out runs/quality --resume          continues the runs in that folder
    python benchmarks/time_to_quality.py --out runs/quality --report --picture docs/time_to_quality.png

minidiff is `minidiff train` with its defaults (Trainer); the recipe is public_recipe.py in PyTorch. Both have the same
images, the same cores, the same judge (minidiff's frozen classifier of digits) and the same digits to draw. minidiff
draws captions of real images with scale 2 and 15 steps of DPM-Solver++(2M). The recipe draws classes with 50 steps of
DDIM, in the best of four ways: two guidance scales that the recipe itself uses, each without noise and with the
ancestral sampler's. Each evaluation chooses the way by the first PILOT pictures and counts these too, which favours the
recipe. If their accuracy is more than FAR below the target, no more are drawn.

The clock leaves out evaluations, imports and reading the images.  It includes a contestant's preparation (minidiff:
measuring the images, learning a tokenizer).  A long run may have to share the machine, so the wall-clock and processor
seconds of each step are kept (OUT/NAME.json), and the time is

    seconds = preparation + steps x pace,     pace: the 10th percentile of a step's seconds

For minidiff, which takes minutes, the pace uses wall-clock seconds. For the recipe it uses processor seconds divided by
the number of cores, as if nothing else had run and no core had ever waited, which favours the recipe on a shared
machine. The plain sum of the steps stands beside it. (Preparation uses one thread, and its processor seconds count.)

Evaluations happen at growing intervals of the clock. So 95 % is reached between two evaluations, and both are reported.
The ratio is a lower bound: the recipe's earlier evaluation at that pace, over minidiff's later one in wall-clock
seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from side_by_side import versions
from tqdm import tqdm

from minidiff import checkpoint, pictures
from minidiff.data import digit_captions as captions
from minidiff.data import mnist
from minidiff.data.digits import Digits
from minidiff.engine.backend import keep_freed_memory
from minidiff.engine.parallel import cores
from minidiff.errors import UserError
from minidiff.evaluation.report import prompts_like
from minidiff.files import check_writable, write_json
from minidiff.pictures import plots
from minidiff.pictures.sheets import PAPER
from minidiff.systems import load_system
from minidiff.systems.text_to_image import TextToImage
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import Trainer

FAR, PILOT = 0.15, 60
SAVE_EVERY = 300.0                                          # seconds
AT_A_TIME = 100                                             # pictures that minidiff draws at a time


# --- the contestants --------------------------------------------------------------------------------------

class Minidiff:
    """`minidiff train` with its defaults."""

    by_processor = False                                    # whether its pace uses processor seconds
    title, first, growth, ways = "minidiff, main job", 10.0, 1.2, {"scale 2": 2.0}

    def __init__(self, data: mnist.Images):
        digits = Digits.of(data)
        self.model = TextToImage.new(digits)
        stage = next(self.model.stages(digits))
        config = TrainOptions().for_stage(stage)
        self.inner = Trainer(stage, config, description=self.model.describe() | {"data": digits.fingerprint})
        self.steps, self.step, self.state, self.restore = (config.steps, self.inner.step, self.inner.state,
                                                           self.inner.restore)

    def draw(self, prompts: list[str], way: str, seed: int) -> np.ndarray:
        """Images (N, 28, 28, 1) in [-1, 1] of captions."""
        with self.inner.with_averaged_weights():
            return np.concatenate([
                self.model.sample(prompts[i:i + AT_A_TIME], scale=self.ways[way], steps=15, seed=seed + i)
                for i in range(0, len(prompts), AT_A_TIME)])


class PublicRecipe:
    """The recipe, in the faster of the two layouts."""

    by_processor = True
    title, first, growth = "public recipe, PyTorch", 400.0, 1.5
    ways = {f"scale {scale:g}, eta {eta:g}": (scale, eta) for scale in (1.5, 3.0) for eta in (0.0, 1.0)}

    def __init__(self, data: mnist.Images, channels_last: bool):
        import public_recipe
        self.inner, self.steps = public_recipe.Recipe(data, channels_last=channels_last), public_recipe.STEPS
        self.step, self.state, self.restore = self.inner.step, self.inner.state, self.inner.restore

    def draw(self, prompts: list[str], way: str, seed: int) -> np.ndarray:
        scale, eta = self.ways[way]
        return self.inner.sample(digits_of(prompts), scale=scale, eta=eta, steps=50, seed=seed)


def maker_of(name: str, data: mnist.Images, saved: checkpoint.Checkpoint | None) -> Callable:
    """The contestant's constructor, which the clock includes; it excludes the choice of the layout before."""
    if name == "minidiff":
        return lambda: Minidiff(data)
    import public_recipe
    import torch
    torch.set_num_threads(cores())
    last = saved.meta["channels_last"] if saved else public_recipe.faster_layout(data)
    print(f"{PublicRecipe.title}: channels {'last' if last else 'first'}, {cores()} threads")
    return lambda: PublicRecipe(data, last)


CONTESTANTS = {"minidiff": Minidiff, "recipe": PublicRecipe}


def digits_of(prompts: list[str]) -> np.ndarray:
    return np.array([captions.parse(prompt)[0] for prompt in prompts])


# --- the log ----------------------------------------------------------------------------------------------

class Log:
    """The measurements of one contestant, and the clock that follows from them."""

    def __init__(self, name: str, about: dict):
        self.by_processor, self.about = CONTESTANTS[name].by_processor, about
        self.preparing, self.wall, self.cpu, self.evaluations = 0.0, [], [], []

    def pace(self) -> float:
        """The 10th percentile of a step's seconds."""
        seconds = np.array(self.cpu) / self.about["cores"] if self.by_processor else self.wall
        return float(np.quantile(seconds, 0.1)) if len(seconds) else 0.0

    def seconds(self, step: int | None = None) -> float:
        """The clock after a step, at the pace of the whole run; step 0 is before the first."""
        return self.preparing + (len(self.wall) if step is None else step) * self.pace()

    def plain(self, step: int) -> float:
        """The same in wall-clock seconds, without the pace."""
        return self.preparing + sum(self.wall[:step])

    def save(self, path: Path) -> None:
        write_json(path, {**self.about, "preparing_seconds": self.preparing, "pace_seconds": self.pace(),
                          "clock_seconds": self.seconds(), "steps": len(self.wall), "evaluations": self.evaluations,
                          "wall_seconds": self.wall, "cpu_seconds": self.cpu})

    @classmethod
    def load(cls, path: Path, steps: int | None = None) -> Log:
        """The log of the first `steps` steps, or of all steps."""
        import json
        try:
            saved = json.loads(path.read_text())
            log = cls(path.stem, {key: saved[key] for key in ("contestant", "data", "target", "cores", "versions")})
            log.preparing = saved["preparing_seconds"]
            log.wall, log.cpu = saved["wall_seconds"][:steps], saved["cpu_seconds"][:steps]
            log.evaluations = [e for e in saved["evaluations"] if e["step"] <= len(log.wall)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a log of this benchmark ({error}): choose another --out") from None
        return log


@dataclass(frozen=True)
class Arrival:
    """When the target was reached: at `step` (None if never), but not at the evaluation before, at `before`."""

    before: int
    step: int | None
    best: float

    @classmethod
    def of(cls, log: Log, target: float) -> Arrival:
        reached = [e["step"] for e in log.evaluations if e["accuracy"] >= target]
        step = min(reached, default=None)
        missed = [e["step"] for e in log.evaluations if step is None or e["step"] < step]
        return cls(max(missed, default=0), step, max((e["accuracy"] for e in log.evaluations), default=0.0))


# --- the run ----------------------------------------------------------------------------------------------

def measure(name: str, data: mnist.Images, args: argparse.Namespace) -> None:
    """Trains one contestant until it reaches the target, has no steps left, or the budget is spent."""
    folder, path = args.out / name, args.out / f"{name}.json"
    keeper = checkpoint.CheckpointFolder(folder, keep=2)
    saved = keeper.latest() if args.resume else None
    keeper.prepare(saved.meta["step"] if saved else 0)
    make = maker_of(name, data, saved)
    about = {"contestant": CONTESTANTS[name].title, "data": data.source, "target": args.target, "cores": cores(),
             "versions": versions()}
    began = time.process_time()                             # one thread's work, without other processes' time
    contestant = make()
    if saved:
        contestant.restore(saved)
        log = Log.load(path, contestant.inner.n)
        for key, now in about.items():
            if log.about[key] != now:
                raise UserError(f"{path} was started with {key} {log.about[key]}, not {now}: use the same, or "
                                "choose another --out")
    else:
        log = Log(name, about)
        log.preparing = time.process_time() - began
    judge = load_system("digit-classifier")
    prompts = prompts_like(mnist.packed(), args.count, np.random.default_rng(0))[:args.count]

    def save() -> float:
        log.save(path)                                      # before the state: a log that is longer is cut
        keeper.save(contestant.inner.n, *contestant.state())
        return time.monotonic()

    def evaluate(whole: bool) -> None:
        found, images = accuracy(contestant, prompts, judge, args.target, whole)
        log.evaluations.append({"step": contestant.inner.n, **found})
        checkpoint.save(args.out / f"{name}-samples.safetensors", {"images": images},
                        {"step": contestant.inner.n, **found})
        bar.write(f"{contestant.title}: step {contestant.inner.n}, {log.seconds():.0f} s of the clock: "
                  f"{describe(found)}", file=sys.stderr)

    saved_at = time.monotonic()
    with tqdm(total=args.budget, initial=min(log.seconds(), args.budget), desc=name, dynamic_ncols=True,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of the clock{postfix}") as bar:
        while Arrival.of(log, args.target).step is None:
            over = log.seconds() >= args.budget or contestant.inner.n == contestant.steps
            evaluated = log.evaluations[-1] if log.evaluations else {"step": 0, "count": 0}
            if over and evaluated["step"] == contestant.inner.n and evaluated["count"] == args.count:
                break
            if over or log.seconds() >= next_evaluation(contestant, log):
                evaluate(whole=over)
                saved_at = save()
                continue
            began, cpu = time.perf_counter(), time.process_time()
            loss = contestant.step()
            log.wall.append(time.perf_counter() - began)
            log.cpu.append(time.process_time() - cpu)
            bar.set_postfix_str(f"step {contestant.inner.n}, {log.pace():.3g} s a step, loss {loss:.4f}", refresh=False)
            bar.update(min(log.seconds(), args.budget) - bar.n)
            if time.monotonic() - saved_at > SAVE_EVERY:
                saved_at = save()


def next_evaluation(contestant, log: Log) -> float:
    """The time of the next evaluation, in seconds of the clock: first, first x growth, ..."""
    last = log.seconds(log.evaluations[-1]["step"]) if log.evaluations else 0.0
    if last < contestant.first:
        return contestant.first
    # rounded, so that the times stay the same although the pace changes a little with each step
    return contestant.first * contestant.growth ** round(math.log(last / contestant.first, contestant.growth) + 1)


def accuracy(contestant, prompts: list[str], judge, target: float, whole: bool) -> tuple[dict, np.ndarray]:
    """The share of pictures with the right digit, drawn in the best way, and a picture (uint8) of each digit.

    Draws all prompts if `whole`, or if the accuracy on the first PILOT is near the target.
    """
    asked, first = digits_of(prompts), prompts[:PILOT]

    def right(images, wanted):
        return judge.read(images)[1] == wanted
    drawn = {way: contestant.draw(first, way, seed=0) for way in contestant.ways}
    best = max(drawn, key=lambda way: right(drawn[way], asked[:PILOT]).mean())
    images = drawn[best]
    if len(prompts) > PILOT and (whole or right(images, asked[:PILOT]).mean() >= target - FAR):
        images = np.concatenate([images, contestant.draw(prompts[PILOT:], best, seed=PILOT)])
    good = right(images, asked[:len(images)])
    shown = [int(np.flatnonzero(asked[:len(images)] == digit)[0]) for digit in range(10)
             if (asked[:len(images)] == digit).any()]
    p, n = float(good.mean()), len(good)
    return ({"accuracy": p, "error": math.sqrt(p * (1 - p) / n), "count": n, "way": best},
            np.rint(127.5 * (images[shown].clip(-1, 1) + 1)).astype(np.uint8))


def describe(found: dict) -> str:
    return f"{100 * found['accuracy']:.1f} % +- {100 * found['error']:.1f} of {found['count']}, {found['way']}"


# --- the result -------------------------------------------------------------------------------------------

def report(folder: Path, target: float, picture: Path | None) -> None:
    logs = {name: Log.load(folder / f"{name}.json") for name in CONTESTANTS if (folder / f"{name}.json").exists()}
    if not logs:
        raise UserError(f"{folder} has no run of this benchmark: leave out --report, or name its folder with --out")
    arrivals = {name: Arrival.of(log, target) for name, log in logs.items()}
    print(f"seconds to {100 * target:g} % of the pictures read as the digit asked for, by the frozen judge\n\n"
          "| contestant | steps | pace, s a step | seconds at that pace | seconds as they went by | last evaluation |\n"
          "|---|---|---|---|---|---|")
    for name, log in logs.items():
        last = describe(log.evaluations[-1]) if log.evaluations else "none"
        at, plain = (when(arrivals[name], clock, len(log.wall)) for clock in (log.seconds, log.plain))
        print(f"| {log.about['contestant']} | {arrivals[name].step or len(log.wall)} | {log.pace():.3g} | {at} "
              f"| {plain} | {last} |")
    if len(logs) == 2 and arrivals["minidiff"].step is not None:
        us, them = logs["minidiff"], arrivals["recipe"]
        least = logs["recipe"].seconds(them.before if them.step else None) / us.plain(arrivals["minidiff"].step)
        until = "at its last evaluation below" if them.step else "when it was stopped"
        print(f"\nThe recipe takes more than {least:.1f} times as long as minidiff: its seconds at a pace that favours "
              f"it (processor seconds over cores), {until}, over minidiff's as they went by.")
    for log in logs.values():
        print(f"{log.about['contestant']}: {log.about['data']}, {log.about['cores']} cores, {log.about['versions']}; "
              f"{log.preparing:.1f} s of its seconds are preparing")
    if picture:
        draw(folder, logs, target, picture)
        print(f"picture  {picture}")


def when(arrival: Arrival, clock: Callable[[int], float], steps: int) -> str:
    if arrival.step is None:
        return f"not in {clock(steps):.0f} (best {100 * arrival.best:.1f} %)"
    return f"{clock(arrival.step):.0f} (not yet at {clock(arrival.before):.0f})"


def draw(folder: Path, logs: dict[str, Log], target: float, path: Path) -> None:
    """Accuracy against seconds, and beside it the ten digits as each drew them at its last evaluation."""
    from PIL import Image
    series = [(log.about["contestant"], [log.seconds(e["step"]) for e in log.evaluations],
               [100 * e["accuracy"] for e in log.evaluations], "o-") for log in logs.values()]
    seconds = [s for _, x, _, _ in series for s in x]
    series.append(("", [min(seconds), max(seconds)], [100 * target] * 2, "--"))
    curve = plots.panels([plots.Panel(f"Pictures read as the digit asked for (dashed: {100 * target:g} %)",
                                      "seconds of training", "%", series, log_x=True)], width=5.2, height=4.6)
    sheets = []
    for name, log in logs.items():
        saved = checkpoint.load(folder / f"{name}-samples.safetensors")
        title = f"{log.about['contestant']}, after {log.seconds(saved.meta['step']):.0f} s"
        sheets.append(pictures.sheet(saved.tensors["images"], columns=5, scale=2, title=title))
    # the curve at the left, the sheets below each other at the right
    paper = Image.new("RGB", (curve.width + max(s.width for s in sheets),
                              max(curve.height, sum(s.height for s in sheets))), PAPER)
    paper.paste(curve, (0, 0))
    for sheet, top in zip(sheets, np.cumsum([0] + [s.height for s in sheets]).tolist(), strict=False):
        paper.paste(sheet, (curve.width, top))
    pictures.save(paper, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_quality"), help="the runs' folder")
    parser.add_argument("--only", choices=CONTESTANTS, help="run one of the two")
    parser.add_argument("--resume", action="store_true", help="continue the runs in --out")
    parser.add_argument("--report", action="store_true", help="train nothing: report the runs in --out")
    parser.add_argument("--budget", type=float, default=3600.0, metavar="SECONDS", help="of the clock, each (3600)")
    parser.add_argument("--target", type=float, default=0.95, help="share of pictures (0.95)")
    parser.add_argument("--count", type=int, default=500, help="pictures of an evaluation (500)")
    parser.add_argument("--threads", type=int, default=cores(), help="cores to use (all)")
    parser.add_argument("--data", metavar="DIR", help="MNIST's folder (as in minidiff train)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the result, a .png")
    args = parser.parse_args()
    try:
        run(args)
    except UserError as error:
        print(f"benchmarks/time_to_quality.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nstopped; --resume continues from the last saved state, at most five minutes old", file=sys.stderr)
        raise SystemExit(130) from None


def run(args: argparse.Namespace) -> None:
    if not 1 <= args.threads <= cores():
        raise UserError(f"--threads must be 1 to {cores()}, the cores of this process, not {args.threads}")
    if not 10 <= args.count <= 10_000 or not 0 < args.target <= 1 or not args.budget > 0:
        raise UserError("--count must be 10 to 10000, --target above 0 and at most 1, --budget above 0")
    if args.picture:
        check_writable(args.picture, (".png",))
    if not args.report:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
        keep_freed_memory()
        args.out.mkdir(parents=True, exist_ok=True)
        data = mnist.load(args.data, quiet=True)
        for name in [args.only] if args.only else CONTESTANTS:
            measure(name, data, args)
    report(args.out, args.target, args.picture)


if __name__ == "__main__":
    main()

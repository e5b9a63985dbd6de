"""How few evaluations of the network are enough?  FID against evaluations for every sampler, with and without guidance.

    python examples/few_steps.py                            the shipped weights; writes few_steps.png
    python examples/few_steps.py --model runs/text-to-image/model.safetensors --count 2000

    none        the conditional model, scale 1: one evaluation at each time
    all         eps = eps_uncond + scale (eps_cond - eps_uncond) at every time: two evaluations
    interval    the same where low < sigma_t / alpha_t <= high, and scale 1 elsewhere   Kynkaanniemi et al. 2024

All three are drawn over the same axis: how often the network is evaluated for one picture, whatever the sampler and the
guidance need for a step.  For each number of evaluations a run makes as many steps as it allows, at least two.  All
samplers of samplers.SAMPLERS are measured, your own too, except those of consistency models.  All pictures have the
same captions, those of real images, and the same noise.

Each row is kept in a file when it is measured, so a run that was stopped goes on where it was.  The file's name holds a
hash of what the row depends on: both networks' weights, minidiff's code and the options.  The code of a sampler from
elsewhere is not part of it: after a change there, name other --rows.  FID depends on the number of pictures: compare it
with its floor, that of as many real images (evaluation/report.py).
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np

import minidiff
from minidiff import pictures, systems
from minidiff.data import mnist
from minidiff.diffusion.guidance import ClassifierFree, GuidanceInterval
from minidiff.diffusion.samplers import SAMPLERS, Sampler, sample, times
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import SampleStreams, generator
from minidiff.errors import UserError, refusals, run_main
from minidiff.evaluation import LEAST, MOST, data_of
from minidiff.evaluation.fidelity import measure
from minidiff.evaluation.judge import fid, load_judge
from minidiff.evaluation.report import draw, prompts_like, real_features
from minidiff.files import write_json
from minidiff.pictures import plots
from minidiff.systems.text_to_image import TextToImage
from minidiff.terminal import progress

GUIDANCE = ("none", "all", "interval")


class Counting:
    """In place of a network: it counts for how many samples it is asked."""

    predicts, samples = "v", 0

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def __call__(self, x_t, t, cond=None):
        self.samples += len(x_t)
        return 0 * x_t


def evaluations(schedule: Schedule, sampler: Sampler, steps: int, options: dict) -> int:
    """How often the network is evaluated for one picture, by a run of the sampler without the network."""
    counting, null = Counting(schedule), (np.zeros((1, 1)),)
    high = options.get("interval_high", math.inf)
    guided = GuidanceInterval(ClassifierFree(counting, options["scale"], null), options.get("interval_low", 0.0), high)
    sample(sampler(guided, np.zeros((1, 1)), times(schedule, steps), null, streams=SampleStreams(0, 1)))
    return counting.samples


def runs(schedule: Schedule, ways: dict[str, dict], budgets) -> list[tuple[str, str, dict, int]]:
    """(sampler, guidance, options, evaluations): for each budget the most steps that it allows, cheapest runs first."""
    found = set()
    for name, entry in SAMPLERS.items():
        for way, options in ways.items():
            counts = {} if entry.consistency else {n: evaluations(schedule, entry, n, options)
                                                   for n in range(2, min(max(budgets), schedule.T) + 1)}
            for budget in budgets:
                if allowed := [n for n, count in counts.items() if count <= budget]:
                    found.add((counts[allowed[-1]], name, way, allowed[-1]))
    return [(name, way, ways[way] | {"sampler": name, "steps": n}, count) for count, name, way, n in sorted(found)]


def source() -> list[Path]:
    """The files of all code that draws and measures."""
    return [Path(__file__), *sorted(Path(minidiff.__file__).parent.rglob("*.py"))]


def main(model: str | None = None, *, count: int = 200, budgets=(4, 6, 8, 12, 16, 25, 50), scale: float = 2.0,
         low: float = 0.2, high: float = 3.0, rows: str = "runs/few-steps", out: str = "few_steps.png") -> list[dict]:
    if not LEAST <= count <= MOST:
        raise UserError(f"--count must be from {LEAST}, for recall, to {MOST}, the real images, not {count}")
    if min(budgets) < 4 or max(budgets) > 1000:             # two guided steps, and as many as the times of a schedule
        raise UserError(f"--evaluations must be from 4 to 1000, not {', '.join(map(str, budgets))}")
    pictures.check_writable(out)                            # fails now, not after the work
    system = systems.load_model(TextToImage, model)
    if (data := data_of(system)) != "digits":
        raise UserError(f"{system.file} was trained on {ascii(data)[:40]}, and the judge reads digits only")
    ways = dict(zip(GUIDANCE, ({"scale": 1.0}, {"scale": scale},
                               {"scale": scale, "interval_low": low, "interval_high": high}), strict=True))
    with refusals("few_steps"):
        planned = runs(system.schedule, ways, budgets)

    # --- captions of `count` real images, and what the pictures are compared with ---
    judge, real = load_judge(), mnist.packed()
    prompts = prompts_like(real, count, generator(0, "captions of few steps"))[:count]
    compared = real_features(judge, real, count, generator(0, "real images beside few steps"))  # (draws, count, D)
    floor = float(np.mean([fid(judge, features) for features in compared]))

    # --- every run that is not in its file yet ---
    state = hashlib.sha256(b"".join(path.read_bytes() for path in [system.file, judge.file, *source()])).hexdigest()
    asked, table = [], []
    for name, way, options, cost in planned:
        key = hashlib.sha256(f"{state} {count} {sorted(options.items())}".encode()).hexdigest()[:12]
        asked.append((Path(rows) / f"{name}-{way}-{options['steps']}-{key}.json", name, way, options, cost))
    try:
        Path(rows).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--rows: {rows} cannot be made: {error.strerror}") from None
    missing = sum(cost for path, *_, cost in asked if not path.exists())
    with progress(title="few steps", total=missing * count, unit="evaluation", unit_scale=True) as bar:
        for path, name, way, options, cost in asked:
            if not path.exists():
                bar.set_postfix_str(f"{name}, guidance {way}, {cost} evaluations")

                def drawn(batches, cost=cost):
                    for batch in batches:
                        yield batch
                        bar.update(cost * (batch.stop - batch.start))
                found = measure(draw(system, prompts, options, 0, drawn), prompts, compared[0], judge)
                write_json(path, {"sampler": name, "guidance": way, "steps": options["steps"], "evaluations": cost,
                                  "fid": found.fid, "digit": found.digit, "recall": found.recall})
            table.append(json.loads(path.read_text(encoding="utf-8")))

    print(f"{system.file}, {count} pictures, scale {scale:g}, interval {low:g} to {high:g}; FID's floor {floor:.1f}\n\n"
          "| guidance | sampler | steps | evaluations | FID | digit | recall |\n|---|---|---|---|---|---|---|")
    for r in sorted(table, key=lambda r: (GUIDANCE.index(r["guidance"]), r["sampler"], r["steps"])):
        print(f"| {r['guidance']} | {r['sampler']} | {r['steps']} | {r['evaluations']} | {r['fid']:.1f} "
              f"| {100 * r['digit']:.1f} % | {100 * r['recall']:.1f} % |")
    titles = {"none": "no guidance", "all": f"guidance, scale {scale:g}",
              "interval": f"scale {scale:g} at {low:g} < noise <= {high:g}"}
    pictures.save(picture(table, floor, titles), out)
    return table


def picture(table: list[dict], floor: float, titles: dict[str, str]):
    """A panel for each way of guidance, a line for each sampler; in grey the floor and the best of all panels."""
    places = sorted({r["evaluations"] for r in table})
    best = [min(r["fid"] for r in table if r["evaluations"] <= n) for n in places]
    panels = []
    for way, title in titles.items():
        series = [("", places, best, ":"), ("", places, [floor] * len(places), "--")]
        for name, entry in SAMPLERS.items():
            style = "s--" if entry.noise else "^-" if entry.history > 1 else "o-"
            line = [(r["evaluations"], r["fid"]) for r in table if (r["guidance"], r["sampler"]) == (way, name)]
            if line:
                series.append((name, *zip(*sorted(line), strict=True), style))
        panels.append(plots.Panel(title, "evaluations of the network for a picture", "FID", series, True, True))
    return plots.panels(panels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="FILE", help="a text-to-image model of digits (else the run in runs/, else "
                                                        "the shipped weights)")
    parser.add_argument("--count", type=int, default=200, help="pictures of each row (200); FID needs many")
    parser.add_argument("--evaluations", type=int, nargs="+", dest="budgets", default=(4, 6, 8, 12, 16, 25, 50),
                        metavar="N", help="of the network for a picture, at most, of each row (4 6 8 12 16 25 50)")
    parser.add_argument("--scale", type=float, default=2.0, help="of guidance (2)")
    parser.add_argument("--low", type=float, default=0.2, help="noise level below which nothing is guided (0.2)")
    parser.add_argument("--high", type=float, default=3.0, help="noise level above which nothing is guided (3)")
    parser.add_argument("--rows", default="runs/few-steps", metavar="FOLDER", help="where the rows are kept")
    parser.add_argument("--out", default="few_steps.png")
    run_main(main, **vars(parser.parse_args()))

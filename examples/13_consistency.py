"""A teacher and what was distilled from it: the same noise and prompts, in 1, 2 and 4 steps beside many.

    python examples/13_consistency.py                     draws consistency.png, with the trained consistency model
    python examples/13_consistency.py --train runs/x      trains it first, in that folder
    python examples/13_consistency.py --measure 500       also prints a table: accuracy, FID, calls of the network

    teacher     DDIM with classifier-free guidance, which calls the network twice a step; few steps are blurred
    student     f(x_t, t) is where the teacher's path ends, in one call; each further step noises and draws again

One step of the student starts from the noise that the teacher's path starts from, so both should end at the same digit.
More steps add new noise, and end at others.
"""

import argparse
from pathlib import Path

import numpy as np

from minidiff import pictures, systems
from minidiff.data.dataset import load_dataset
from minidiff.errors import run_main
from minidiff.evaluation import evaluate
from minidiff.systems.consistency import Consistency
from minidiff.training.run import TrainOptions, run

PROMPTS = ["a bold seven leaning left", "a thin, upright three", "a wide zero", "5", "a narrow eight", "a heavy four"]
FEW, MANY = (1, 2, 4), 32                                   # steps


def settings(student: Consistency) -> list[tuple]:
    """(row, system, its options, calls of the network for a picture): the teacher in many steps, both in few."""
    teacher, guided = student.teacher(), {"sampler": "ddim", "scale": student.config.scale}
    rows = [(f"teacher, {steps}", teacher, guided | {"steps": steps}, 2 * steps) for steps in (MANY, *reversed(FEW))]
    return rows + [(f"student, {steps}", student, {"steps": steps}, steps) for steps in FEW]


def table(rows: list[tuple], count: int) -> list[str]:
    """Measures the rows; returns them as Markdown."""
    lines = [f"| system, steps | calls | digit | attributes | FID of {count} | s a picture |", "|---" * 6 + "|"]
    print("\n".join(lines))
    for label, system, options, calls in rows:
        r = evaluate(system, count=count, options=options)
        lines.append(f"| {label} | {calls} | {100 * r.digit_accuracy:.1f} % | {100 * r.agreement:.1f} % | {r.fid:.1f} "
                     f"| {r.seconds_per_image:.3f} |")
        print(lines[-1], flush=True)
    return lines


def main(model: str | None = None, train: str | None = None, effort: float = 1.0, data: str | None = None,
         count: int = 0, seed: int = 0, out: str = "consistency.png", config=None) -> list[str]:
    """Draws each prompt in every setting; returns the table's lines, where it is asked for."""
    pictures.check_writable(out)                            # fails now, not after the training
    if train:
        begun = (Path(train) / "run.json").exists()
        student = run(train, Consistency, load_dataset(data), TrainOptions(seed=seed, effort=effort), config=config,
                      resume=begun).system
    else:
        student = systems.load_system("consistency", model)
    rows = settings(student)
    drawn = [system.sample(PROMPTS, seed=seed, **options) for _, system, options, _ in rows]       # (B, H, W, C) each
    labels = [label for label, *_ in rows]
    pictures.save(pictures.strip(np.stack(drawn), PROMPTS, labels=labels, columns=len(rows)), out)
    print(f"{', '.join(labels)} steps -> {out}")
    return table(rows, count) if count else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="weights (default: those of runs/consistency, else those of the package)")
    parser.add_argument("--train", help="train first, in this folder; resumes a run that it holds")
    parser.add_argument("--effort", type=float, default=1.0, help="the share of the training steps to take")
    parser.add_argument("--data", help="folder with MNIST's files")
    parser.add_argument("--measure", type=int, default=0, dest="count", help="pictures in each row of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="consistency.png")
    run_main(main, **vars(parser.parse_args()))

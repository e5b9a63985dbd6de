"""Pictures from disk against what training needs: images a second, and memory.

    python benchmarks/reading.py                            20,000 pictures of 64 x 64 in a temporary folder
    python benchmarks/reading.py --count 100000 --size 32

Makes PNG files with captions, and then, each in a process of its own: reads the folder for the first time (decodes
every picture into the cache); reads it again (checks the cache); and draws batches in the order of the epochs, once
from memory that the system has, and the text-to-image system's training steps on the same pictures.  Memory: the
largest that was the process's own; pages of the mapped file, which the system may take back, stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from side_by_side import positive
from tqdm import tqdm

from minidiff.data.dataset import load_dataset
from minidiff.engine.backend import keep_freed_memory
from minidiff.errors import run_main
from minidiff.systems.stage import Step
from minidiff.systems.text_to_image import TextToImage
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import Trainer

BATCH, WARM, STEPS = 64, 2, 12
FOLDERS = 100                                               # among which the pictures are divided


def make(folder: Path, count: int, size: int) -> None:
    """`count` PNG files with a caption each: shapes of random colours, which are as hard to decode as drawings."""
    rng = np.random.default_rng(0)
    for i in tqdm(range(count), desc="making pictures", unit="picture", leave=False):
        place = folder / f"{i % FOLDERS:02d}"
        place.mkdir(exist_ok=True)
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"a picture of number {i}")


def memory(field: str) -> float:
    """A line of /proc/self/status in MB, such as VmHWM; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), float("nan"))


def measured(what: str, folder: Path, size: int) -> dict:
    """One row: seconds, images, and memory."""
    keep_freed_memory()
    before, start = memory("RssAnon"), time.perf_counter()
    data = load_dataset(folder, options={"size": (size, size)})
    if what == "batches":
        start, steps = time.perf_counter(), max(1, len(data) // BATCH)
        for n in range(steps):
            step = Step(0, 1, n, steps, BATCH)
            step.images(data, step.choose(data))
        images = steps * BATCH
    elif what == "training":
        system = TextToImage.new(data, 0)
        stage = next(system.stages(data))
        trainer = Trainer(stage, TrainOptions(batch=BATCH).for_stage(stage))
        for _ in range(WARM):
            trainer.step()
        start = time.perf_counter()
        for _ in range(STEPS):
            trainer.step()
        images = STEPS * BATCH
    else:
        images = len(data)
    return {"seconds": time.perf_counter() - start, "images": images, "own": memory("RssAnon") - before,
            "mapped": memory("RssFile")}


ROWS = [("decoding, the first time", "first"), ("opening, with the cache checked", "again"),
        ("batches of 64, in the order of an epoch", "batches"), ("training steps of text-to-image", "training")]


def main(count: int, size: int, run: str | None, folder: Path | None) -> None:
    if run:
        print(json.dumps(measured(run, folder, size)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        folder.mkdir()
        make(folder, count, size)
        print(f"{count:,} pictures of {size} x {size}")
        print("| | images/s | seconds | MB of its own | MB of the mapped file and programs |\n|---|--:|--:|--:|--:|")
        for title, what in ROWS:
            done = subprocess.run([sys.executable, __file__, "--run", what, "--folder", folder, "--size", str(size)],
                                  env=os.environ | {"XDG_CACHE_HOME": temporary}, stdout=subprocess.PIPE, text=True,
                                  check=True)
            row = json.loads(done.stdout)
            print(f"| {title} | {row['images'] / row['seconds']:,.0f} | {row['seconds']:.1f} | {row['own']:.0f} | "
                  f"{row['mapped']:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=positive, default=20_000)
    parser.add_argument("--size", type=positive, default=64, help="pixels of a side")
    parser.add_argument("--run", choices=[what for _, what in ROWS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    run_main(main, **vars(parser.parse_args()))

"""All systems of the literature side by side: one table, and one picture.

    python examples/compare_systems.py                  all systems that have weights; writes docs/systems.md and .png
    python examples/compare_systems.py imagen latent    these two
    python examples/compare_systems.py --train          first trains those without weights, some minutes each

All systems draw the same prompts: captions of real images, and a fifth as many of combinations that training never saw.
The same frozen classifier judges all pictures.  --cache keeps each row, which is measured again only if its weights
change; the milliseconds are measured in every run.  What stands in systems.md after the line "<!-- end -->" is kept.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minidiff import pictures, systems
from minidiff.data import mnist
from minidiff.data.dataset import load_dataset
from minidiff.engine.random import generator
from minidiff.errors import run_main
from minidiff.evaluation import evaluate
from minidiff.evaluation.judge import load_judge
from minidiff.evaluation.report import compare_with_real, draw
from minidiff.files import write_json, write_whole
from minidiff.training import run as stages

# row -> (system, its sampling options); CLIP chooses the best of 8
ROWS = {
    "DDPM": ("ddpm", {}),
    "VDM": ("vdm", {}),
    "classifier guidance": ("adm", {}),
    "classifier-free guidance": ("text-to-image", {"scale": 2.0, "steps": 15}),
    "CLIP guidance (GLIDE)": ("glide", {}),
    "DALL-E": ("dalle", {}),
    "DALL-E, best of 8": ("dalle", {"rerank": 8}),
    "DALL-E 2": ("dalle2", {}),
    "Imagen": ("imagen", {}),
    "Stable Diffusion": ("latent", {}),
    "diffusion transformer": ("dit", {}),
    "consistency model, 1 step": ("consistency", {"steps": 1}),
    "consistency model, 4 steps": ("consistency", {"steps": 4}),
}
SHORT = {"diffusion transformer": "transformer", "consistency model, 1 step": "consistency, 1",
         "consistency model, 4 steps": "consistency, 4"}      # over the picture's columns
PROMPTS = ("a bold seven leaning left", "a thin, upright three", "a wide zero", "5", "a narrow eight", "a heavy four",
           "a right-leaning 2", "a slim one", "the broad digit six", "a thin nine leaning right")
TITLES = ("system", "stands on", "parameters", "training, min", "ms / image", "digit", "attributes",
          "held out: all right", "FID (floor, ceiling)", "recall")
END = "<!-- end -->"                        # of what is written here; what follows it in systems.md is kept
NOTE = """\
*Stands on* names another system whose weights this one uses. *Parameters* are those in the system's file, which
includes copies of the weights that it stands on; GLIDE does not copy those of text-to-image, nor "best of 8" those of
CLIP. *Minutes* are the elapsed time of the system's own stages, as its file says. The judge is frozen and the same for
all; "all right" means that the digit and every attribute of the caption are right. FID's floor is that of as many real
images, drawn at random, its ceiling that of draws from a Gaussian fitted to the pixels. The judge also gave the
perceptual loss of the latent autoencoder ("Stable Diffusion")."""


def needs_of(name: str, options: dict) -> list[str]:
    """The other trained systems whose weights a row uses."""
    return [*systems.system_class(name).needs, *(["clip"] if "rerank" in options else [])]


def measure(name: str, options: dict, count: int) -> dict:
    """One row, as plain numbers."""
    model = systems.load_system(name)
    needs = needs_of(name, options)
    row = {"needs": needs, "parameters": model.parameter_count(), "minutes": model.training_minutes()}

    def progress(batches):
        return tqdm(batches, desc=name, unit="batch")
    if not model.reads_captions:                            # no caption to judge by
        judge = load_judge()
        features, _ = judge.read(draw(model, [""] * count, options, 0, progress))
        rng = generator(0, "what an evaluation compares with")
        return row | compare_with_real(judge, features, mnist.packed(), rng)
    return row | evaluate(model, count=count, options=options, progress=progress).as_dict()


def pace(name: str, options: dict, count: int) -> float:
    """Milliseconds for each of `count` images, after a short warm-up."""
    model = systems.load_system(name)
    captions = [PROMPTS[i % len(PROMPTS)] if model.reads_captions else "" for i in range(count)]
    model.sample(captions[:2], **options)
    started = time.perf_counter()
    model.sample(captions, **options)
    return 1000 * (time.perf_counter() - started) / count


def cells(label: str, r: dict, ms: float) -> tuple[str, ...]:
    def share(name: str) -> str:
        return f"{100 * r[name]:.1f} %" if name in r else "-"
    minutes = f"{r['minutes']:.1f}" if r["minutes"] == r["minutes"] else "-"
    return (label, ", ".join(r["needs"]) or "-", f"{r['parameters']:,}", minutes, f"{ms:.0f}", share("digit_accuracy"),
            share("agreement"), share("held_out_all_right"),
            f"{r['fid']:.1f} ({r['fid_floor']:.1f}, {r['fid_ceiling']:.0f})", f"{r['recall']:.2f}")


def main(which: list[str], count: int = 1000, train: bool = False, out: str = "docs",
         cache: str = "runs/compare") -> None:
    unknown = set(which) - {name for name, _ in ROWS.values()}
    if unknown:
        raise SystemExit(f"compare_systems: there is no row for the system {', '.join(sorted(unknown))}")
    Path(cache).mkdir(parents=True, exist_ok=True)
    table, shown = [TITLES, ("---",) * len(TITLES)], {}
    for label, (name, options) in ROWS.items():
        if which and name not in which:
            continue
        path, run = systems.weights_of(name), Path("runs") / name
        if path is None and not train:
            print(f"{label}: no weights; train it with minidiff train --system {name}, or pass --train")
            continue
        if path is None:
            stages.run(run, systems.system_class(name), load_dataset(), resume=(run / stages.START).exists())
            path = run / "model.safetensors"
        files = [path, *filter(None, map(systems.weights_of, needs_of(name, options)))]
        asked = hashlib.sha256(b"".join(p.read_bytes() for p in files) + f"{sorted(options.items())}{count}".encode())
        kept = Path(cache) / f"{name}-{asked.hexdigest()[:12]}.json"
        if not kept.exists():
            write_json(kept, measure(name, options, count))
        table.append(cells(label, json.loads(kept.read_text(encoding="utf-8")), pace(name, options, min(count, 64))))
        if systems.system_class(name).reads_captions:
            shown[label] = systems.load_system(name).sample(list(PROMPTS), seed=1, **options)
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    print(text)
    page = Path(out) / "systems.md"
    older = page.read_text(encoding="utf-8") if page.exists() else ""
    made = f"# The systems side by side\n\n`python examples/compare_systems.py --count {count}`\n\n{text}\n\n{NOTE}\n\n"
    write_whole(page, (made + END + (older.partition(END)[2] or "\n")).encode())
    if shown:
        labels = [SHORT.get(label, label.split(" guid")[0]) for label in shown]
        drawn = np.stack(list(shown.values()))              # (systems, prompts, H, W, C)
        picture = pictures.strip(drawn, list(PROMPTS), labels=labels, columns=max(2, len(shown)), scale=4)
        pictures.save(picture, Path(out) / "systems.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", help="systems (all)")
    parser.add_argument("--count", type=int, default=1000, help="captions for each system (1000); held out: a fifth")
    parser.add_argument("--train", action="store_true", help="train the systems that have no weights")
    parser.add_argument("--out", default="docs", help="folder of systems.md and systems.png (docs)")
    parser.add_argument("--cache", default="runs/compare", help="folder of the rows (runs/compare)")
    run_main(main, **vars(parser.parse_args()))

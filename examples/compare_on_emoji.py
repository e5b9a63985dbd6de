"""Systems side by side on emoji: one table, and one picture, of names that training saw and of names that it never saw.

    minidiff train --data emoji --out runs/emoji                        a system, and the same with --system dalle, ...
    python examples/compare_on_emoji.py emoji runs/dalle/model.safetensors           writes emoji_systems.md and .png

Each argument is a trained model of emoji: a file, or the name of weights that come with minidiff, and options of its
sampling where they are not to be the default ones: "runs/dalle/model.safetensors,scale=1".  All draw the same names
with the same seed.  The true picture of each name is known, of the held-out ones too, so the table says for how
many drawings it is the nearest of all real emoji (R@1), or among the nearest five (R@5): by the distance of pixels, and
with --judge by the features of a CLIP that was trained on emoji.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minidiff import evaluation, pictures, systems
from minidiff.cli.arguments import setting
from minidiff.cli.sampling_options import checked_option
from minidiff.data import emoji
from minidiff.errors import UserError, refusals, run_main
from minidiff.evaluation.emoji import EmojiReport, evaluate_emoji
from minidiff.evaluation.pictures import clip_of
from minidiff.files import write_whole

SEEN = ("grinning face", "red apple", "flag: Italy", "robot", "woman astronaut: medium-dark skin tone", "snowman")
HELD_OUT = ("snowboarder: medium skin tone", "thumbs up: medium skin tone", "woman astronaut: light skin tone",
            "person biking: light skin tone", "man vampire: light skin tone", "palms up together: dark skin tone")
TITLES = ("system", "parameters", "training, min", "ms / image", "R@1", "R@5", "error", "held out: R@1", "R@5",
          "error")
BY_CLIP = ("R@1 by CLIP", "held out")
NOTE = """\
*R@1* and *R@5* are the shares of drawings whose nearest real emoji, or one of whose nearest five, is the one that was
asked for, by the distance of pixels, among all {among} emoji; "by CLIP" is the same by a CLIP's features. *Error* is
the mean squared error to the true picture, of pixels in [-1, 1]. {seen} of the names that training saw were asked
for, and {held_out} pairs of a thing and a skin tone that were held out. *Minutes* are the elapsed time of the
system's own stages."""


def shown_names(data: emoji.Emoji) -> tuple[list[str], np.ndarray]:
    """The names of the picture that these data have, seen ones first, and their true pictures (N, 32, 32, 3)."""
    every = {part.caption(i): part.images([i])[0] for part in (data, data.test()) for i in range(len(part))}
    names = [name for name in (*SEEN, *HELD_OUT) if name in every]
    return names, np.stack([every[name] for name in names])


def loaded_with_options(argument: str) -> tuple:
    """The trained model that an argument names, and its options of sampling: "FILE,scale=1,steps=10"."""
    path, *options = argument.split(",")
    file = systems.model_path(path)
    kind = systems.class_of_model(file)
    evaluation.check_draws(kind)
    model = systems.load_model(kind, file)
    if evaluation.data_of(model) != "emoji":
        raise UserError(f"{path} was not trained on emoji")
    try:
        given = dict(map(setting, options))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{argument}: {error}") from None
    return model, {name: checked_option(kind, name, value) for name, value in given.items()}


def cells(title: str, model, r: EmojiReport) -> tuple[str, ...]:
    def share(p: float, n: int) -> str:
        return f"{100 * p:.1f} ± {100 * (p * (1 - p) / n) ** 0.5:.1f} %"
    by_clip = () if r.clip is None else (share(r.clip["r1"], r.images),
                                         share(r.clip["held_out_r1"], r.held_out_images))
    return (title, f"{model.parameter_count():,}", f"{model.training_minutes():.0f}",
            f"{1000 * r.seconds_per_image:.0f}", share(r.r1, r.images), share(r.r5, r.images), f"{r.error:.3f}",
            share(r.held_out_r1, r.held_out_images), share(r.held_out_r5, r.held_out_images),
            f"{r.held_out_error:.3f}", *by_clip)


def main(models: list[str], judge: str | None = None, count: int = 1000, out: str = ".") -> None:
    if count < 1:
        raise UserError(f"--count must be at least 1, not {count}")
    pictures.check_writable(Path(out) / "emoji_systems.png")
    loaded = [loaded_with_options(argument) for argument in models]
    shown = [", ".join([model.name, *(f"{name} {value}" for name, value in options.items())])
             for model, options in loaded]
    data = emoji.load(None)
    clip = None if judge is None else clip_of(judge, data)
    names, true = shown_names(data)
    titles = TITLES if clip is None else TITLES + BY_CLIP
    table, drawn = [titles, ("---",) * len(titles)], [true]
    for title, (model, options) in zip(shown, loaded, strict=True):                 # first, so that a wrong option ends
        with refusals(title):                                                       # the run at once
            drawn.append(model.sample(names, seed=1, **options))
    for title, (model, options) in zip(shown, loaded, strict=True):
        def progress(batches, title=title):
            return tqdm(batches, desc=title, unit="batch")
        report = evaluate_emoji(model, data=data, count=count, options=options, judge=clip, progress=progress)
        table.append(cells(title, model, report))
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    print(text)
    note = NOTE.format(among=report.among, seen=report.images, held_out=report.held_out_images)
    write_whole(Path(out) / "emoji_systems.md", f"# Systems that draw emoji\n\n{text}\n\n{note}\n".encode())
    captions = [name if name in SEEN else f"{name} (held out)" for name in names]
    sheet = pictures.strip(np.stack(drawn), captions, labels=["true", *shown])
    pictures.save(sheet, Path(out) / "emoji_systems.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="files of trained models of emoji, or names of weights")
    parser.add_argument("--judge", help="file of a CLIP that was trained on emoji")
    parser.add_argument("--count", type=int, default=1000, help="seen names for each system (1000)")
    parser.add_argument("--out", default=".", help="folder of emoji_systems.md and emoji_systems.png (this one)")
    run_main(main, **vars(parser.parse_args()))

"""What a checkpoint of Stable Diffusion may be asked for: checked before its weights are read, and before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minidiff.checks import finite
from minidiff.errors import UserError
from minidiff.nn.images import clean_images
from minidiff.pretrained.plan import Plan
from minidiff.pretrained.scheduler_classes import check_choice
from minidiff.pretrained.scheduler_config import SchedulerConfig

LARGEST = 4096                                              # pixels, each way
STRENGTH = 0.8                                              # of image to image, where none is given


@dataclass(frozen=True)
class Form:
    """What of a checkpoint decides which options it takes."""

    sees_mask: bool                         # its network was trained for in-painting
    reads_scale: bool                       # its network does the guidance itself
    encoders: int                           # of text
    factor: int                             # pixels a latent, each way
    size: int                               # pixels of the square pictures that it was trained on

    def pixels(self, size: str | None, image: np.ndarray | None) -> tuple[int, int]:
        """(height, width) of the pictures; UserError unless they are multiples of 8."""
        if image is not None and size is None:
            height, width = image.shape[:2]
        else:
            width, height = size_of(size or f"{self.size}x{self.size}")
        f = self.factor
        if height % f or width % f or not height or not width:
            raise UserError(f"size takes multiples of {f}, such as {-(-max(width, 1) // f) * f}x"
                            f"{-(-max(height, 1) // f) * f}, not {width}x{height}")
        if image is not None and image.shape[:2] != (height, width):
            raise UserError(f"image is {image.shape[1]}x{image.shape[0]}, and size {width}x{height}: leave out size, "
                            "or resize the image")
        return height, width


def check(form: Form, options: Mapping[str, Any], scheduler: SchedulerConfig) -> None:
    """UserError, TypeError or ValueError where options of `sample` are of another kind, or do not go together.

    options: those that were given; what is left out has its default.
    """
    image, mask, strength, sampler = (options.get(name) for name in ("image", "mask", "strength", "sampler"))
    check_prompts(form, options)
    finite("scale", options.get("scale", 7.5))
    if image is not None or mask is not None:
        check_image(image, mask)
    if form.sees_mask and mask is None:
        raise UserError("this network was trained for in-painting: give an image, and a mask of what to draw again")
    if strength is not None:
        if image is None:
            raise UserError("strength is of image to image: give an image, too")
        finite("strength", strength, 0, 1)
    if sampler is not None:
        check_choice(sampler)
    form.pixels(options.get("size"), image)
    if form.sees_mask and not mask[::form.factor, ::form.factor].any():
        raise UserError(f"this network reads one pixel of each {form.factor}x{form.factor}, and mask is white in none "
                        "of them: make its white part larger")
    if strength != 0 and not plan_of(form, options, scheduler).steps:
        raise UserError(f"strength {strength_of(options)} of {options.get('steps', 20)} steps is less than a step: "
                        "take a larger strength, or more steps")


def plan_of(form: Form, options: Mapping[str, Any], scheduler: SchedulerConfig) -> Plan:
    """The run that the options ask for: from an image its last steps, or for some all steps on a share of the times."""
    scheduler = scheduler.changed(options.get("spacing"), options.get("predicts"))
    steps, sampler = options.get("steps", 20), options.get("sampler")
    if _spreads_all(form, options, scheduler):
        return scheduler.plan(steps, sampler, strength_of(options))
    plan = scheduler.plan(steps, sampler)
    return plan if options.get("image") is None else plan.shortened(steps, int(steps * strength_of(options)))


def steps_made(form: Form, options: Mapping[str, Any], scheduler: SchedulerConfig) -> int:
    """How many steps a run makes: from an image int(steps * strength), as other programs do, or for some all."""
    steps = options.get("steps", 20)
    return steps if _spreads_all(form, options, scheduler) else int(steps * strength_of(options))


def strength_of(options: Mapping[str, Any]) -> float:
    """The strength that is given, or its default; 1 without an image."""
    if options.get("strength") is not None:
        return options["strength"]
    return STRENGTH if options.get("image") is not None and options.get("mask") is None else 1


def _spreads_all(form: Form, options: Mapping[str, Any], scheduler: SchedulerConfig) -> bool:
    """Whether a run from an image spreads all its steps over the share of times that strength says.

    Other programs do so in the pipeline of latent consistency models, which has no in-painting.
    """
    return (form.reads_scale and options.get("image") is not None and options.get("mask") is None
            and strength_of(options) > 0 and scheduler.distilled(options.get("sampler")))


def check_prompts(form: Form, options: Mapping[str, Any]) -> None:
    """UserError or TypeError where a prompt is no str, or the networks read no such prompt."""
    for name in ("negative", "second", "second_negative"):
        text = options.get(name)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{name} must be a str, not {str(text)[:40]!r}")
        if text is not None and name != "negative" and form.encoders == 1:
            raise UserError(f"{name} is for SDXL's second text encoder, and this checkpoint has one: leave it out")
        if text is not None and name != "second" and form.reads_scale:
            raise UserError("this network reads the scale and is evaluated once a step, without a negative prompt: "
                            "leave it out")


def check_image(image: np.ndarray | None, mask: np.ndarray | None) -> None:
    if image is None:
        raise UserError("mask says what of an image to draw again: give the image, too")
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype.kind != "f":
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be (H, W, 3) in [-1, 1], of a floating dtype, not {got}")
    clean_images(image[None])                               # refused where out of range, or NaN
    if mask is not None and (not isinstance(mask, np.ndarray) or mask.shape != image.shape[:2] or mask.dtype != bool):
        got = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"mask must be booleans of shape {image.shape[:2]}, not {got}")
    if mask is not None and not mask.any():
        raise UserError("mask is black everywhere: it is white (True) where the image is to be drawn again")


def size_of(text: str) -> tuple[int, int]:
    """(width, height) of "512x768"."""
    parts = text.lower().split("x") if isinstance(text, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and 0 < int(part[:9]) <= LARGEST for part in parts):
        raise UserError(f"size takes WIDTHxHEIGHT in pixels, such as 512x512, each at most {LARGEST}, not "
                        f"{str(text)[:40]!r}")
    return int(parts[0]), int(parts[1])

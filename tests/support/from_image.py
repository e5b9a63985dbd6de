"""Runs of Stable Diffusion from an image by many samplers, with a formula for a network and given latents and noise.

What diffusers makes of the same: tests/parity/test_parity_from_image.py, and tests/pretrained/from_image.npz.
"""

from copy import copy
from functools import cache
from pathlib import Path

import numpy as np
from support.given_noise import GivenNoise

from minidiff.engine.tensor import Tensor
from minidiff.pretrained.config import Config
from minidiff.pretrained.scheduler_config import SchedulerConfig
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parents[1] / "pretrained" / "checkpoints"
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
SHAPE = (1, 5, 6, 4)
METHODS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}), "plms": ("PNDMScheduler", {"skip_prk_steps": True} | LEADING),
    "plms to clean": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "euler": ("EulerDiscreteScheduler", {}), "euler leading": ("EulerDiscreteScheduler", LEADING),
    "euler trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler to time 0": ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}), "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}), "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}), "lcm": ("LCMScheduler", {})}
STEPS = (5, 8)
STRENGTHS = (0.2, 0.5, 0.8, 0.9, 1.0)                       # 0.8 of 5 and 0.9 of 8 leave out the first step alone


def network(x, t):
    """Neighbours mix, so that the known part of an image reaches the rest.  x: (B, h, w, C), t: (B,)."""
    around = np.roll(x, 1, axis=1)[..., :4] + np.roll(x, 1, axis=2)[..., :4]
    mixed = 0.7 * x[..., :4] + 0.2 * around + 0.1 * x.sum(axis=-1, keepdims=True) + 0.3
    return (np.tanh(mixed) * (0.5 + np.reshape(t, (-1, 1, 1, 1)) / 2000)).astype(np.float32)


@cache
def checkpoint():
    return StableDiffusion.load(HERE / "eps")


class OurUnet:
    extra, reads_scale = None, False

    def __init__(self, channels):
        self.channels, self.times = channels, []

    def __call__(self, z_t, t, *_):
        self.times.append(float(t[0]))
        return Tensor(network(z_t.data, t))


def ours(channels, name, options, noise, z_0, hidden=None, **arguments):
    """(the last latents, the times that the network is asked at)."""
    m = copy(checkpoint())
    m.unet, answers = OurUnet(channels), iter((z_0, hidden))
    m.encode = lambda image: next(answers)
    m.scheduler = SchedulerConfig(Config({"_class_name": name} | options, Path("scheduler_config.json")))
    *_, state = m.trajectory(["a"], image=np.zeros((40, 48, 3), np.float32), scale=1.0, streams=GivenNoise(noise, 1),
                             **arguments)
    return state.z_t, m.unet.times


def numbers(seed, steps):
    """z_0 and the noise of the start and of each step."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE, np.float32), rng.standard_normal((steps + 2, *SHAPE), np.float32)


def a_mask():
    """Of 2 x 3 whole latents."""
    mask = np.zeros((40, 48), bool)
    mask[8:24, 16:40] = True
    return mask

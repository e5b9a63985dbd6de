"""Stable Diffusion from prompt to pixel, in closed form (law 45): its code, with stand-ins for its networks.

    text encoder    each prompt has a mean mu(y) of the latents, which its states carry
    autoencoder     z = E x + e for patches of 2 x 2 pixels, x = D z + d: orthogonal (D = E^T) or not
    UNet            the exact prediction, eps or v, for latents z_0 ~ N(mu(y), S^2), S of each channel

Guidance of two such predictions is the prediction for the mean mu_w = mu(negative) + scale (mu(y) - mu(negative)). So
each step multiplies z - alpha mu_w by a number (law 24), and the picture is an affine function of the noise:

    z_s - alpha_s mu_w = (alpha_s alpha_t S^2 + sigma_s sigma_t) / V_t (z_t - alpha_t mu_w),   V = alpha^2 S^2 + sigma^2
    z_T = std eps, or of an image alpha_t factor (E x + e - shift) + sigma_t eps;   x = D (z_0 / factor + shift) + d

The tests compute the betas' products, the times and these lines themselves.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.law_tools import few, rotation

from minidiff.engine.tensor import Tensor
from minidiff.pretrained.config import Config
from minidiff.pretrained.scheduler_config import SchedulerConfig
from minidiff.systems.stable_diffusion import Settings, StableDiffusion

T, B, SIZE = 24, 2, (6, 4)                                  # times; pictures; height and width in pixels
BETAS = np.linspace(0.02, 0.3, T)
ABAR = np.array([math.prod(1 - BETAS[:t + 1]) for t in range(T)])
PROMPTS = ["a red cube", "seven"]


def patches(x):
    """(B, H, W, 3) -> (B, H/2, W/2, 12)."""
    B, H, W, _ = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, H // 2, W // 2, 12)


def joined(p):
    """The inverse of `patches`."""
    B, h, w, _ = p.shape
    return p.reshape(B, h, w, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * h, 2 * w, 3)


class World:
    """All numbers of one case, at random."""

    def __init__(self, seed, orthogonal, predicts):
        rng = self.rng = np.random.default_rng(seed)
        Q = rotation(rng, 12)[:4]                           # (4, 12), rows orthonormal
        self.E, self.D = (Q.T, Q) if orthogonal else (rng.normal(size=(12, 4)), 0.1 * rng.normal(size=(4, 12)))
        self.D = 0.02 * self.D                              # so that few pixels reach 1, where they are cut
        self.e, self.d = rng.normal(size=4), 0.1 * rng.normal(size=12)
        self.S, self.predicts = rng.uniform(0.3, 2, 4), predicts
        self.factor, self.shift = rng.uniform(0.2, 2), rng.normal() / 2
        self.means = {text: rng.normal(size=4) for text in (*PROMPTS, "", "blurry")}

    # ---- stand-ins for the networks

    def unet(self, z, t, tau, pooled, sizes, scale):
        mu, abar = tau.data[:, None, None, 5, :], ABAR[np.asarray(t).astype(int)].reshape(-1, 1, 1, 1)
        V = abar * self.S**2 + 1 - abar
        # score = -(z - alpha mu) / V, eps = -sigma score, x_0 = (z + sigma^2 score) / alpha, v = alpha eps - sigma x_0
        score = -(z.data - np.sqrt(abar) * mu) / V
        eps = -np.sqrt(1 - abar) * score
        x_0 = (z.data + (1 - abar) * score) / np.sqrt(abar)
        return Tensor(eps if self.predicts == "eps" else np.sqrt(abar) * eps - np.sqrt(1 - abar) * x_0)

    def system(self, scheduler, **options):
        class Linear(StableDiffusion):
            dtype, device = np.dtype(np.float64), "cpu"
        unet = self.unet

        class Unet:
            extra, channels, reads_scale = None, 4, False

            def __call__(self, *args):
                return unet(*args)
        texts = list(self.means)

        def ids(prompts):
            return np.array([[texts.index(p)] for p in prompts]), [0] * len(prompts)

        def states(ids):
            last = np.repeat(np.array([self.means[texts[i]] for i in ids[:, 0]])[:, None], 77, axis=1)      # (B, 77, 4)
            return SimpleNamespace(last=Tensor(last))
        vae = SimpleNamespace(factor=2, encode=lambda x: (Tensor(patches(x.data) @ self.E + self.e), None),
                              decode=lambda z: Tensor(joined(z.data @ self.D + self.d)))
        config = {"_class_name": scheduler, "num_train_timesteps": T, "trained_betas": BETAS.tolist(),
                  "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[self.predicts], **options}
        return Linear(Unet(), vae, [states], [SimpleNamespace(ids=ids, length=77)],
                      SchedulerConfig(Config(config, Path("scheduler_config.json"))),
                      Settings(self.factor, self.shift, 8, False))

    # ---- the closed form

    def picture(self, z, path, scale, negative):
        """(B, H, W, 3) from z at path[0], along (alpha_bar, alpha_bar, ...)."""
        mu = np.stack([self.means[negative] + scale * (self.means[p] - self.means[negative]) for p in PROMPTS])
        mu = mu[:, None, None]                                                        # (B, 1, 1, 4)
        for a, b in zip(path, path[1:], strict=False):      # from alpha_bar = a to b
            gain = (math.sqrt(a * b) * self.S**2 + math.sqrt((1 - a) * (1 - b))) / (a * self.S**2 + 1 - a)
            z = math.sqrt(b) * mu + gain * (z - math.sqrt(a) * mu)
        return joined((z / self.factor + self.shift) @ self.D + self.d)         # before it is cut to [-1, 1]


class Given:
    """Streams whose normal numbers are given."""

    def __init__(self, noise):
        self.noise = noise

    def __len__(self):
        return len(self.noise)

    def normal(self, shape, dtype=np.float64):
        assert shape == self.noise.shape[1:]
        return self.noise


def leading(N):
    """DDIM with steps_offset 1, N a divisor of T: times 1, 1 + T/N, ..., the last step ends at alpha_bar_0."""
    return [*(ABAR[1 + T // N * k] for k in reversed(range(N))), ABAR[0]]


def trailing(N):
    """Euler: times T - 1, T - 1 - T/N, ..., the last step ends at the clean image."""
    return [*(ABAR[T - 1 - T // N * k] for k in range(N)), 1.0]


LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
RUNS = {"ddim": ("DDIMScheduler", LEADING, leading),
        "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, trailing)}
worlds = st.builds(World, st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(["eps", "v"]))
scales = st.sampled_from([0.0, 1.0, 2.5, 7.5])


def assert_equal(found, expected):
    assert (np.abs(expected) < 1).mean() > 0.5              # the test sees more than the cut
    np.testing.assert_allclose(found, np.clip(expected, -1, 1), rtol=0, atol=1e-9)


@pytest.mark.law(45, "text to image: x = D (z_0 / factor + shift) + d, z_0 - mu_w = prod_steps (alpha_s alpha_t S^2 + "
                     "sigma_s sigma_t) / V_t (std eps - alpha_T mu_w), mu_w = mu(neg) + scale (mu(y) - mu(neg))",
                 source="law 24 step by step, over betas, times and maps of the test's own",
                 tolerance="1e-9: rounding over sigma > .14, in 12 steps")
@few
@given(worlds, st.sampled_from(sorted(RUNS)), st.sampled_from([1, 2, 4, 12]), scales, st.sampled_from([None, "blurry"]))
def test_text_to_image_is_its_closed_form(world, run, N, scale, negative):
    """Bugs: the factor multiplied for divided, guidance from the prompt to the negative one, a start of another std."""
    name, options, path = RUNS[run]
    path = path(N)
    noise = world.rng.standard_normal((B, SIZE[0] // 2, SIZE[1] // 2, 4))
    found = world.system(name, **options).sample(PROMPTS, negative=negative, scale=scale, steps=N, size="4x6",
                                                 streams=Given(noise))
    # Euler starts at sigma_T times the noise, which is what its x_T / alpha_T = rho_T eps says; DDIM at the noise
    std = math.sqrt(1 - path[0]) if run == "euler" else 1.0
    assert_equal(found, world.picture(std * noise, path, scale, negative or ""))


@pytest.mark.law(45, "image to image: the same from z_t = alpha_t factor (E x + e - shift) + sigma_t eps, on the last "
                     "strength N of the N steps",
                 source="as above", tolerance="1e-9: as above")
@few
@given(worlds, st.sampled_from(sorted(RUNS)), st.sampled_from([(4, 0.5, 2), (4, 1.0, 4), (12, 0.75, 9), (2, 0.5, 1)]),
       scales)
def test_image_to_image_is_its_closed_form(world, run, steps, scale):
    N, strength, made = steps
    name, options, path = RUNS[run]
    path = path(N)[N - made:]
    noise = world.rng.standard_normal((B, SIZE[0] // 2, SIZE[1] // 2, 4))
    image = world.rng.uniform(-0.5, 0.5, (*SIZE, 3))
    found = world.system(name, **options).sample(PROMPTS, scale=scale, steps=N, image=image, strength=strength,
                                                 streams=Given(noise))
    z_0 = world.factor * (patches(image[None]) @ world.E + world.e - world.shift)
    z_t = math.sqrt(path[0]) * z_0 + math.sqrt(1 - path[0]) * noise
    assert_equal(found, world.picture(z_t, path, scale, ""))


@pytest.mark.law(45, "an orthogonal autoencoder whose decoder undoes its encoder gives an image back at strength 0",
                 source="D (E x) = x for patches in the span of D's rows", tolerance="1e-9: rounding")
@few
@given(st.integers(0, 2**32 - 1))
def test_at_strength_0_an_image_comes_back(seed):
    world = World(seed, True, "eps")
    world.E, world.D, world.d = world.E, world.E.T, -world.e @ world.E.T
    image = joined(0.2 * np.tanh(world.rng.normal(size=(1, SIZE[0] // 2, SIZE[1] // 2, 4))) @ world.D)[0]
    noise = world.rng.standard_normal((B, SIZE[0] // 2, SIZE[1] // 2, 4))
    found = world.system("DDIMScheduler", **LEADING).sample(PROMPTS, steps=4, image=image, strength=0.0,
                                                            streams=Given(noise))
    assert_equal(found, np.stack([image] * B))

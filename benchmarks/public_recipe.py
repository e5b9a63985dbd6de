"""The recipe that people copy for conditional MNIST diffusion, in PyTorch: the rival of time_to_quality.py.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,    t uniform in 1 ... T,    x_0 in [0, 1]
    loss = || eps - eps_theta(x_t, t / T, class) ||^2,          the class dropped one time in ten

T = 400, betas rise linearly from 1e-4 to 0.02; Adam at 1e-4, which falls by a twentieth after each of 20 epochs; batch
256. A UNet of 128 features at 28x28, with batch norm. On the way up the class c is a factor and the time t a shift, c h
+ t. Known from github.com/TeaPearce/Conditional_Diffusion_MNIST; this is a new implementation.

Advantages that do not change the recipe: the images are ready in one array, Adam is fused, the network may be channels
last, and an epoch counts 60,000 images even if there are fewer, so that the learning rate does not fall faster.
"""

from __future__ import annotations

import math
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minidiff import checkpoint
from minidiff.data import mnist
from minidiff.errors import UserError

CLASSES, FEATURES, T = 10, 128, 400
BATCH, LR, EPOCHS, EPOCH = 256, 1e-4, 20, 235               # an epoch in steps: 60,000 images
STEPS, DROP = EPOCHS * EPOCH, 0.1


# --- the network ------------------------------------------------------------------------------------------

class ConvBlock(nn.Sequential):
    """Two convolutions, each with batch norm and GELU: (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, C: int, D: int):
        super().__init__(*(nn.Sequential(nn.Conv2d(c, D, 3, padding=1), nn.BatchNorm2d(D), nn.GELU())
                           for c in (C, D)))


class ResidualConvBlock(ConvBlock):
    """The same, with the first half's output added; the sum is scaled to keep its size."""

    def forward(self, x):
        h = self[0](x)
        return (h + self[1](h)) / math.sqrt(2)


class Up(nn.Module):
    """(B, C/2, H, W) and the skip of the same shape -> (B, D, 2H, 2W)."""

    def __init__(self, C: int, D: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(C, D, 2, stride=2)
        self.blocks = nn.Sequential(ConvBlock(D, D), ConvBlock(D, D))

    def forward(self, h, skip):
        return self.blocks(self.upsample(torch.cat([h, skip], dim=1)))


class Embedding(nn.Sequential):
    """Two layers: (B, C) -> (B, D, 1, 1)."""

    def __init__(self, C: int, D: int):
        super().__init__(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D), nn.Unflatten(1, (D, 1, 1)))


class UNet(nn.Module):
    """x_t (B, 1, 28, 28), t (B,) in (0, 1], classes (B, 10), one-hot or all 0 for none -> eps (B, 1, 28, 28)."""

    def __init__(self, features: int = FEATURES):
        super().__init__()
        D = features
        self.first = ResidualConvBlock(1, D)
        self.down1 = nn.Sequential(ConvBlock(D, D), nn.MaxPool2d(2))
        self.down2 = nn.Sequential(ConvBlock(D, 2 * D), nn.MaxPool2d(2))
        self.to_vector = nn.Sequential(nn.AvgPool2d(7), nn.GELU())
        self.time1, self.class1 = Embedding(1, 2 * D), Embedding(CLASSES, 2 * D)
        self.time2, self.class2 = Embedding(1, D), Embedding(CLASSES, D)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(2 * D, 2 * D, 7, stride=7), nn.GroupNorm(8, 2 * D), nn.ReLU())
        self.up1, self.up2 = Up(4 * D, D), Up(2 * D, D)
        self.out = nn.Sequential(nn.Conv2d(2 * D, D, 3, padding=1), nn.GroupNorm(8, D), nn.ReLU(),
                                 nn.Conv2d(D, 1, 3, padding=1))

    def forward(self, x, t, classes):
        first = self.first(x)                                                       # (B, D, 28, 28)
        down1 = self.down1(first)                                                   # (B, D, 14, 14)
        down2 = self.down2(down1)                                                   # (B, 2 D, 7, 7)
        t = t[:, None]
        h = self.up0(self.to_vector(down2))                                         # (B, 2 D, 7, 7)
        h = self.up1(self.class1(classes) * h + self.time1(t), down2)               # (B, D, 14, 14)
        h = self.up2(self.class2(classes) * h + self.time2(t), down1)               # (B, D, 28, 28)
        return self.out(torch.cat([h, first], dim=1))


def alpha_bars() -> np.ndarray:
    """alpha_bar_0 = 1, alpha_bar_1 ... alpha_bar_T, float64 (T + 1,)."""
    # beta_t = 1e-4 + (0.02 - 1e-4) t / T
    betas = 1e-4 + (0.02 - 1e-4) * np.arange(1, T + 1) / T
    return np.append(1.0, np.cumprod(1 - betas))


# --- training ---------------------------------------------------------------------------------------------

class Recipe:
    """The recipe in training.  The random numbers of step n come from generators of (seed, n)."""

    def __init__(self, data: mnist.Images, *, seed: int = 0, batch: int = BATCH, features: int = FEATURES,
                 channels_last: bool = True):
        if len(data) < batch:
            raise UserError(f"the recipe's batch is {batch} images, and {data.source} has {len(data)}")
        torch.manual_seed(seed)
        self.seed, self.count, self.channels_last, self.n = seed, batch, channels_last, 0
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = UNet(features).to(memory_format=self.layout)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=LR, fused=True)
        self.x_0 = torch.from_numpy(data.images.astype(np.float32) / 255)[:, None]  # (N, 1, 28, 28)
        self.classes = F.one_hot(torch.from_numpy(data.labels.astype(np.int64)), CLASSES).float()
        self.alpha_bar = alpha_bars()

    def batch(self) -> tuple[torch.Tensor, ...]:
        """x_0, classes, t and eps of step n: each image once in a round, each round in a new order."""
        each = len(self.x_0) // self.count                  # whole batches in a round
        order = np.random.default_rng([self.seed, 1, self.n // each]).permutation(len(self.x_0))
        chosen = order[self.n % each * self.count:][:self.count]
        rng = np.random.default_rng([self.seed, 2, self.n])
        t = rng.integers(1, T + 1, self.count)
        kept = (rng.random((self.count, 1)) >= DROP).astype(np.float32)
        eps = rng.standard_normal((self.count, *self.x_0.shape[1:]), dtype=np.float32)
        return self.x_0[chosen], self.classes[chosen] * torch.from_numpy(kept), t, torch.from_numpy(eps)

    def loss(self, x_0, classes, t: np.ndarray, eps) -> torch.Tensor:
        abar = self.alpha_bar[t, None, None, None]
        alpha, sigma = (torch.from_numpy(np.sqrt(a).astype(np.float32)) for a in (abar, 1 - abar))
        # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
        x_t = alpha * x_0 + sigma * eps
        return F.mse_loss(self.net(x_t, torch.from_numpy((t / T).astype(np.float32)), classes), eps)

    def step(self) -> float:
        """One step; returns its loss."""
        for group in self.adam.param_groups:
            group["lr"] = LR * max(1 - self.n // EPOCH / EPOCHS, 0)
        loss = self.loss(*self.batch())
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()
        self.n += 1
        return loss.item()

    # --- sampling -----------------------------------------------------------------------------------------

    def sample(self, classes: np.ndarray, *, scale: float, eta: float = 0.0, steps: int = 50,
               seed: int = 0) -> np.ndarray:
        """Images (B, 28, 28, 1) in [-1, 1] of classes (B,), by DDIM with guidance, eps_u + scale (eps_c - eps_u).

        eta: 0 adds no noise, 1 as much as the ancestral sampler.
        """
        path = np.round(np.linspace(T, 0, steps + 1)).astype(int)

        def step(x_t, eps, t, s, draw):
            a, b = self.alpha_bar[t], self.alpha_bar[s]
            # sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)   DDIM eq. 16
            sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
            # x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z          DDIM eq. 12
            x0_hat = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
            x_s = math.sqrt(b) * x0_hat + math.sqrt(max(1 - b - sigma**2, 0)) * eps
            return x_s + sigma * draw() if sigma else x_s
        return self._walk(step, path, classes, scale, seed)

    def ancestral(self, classes: np.ndarray, *, scale: float, seed: int = 0) -> np.ndarray:
        """The same with the recipe's own sampler: DDPM, all T steps."""
        def step(x_t, eps, t, s, draw):
            # x_s = (x_t - beta / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha) + sqrt(beta) z       DDPM algorithm 2
            alpha = self.alpha_bar[t] / self.alpha_bar[s]
            x_s = (x_t - (1 - alpha) / math.sqrt(1 - self.alpha_bar[t]) * eps) / math.sqrt(alpha)
            return x_s + math.sqrt(1 - alpha) * draw() if s else x_s
        return self._walk(step, np.arange(T, -1, -1), classes, scale, seed)

    @torch.inference_mode()
    def _walk(self, step, path, classes: np.ndarray, scale: float, seed: int, at_a_time: int = 64) -> np.ndarray:
        """Calls step(x_t, eps, t, s, draw) -> x_s along the path; batch norms use their running means."""
        self.net.eval()
        pictures = []
        for i in range(0, len(classes), at_a_time):
            asked = F.one_hot(torch.from_numpy(np.asarray(classes[i:i + at_a_time], np.int64)), CLASSES).float()
            both = torch.cat([asked, torch.zeros_like(asked)])                      # (2 B, 10)
            random = torch.Generator().manual_seed(2**32 * seed + i)
            draw = partial(torch.randn, len(asked), 1, 28, 28, generator=random)
            x_t = draw()
            for t, s in zip(path[:-1].tolist(), path[1:].tolist(), strict=True):
                twice = torch.cat([x_t, x_t]).contiguous(memory_format=self.layout)
                eps_c, eps_u = self.net(twice, torch.full((len(both),), t / T), both).chunk(2)
                # eps = eps_u + scale (eps_c - eps_u)
                x_t = step(x_t, eps_u + scale * (eps_c - eps_u), t, s, draw)
            pictures.append(x_t.permute(0, 2, 3, 1).contiguous().numpy())
        self.net.train()
        return (2 * np.concatenate(pictures) - 1).clip(-1, 1)                       # [0, 1] -> [-1, 1]

    # --- files --------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The weights, the batch norms' statistics and Adam's moments, by name; not copies."""
        tensors = {f"net.{name}": a for name, a in self.net.state_dict().items()}
        for name, p in self.net.named_parameters():
            state = self.adam.state[p]
            if not state:                                   # Adam makes its moments at its first step
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            tensors |= {f"adam.{name}.{what}": a for what, a in state.items()}
        return tensors

    def state(self) -> tuple[dict[str, np.ndarray], dict]:
        """(tensors, meta): everything that the next step depends on."""
        return ({name: a.detach().contiguous().numpy() for name, a in self._tensors().items()},
                {"system": "public recipe", "seed": self.seed, "channels_last": self.channels_last})

    @torch.no_grad()
    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Restores a saved state; UserError if it belongs to something else."""
        tensors = self._tensors()
        checkpoint.check_shapes({name: tuple(a.shape) for name, a in tensors.items()}, saved.tensors, saved.path)
        for name, a in tensors.items():
            a.copy_(torch.from_numpy(saved.tensors[name]))
        self.n = saved.meta["step"]


def faster_layout(data: mnist.Images, batch: int = 64, rounds: int = 2) -> bool:
    """Whether channels last is faster, measured by a few steps of each in turn."""
    recipes = {last: Recipe(data, batch=batch, channels_last=last) for last in (False, True)}
    seconds = {last: [] for last in recipes}
    for turn in range(1 + rounds):                          # the first is not timed
        for last, recipe in recipes.items():
            began = time.perf_counter()
            recipe.step()
            seconds[last] += [time.perf_counter() - began] * bool(turn)
    return min(seconds[True]) <= min(seconds[False])

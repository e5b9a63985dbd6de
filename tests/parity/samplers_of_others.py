"""k-diffusion's and smalldiffusion's samplers as schedulers, by replay: each is one function that calls the model.

Both keep x_0 + sigma eps, sigma being our sigma / alpha, and call the model with that sigma. Of k-diffusion only
`sampling` is needed, of smalldiffusion only `diffusion`; their packages also import modules that draw and read images.
Where torchvision is not installed, or not for this PyTorch, an empty stand-in takes its place during the import.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from contextlib import contextmanager
from importlib.metadata import version
from unittest import mock

import numpy as np
import torch

from minidiff.diffusion.schedules import Schedule
from minidiff.verify.scheduler.replay import Replayed


@contextmanager
def without_images(package: str):
    """Imports of `package` without running its __init__, and without torchvision if that cannot be imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{package} is not installed")
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    bare.__version__ = version(package.replace("_", "-"))
    stand_ins = {package: bare}
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        stand_ins |= {name: mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
                      for name in ("torchvision", "torchvision.transforms")}
    hidden = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield bare
    finally:                                                # others stay: NumPy's extensions load only once
        for name in [name for name in sys.modules if name in stand_ins or name.startswith(package + ".")]:
            del sys.modules[name]
        sys.modules.update(hidden)


def k_diffusion():
    """k_diffusion.sampling, and the version."""
    with without_images("k_diffusion") as package:
        return importlib.import_module("k_diffusion.sampling"), package.__version__


def smalldiffusion():
    """smalldiffusion.diffusion, and the version."""
    with without_images("smalldiffusion") as package:
        return importlib.import_module("smalldiffusion.diffusion"), package.__version__


class InSigma(Replayed):
    """A sampler of x_0 + sigma eps: run(model, x, sigmas, draw) -> x_0, model(x, sigma) -> x0_hat, in torch."""

    def __init__(self, schedule: Schedule, run, list_of, order: int = 1, evaluations: int = 1,
                 extrapolates: bool = False):
        self.schedule = schedule
        self.sigma = np.asarray(schedule.sigma(np.arange(schedule.T)) / schedule.alpha(np.arange(schedule.T)))

        def run_by_times(network, x_T, times, draw):
            def model(x, sigma):
                t = int(np.argmin(abs(self.sigma - float(sigma.flatten()[0]))))
                u = self.schedule.alpha(t) * x.numpy()
                eps = torch.from_numpy(network(x.numpy(), np.full(len(u), t)))
                return x - sigma.reshape(-1, *[1] * (x.ndim - 1)) * eps

            sigmas = torch.from_numpy(np.append(self.sigma[times], 0.0))
            return run(model, torch.from_numpy(x_T), sigmas, lambda: torch.from_numpy(draw())).numpy()

        super().__init__(run_by_times, schedule.alpha_bar, "eps", list_of, order, evaluations, extrapolates)

    def scale_input(self, x_t, t):
        return self.schedule.alpha(int(t)) * x_t

    def add_noise(self, x_0, eps, t):
        return x_0 + self.sigma[np.asarray(t)].reshape(-1, *[1] * (np.ndim(x_0) - 1)) * eps


def of_k_diffusion(name: str, schedule: Schedule, list_of, **options) -> InSigma:
    """name: euler, heun, dpmpp_2m, euler_ancestral."""
    sampling, _ = k_diffusion()
    sampler = getattr(sampling, f"sample_{name}")

    def run(model, x, sigmas, draw):
        noise = {"noise_sampler": lambda *_: draw()} if name == "euler_ancestral" else {}
        return sampler(model, x, sigmas, disable=True, **noise, **options)

    return InSigma(schedule, run, list_of, order=2 if name in ("heun", "dpmpp_2m") else 1,
                   evaluations=2 if name == "heun" else 1, extrapolates=name == "dpmpp_2m")


def of_smalldiffusion(schedule: Schedule, list_of, gam: float = 1.0, mu: float = 0.0) -> InSigma:
    """gam = 1: mu = 0 is DDIM, mu = 1/2 DDPM; gam = 2, mu = 0 is its accelerated sampler."""
    diffusion, _ = smalldiffusion()

    def run(model, x, sigmas, draw):
        class Model:
            def eval(self):
                pass

            def predict_eps_cfg(self, x, sigma, cond, scale):
                return (x - model(x, sigma.expand(len(x)))) / sigma

            def rand_input(self, batch):
                return draw() if mu else torch.zeros_like(x)

        accelerator = types.SimpleNamespace(device="cpu")
        *_, end = diffusion.samples(Model(), sigmas, gam=gam, mu=mu, xt=x, accelerator=accelerator)
        return end

    return InSigma(schedule, run, list_of, order=1)

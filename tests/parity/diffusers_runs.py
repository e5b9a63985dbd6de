"""A run of a scheduler of diffusers, step by step, with given noise and a formula in place of the network."""

import numpy as np
import pytest
import torch

DRAWING = ("lcm", "dpmsolver_multistep", "euler_ancestral_discrete")    # modules whose steps draw noise


def end_of_run(scheduler, steps: int, x_T, noise, network) -> np.ndarray:
    """The last sample; noise: an array for each draw; network: (x_t, t) -> what it predicts, float32 in the end."""
    scheduler.set_timesteps(steps)
    x, drawn = torch.from_numpy(x_T) * scheduler.init_noise_sigma, iter(noise)
    with pytest.MonkeyPatch.context() as patch:
        for module in DRAWING:
            patch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor",
                          lambda *a, **k: torch.from_numpy(next(drawn)))
        for t in scheduler.timesteps:
            predicted = network(scheduler.scale_model_input(x, t).numpy(), float(t)).astype(np.float32)
            x = scheduler.step(torch.from_numpy(predicted), t, x).prev_sample
    return x.numpy()

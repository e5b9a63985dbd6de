"""Makes golden64.npz beside each golden.npz of tests/pretrained/checkpoints: the networks of diffusers in float64.

    python -m tests.parity.make_float64

The weights are those of the checkpoints, the inputs those of golden.npz.  diffusers computes the waves of the time and
of SDXL's sizes in float32 whatever the network's dtype; here they are computed in float64 (`in_float64`).  Each entry
holds every 7th number of an output, which suffices and is small.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).parents[1] / "pretrained" / "checkpoints"
EVERY = 7


@contextmanager
def in_float64():
    """diffusers' waves of the time in float64."""
    def waves(timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=10000):
        half = embedding_dim // 2
        k = torch.arange(half, dtype=torch.float64)
        angle = timesteps.double()[:, None] * max_period ** (-k / (half - downscale_freq_shift))
        parts = [angle.cos(), angle.sin()] if flip_sin_to_cos else [angle.sin(), angle.cos()]
        return torch.cat(parts, dim=-1)
    with mock.patch("diffusers.models.embeddings.get_timestep_embedding", waves):
        yield


def outputs(kind: str) -> dict[str, np.ndarray]:
    """What diffusers' networks compute in float64 from golden.npz's inputs."""
    folder, g = HERE / kind, np.load(HERE / kind / "golden.npz")

    def double(cls, part):
        return cls.from_pretrained(folder / part, torch_dtype=torch.float32).double().eval()
    ids = torch.tensor(g["ids"])
    text = double(CLIPTextModel, "text_encoder")(ids, output_hidden_states=True)
    out = {"last": text.last_hidden_state, "penultimate": text.hidden_states[-2], "pooled": text.pooler_output}
    tau, added = text.last_hidden_state, {}
    if kind == "sdxl":
        second = double(CLIPTextModelWithProjection, "text_encoder_2")(ids, output_hidden_states=True)
        out |= {"penultimate_2": second.hidden_states[-2], "embedding_2": second.text_embeds}
        tau = torch.cat([text.hidden_states[-2], second.hidden_states[-2]], -1)
        sizes = torch.tensor([[48.0, 64, 0, 0, 48, 64]] * 2, dtype=torch.float64)
        added = {"added_cond_kwargs": {"text_embeds": second.text_embeds[[0, 2]], "time_ids": sizes}}
    vae, z = double(AutoencoderKL, "vae"), torch.tensor(g["z"]).double()
    q = vae.encode(torch.tensor(g["image"]).double()).latent_dist
    out |= {"mean": q.mean, "logvar": q.logvar, "decoded": vae.decode(z[:1, :4] / 0.18215).sample}
    with in_float64():
        out["unet"] = double(UNet2DConditionModel, "unet")(z, torch.tensor(g["t"]), tau[[0, 2]], **added).sample
    return {name: a.numpy() for name, a in out.items()}


if __name__ == "__main__":
    with torch.no_grad():
        for path in sorted(HERE.glob("*/golden.npz")):
            found = {name: a.ravel()[::EVERY] for name, a in outputs(path.parent.name).items()}
            np.savez_compressed(path.with_name("golden64.npz"), **found)

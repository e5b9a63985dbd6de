"""Image to image and in-painting, as diffusers' own pipelines run them: their times, noised starts and last latents.

The pipelines' networks are formulas here, so that a run takes milliseconds; latents stand for the given image, and the
noise of both sides is the same.  diffusers draws z ~ q(z | x) for an image, where minidiff takes the mean.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from support.from_image import METHODS, SD, SHAPE, STEPS, STRENGTHS, a_mask, network, numbers, ours

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")           # other programs' own
class TheirUnet(torch.nn.Module):
    dtype = torch.float32

    def __init__(self, channels):
        super().__init__()
        self.config = SimpleNamespace(in_channels=channels, sample_size=8, time_cond_proj_dim=None)
        self.times = []

    def forward(self, x, t, **_):
        self.times.append(float(t))
        return (torch.from_numpy(network(x.permute(0, 2, 3, 1).numpy(), float(t))).permute(0, 3, 1, 2),)


class TheirVae(torch.nn.Module):
    dtype, config = torch.float32, SimpleNamespace(scaling_factor=1.0, latent_channels=4)


def theirs(pipeline, channels, name, options, noise, **arguments):
    """(their last latents, the times that their network is asked at)."""
    from diffusers.image_processor import VaeImageProcessor
    p = object.__new__(pipeline)
    parts = {name: None for name in ("text_encoder", "tokenizer", "safety_checker", "feature_extractor",
                                     "image_encoder")}
    parts |= {"unet": TheirUnet(channels), "vae": TheirVae(), "scheduler": getattr(diffusers, name)(**options),
              "vae_scale_factor": 8, "image_processor": VaeImageProcessor(vae_scale_factor=8),
              "mask_processor": VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True,
                                                  do_convert_grayscale=True),
              "_internal_dict": diffusers.configuration_utils.FrozenDict({})}
    for part, value in parts.items():
        object.__setattr__(p, part, value)
    p.set_progress_bar_config(disable=True)
    drawn = iter(noise)
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline.__module__, *(f"diffusers.schedulers.scheduling_{kind}" for kind in (
                "lcm", "dpmsolver_multistep", "euler_ancestral_discrete"))):
            patch.setattr(f"{module}.randn_tensor", lambda *a, **k: latents(next(drawn)))
        patch.setattr(pipeline, "_execution_device", torch.device("cpu"))
        patch.setattr(pipeline, "maybe_free_model_hooks", lambda self: None)
        found = p(prompt_embeds=torch.zeros(1, 77, 16), guidance_scale=1.0, output_type="latent", **arguments)
    return found.images.permute(0, 2, 3, 1).numpy(), p.unet.times


def latents(a):
    """(B, h, w, C) -> theirs, (B, C, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(a.transpose(0, 3, 1, 2)))


def assert_same(found, expected):
    (z, times), (z_theirs, times_theirs) = found, expected
    np.testing.assert_allclose(times, times_theirs, atol=1e-3)
    assert np.abs(z - z_theirs).max() <= 1e-4 * np.abs(z_theirs).max()


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_image_to_image(method, strength):
    name, options = METHODS[method]
    for steps in STEPS:
        if strength == 0.2 and name == "EulerDiscreteScheduler" and options.get("final_sigmas_type"):
            continue                                        # its only step would go nowhere: refused here
        z_0, noise = numbers(steps, steps)
        expected = theirs(diffusers.StableDiffusionImg2ImgPipeline, 4, name, SD | options, noise,
                          image=latents(z_0), strength=strength, num_inference_steps=steps)
        found = ours(4, name, SD | options, noise, z_0, strength=strength, steps=steps)
        if options.get("final_sigmas_type"):                # theirs is asked once more, for a step that goes nowhere
            expected = expected[0], expected[1][:-1]
        assert_same(found, expected)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "euler to time 0"])
def test_in_painting(method, strength, channels):
    """A mask of whole latents: else theirs reads one pixel of a latent, and ours draws it again for any of its 64."""
    name, options = METHODS[method]
    z_0, noise = numbers(3, 6)
    hidden = np.random.default_rng(4).standard_normal(SHAPE, np.float32)
    mask = a_mask()
    expected = theirs(diffusers.StableDiffusionInpaintPipeline, channels, name, SD | options, noise,
                      image=latents(z_0), mask_image=torch.from_numpy(mask[None, None].astype(np.float32)), height=40,
                      width=48, masked_image_latents=latents(hidden), strength=strength, num_inference_steps=6)
    found = ours(channels, name, SD | options, noise, z_0, hidden, mask=mask, strength=strength, steps=6)
    assert_same(found, expected)

"""Makes tests/pretrained/from_image.npz: what diffusers' image to image and in-painting make of support/from_image.py.

    PYTHONPATH=.:tests python -m tests.parity.make_from_image

Entries: "METHOD STRENGTH image", "METHOD STRENGTH mask4" and "... mask9", the last latents, and the same with " times".
"""

from pathlib import Path

import diffusers
import numpy as np
import torch
from support.from_image import METHODS, SD, a_mask, numbers

from tests.parity.test_parity_from_image import latents, theirs

OUT = Path(__file__).parents[1] / "pretrained" / "from_image.npz"

if __name__ == "__main__":
    found, mask = {}, torch.from_numpy(a_mask()[None, None].astype(np.float32))
    z_0, noise = numbers(1, 5)
    for method, (name, options) in METHODS.items():
        for strength in (0.5, 0.8, 1.0):
            common = {"image": latents(z_0), "strength": strength, "num_inference_steps": 5}
            runs = {"image": (diffusers.StableDiffusionImg2ImgPipeline, 4, {})}
            runs |= {f"mask{channels}": (diffusers.StableDiffusionInpaintPipeline, channels, {
                "mask_image": mask, "height": 40, "width": 48, "masked_image_latents": latents(-z_0)})
                     for channels in (4, 9)}
            for kind, (pipeline, channels, more) in runs.items():
                z, times = theirs(pipeline, channels, name, SD | options, noise, **common, **more)
                found |= {f"{method} {strength} {kind}": z, f"{method} {strength} {kind} times": np.float32(times)}
    np.savez_compressed(OUT, **found)

"""Parts of two checkpoints, each whole by itself, do not go together: by shapes alone, before a weight is read."""

from pathlib import Path

import numpy as np
import pytest

from minidiff.errors import UserError
from minidiff.pretrained import agreement
from minidiff.pretrained.checkpoints import open_checkpoint

HERE = Path(__file__).parent / "checkpoints"


class Shapes:
    """Weights of which only shapes are known; the one named stands in front of those of a checkpoint."""

    def __init__(self, weights, **changed):
        self.own, self.changed = weights, {name.replace("__", "."): shape for name, shape in changed.items()}

    def shape(self, name):
        return self.changed.get(name) or self.own.shape(name)

    def __getattr__(self, name):
        return getattr(self.own, name)

    def __contains__(self, name):
        return name in self.own


def parts(kind: str):
    saved = open_checkpoint(HERE / kind)
    names = ["unet", "vae", *(part for part in saved.parts if part.startswith("text"))]
    return saved, {name: saved.weights(name, np.float32) for name in names}


@pytest.mark.parametrize("kind", ["eps", "v", "sdxl", "inpaint"])
def test_a_checkpoint_agrees_with_itself(kind):
    _, own = parts(kind)
    agreement.check_latents(own["unet"], own["vae"])


@pytest.mark.parametrize("changed", [{"conv_in__weight": (8, 5, 3, 3)}, {"conv_in__weight": (8, 8, 3, 3)},
                                     {"conv_out__weight": (3, 8, 3, 3)}, {"conv_out__weight": (8, 8, 3, 3)}])
def test_a_unet_of_other_latents(changed):
    _, own = parts("eps")
    with pytest.raises(UserError, match="its autoencoder's latents have 4"):
        agreement.check_latents(Shapes(own["unet"], **changed), own["vae"])


@pytest.mark.parametrize("kind, other", [("eps", "sdxl"), ("sdxl", "eps"), ("v", "sdxl"), ("inpaint", "sdxl")])
def test_a_unet_of_another_text_encoder(kind, other):
    saved, own = parts(kind)
    text = [weights for name, weights in parts(other)[1].items() if name.startswith("text")]
    with pytest.raises(UserError, match="numbers a token, and its text encoders give .*: they are of different"):
        agreement.check_prompt(saved.config("unet"), own["unet"], text)

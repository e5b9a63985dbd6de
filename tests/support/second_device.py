"""What the tests of a second device share: a model that it can train in a test, and results with their gradients."""

import numpy as np

from minidiff.engine.backend import to_device
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.unet import UNetConfig
from minidiff.systems.text_to_image import TextToImageConfig
from minidiff.text.encoder import TextEncoderConfig

SMALL = TextToImageConfig(T=50, text=TextEncoderConfig(width=8, layers=1, heads=2),
                          unet=UNetConfig(patch=4, widths=(8,), attention=(True,), heads=2, groups=4, embedding=8,
                                          text=8))


def run(f, module, device: str, x: np.ndarray) -> list:
    """f(module, Tensor x) on a device: the result and its gradients, by x and by every parameter."""
    module.to(device)
    x = Tensor(to_device(x, device), requires_grad=True)
    y = f(module, x)
    dy = np.random.default_rng(2).standard_normal(y.shape).astype(y.dtype)
    return [y.data, *gradients(y, [x, *module.parameters().values()], to_device(dy, device))]

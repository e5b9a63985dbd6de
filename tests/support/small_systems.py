"""Every system, small enough to train in a test: a configuration of each, and stand-ins for the trained systems."""

from dataclasses import replace
from functools import cache

import numpy as np
from support import tiny

from minidiff import systems
from minidiff.data.digits import Digits
from minidiff.nn.autoencoder import AutoencoderConfig
from minidiff.nn.image_classifier import ImageClassifierConfig
from minidiff.nn.image_tower import ImageTowerConfig
from minidiff.nn.mmdit import MMDiTConfig
from minidiff.nn.prior import PriorConfig
from minidiff.nn.unet import UNetConfig
from minidiff.systems.adm import ADMConfig
from minidiff.systems.autoencoder import KLAutoencoderConfig, VQAutoencoderConfig
from minidiff.systems.clip import CLIPConfig
from minidiff.systems.consistency import ConsistencyConfig
from minidiff.systems.dalle import DALLEConfig
from minidiff.systems.dalle2 import UnCLIPConfig
from minidiff.systems.ddpm import DDPMConfig
from minidiff.systems.digit_classifier import DigitClassifierConfig
from minidiff.systems.dit import DiTConfig
from minidiff.systems.dpm import DPMConfig
from minidiff.systems.glide import GLIDEConfig
from minidiff.systems.imagen import ImagenConfig
from minidiff.systems.latent import LatentConfig
from minidiff.systems.system import System
from minidiff.systems.vdm import VDMConfig
from minidiff.text.encoder import TextEncoderConfig
from minidiff.training import run

TEXT = TextEncoderConfig(width=8, layers=1, heads=2)
TOWER = ImageTowerConfig(widths=(8, 8), groups=4, last=2)
UNET = UNetConfig(widths=(8, 16), heads=2, groups=4, embedding=16)
GRID = UNetConfig(patch=1, groups=4, heads=2, embedding=8, text=8)                  # of a few pixels
FINER = replace(GRID, channels=2, out=1, widths=(8, 8), attention=(False, False))
NETWORK = AutoencoderConfig(widths=(4, 8), groups=2)
SMALL_CLIP = CLIPConfig(pairs=4, image=TOWER, text=TEXT)
SMALL_DDPM = DDPMConfig(T=50, steps=3, unet=replace(UNET, out=2))
SMALL_KL = KLAutoencoderConfig(network=NETWORK, latent=2, steps=3, perceptual=0.0)

CONFIGS = {
    "text-to-image": tiny.CONFIG,
    "dpm": DPMConfig(T=6, hidden=5, steps=2, schedule_steps=2),
    "ddpm": SMALL_DDPM,
    "vdm": VDMConfig(pieces=3, waves=(4, 8), T=50, steps=3, unet=replace(UNET, channels=5, out=4)),
    "clip": SMALL_CLIP,
    "adm": ADMConfig("digits", SMALL_DDPM, UNET, steps=3),
    "glide": GLIDEConfig(T=50, pairs=4, embedding=8, image=TOWER, text=TEXT),
    "dalle": DALLEConfig(autoencoder=AutoencoderConfig(widths=(8, 8)), codes=5, length=20, width=8, layers=2, heads=2),
    "dalle2": UnCLIPConfig(clip=SMALL_CLIP, prior=PriorConfig(width=8, layers=1, heads=2), components=3, buckets=3,
                           dots=2, unet=replace(UNET, text=8)),
    "imagen": ImagenConfig(T=20, text=replace(TEXT, vocab=440, length=60), decoder_layers=1,
                           base=replace(GRID, widths=(8,), attention=(True,)), super1=FINER,
                           super2=replace(FINER, patch=2)),
    "autoencoder-kl": SMALL_KL,
    "autoencoder-vq": VQAutoencoderConfig(network=NETWORK, latent=3, codes=8, steps=3, perceptual=0.0),
    "latent": LatentConfig(T=50, steps=3, clip=SMALL_CLIP, autoencoder=SMALL_KL,
                           unet=replace(GRID, channels=2, widths=(8,), attention=(True,))),
    "dit": DiTConfig(T=50, steps=3, text=TEXT, network=MMDiTConfig(patch=7, width=8, blocks=2, heads=2, text=8)),
    "consistency": ConsistencyConfig(tiny.CONFIG, intervals=5, steps=3),
    "digit-classifier": DigitClassifierConfig(ImageClassifierConfig(widths=(8, 8), groups=4, features=6), steps=3),
}


def data() -> Digits:
    return tiny.digits()


def moved(system, seed: int = 0, by: float = 0.1):
    """Every parameter is changed from its first value, so that no branch is zero."""
    rng = np.random.default_rng(seed)
    for p in system.parameters().values():
        p.data = np.asarray(p.data + by * rng.standard_normal(p.shape), p.dtype)
    return system


@cache
def small(name: str) -> System:
    """An untrained system in which no weight is 0."""
    if name == "text-to-image":
        return tiny.trained_a_little()
    return moved(new(name))


def on_gpu(name: str) -> System:
    """A copy of the small system whose weights are on the device; the one that all share stays where it is."""
    own = small(name)
    copy = type(own)(own.config, own.tokenizer, np.random.default_rng(0))
    copy.load_state_dict(own.state_dict())
    return copy.to("cuda")


def new(name: str, config=None, seed: int = 0) -> System:
    """An untrained small system, built on small ones."""
    kind = systems.system_class(name)
    return kind.new(data(), seed, config or CONFIGS[name], {other: small(other) for other in kind.needs})


def ship(monkeypatch) -> None:
    """Puts small systems in the place of the trained systems on which others are built."""
    monkeypatch.setattr(systems, "load_system", lambda name, path=None: small(name))
    monkeypatch.setattr(run, "load_needed",
                        lambda kind, paths=None: {name: small(name) for name in kind.needs})

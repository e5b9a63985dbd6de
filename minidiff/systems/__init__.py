"""Floor V: the systems of the literature, each one page.  `SYSTEMS` names them, `find` loads one's weights."""

from __future__ import annotations

import importlib
from pathlib import Path

from minidiff.errors import UserError

# name -> (module, class); a module is imported when its system is asked for
SYSTEMS: dict[str, tuple[str, str]] = {
    "dpm": ("dpm", "DPM"),
    "ddpm": ("ddpm", "DDPM"),
    "clip": ("clip", "CLIP"),
    "adm": ("adm", "ADM"),
    "text-to-image": ("text_to_image", "TextToImage"),
    "glide": ("glide", "GLIDE"),
    "dalle": ("dalle", "DALLE"),
    "dalle2": ("dalle2", "UnCLIP"),
    "imagen": ("imagen", "Imagen"),
    "autoencoder-kl": ("autoencoder", "KLAutoencoder"),
    "autoencoder-vq": ("autoencoder", "VQAutoencoder"),
    "latent": ("latent", "LatentDiffusion"),
}


def system_class(name: str):
    """The class of the system called `name`; UserError where there is none."""
    if name not in SYSTEMS:
        raise UserError(f"there is no system {name!r}: it is one of {', '.join(SYSTEMS)}")
    module, kind = SYSTEMS[name]
    return getattr(importlib.import_module(f"minidiff.systems.{module}"), kind)


def weights_of(name: str) -> Path | None:
    """The file of the system's weights: the one that comes with minidiff, else the one trained here, in runs/NAME."""
    places = (system_class(name).shipped(), Path("runs") / name / "model.safetensors")
    return next((path for path in places if path.exists()), None)


def load_system(name: str, path: str | Path | None = None):
    """The trained system called `name`, from `path` or from where `weights_of` finds it.  UserError says how to train
    it where there is none."""
    path = path or weights_of(name)
    if path is None:
        raise UserError(f"there are no weights of {name} yet: train it with minidiff train --system {name}")
    return system_class(name).load(path)

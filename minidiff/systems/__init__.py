"""Floor V: the systems of the literature, each one page.  `SYSTEMS` names them, `load_system` loads one's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from minidiff import checkpoint
from minidiff.errors import UserError
from minidiff.registry import Registry

SYSTEMS: Registry = Registry("system", "minidiff.systems", {
    "dpm": "minidiff.systems.dpm:DPM",
    "ddpm": "minidiff.systems.ddpm:DDPM",
    "vdm": "minidiff.systems.vdm:VDM",
    "clip": "minidiff.systems.clip:CLIP",
    "adm": "minidiff.systems.adm:ADM",
    "text-to-image": "minidiff.systems.text_to_image:TextToImage",
    "glide": "minidiff.systems.glide:GLIDE",
    "dalle": "minidiff.systems.dalle:DALLE",
    "dalle2": "minidiff.systems.dalle2:UnCLIP",
    "imagen": "minidiff.systems.imagen:Imagen",
    "autoencoder-kl": "minidiff.systems.autoencoder:KLAutoencoder",
    "autoencoder-vq": "minidiff.systems.autoencoder:VQAutoencoder",
    "latent": "minidiff.systems.latent:LatentDiffusion",
    "dit": "minidiff.systems.dit:DiffusionTransformer",
    "consistency": "minidiff.systems.consistency:Consistency",
    "digit-classifier": "minidiff.systems.digit_classifier:DigitClassifier",
})
DEFAULT = "text-to-image"                                   # the default of --system, and nothing more
RUNS = Path("runs")                                         # a system's own runs are in runs/NAME


def system_class(name: str):
    """The class of the system called `name`; UserError where there is none."""
    return SYSTEMS[name]


def class_of_model(path: str | Path) -> type:
    """The class of the system in a model's file, or in another program's file or folder; UserError where there is none.
    """
    from minidiff.pretrained.checkpoints import is_foreign, open_checkpoint
    if is_foreign(Path(path)):
        open_checkpoint(Path(path))                         # UserError where it is none that minidiff has
        from minidiff.systems.stable_diffusion import StableDiffusion
        return StableDiffusion
    name = checkpoint.read_header(path).meta.get("system")
    if not isinstance(name, str) or name not in SYSTEMS:
        raise UserError(f"{path} holds {str(name)[:40]!r}, which is none of the systems {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def model_path(model: str | Path) -> Path:
    """The path of a model: of a file or folder, else of what comes with minidiff under this name ("emoji"), else of
    the checkpoint "org/name" at Hugging Face, which is fetched."""
    from minidiff.pretrained import hub
    return hub.local(named_weights(model))


def named_weights(model: str | Path) -> str | Path:
    """The weights that come with minidiff under a plain name that is no file or folder here; any other model as it is.

    UserError where there are no weights of a plain name.
    """
    from minidiff.systems.system import WEIGHTS
    if Path(model).exists() or not re.fullmatch(r"[A-Za-z0-9-]+", str(model)):
        return model
    shipped = WEIGHTS / f"{model}.safetensors"
    if not shipped.is_file():
        names = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors")))
        raise UserError(f"{model} does not exist here, and no weights of this name come with minidiff: it has {names}")
    return shipped


def weights_of(name: str) -> Path | None:
    """The file of a system's weights: of the user's own run, in runs/NAME, or else the one that comes with minidiff."""
    places = (RUNS / name / "model.safetensors", SYSTEMS[name].shipped())
    return next((path for path in places if path.is_file()), None)


def load_system(name: str, path: str | Path | None = None):
    """The trained system called `name`: from `path`, or else from where `weights_of` finds it.

    UserError says how to train it where there are no weights.
    """
    return load_model(SYSTEMS[name], path)


def load_model(kind: type, path: str | Path | None = None, **options):
    """The trained system of this class: from `path`, a file or folder, or else as `load_system` finds it.

    options: of its `load`.
    """
    found = named_weights(path) if path else weights_of(kind.name)
    if found is None:
        raise UserError(f"there are no weights of {kind.name} yet: train it with minidiff train --system {kind.name}")
    system = kind.load(found, **options)
    system.file = Path(found)                               # for messages
    return system


def load_needed(kind: type, paths: Mapping[str, str | Path] | None = None) -> dict[str, object]:
    """The trained systems that a new system of this class is built on (its `needs`), by their names.

    paths: files of those that are not to be searched for.  UserError where one is missing, or where a path is given
    for a system that is not needed.
    """
    paths = paths or {}
    for name in paths:
        if name not in kind.needs:
            needs = ", ".join(kind.needs) or "no other system"
            raise UserError(f"{kind.name} is not built on {name!r}: it needs {needs}")
    return {name: load_system(name, paths.get(name)) for name in kind.needs}

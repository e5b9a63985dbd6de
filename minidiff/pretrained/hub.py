"""Checkpoints by name: fetched from Hugging Face, into the cache that its other programs use.

    "org/name"  -->  ~/.cache/huggingface/hub/models--org--name/snapshots/COMMIT/

The package huggingface_hub does the work; it is an extra of minidiff.  The pipeline's index is fetched first, so that a
family that minidiff does not have is refused before gigabytes come.  Then come the files that checkpoints.Folder reads
and no other: never a pickle, and half precision only where there is nothing else.  Without a network, what the cache
has is taken.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from minidiff.errors import UserError, brief
from minidiff.files import user_path
from minidiff.pretrained.checkpoints import INDEX, STEMS, TOKENIZER_FILES, VARIANTS, Folder, family_of, parts_of
from minidiff.pretrained.config import Config
from minidiff.pretrained.weights import PICKLES

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".safetensors", ".json", *PICKLES)                 # a path that ends so is of a file, and no name
SETTINGS = ("config.json", "scheduler_config.json", *TOKENIZER_FILES)


def local(model: str | Path) -> Path:
    """The path of a model: `model` itself, with ~ for the home folder, or where the checkpoint of this name was put."""
    path = user_path(model)
    if path.exists() or not NAME.fullmatch(str(model)) or str(model).lower().endswith(FILES):
        return path
    return fetched(str(model))


def fetched(name: str) -> Path:
    """The folder of the checkpoint called "org/name"; UserError where it cannot be had."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError(f"{name} is no file or folder here; to fetch a model of this name from Hugging Face, install "
                        "huggingface_hub: pip install huggingface_hub") from None
    with refused(name):
        try:
            files = hub.HfApi().list_repo_files(name)
        except Exception as error:
            if not of_network(error):
                raise
            return from_cache(hub, name, error)
        if INDEX not in files:
            raise UserError(f"{name} at Hugging Face has no {INDEX}: minidiff fetches folders in diffusers' layout; "
                            "download its .safetensors file, and name that.")
        family = family_of(Config.load(Path(hub.hf_hub_download(name, INDEX))))
        return Path(hub.snapshot_download(name, allow_patterns=needed(name, family, files)))


def from_cache(hub, name: str, error: Exception) -> Path:
    """The folder in the cache, which must be complete."""
    try:
        folder = Path(hub.snapshot_download(name, local_files_only=True, allow_patterns=[INDEX]))
        Folder.at(folder)
    except Exception:
        raise UserError(f"{name} could not be fetched, since Hugging Face cannot be reached, and is not in the cache "
                        f"({brief(error)})") from error
    return folder


def needed(name: str, family: str, files: Collection[str]) -> list[str]:
    """The files of a repository that checkpoints.Folder reads; UserError where some weights are pickles only."""
    chosen = [INDEX]
    for part in parts_of(family):
        chosen += [f"{part}/{file}" for file in SETTINGS if f"{part}/{file}" in files
                   and not (file == "tokenizer.json" and f"{part}/vocab.json" in files)]
        if part in STEMS:
            chosen += weights_of(name, part, files)
    return chosen


def weights_of(name: str, part: str, files: Collection[str]) -> list[str]:
    """The files of a part's weights, in the first of VARIANTS that it has."""
    for variant in VARIANTS:
        stem = f"{part}/{STEMS[part]}{variant}"
        index = f"{part}/{STEMS[part]}.safetensors.index{variant}.json"
        if f"{stem}.safetensors" in files:
            return [f"{stem}.safetensors"]
        if index in files:
            # in older repositories the variant's name stands behind the numbers
            before, v = re.escape(f"{part}/{STEMS[part]}"), re.escape(variant)
            shard = re.compile(rf"{before}({v}-\d+-of-\d+|-\d+-of-\d+{v})\.safetensors")
            return [index, *(file for file in files if shard.fullmatch(file))]
    if any(file.startswith(f"{part}/") and file.endswith(PICKLES) for file in files):
        raise UserError(f"{name} at Hugging Face has the weights of {part}/ as pickles only, which are programs: "
                        "minidiff reads safetensors.")
    raise UserError(f"{name} at Hugging Face has no weights of {part}/: the checkpoint is not complete.")


# --- what can go wrong at the other end -------------------------------------------------------------------------

@contextmanager
def refused(name: str) -> Iterator[None]:
    """Turns the errors of huggingface_hub into a UserError; its versions have them in different places."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "GatedRepoError" in kinds:
            raise UserError(f"{name} is given only to those who accept its terms: do so at "
                            f"https://huggingface.co/{name}, then log in with: hf auth login") from error
        if "RepositoryNotFoundError" in kinds:
            raise UserError(f"there is no model {name} at Hugging Face that is open to you, and no file or folder of "
                            "this name here") from error
        raise UserError(f"{name} could not be fetched from Hugging Face ({brief(error)})") from error


def of_network(error: Exception) -> bool:
    """Whether the other end was not reached: an answer, if only of a refusal, has a status."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None and bool(kinds & {"ConnectionError", "ConnectError", "Timeout", "TimeoutException",
                                            "TimeoutError", "OfflineModeIsEnabled", "TransportError"})

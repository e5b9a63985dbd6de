"""A Stable Diffusion checkpoint on disk: which parts it has, where their files are, and of which family it is.

`open_checkpoint` opens a folder or a single file (single_file.py).

A folder in diffusers' layout:

    model_index.json            the class of the pipeline, and of each part
    unet/ vae/                  config.json, diffusion_pytorch_model.safetensors
    text_encoder/ (and _2)      config.json, model.safetensors
    tokenizer/ (and _2)         vocab.json and merges.txt, or tokenizer.json; tokenizer_config.json
    scheduler/                  scheduler_config.json

A part's weights may be in several files (`...safetensors.index.json` names them), or in half precision only
(`...fp16.safetensors`).  Pickles (.bin, .ckpt) are programs, and are refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from minidiff.checkpoint import KEY
from minidiff.errors import UserError
from minidiff.pretrained.clip_tokenizer import ClipTokenizer
from minidiff.pretrained.config import Config
from minidiff.pretrained.single_file import KINDS, RELATIVES, UNET, SingleFile, kind_of
from minidiff.pretrained.weights import PICKLES, Entry, Weights, entries, metadata, names

INDEX = "model_index.json"
PIPELINES = {name: family for family, names in {
    "Stable Diffusion": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
                         "StableDiffusionInpaintPipelineLegacy", "LatentConsistencyModelPipeline",
                         "LatentConsistencyModelImg2ImgPipeline"),
    "SDXL": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
}.items() for name in names}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
         "text_encoder_2": "model"}
VARIANTS = ("", ".fp16", ".bf16")                           # of a part's weights, the first one preferred
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")
# what the scheduler_config.json of the first checkpoints leaves out; the pipelines of these families set it, too
LEFT_OUT = {"steps_offset": 1, "clip_sample": False}
CONVERT = "where you trust it, convert it with diffusers: StableDiffusionPipeline.from_single_file(path), or " \
          "from_pretrained(folder), then save_pretrained(new_folder)"


@dataclass(frozen=True)
class Folder:
    """A checkpoint's folder, whose model_index.json has been read."""

    path: Path
    family: str                             # a value of PIPELINES
    index: Config

    @classmethod
    def at(cls, path: Path) -> Folder:
        """The checkpoint in a folder; UserError where it is none, or of a family that minidiff does not have."""
        check_ordinary(path / INDEX)
        if not (path / INDEX).exists():
            raise UserError(no_index(path))
        check_inside(path / INDEX, path)
        index = Config.load(path / INDEX)
        folder = cls(path, family_of(index), index)
        missing = [f"{part}/" for part in folder.parts if not (path / part).is_dir()]
        if missing:
            raise UserError(f"{path} is not complete: it has no {', '.join(missing)}.")
        return folder

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders that this family needs."""
        return parts_of(self.family)

    def config(self, part: str) -> Config:
        path = self.path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        check_inside(path, self.path)
        config = Config.load(path)
        if part == "scheduler" and self.family == "Stable Diffusion":
            return Config(LEFT_OUT | config.values, path)
        return config

    def weights(self, part: str, dtype, low_memory: bool = False) -> Weights:
        """The tensors of a part, to be read in dtype."""
        entries = {present_name(name): entry for name, entry in self._entries(part).items()}
        return Weights(entries, str(self.path / part), dtype=dtype, low_memory=low_memory)

    def tokenizer(self, part: str) -> ClipTokenizer:
        """The tokenizer of a text encoder."""
        folder = self.path / part.replace("text_encoder", "tokenizer")
        for name in TOKENIZER_FILES:
            check_inside(folder / name, self.path)
        return ClipTokenizer.load(folder)

    @property
    def zeros_without_negative(self) -> bool:
        """Whether no negative prompt is the state 0 (SDXL), and not that of ''."""
        return self.index.flag("force_zeros_for_empty_prompt", self.family == "SDXL")

    def _entries(self, part: str) -> dict[str, Entry]:
        folder, stem = self.path / part, STEMS[part]
        for variant in VARIANTS:
            whole = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            check_ordinary(whole)
            if whole.is_file():
                return entries(check_inside(whole, self.path))
            if index.is_file():
                return self._shards(index)
        if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
            raise UserError(f"{folder} has its weights as a pickle, which is a program: {CONVERT}.")
        raise UserError(f"{folder} has no {stem}.safetensors: the checkpoint is not complete.")

    def _shards(self, index: Path) -> dict[str, Entry]:
        """The tensors of several files; the index says which file has which."""
        check_inside(index, self.path)
        where = Config.load(index).values.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise UserError(f"{index} has no weight_map of names and files.")
        found: dict[str, Entry] = {}
        for name in sorted(set(where.values())):
            path = index.parent / name
            if Path(name).name != name or not path.is_file():
                raise UserError(f"{index} names the file {name[:80]!r}, which is not in its folder.")
            found |= entries(check_inside(path, self.path))
        missing = [name for name in where if name not in found]
        if missing:
            raise UserError(f"{index} names the tensor {missing[0][:80]!r}, which is in none of its files.")
        return found


def present_name(name: str) -> str:
    """The name that diffusers gives a tensor today: until 2023 it called an autoencoder's attention otherwise."""
    before, attentions, layer = name.partition(".attentions.")
    block, _, rest = layer.partition(".")
    old, _, kind = rest.rpartition(".")
    return f"{before}{attentions}{block}.{OLD_ATTENTION[old]}.{kind}" if old in OLD_ATTENTION else name


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def parts_of(family: str) -> tuple[str, ...]:
    """The folders of a checkpoint of this family."""
    second = ("text_encoder_2", "tokenizer_2") if family == "SDXL" else ()
    return ("unet", "vae", "text_encoder", "tokenizer", "scheduler", *second)


def open_checkpoint(path: Path) -> Folder | SingleFile:
    """The checkpoint in a folder or file; UserError where it is none."""
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path} is a pickle, which is a program: {CONVERT}.")
    if path.is_dir():
        return Folder.at(path)
    if path.parent.name in STEMS and (path.parents[1] / INDEX).is_file():
        raise UserError(f"{path} is one part of a checkpoint: give its folder, {path.parents[1]}.")
    return SingleFile.at(path)


def is_foreign(path: Path) -> bool:
    """Whether the path is a folder, a pickle, or another program's file of a kind that is known."""
    if path.is_dir() or path.suffix.lower() in PICKLES:
        return True
    try:
        found = [] if KEY in metadata(path) else names(path)
    except UserError:
        return False
    return any(name.startswith(UNET) for name in found) or kind_of(found, KINDS | RELATIVES) is not None


def family_of(index: Config) -> str:
    """The family of a model_index.json; UserError where minidiff does not have it."""
    name = index.text("_class_name")
    if name not in PIPELINES:
        raise UserError(f"{index.path} is of a {name[:60]!r}, which minidiff does not have; it has "
                        f"{', '.join(sorted(set(PIPELINES.values())))} ({', '.join(PIPELINES)}).")
    if PIPELINES[name] == "SDXL" and index.values.get("text_encoder") == [None, None]:         # it has the second alone
        raise UserError(f"{index.path} is of SDXL's refiner, which minidiff does not have.")
    return PIPELINES[name]


# --- checks -----------------------------------------------------------------------------------------------------

def check_inside(path: Path, folder: Path) -> Path:
    """The file that the path leads to; UserError where it is a link out of the checkpoint's folder.

    The cache of huggingface_hub has its files in blobs/, and in snapshots/COMMIT/ links to them.
    """
    try:
        target, own = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):                         # RuntimeError: Python 3.12 and before
        raise UserError(f"{path} is a link that leads to itself.") from None
    places = [own] + [own.parents[1] / "blobs"] * (own.parent.name == "snapshots")
    if not any(target.is_relative_to(place) for place in places):
        raise UserError(f"{path} is a link out of the checkpoint, to {target}: copy the file into its place.")
    return target


def check_ordinary(path: Path) -> None:
    """UserError for a folder, pipe or device; also for a link that leads nowhere."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path} is not an ordinary file, nor a link to one.")


def no_index(path: Path) -> str:
    """Why a folder is no checkpoint, and what is one."""
    if path.resolve().name in STEMS and (path.resolve().parent / INDEX).is_file():
        return f"{path} is one part of a checkpoint: give its folder, {path.resolve().parent}."
    if (path / "model.safetensors").is_file():
        return f"{path} is a folder: name the file in it, {path / 'model.safetensors'}."
    return (f"{path} is a folder without {INDEX}: it takes a folder in diffusers' layout ({INDEX}, unet/, vae/, "
            "text_encoder/, tokenizer/, scheduler/), or one .safetensors file.")


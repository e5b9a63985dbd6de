"""A Stable Diffusion checkpoint on disk: which parts it has, where their files are, and of which family it is.

`open_checkpoint` opens a folder or a single file (single_file.py).

A folder in diffusers' layout:

    model_index.json            the class of the pipeline, and of each part
    unet/ vae/                  config.json, diffusion_pytorch_model.safetensors
    text_encoder/ (and _2)      config.json, model.safetensors
    tokenizer/ (and _2)         vocab.json, merges.txt, tokenizer_config.json
    scheduler/                  scheduler_config.json

A part's weights may be in several files (`...safetensors.index.json` names them), or in half precision only
(`...fp16.safetensors`).  Pickles (.bin, .ckpt) are programs, and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minidiff.errors import UserError
from minidiff.pretrained.clip_tokenizer import ClipTokenizer
from minidiff.pretrained.config import Config
from minidiff.pretrained.single_file import UNET, SingleFile
from minidiff.pretrained.weights import PICKLES, Entry, Weights, entries

INDEX = "model_index.json"
PIPELINES = {name: family for family, names in {
    "Stable Diffusion": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
                         "StableDiffusionInpaintPipelineLegacy"),
    "SDXL": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
}.items() for name in names}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
         "text_encoder_2": "model"}
CONVERT = "convert it to safetensors where you trust it (in diffusers: pipe.save_pretrained(folder), with " \
          "safe_serialization)"


@dataclass(frozen=True)
class Folder:
    """A checkpoint's folder, whose model_index.json has been read."""

    path: Path
    family: str                             # a value of PIPELINES
    index: Config

    @classmethod
    def at(cls, path: Path) -> Folder:
        """The checkpoint in a folder; UserError where it is none, or of a family that minidiff does not have."""
        if not (path / INDEX).is_file():
            raise UserError(f"{path} is no checkpoint of Stable Diffusion: it has no {INDEX}.")
        index = Config.load(path / INDEX)
        name = index.text("_class_name")
        if name not in PIPELINES:
            raise UserError(f"{path} is a {name[:60]!r}, which minidiff does not have; it has "
                            f"{', '.join(sorted(set(PIPELINES.values())))} ({', '.join(PIPELINES)}).")
        folder = cls(path, PIPELINES[name], index)
        for part in folder.parts:
            if not (path / part).is_dir():
                raise UserError(f"{path} is not complete: it has no {part}/.")
        return folder

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders that this family needs."""
        second = ("text_encoder_2", "tokenizer_2") if self.family == "SDXL" else ()
        return ("unet", "vae", "text_encoder", "tokenizer", "scheduler", *second)

    def config(self, part: str) -> Config:
        return Config.load(self.path / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))

    def weights(self, part: str, dtype) -> Weights:
        """The tensors of a part, to be read in dtype."""
        return Weights(self._entries(part), str(self.path / part), dtype=dtype)

    def tokenizer(self, part: str) -> ClipTokenizer:
        """The tokenizer of a text encoder."""
        return ClipTokenizer.load(self.path / part.replace("text_encoder", "tokenizer"))

    @property
    def zeros_without_negative(self) -> bool:
        """Whether no negative prompt is the state 0 (SDXL), and not that of ''."""
        return self.index.flag("force_zeros_for_empty_prompt", False)

    def _entries(self, part: str) -> dict[str, Entry]:
        folder, stem = self.path / part, STEMS[part]
        for variant in ("", ".fp16", ".bf16"):
            whole = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if whole.is_file():
                return entries(self._inside(whole))
            if index.is_file():
                return self._shards(index)
        if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
            raise UserError(f"{folder} has its weights as a pickle, which is a program: {CONVERT}.")
        raise UserError(f"{folder} has no {stem}.safetensors: the checkpoint is not complete.")

    def _shards(self, index: Path) -> dict[str, Entry]:
        """The tensors of several files; the index says which file has which."""
        where = Config.load(index).values.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise UserError(f"{index} has no weight_map of names and files.")
        found: dict[str, Entry] = {}
        for name in sorted(set(where.values())):
            path = index.parent / name
            if Path(name).name != name or not path.is_file():
                raise UserError(f"{index} names the file {name[:80]!r}, which is not in its folder.")
            found |= entries(self._inside(path))
        missing = [name for name in where if name not in found]
        if missing:
            raise UserError(f"{index} names the tensor {missing[0][:80]!r}, which is in none of its files.")
        return found

    def _inside(self, path: Path) -> Path:
        """The file, unless it is a link out of the checkpoint.  The cache of huggingface_hub links to its blobs/."""
        target, own = path.resolve(), self.path.resolve()
        if not any(target.is_relative_to(place) for place in (own, own.parent.parent / "blobs")):
            raise UserError(f"{path} is a link out of the checkpoint, to {target}: copy the file into its place.")
        return target


def open_checkpoint(path: Path) -> Folder | SingleFile:
    """The checkpoint in a folder or file; UserError where it is none."""
    if path.suffix.lower() in PICKLES:
        raise UserError(f"{path} is a pickle, which is a program: {CONVERT}.")
    return Folder.at(path) if path.is_dir() else SingleFile.at(path)


def is_foreign(path: Path) -> bool:
    """Whether the path is a folder in diffusers' layout, or a file with the names of Stable Diffusion, or a pickle."""
    if path.is_dir():
        return (path / INDEX).is_file()
    if path.suffix.lower() in PICKLES:
        return True
    try:
        return any(name.startswith(UNET) for name in entries(path))
    except UserError:
        return False


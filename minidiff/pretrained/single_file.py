"""A Stable Diffusion checkpoint in one .safetensors file, with the names of its first program (CompVis, Stability).

The networks are those of a folder in diffusers' layout; only names differ, and a few tensors are stored together.  Such
a file has no configuration.  What its shapes do not say is what all published models of the family have: the number of
heads, the noise schedule, the spacing of times.  Nor has it a tokenizer: CLIP's own, which comes with minidiff, serves.
The second family reads the state before the last of its text encoder's 24 layers, so that layer is left out.

    model.diffusion_model.      the UNet             time_embed, input_blocks, middle_block, output_blocks, out
    first_stage_model.          the autoencoder      encoder.down, encoder.mid, decoder.mid, decoder.up
    cond_stage_model.           the text encoder     transformers' names (1.x), OpenCLIP's (2.x)
    conditioner.embedders.      SDXL's two           0: transformers' names, 1: OpenCLIP's

SDXL's program also writes the second family, such as SD-Turbo, with its one text encoder as conditioner.embedders.0.
Some fine-tuned files have an empty tensor v_pred, which says that the network predicts v, and one called ztsnr, for a
schedule that ends in pure noise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minidiff.errors import UserError
from minidiff.pretrained.clip_tokenizer import END, ClipTokenizer
from minidiff.pretrained.config import Config
from minidiff.pretrained.weights import DTYPES, Entry, Weights, entries

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CONV_IN = UNET + "input_blocks.0.0.weight"                 # of every checkpoint with a UNet
TEXT = {"SD 1": {"text_encoder": "cond_stage_model.transformer."},
        "SD 2": {"text_encoder": "cond_stage_model.model."},
        "SDXL": {"text_encoder": "conditioner.embedders.0.transformer.",
                 "text_encoder_2": "conditioner.embedders.1.model."}}
SIGNS = {"SD 1": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
         "SD 2": "cond_stage_model.model.ln_final.weight",
         "SDXL": "conditioner.embedders.1.model.ln_final.weight"}
SECOND_BY_SGM = "conditioner.embedders.0.model."             # SDXL's program; its refiner has these names, too
NOT_READ = "transformer.resblocks.23."                      # of the second family's text encoder
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
         "timestep_spacing": "leading", "steps_offset": 1}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULERS = {"SD 1": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
              "SD 2": {"_class_name": "DDIMScheduler", "set_alpha_to_one": False},
              "SDXL": {"_class_name": "EulerDiscreteScheduler"}}


# how names of tensors begin -> what a file with them is, if it lacks SIGNS or CONV_IN
OTHER = "which minidiff does not have."
PART = "one part of a checkpoint: give the folder that has model_index.json, or a file with all parts."
KINDS = {r"(model\.diffusion_model\.)?joint_blocks\.": f"a Stable Diffusion 3, {OTHER}",
         r"(model\.diffusion_model\.)?double_blocks\.": f"a FLUX, {OTHER}",
         r"model\.diffusion_model\.(blocks|layers|transformer_blocks)\.": f"a diffusion transformer, {OTHER}",
         r"transformer_blocks\.|single_transformer_blocks\.": f"a diffusion transformer, {OTHER}",
         r"conditioner\.embedders\.0\.model\.": f"SDXL's refiner, {OTHER}",
         r"control_model\.|controlnet_": f"a ControlNet, {OTHER}",
         r".*[._]lora[._]|lora_(unet|te)": "a LoRA: give a checkpoint, and this file as its LoRA.",
         r"(down_blocks|encoder\.(down|down_blocks)|text_model\.encoder|input_blocks)\.": PART}


# the same, for a file that has one of SIGNS, too
RELATIVES = {r"edm_mean$|edm_vpred\.": f"a model with EDM's scale of noise, such as Playground 2.5 or CosXL, {OTHER}"}


def kind_of(tensors: Iterable[str], kinds: Mapping[str, str]) -> str | None:
    """What a file with these names of tensors is, by `kinds`; None if no pattern matches."""
    return next((kind for pattern, kind in kinds.items() if any(re.match(pattern, name) for name in tensors)), None)


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in one file, with the methods of checkpoints.Folder."""

    path: Path
    kind: str                               # a key of SIGNS
    tensors: Mapping[str, Entry]

    @classmethod
    def at(cls, path: Path) -> SingleFile:
        """The checkpoint in a file; UserError where it is none, or of a family that minidiff does not have."""
        tensors = first_names(entries(path))
        family = next((family for family, sign in SIGNS.items() if sign in tensors), None)
        kind = kind_of(tensors, RELATIVES)
        if kind is None and (family is None or CONV_IN not in tensors):
            kind = kind_of(tensors, KINDS)
        if kind is not None:
            raise UserError(f"{path} is {kind}")
        if family is None or CONV_IN not in tensors:
            raise UserError(f"{path} is no checkpoint of Stable Diffusion 1, 2 or SDXL: it lacks their names, such as "
                            f"{SIGNS['SD 1']}.")
        return cls(path, family, tensors)

    @property
    def family(self) -> str:
        """As a folder has it."""
        return "SDXL" if self.kind == "SDXL" else "Stable Diffusion"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("unet", "vae", *TEXT[self.kind])

    def weights(self, part: str, dtype, low_memory: bool = False) -> Weights:
        """The tensors of a part, to be read in dtype, with diffusers' names."""
        return Weights(dict(self._renamed(part)), f"{self.path} ({part})", dtype=dtype, low_memory=low_memory)

    def config(self, part: str) -> Config:
        """The configuration of a part, from its shapes and what the family has."""
        values = {"unet": self._unet, "vae": self._vae, "scheduler": self._scheduler}.get(part, self._text)
        return Config(values() if part in ("unet", "vae", "scheduler") else values(part), self.path)

    def tokenizer(self, part: str) -> ClipTokenizer:
        """CLIP's own; OpenCLIP's encoders were trained with other padding."""
        open_clip_too = TEXT[self.kind][part].endswith("model.")
        return ClipTokenizer.shipped(pad="!" if open_clip_too else END)

    @property
    def zeros_without_negative(self) -> bool:
        return self.kind == "SDXL"

    # --- names ----------------------------------------------------------------------------------------------

    def _renamed(self, part: str) -> Iterator[tuple[str, Entry]]:
        if part == "unet":
            names = unet_names(self._blocks_per_level())
            yield from ((names(name), entry) for name, entry in self._below(UNET))
        elif part == "vae":
            levels = self._count(self._below(VAE), r"encoder\.down\.(\d{1,3})\.", "an encoder")
            yield from ((vae_name(name, levels), entry) for name, entry in self._below(VAE)
                        if not name.startswith("loss."))
        elif TEXT[self.kind][part].endswith("model."):
            yield from open_clip([(name, entry) for name, entry in self._below(TEXT[self.kind][part])
                                  if self.kind != "SD 2" or not name.startswith(NOT_READ)])
        else:
            yield from self._below(TEXT[self.kind][part])

    def _below(self, prefix: str) -> list[tuple[str, Entry]]:
        return [(name.removeprefix(prefix), entry) for name, entry in self.tensors.items() if name.startswith(prefix)]

    def _count(self, tensors, pattern: str, what: str) -> int:
        """One more than the largest number that the pattern finds; UserError where it finds none."""
        numbers = _numbers(tensors, pattern)
        if not numbers:
            raise UserError(f"{self.path} lacks {what} of Stable Diffusion: it holds a part of a checkpoint only.")
        return 1 + max(numbers)

    def _blocks_per_level(self) -> int:
        """Residual blocks of each level on the way down: those before the first change of resolution."""
        return min(_numbers(self._below(UNET), r"input_blocks\.(\d{1,3})\.0\.op\."), default=2) - 1

    # --- configurations -------------------------------------------------------------------------------------

    def _unet(self) -> dict:
        weights = self.weights("unet", np.float32)
        levels = self._count(weights.tensors.items(), r"down_blocks\.(\d{1,3})\.", "input blocks")
        attends = [f"down_blocks.{i}.attentions.0" in weights for i in range(levels)]
        widths = [weights.shape(f"down_blocks.{i}.resnets.0.conv2.weight")[0] for i in range(levels)]
        depth = [1 + max(_numbers(weights.tensors.items(),
                                  rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d{{1,3}})\."), default=0)
                 for i in range(levels)]
        kinds = {True: "CrossAttn", False: ""}
        return {"down_block_types": [f"{kinds[a]}DownBlock2D" for a in attends],
                "up_block_types": [f"{kinds[a]}UpBlock2D" for a in reversed(attends)],
                "layers_per_block": self._blocks_per_level(), "transformer_layers_per_block": depth,
                "attention_head_dim": 8 if self.kind == "SD 1" else [max(1, w // 64) for w in widths],
                "addition_time_embed_dim": 256, "sample_size": {"SD 1": 64, "SD 2": 96, "SDXL": 128}[self.kind]}

    def _vae(self) -> dict:
        weights = self.weights("vae", np.float32)
        levels = self._count(weights.tensors.items(), r"encoder\.down_blocks\.(\d{1,3})\.", "an encoder")
        blocks = self._count(weights.tensors.items(), r"encoder\.down_blocks\.0\.resnets\.(\d{1,3})\.",
                             "an encoder")
        return {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
                "layers_per_block": blocks, "scaling_factor": 0.13025 if self.kind == "SDXL" else 0.18215}

    def _text(self, part: str) -> dict:
        names = self._renamed(part)
        layers = self._count(names, r"text_model\.encoder\.layers\.(\d{1,3})\.", "a text encoder")
        openai = TEXT[self.kind][part].endswith("transformer.")
        width = math.prod(self.weights(part, np.float32).shape("text_model.final_layer_norm.weight"))
        return {"num_hidden_layers": layers, "num_attention_heads": max(1, width // 64), "eos_token_id": 49407,
                "hidden_act": "quick_gelu" if openai else "gelu"}

    def _scheduler(self) -> dict:
        # the 768 pixel models of the second family predict v, and the others eps; no tensor tells which
        predicts = "v_prediction" if self.kind == "SD 2" or "v_pred" in self.tensors else "epsilon"
        scheduler = BETAS | SCHEDULERS[self.kind] | {"prediction_type": predicts}
        if "ztsnr" not in self.tensors:
            return scheduler
        # PNDM takes no such schedule
        return scheduler | ZERO_SNR | {"_class_name": SCHEDULERS["SDXL"]["_class_name"]}


def first_names(tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    """The second family with the names of its first program, where SDXL's program has written it."""
    if CONV_IN not in tensors or any(name.startswith(f"{UNET}label_emb.") for name in tensors):
        return dict(tensors)                                # SDXL, its refiner, or no whole file
    return {name.replace(SECOND_BY_SGM, TEXT["SD 2"]["text_encoder"]) if name.startswith(SECOND_BY_SGM) else name: entry
            for name, entry in tensors.items()}


def unet_names(blocks: int):
    """The function that renames a tensor of the UNet; blocks: residual blocks a level on the way down."""
    def block_of(name: str) -> str:
        kind, number, place, rest = re.fullmatch(r"(input|output)_blocks\.(\d{1,3})\.(\d)\.(.+)", name).groups()
        number, down = int(number), kind == "input"
        level, j = divmod(number - 1 if down else number, blocks + 1)
        where = f"{'down' if down else 'up'}_blocks.{level}"
        if rest.startswith("op."):                          # the level's last input block changes the resolution
            return f"{where}.downsamplers.0.conv.{rest[3:]}"
        if rest.startswith("conv."):
            return f"{where}.upsamplers.0.{rest}"
        return f"{where}.{'resnets' if place == '0' else 'attentions'}.{j}.{_inside(rest)}"

    def name_of(name: str) -> str:
        for old, new in UNET_NAMES.items():
            if name.startswith(old):
                return new + _inside(name.removeprefix(old))
        return block_of(name) if re.fullmatch(r"(input|output)_blocks\.\d{1,3}\.\d\..+", name) else name
    return name_of


UNET_NAMES = {"time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2.",
              "label_emb.0.0.": "add_embedding.linear_1.", "label_emb.0.2.": "add_embedding.linear_2.",
              "input_blocks.0.0.": "conv_in.", "out.0.": "conv_norm_out.", "out.2.": "conv_out.",
              "middle_block.0.": "mid_block.resnets.0.", "middle_block.1.": "mid_block.attentions.0.",
              "middle_block.2.": "mid_block.resnets.1."}
INSIDE = {"in_layers.0.": "norm1.", "in_layers.2.": "conv1.", "emb_layers.1.": "time_emb_proj.",
          "out_layers.0.": "norm2.", "out_layers.3.": "conv2.", "skip_connection.": "conv_shortcut."}


def _inside(rest: str) -> str:
    """A name inside a residual block."""
    return next((new + rest.removeprefix(old) for old, new in INSIDE.items() if rest.startswith(old)), rest)


def vae_name(name: str, levels: int) -> str:
    """The name of a tensor of the autoencoder; levels: of resolution."""
    for pattern, new in VAE_NAMES:
        name = re.sub(pattern, new, name)
    # the decoder's levels are counted from the lowest resolution
    return re.sub(r"^decoder\.up\.(\d{1,3})", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)


VAE_NAMES = [(r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.block\.(\d{1,3})\.", r".resnets.\1."),
             (r"^encoder\.down\.", "encoder.down_blocks."), (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
             (r"\.upsample\.conv\.", ".upsamplers.0.conv."), (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
             (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
             (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
             (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
             (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."), (r"\.norm_out\.", ".conv_norm_out.")]


def open_clip(tensors: list[tuple[str, Entry]]) -> Iterator[tuple[str, Entry]]:
    """OpenCLIP's text encoder with transformers' names; q, k and v are stored together there."""
    for name, entry in tensors:
        block = re.fullmatch(r"transformer\.resblocks\.(\d{1,3})\.(.+)", name)
        if name in OPEN_CLIP:
            yield OPEN_CLIP[name], replace(entry, transposed=True) if name == "text_projection" else entry
        elif block and block[2].startswith("attn.in_proj_"):
            for i, part in enumerate(third(entry)):
                yield f"text_model.encoder.layers.{block[1]}.self_attn.{'qkv'[i]}_proj.{block[2][13:]}", part
        elif block:
            rest = next((new + block[2].removeprefix(old) for old, new in BLOCK.items() if block[2].startswith(old)),
                        block[2])
            yield f"text_model.encoder.layers.{block[1]}.{rest}", entry
        elif name not in ("logit_scale", "attn_mask"):
            yield name, entry


OPEN_CLIP = {"token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "ln_final.weight": "text_model.final_layer_norm.weight",
             "ln_final.bias": "text_model.final_layer_norm.bias", "text_projection": "text_projection.weight"}
BLOCK = {"ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "attn.out_proj.": "self_attn.out_proj.",
         "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2."}


def third(entry: Entry) -> list[Entry]:
    """The three equal parts of a tensor along its first axis."""
    rows, *rest = entry.shape or (1,)
    if rows % 3:
        raise UserError(f"{entry.path} holds q, k and v together in shape {entry.shape}, which does not divide by 3.")
    size = entry.size // 3 * np.dtype(DTYPES[entry.dtype]).itemsize
    return [replace(entry, begin=entry.begin + i * size, shape=(rows // 3, *rest)) for i in range(3)]


def _numbers(tensors, pattern: str) -> list[int]:
    """The numbers that the pattern finds at the beginning of names."""
    return [int(match[1]) for name, _ in tensors if (match := re.match(pattern, name))]

"""Writes a checkpoint's folder as one file with the names of Stable Diffusion's first program.

The names are counted block by block as that program builds its networks (CompVis, ldm/modules/diffusionmodules), not
computed from their numbers as minidiff/pretrained/single_file.py does.  tests/parity compares them with diffusers'.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}


def unet_prefixes(levels: int, blocks: int, attends: list[bool]) -> dict[str, str]:
    """diffusers' prefix of each block -> the original one."""
    found, n = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
                "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
                "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
                "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
                "mid_block.resnets.1": "middle_block.2"}, 0
    for level in range(levels):
        for j in range(blocks):
            n += 1
            found[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{n}.0"
            found[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{n}.1"
        if level < levels - 1:
            n += 1
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
    n = -1
    for level, has_attention in enumerate(reversed(attends)):
        for j in range(blocks + 1):
            n += 1
            found[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{n}.0"
            found[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{n}.1"
        if level < levels - 1:
            found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n}.{2 if has_attention else 1}.conv"
    return found


def vae_prefixes(levels: int, blocks: int) -> dict[str, str]:
    found = {}
    for side in ("encoder", "decoder"):
        found |= {f"{side}.conv_norm_out": f"{side}.norm_out", f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
                  f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
                  f"{side}.mid_block.attentions.0.group_norm": f"{side}.mid.attn_1.norm",
                  f"{side}.mid_block.attentions.0.to_q": f"{side}.mid.attn_1.q",
                  f"{side}.mid_block.attentions.0.to_k": f"{side}.mid.attn_1.k",
                  f"{side}.mid_block.attentions.0.to_v": f"{side}.mid.attn_1.v",
                  f"{side}.mid_block.attentions.0.to_out.0": f"{side}.mid.attn_1.proj_out"}
    for level in range(levels):
        for j in range(blocks):
            found[f"encoder.down_blocks.{level}.resnets.{j}"] = f"encoder.down.{level}.block.{j}"
        for j in range(blocks + 1):                         # the first that the decoder runs has the highest number
            found[f"decoder.up_blocks.{level}.resnets.{j}"] = f"decoder.up.{levels - level - 1}.block.{j}"
        found[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        found[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{levels - level - 1}.upsample.conv"
    return found


def renamed(tensors: dict, prefixes: dict[str, str], inside: dict[str, str]) -> dict:
    """The tensors under the original prefixes, and the parts of residual blocks with their original names."""
    result = {}
    for name, a in tensors.items():
        known = [prefix for prefix in prefixes if name.startswith(prefix + ".")]
        prefix = max(known, key=len, default="")
        rest = name.removeprefix(prefix).lstrip(".")
        if ".resnets." in f".{prefix}." and rest.split(".")[0] in inside:
            rest = inside[rest.split(".")[0]] + "." + rest.split(".", 1)[1]
        result[f"{prefixes[prefix]}.{rest}" if prefix else name] = a
    return result


def openclip(tensors: dict) -> dict:
    """transformers' text encoder with OpenCLIP's names: q, k and v together, the projection transposed."""
    result, joined = {}, {}
    for name, a in tensors.items():
        parts = name.removeprefix("text_model.").split(".")
        if parts[0] == "encoder":
            block, rest = f"transformer.resblocks.{parts[2]}", ".".join(parts[3:])
            if parts[3] == "self_attn" and parts[4] != "out_proj":
                joined.setdefault(f"{block}.attn.in_proj_{parts[5]}", {})[parts[4]] = a
                continue
            for new, old in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("self_attn.out_proj", "attn.out_proj"),
                             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                rest = rest.replace(new, old)
            result[f"{block}.{rest}"] = a
        else:
            key = {"embeddings.token_embedding.weight": "token_embedding.weight",
                   "embeddings.position_embedding.weight": "positional_embedding",
                   "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
                   "text_projection.weight": "text_projection"}[".".join(parts)]
            result[key] = np.ascontiguousarray(a.T) if key == "text_projection" else a
    result |= {name: np.concatenate([parts[f"{p}_proj"] for p in "qkv"]) for name, parts in joined.items()}
    return result | {"logit_scale": np.zeros((), np.float16)}


def write_single_file(folder: Path, path: Path, family: str, levels: int = 2, blocks: int = 1,
                      attends: list[bool] | None = None) -> None:
    """The folder's checkpoint as one file; family "SD 1", "SD 2" or "SDXL"."""
    attends = attends or ([False, True] if family == "SDXL" else [True, False])
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    tensors = {PREFIXES["unet"] + name: a for name, a in
               renamed(unet, unet_prefixes(levels, blocks, attends), RESNET).items()}
    tensors |= {PREFIXES["vae"] + name: a for name, a in
                renamed(vae, vae_prefixes(4, 1), {"conv_shortcut": "nin_shortcut"}).items()}
    text = load_file(folder / "text_encoder" / "model.safetensors")
    text = {name if name.startswith("text_model.") else f"text_model.{name}": a for name, a in text.items()}
    if family == "SD 2":
        tensors |= {"cond_stage_model.model." + name: a for name, a in openclip(text).items()}
    else:
        prefix = "conditioner.embedders.0." if family == "SDXL" else "cond_stage_model."
        tensors |= {f"{prefix}transformer.{name}": a for name, a in text.items()}
    if family == "SDXL":
        second = load_file(folder / "text_encoder_2" / "model.safetensors")
        tensors |= {"conditioner.embedders.1.model." + name: a for name, a in openclip(second).items()}
    save_file(tensors, path)

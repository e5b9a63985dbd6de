"""A copy of a checkpoint whose autoencoder has several times as many channels inside."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

OUTSIDE = ("quant_conv", "post_quant_conv")                 # of latents only
FIRST, LAST = ("encoder.conv_in", "decoder.conv_in"), ("encoder.conv_out", "decoder.conv_out")


def widened(folder: Path, copy: Path, times: int) -> Path:
    """The copy, in which each channel stands `times` times, and counts for its share."""
    shutil.copytree(folder, copy)
    path, config = copy / "vae" / "diffusion_pytorch_model.safetensors", copy / "vae" / "config.json"
    tensors = {}
    for name, a in load_file(path).items():
        layer = name.rsplit(".", 1)[0]
        if layer not in (*OUTSIDE, *LAST):
            a = np.repeat(a, times, axis=0)
        if a.ndim > 1 and layer not in (*OUTSIDE, *FIRST):
            a = np.repeat(a, times, axis=1) / times
        tensors[name] = np.ascontiguousarray(a, np.float16)
    save_file(tensors, path)
    values = json.loads(config.read_text(encoding="utf-8"))
    values["block_out_channels"] = [times * width for width in values["block_out_channels"]]
    config.write_text(json.dumps(values), encoding="utf-8")
    return copy

"""A copy of a checkpoint's folder in which some tensors are others."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

FILES = {"unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "text_encoder/model.safetensors",
         "text_encoder_2": "text_encoder_2/model.safetensors"}


def tensors_of(folder: Path, part: str) -> dict[str, np.ndarray]:
    return load_file(folder / FILES[part])


def changed_copy(folder: Path, copy: Path, changes: Mapping[str, Mapping[str, Callable]]) -> Path:
    """The folder `copy`, where each named tensor of a part is what the function makes of it, in float64."""
    shutil.copytree(folder, copy)
    for part, functions in changes.items():
        tensors = tensors_of(folder, part)
        for name, function in functions.items():
            tensors[name] = np.ascontiguousarray(function(tensors[name].astype(np.float64)))
        save_file(tensors, copy / FILES[part])
    return copy

"""A checkpoint in one file with its first program's names holds the same networks as a folder in diffusers' layout."""

import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.original_names import write_single_file

from minidiff.errors import UserError
from minidiff.pretrained.checkpoints import Folder
from minidiff.pretrained.single_file import SingleFile
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parent / "checkpoints"
FAMILIES = {"eps": "SD 1", "v": "SD 2", "sdxl": "SDXL", "inpaint": "SD 1"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_tensor_of_the_folder(kind, tmp_path):
    write_single_file(HERE / kind, tmp_path / "m.safetensors", FAMILIES[kind])
    folder, single = Folder.at(HERE / kind), SingleFile.at(tmp_path / "m.safetensors")
    assert single.family == FAMILIES[kind] and set(single.parts) == {p for p in folder.parts if p[0] not in "ts"} | {
        p for p in folder.parts if p.startswith("text")}
    for part in single.parts:
        expected, found = folder.weights(part, np.float32).tensors, single.weights(part, np.float32).tensors
        expected = {name if not part.startswith("text") or name.startswith("text") else f"text_model.{name}": entry
                    for name, entry in expected.items()}
        assert found.keys() == expected.keys()
        for name, entry in expected.items():
            assert np.array_equal(found[name].read(), entry.read()), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_configuration_that_the_shapes_tell(kind, tmp_path):
    write_single_file(HERE / kind, tmp_path / "m.safetensors", FAMILIES[kind])
    folder, single = Folder.at(HERE / kind), SingleFile.at(tmp_path / "m.safetensors")
    for part, names in (("unet", ("down_block_types", "up_block_types", "layers_per_block")),
                        ("vae", ("down_block_types", "up_block_types", "layers_per_block")),
                        ("text_encoder", ("num_hidden_layers",))):
        for name in names:
            assert single.config(part).values[name] == folder.config(part).values[name], (part, name)
    depth = folder.config("unet").wholes("transformer_layers_per_block", 2, 1)
    attends = [kind.startswith("Cross") for kind in folder.config("unet").texts("down_block_types")]
    found = single.config("unet").values["transformer_layers_per_block"]
    assert all(a == b for a, b, has in zip(found, depth, attends, strict=True) if has)


def test_another_file_is_refused(tmp_path):
    from safetensors.numpy import save_file
    for name, words in (("double_blocks.0.weight", "is a FLUX"),
                        ("x", "no checkpoint of Stable Diffusion 1, 2 or SDXL")):
        save_file({name: np.zeros(3, np.float32)}, tmp_path / "m.safetensors")
        with pytest.raises(UserError, match=words):
            SingleFile.at(tmp_path / "m.safetensors")


NONE = np.zeros(3, np.float32)
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
HUGE = "9" * 12
DAMAGED = [
    ("SD 1", {f"{UNET}input_blocks.{HUGE}.0.op.weight": NONE}),
    ("SD 1", {f"{UNET}input_blocks.{'9' * 5000}.0.x": NONE}),
    ("SD 1", {f"{UNET}input_blocks.999.0.op.weight": NONE}), ("SD 1", {f"{UNET}output_blocks.{HUGE}.0.x": NONE}),
    ("SD 1", {f"{VAE}encoder.down.{HUGE}.block.0.x": NONE}), ("SD 1", {f"{VAE}decoder.up.{HUGE}.block.0.x": NONE}),
    ("SD 1", {f"{VAE}encoder.down.0.block.{HUGE}.x": NONE}), ("SD 1", VAE), ("SD 1", TEXT), ("SD 1", UNET),
    ("SD 1", {f"{TEXT}transformer.text_model.encoder.layers.{HUGE}.x": NONE}),
    ("SD 1", {f"{TEXT}transformer.text_model.final_layer_norm.weight": NONE[0]}),
    ("SD 2", {f"{TEXT}model.transformer.resblocks.{HUGE}.x": NONE}),
    ("SD 2", {f"{TEXT}model.transformer.resblocks.0.attn.in_proj_weight": NONE[0]}),
    ("SDXL", {"conditioner.embedders.1.model.text_projection": NONE[0]}), ("SDXL", "conditioner."),
    ("SDXL", {"conditioner.embedders.1.model.text_projection": np.zeros((2, 2, 2), np.float32)}),
]


@pytest.mark.parametrize("family, change", DAMAGED)
def test_names_from_a_stranger_are_refused_at_once_and_before_memory_is_taken(tmp_path, family, change):
    """A number in a name counts levels or layers: a huge one must not make as many of them.  A text: parts that are
    left out."""
    kind = next(kind for kind, known in FAMILIES.items() if known == family)
    write_single_file(HERE / kind, tmp_path / "m.safetensors", family)
    tensors = load_file(tmp_path / "m.safetensors")
    if isinstance(change, str):
        tensors = {name: a for name, a in tensors.items() if not name.startswith(change)}
    else:
        tensors |= {name: np.asarray(a) for name, a in change.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    started = time.process_time()
    with pytest.raises(UserError, match="m.safetensors"):
        StableDiffusion.load(tmp_path / "m.safetensors")
    assert time.process_time() - started < 1

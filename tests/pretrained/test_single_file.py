"""A checkpoint in one file with its first program's names holds the same networks as a folder in diffusers' layout."""

import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.original_names import write_single_file

from minidiff.cli.main import main
from minidiff.errors import UserError
from minidiff.pretrained.checkpoints import Folder
from minidiff.pretrained.scheduler_config import SchedulerConfig
from minidiff.pretrained.single_file import SingleFile
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parent / "checkpoints"
FAMILIES = {"eps": "SD 1", "v": "SD 2", "sdxl": "SDXL", "inpaint": "SD 1"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_tensor_of_the_folder(kind, tmp_path):
    write_single_file(HERE / kind, tmp_path / "m.safetensors", FAMILIES[kind])
    folder, single = Folder.at(HERE / kind), SingleFile.at(tmp_path / "m.safetensors")
    assert single.kind == FAMILIES[kind] and single.family == folder.family
    assert set(single.parts) == {p for p in folder.parts if p[0] not in "ts"} | {
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


def test_the_second_family_leaves_out_the_layer_that_it_does_not_read(tmp_path):
    """OpenCLIP's encoder has 24 layers, and Stable Diffusion 2 reads the state after 23 of them."""
    write_single_file(HERE / "v", tmp_path / "m.safetensors", "SD 2")
    tensors, block = load_file(tmp_path / "m.safetensors"), f"{TEXT}model.transformer.resblocks"
    layers = 1 + max(int(name.split("resblocks.")[1].split(".")[0]) for name in tensors if name.startswith(block))
    more = {name.replace(f"{block}.0.", f"{block}.{i}."): a for name, a in tensors.items() for i in range(layers, 24)
            if name.startswith(f"{block}.0.")}
    save_file(tensors | more, tmp_path / "m.safetensors")
    single = SingleFile.at(tmp_path / "m.safetensors")
    assert single.config("text_encoder").values["num_hidden_layers"] == 23
    names = single.weights("text_encoder", np.float32).tensors
    assert any(".layers.22." in name for name in names) and not any(".layers.23." in name for name in names)


@pytest.mark.parametrize("start, words", [
    (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"), (b"<!DOCTYPE html>", "a web page"),
    (b"GGUF" + bytes(100), "is a GGUF file"), (b"PK\x03\x04" + bytes(100), "a pickle"), (b'{"a": 1}' * 9, "is JSON")])
def test_a_file_of_another_kind_is_named(tmp_path, start, words):
    (tmp_path / "m.safetensors").write_bytes(start)
    with pytest.raises(UserError, match=words):
        SingleFile.at(tmp_path / "m.safetensors")


def test_a_file_that_is_cut_short_is_said_to_be(tmp_path, capsys):
    write_single_file(HERE / "eps", tmp_path / "m.safetensors", "SD 1")
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:-1000])
    for command in (["info"], ["sample", "a"]):
        assert main([*command, "--model", str(tmp_path / "m.safetensors")]) == 2
        assert "m.safetensors is cut short: the tensor" in capsys.readouterr().err


def test_the_second_family_as_sdxls_program_writes_it(tmp_path):
    """As SD-Turbo's file; SDXL's refiner has these names, too, and reads sizes."""
    write_single_file(HERE / "v", tmp_path / "m.safetensors", "SD 2")
    tensors = {name.replace(f"{TEXT}model.", "conditioner.embedders.0.model."): a
               for name, a in load_file(tmp_path / "m.safetensors").items()}
    save_file(tensors, tmp_path / "turbo.safetensors")
    one, other = SingleFile.at(tmp_path / "m.safetensors"), SingleFile.at(tmp_path / "turbo.safetensors")
    assert other.kind == "SD 2"
    for part in one.parts:
        expected, found = (m.weights(part, np.float32).tensors for m in (one, other))
        assert found.keys() == expected.keys()
    save_file(tensors | {f"{UNET}label_emb.0.0.weight": NONE}, tmp_path / "refiner.safetensors")
    with pytest.raises(UserError, match="is SDXL's refiner"):
        SingleFile.at(tmp_path / "refiner.safetensors")


@pytest.mark.parametrize("kind", ["eps", "sdxl"])
def test_empty_tensors_say_that_the_network_predicts_v_and_the_schedule_ends_in_noise(kind, tmp_path):
    write_single_file(HERE / kind, tmp_path / "m.safetensors", FAMILIES[kind])
    tensors, none = load_file(tmp_path / "m.safetensors"), np.zeros(0, np.float32)
    save_file(tensors | {"v_pred": none}, tmp_path / "v.safetensors")
    save_file(tensors | {"v_pred": none, "ztsnr": none}, tmp_path / "zero.safetensors")
    plain, v, zero = (SchedulerConfig(SingleFile.at(tmp_path / f"{name}.safetensors").config("scheduler"))
                      for name in ("m", "v", "zero"))
    assert (plain.predicts, v.predicts, zero.predicts) == ("eps", "v", "v")
    assert v.name == plain.name and v.alpha_bar[-1] > 0 and zero.alpha_bar[-1] == 0
    assert zero.plan(4).t[-1] == 999


@pytest.mark.parametrize("name", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_file_with_another_scale_of_noise_is_refused(name, tmp_path):
    write_single_file(HERE / "sdxl", tmp_path / "m.safetensors", "SDXL")
    save_file(load_file(tmp_path / "m.safetensors") | {name: NONE}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="a model with EDM's scale of noise"):
        SingleFile.at(tmp_path / "m.safetensors")

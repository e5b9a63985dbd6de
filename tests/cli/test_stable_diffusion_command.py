"""minidiff sample and info with checkpoints of Stable Diffusion."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from minidiff import pictures
from minidiff.cli import preview
from minidiff.cli.main import main
from minidiff.errors import UserError
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parents[1] / "pretrained" / "checkpoints"


def sample(*words, model="eps", steps=2, size="48x40") -> int:
    size = ["--size", size] if size else []
    return main(["sample", "a cat", "--model", str(HERE / model), "--steps", str(steps), *size, *map(str, words)])


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_picture_is_written_pixel_for_pixel(tmp_path, capsys):
    assert sample("--negative", "dog", "-o", tmp_path / "a.png", "--trajectory", tmp_path / "t.gif") == 0
    assert pixels(tmp_path / "a.png").shape == (40, 48, 3) and (tmp_path / "t.gif").stat().st_size > 1000
    assert "by stable-diffusion" in capsys.readouterr().out


@pytest.mark.parametrize("words", [(), ("--low-memory",)])
def test_the_memory_is_checked_for_the_weights_as_they_will_be_held(words, tmp_path, monkeypatch):
    asked = []

    def stop(path, options):
        asked.append(options)
        raise UserError("enough")
    monkeypatch.setattr(StableDiffusion, "check_memory", stop)
    assert sample(*words, "-o", tmp_path / "a.png") == 2
    assert [options.get("low_memory", False) for options in asked] == [bool(words)]
    assert asked[0]["size"] == "48x40" and asked[0]["steps"] == 2


def test_several_pictures_are_several_files(tmp_path):
    assert sample("--count", 2, "--seed", 3, "-o", tmp_path / "a.png") == 0
    first, second = (pixels(tmp_path / f"a-{i}.png") for i in (1, 2))
    assert (first != second).any() and not (tmp_path / "a.png").exists()


def test_a_failure_does_not_lose_the_pictures_before_it(tmp_path, monkeypatch, capsys):
    trajectory = StableDiffusion.trajectory

    def failing(self, *args, **options):
        if (tmp_path / "a-1.png").exists():
            raise UserError("the second one failed")
        return trajectory(self, *args, **options)
    monkeypatch.setattr(StableDiffusion, "trajectory", failing)
    assert sample("--count", 2, "-o", tmp_path / "a.png") == 2 and "second one failed" in capsys.readouterr().err
    assert pixels(tmp_path / "a-1.png").shape == (40, 48, 3)


@pytest.mark.slow
def test_previews_come_now_and_then_and_show_the_estimate_at_half_its_size(tmp_path, monkeypatch, capsys):
    shots, out = tmp_path / "p.png", ["-o", tmp_path / "a.png", "--preview", tmp_path / "p.png"]
    assert sample(*out) == 0 and not shots.exists()         # the run was over in less than ten seconds
    seen, save = [], pictures.save
    monkeypatch.setattr(preview, "EVERY", 0)
    monkeypatch.setattr(preview, "SHARE", np.inf)
    monkeypatch.setattr(pictures, "save", lambda image, path: (seen.append(path), save(image, path)))
    assert sample(*out, steps=3) == 0 and seen == [shots] * 3 + [tmp_path / "a.png"]
    assert pixels(shots).shape == (24, 24, 3)               # 5 x 6 latents are 3 x 3
    large = np.asarray(Image.open(tmp_path / "a.png").resize((24, 20)), float)
    assert abs(large.mean() - pixels(shots).mean()) < 30
    seen.clear()
    monkeypatch.setattr(preview, "SHARE", 1e-9)             # one preview took long: there is no time for another
    assert sample(*out, steps=3) == 0 and seen.count(shots) == 1


def test_a_preview_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def full(image, path, save=pictures.save):
        if path.name == "p.png":
            raise UserError("the disk is full")
        save(image, path)
    monkeypatch.setattr(preview, "EVERY", 0)
    monkeypatch.setattr(pictures, "save", full)
    assert sample("-o", tmp_path / "a.png", "--preview", tmp_path / "p.png") == 0 and (tmp_path / "a.png").exists()
    assert "no preview was drawn (the disk is full); sampling continues" in capsys.readouterr().err


def test_peak_memory_is_said_at_the_end(tmp_path, capsys):
    assert sample("-o", tmp_path / "a.png") == 0
    assert re.search(r"peak memory: \d+\.\d GiB", capsys.readouterr().out) or sys.platform == "win32"


def test_image_to_image_and_in_painting(tmp_path):
    assert sample("-o", tmp_path / "a.png", size="50x43") == 2                      # no multiples of 8
    Image.fromarray(np.full((43, 50, 3), 200, np.uint8)).save(tmp_path / "in.png")
    assert sample("--image", tmp_path / "in.png", "--strength", 0.5, "-o", tmp_path / "b.png", size=None) == 0
    assert pixels(tmp_path / "b.png").shape == (40, 48, 3)
    mask = np.zeros((40, 48), np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for model in ("eps", "inpaint"):
        assert sample("--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "-o", tmp_path / "c.png",
                      model=model, size=None) == 0
        assert (pixels(tmp_path / "c.png")[:, :24] == 200).all() and (pixels(tmp_path / "c.png")[:, 24:] != 200).any()


def shown(image, name, folder):
    """The file of a picture, given as an array or as one of Pillow's."""
    file = folder / f"{name}.png"
    (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).save(file)
    return file


def taken(monkeypatch, *words) -> dict:
    """What the command hands on as image and mask; nothing is drawn."""
    found = {}

    def stop(path, options):
        found.update(options)
        raise UserError("enough")
    monkeypatch.setattr(StableDiffusion, "check_options", stop)
    assert sample(*words, size=None) == 2
    return found


WHITE = np.full((40, 48), 255, np.uint8)


def test_images_of_every_mode_look_as_in_a_viewer(tmp_path, monkeypatch):
    """16 bits are not cut at 255, what is transparent is white, a palette's numbers are its colours."""
    rgba = np.zeros((40, 48, 4), np.uint8)
    rgba[:, :24] = (255, 0, 0, 255)
    palette = Image.fromarray(rgba[..., :3]).quantize(4)
    for image, left, right in ((np.repeat(np.uint16([[0x8080], [0xffff]]), 24, 1).ravel()[None].repeat(40, 0),
                                (1 / 255,) * 3, (1.0,) * 3),
                               (rgba, (1.0, -1.0, -1.0), (1.0,) * 3), (palette, (1.0, -1.0, -1.0), (-1.0,) * 3)):
        x = taken(monkeypatch, "--image", shown(image, "in", tmp_path), "-o", tmp_path / "a.png")["image"]
        assert x.shape == (40, 48, 3) and x.dtype == np.float32
        assert np.allclose(x[20, 2], left, atol=0.01) and np.allclose(x[20, 45], right, atol=0.01)


def test_masks_are_white_where_the_image_is_drawn_again(tmp_path, monkeypatch, capsys):
    words = "--image", shown(np.zeros((40, 48, 3), np.uint8), "in", tmp_path), "-o", tmp_path / "a.png", "--mask"
    grey = WHITE.copy()
    grey[:, :10], grey[:, 10:20], grey[:, 20:30] = 0, 127, 128
    deep = np.where(WHITE[:, :48] > 0, 0x7f00, 0).astype(np.uint16)
    deep[:, 24:] = 0xffff
    for mask, black in ((grey, 20), (deep, 24), (np.where(grey > 0, WHITE, 0), 10), (WHITE, 0)):
        found = taken(monkeypatch, *words, shown(mask, "mask", tmp_path))["mask"]
        assert found.dtype == bool and (found == (np.arange(48) >= black)).all()
        said = "grey pixels: from the middle grey on they count as white" in capsys.readouterr().err
        assert said == (mask is grey or mask is deep)


@pytest.mark.parametrize("mask, sentence", [
    (WHITE[:, :40], "is 40x40, and the image 48x40: they must be of one size"),
    (np.zeros_like(WHITE), "mask is black everywhere"),
    (np.dstack([WHITE] * 3 + [WHITE // 2]), "has transparent pixels")])
def test_masks_that_are_refused(tmp_path, capsys, mask, sentence):
    image = shown(np.zeros((40, 48, 3), np.uint8), "in", tmp_path)
    assert sample("--image", image, "--mask", shown(mask, "mask", tmp_path), "-o", tmp_path / "a.png", size=None) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert "black everywhere" in sentence or ascii(str(tmp_path / "mask.png")) in said


@pytest.mark.parametrize("strength, sentence", [
    (0, "minidiff: --strength 0 makes no step and gives the image back: take a number above 0, at most 1"),
    (1.5, "strength must be a finite number from 0 to 1, not 1.5"), ("nan", "nan"),
    (0.4, "strength 0.4 of 2 steps is less than a step")])
def test_strengths_that_are_refused(tmp_path, capsys, strength, sentence):
    image = shown(np.zeros((40, 48, 3), np.uint8), "in", tmp_path)
    assert sample("--image", image, "--strength", strength, "-o", tmp_path / "a.png", size=None) == 2
    said = capsys.readouterr().err
    assert sentence in said.splitlines()[-1]
    assert sample("--image", image, "--set", f"strength={strength}".replace("nan", "NaN"), "-o", tmp_path / "a.png",
                  size=None) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_a_lora_and_an_embedding_change_the_picture_as_in_python(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    lora, toy = tmp_path / "style.safetensors", tmp_path / "toy.safetensors"
    save_file({f"{layer}.lora_{m}.weight": rng.normal(size=shape).astype(np.float32)
               for m, shape in {"A": (2, 8), "B": (8, 2)}.items()}, lora)
    save_file({"x": rng.normal(size=(2, 16)).astype(np.float32)}, toy)

    def drawn(prompt, *words):
        assert main(["sample", prompt, "--model", str(HERE / "eps"), "--steps", "2", "--size", "48x40", "-o",
                     str(tmp_path / "a.png"), *map(str, words)]) == 0
        return pixels(tmp_path / "a.png")

    def expected(prompt, **changes):
        x = StableDiffusion.load(HERE / "eps", **changes).sample([prompt], steps=2, size="48x40")
        return pictures.plain(x[0])
    assert (drawn("a cat", "--lora", f"{lora}:5") == expected("a cat", loras=[(lora, 5.0)])).all()
    monkeypatch.setenv("HOME", str(tmp_path))
    twice = drawn("a cat", "--lora", lora, "--lora", "~/style.safetensors:2")
    assert (twice == expected("a cat", loras=[(lora, 3.0)])).mean() > 0.99 and (twice != drawn("a cat")).any()
    named = drawn("a <cat-toy>", "--embedding", f"{toy}:<cat-toy>")
    assert (named == expected("a <cat-toy>", embeddings={"<cat-toy>": toy})).all()
    toy.rename(tmp_path / "oyt.safetensors")
    assert (drawn("a oyt", "--embedding", tmp_path / "oyt.safetensors") == named).all()
    # neither may be written over, under any name
    for option, file in (("--lora", lora), ("--embedding", tmp_path / "oyt.safetensors")):
        (tmp_path / "link.png").symlink_to(file)
        assert main(["sample", "a oyt", "--model", str(HERE / "eps"), "--steps", "2", "--size", "48x40", "-o",
                     str(tmp_path / "link.png"), option, str(file)]) == 2
        assert f"minidiff: {option} ({file}) and --out are both " in capsys.readouterr().err
        (tmp_path / "link.png").unlink()


def test_info_tells_family_sizes_and_precision(capsys):
    assert main(["info", "--model", str(HERE / "sdxl")]) == 0
    out = capsys.readouterr().out
    assert "SDXL, " in out and "95,004 unet" in out and "F16" in out and "EulerDiscreteScheduler" in out


@pytest.mark.parametrize("words, says", [
    (["sample", "x", "--image", "in.png"], "takes no --image"),
    (["sample", "x", "--size", "64x64"], "no option 'size'"),
    (["sample", "x", "--lora", "a.safetensors"], "takes no --lora"),
    (["sample", "x", "--preview", "p.png"], "takes no --preview"),
    (["sample", "x", "--preview", "p.txt"], "takes one of the endings"),
    (["sample", "x", "--model", str(HERE / "eps"), "-o", "a.png", "--preview", "a.png"], "name two files"),
    (["sample", "x", "--embedding", "a.safetensors"], "takes no --embedding"),
    (["sample", "x", "--model", str(HERE / "eps"), "--lora", "a.safetensors:x"], "such as style.safetensors:0.8"),
    (["sample", "x", "--model", str(HERE / "eps"), "--lora", "a.safetensors:.5"], "a.safetensors does not exist"),
    (["sample", "x", "--model", str(HERE / "eps"), "--embedding", "dog.safetensors"], "does not exist"),
    (["sample", "x", "--model", str(HERE / "eps"), "--embedding", "a.st:<b>", "--embedding", "c.st:<b>"],
     "<b> was given twice"),
    (["sample", "x", "--model", "m.ckpt"], "pickle"), (["sample", "x", "--model", "."], "is a folder"),
    (["sample", "x", "--model", str(HERE / "eps"), "--sampler", "heum"], "sampler must be one of"),
    (["sample", "x", "--model", str(HERE / "eps"), "--mask", "m.png"],
     "minidiff: --mask says what of a picture to draw again: name the picture with --image\n"),
    (["sample", "x", "--model", str(HERE / "eps"), "--system", "latent"], "leave out --system"),
    (["evaluate", "--model", str(HERE / "eps")], "has no judge")])
def test_mistakes_are_one_sentence(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.ckpt").write_bytes(b"\x80\x02")
    assert main(words) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


UNET = "model.diffusion_model."


@pytest.mark.parametrize("name, says", [
    (UNET + "joint_blocks.0.x", "is a Stable Diffusion 3, which"), ("double_blocks.0.img_attn.x", "is a FLUX, which"),
    (UNET + "double_blocks.0.x", "is a FLUX, which"), ("lora_unet_x.lora_down.weight", "is a LoRA: give"),
    ("conditioner.embedders.0.model.ln_final.weight", "is SDXL's refiner, which"),
    ("down_blocks.0.resnets.0.conv1.weight", "is one part of a checkpoint: give the folder that has")])
@pytest.mark.parametrize("command", [["info"], ["sample", "x"]])
def test_files_of_other_kinds_are_named(command, name, says, tmp_path, capsys):
    save_file({name: np.zeros(3, np.float32)}, tmp_path / "m.safetensors")
    assert main([*command, "--model", str(tmp_path / "m.safetensors")]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_folders_of_other_kinds_are_named(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    (tmp_path / "other").mkdir()
    unet = HERE / "eps" / "unet"
    for model, says in ((tmp_path, "is of a 'FluxPipeline'"), (tmp_path / "other", "is a folder without model_index"),
                        (tmp_path / "run", "name the file in it"), (unet, f"give its folder, {HERE / 'eps'}"),
                        (unet / "diffusion_pytorch_model.safetensors", f"give its folder, {HERE / 'eps'}")):
        assert main(["sample", "x", "--model", str(model)]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1


def test_a_remark_stands_on_a_line_of_its_own_beside_the_progress_bar(tmp_path, capsys):
    assert main(["sample", "a thin seven " * 40, "--model", str(HERE / "eps"), "--steps", "2", "--size", "48x40", "-o",
                 str(tmp_path / "a.png")]) == 0
    before, after = capsys.readouterr().err.split("minidiff: the prompt")
    assert "sampling:" in before and before.endswith("\r") and "\n" not in before and "\n" in after
    *_, cleared, _ = before.split("\r")
    assert not cleared.strip()                              # the bar was overwritten by spaces


def test_the_help_names_its_samplers_and_promises_no_number_of_steps(capsys):
    assert main(["sample", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "of Stable Diffusion: ddim, plms, euler, " in out and "1 to 1000" not in out
    assert "no more than the model's schedule has times" in out


def test_no_file_of_the_checkpoint_is_written_over(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(HERE / "eps", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "link.png").symlink_to(weights)
    (tmp_path / "a-2.png").symlink_to(weights)
    for words in (["-o", tmp_path / "link.png"], ["-o", tmp_path / "a.png", "--count", 2]):
        assert sample(*words, model=folder) == 2 and "name two files" in capsys.readouterr().err
    assert weights.read_bytes() == before


def test_no_lora_is_written_over(tmp_path, capsys):
    lora = tmp_path / "a.safetensors"
    save_file({f"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_{m}.weight": np.zeros(shape, np.float32)
               for m, shape in {"A": (2, 16), "B": (24, 2)}.items()}, lora)
    (tmp_path / "a.png").symlink_to(lora)
    assert sample("--lora", lora, "-o", tmp_path / "a.png") == 2 and "name two files" in capsys.readouterr().err


def test_no_picture_is_written_over_another_or_its_image(tmp_path):
    Image.new("RGB", (48, 40)).save(tmp_path / "a-1.png")
    out = ["-o", tmp_path / "a.png", "--count", 2]
    assert sample(*out, "--image", tmp_path / "a-1.png", size=None) == 2
    assert sample(*out, "--trajectory", tmp_path / "a-2.png") == 2


@pytest.mark.parametrize("words, sentence", [
    (("--size", "65x64"), "size takes multiples of 8"), (("--second", "b"), "second is for SDXL's second text encoder"),
    (("--strength", "0.5"), "strength is of image to image"), (("--steps", "1000", "--sampler", "dpm++2m"), "steps"),
    (("--set", "spacing=even"), "spacing must be one of"), (("--set", "predicts=noise"), "predicts must be one of"),
    (("--set", "image=3"), "image is a picture: name its file with --image"),
    (("--set", "mask=abc"), "mask is a picture"), (("--set", "strength=abc"), "strength takes a number, not 'abc'"),
    (("--set", "negative=5"), "negative takes a text, not 5"),
    (("--set", "strength=true"), "strength takes a number, not True")])
def test_options_are_refused_before_the_weights_are_read(tmp_path, monkeypatch, capsys, words, sentence):
    """At full size the weights take 15 s and gigabytes."""
    monkeypatch.setattr(StableDiffusion, "load", lambda *a, **k: pytest.fail("the weights were read"))
    assert main(["sample", "x", "--model", str(HERE / "eps"), "-o", str(tmp_path / "a.png"), *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_an_in_painting_network_without_a_mask_is_refused_before_the_weights_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(StableDiffusion, "load", lambda *a, **k: pytest.fail("the weights were read"))
    assert main(["sample", "x", "--model", str(HERE / "inpaint"), "-o", str(tmp_path / "a.png")]) == 2
    assert "was trained for in-painting" in capsys.readouterr().err


def test_the_bar_counts_the_steps_that_are_made():
    image, mask, model = np.zeros((8, 8, 3)), np.ones((8, 8), bool), StableDiffusion.load(HERE / "eps")
    for options, steps in (({}, 20), ({"steps": 7}, 7), ({"steps": 10, "image": image}, 8),
                           ({"steps": 10, "image": image, "strength": 0.75}, 7),
                           ({"steps": 10, "image": image, "mask": mask}, 10)):
        assert model.steps_made(options) == steps
    small = np.zeros((40, 48, 3), np.float32)
    states = model.trajectory(["a"], image=small, strength=0.75, steps=10, sampler="ddim")
    assert len(list(states)) == 7


def test_a_trajectory_of_several_pictures_decodes_the_states_of_the_first_alone(tmp_path, monkeypatch):
    decoded, decode = [], StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, z: decoded.append(1) or decode(self, z))
    assert sample("--count", 3, "-o", tmp_path / "a.png", "--trajectory", tmp_path / "t.gif", steps=4) == 0
    assert len(decoded) <= 5 + 1 + 2                        # states of the first, its picture, those of two more


def test_info_tells_the_generation_and_the_size(capsys, tmp_path):
    assert main(["info", "--model", str(HERE / "inpaint")]) == 0
    out = capsys.readouterr().out
    assert "Stable Diffusion, for in-painting" in out and "64x64" in out and "None" not in out
    copied = tmp_path / "m"
    shutil.copytree(HERE / "eps", copied)
    for part in ("vae", "scheduler"):
        shutil.rmtree(copied / part)
    assert main(["info", "--model", str(copied)]) == 2 and "it has no vae/, scheduler/" in capsys.readouterr().err


def test_python_finds_a_checkpoint_as_the_command_does(monkeypatch):
    monkeypatch.setenv("HOME", str(HERE.parent))
    assert len(StableDiffusion.load("~/checkpoints/eps").encoders) == 1

"""Stable Diffusion as a system: what its options do, and which checkpoints it refuses (its parts: tests/pretrained)."""

import copy
import json
import os
import pickle
import shutil
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.examples import load

from minidiff.cli.main import main
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.pretrained.checkpoints import Folder
from minidiff.pretrained.config import Config
from minidiff.pretrained.scheduler_classes import CHOICES
from minidiff.pretrained.scheduler_config import SchedulerConfig
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parents[1] / "pretrained" / "checkpoints"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "sd"
SMALL = {"steps": 3, "size": "48x40"}                       # (40, 48) pixels, 5 x 6 latents
KINDS = ("eps", "v", "sdxl")


@cache
def model(kind: str) -> StableDiffusion:
    return StableDiffusion.load(HERE / kind)


# --- sampling -----------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_depends_on_its_own_seed_and_prompt_only(kind):
    m, prompts = model(kind), ["a red cube", "", "seven"]
    together = m.sample(prompts, seed=4, **SMALL)
    assert together.shape == (3, 40, 48, 3) and np.abs(together).max() <= 1 and together.std() > 0.01
    streams = SampleStreams(4, 3)[1:2]
    alone = m.sample(prompts[1:2], streams=streams, **SMALL)
    assert np.abs(alone[0] - together[1]).max() < 1e-3      # rounding of other batch sizes
    assert np.abs(m.sample(prompts[1:2], seed=5, **SMALL) - alone).max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_goes_from_the_negative_prompt_through_the_prompt(kind):
    """At scale 0 only the negative prompt counts, at 1 only the prompt, and the negative one counts at 3."""
    m = model(kind)

    def drawn(prompt, negative, scale):
        return m.sample([prompt], negative=negative, scale=scale, **SMALL)
    assert np.array_equal(drawn("a", "blurry", 0.0), drawn("b", "blurry", 0.0))
    assert np.array_equal(drawn("a", "blurry", 1.0), drawn("a", "dark", 1.0))
    assert np.allclose(drawn("blurry", "a", 1.0), drawn("a", "blurry", 0.0), atol=1e-4)
    assert np.abs(drawn("a", "blurry", 3.0) - drawn("a", "dark", 3.0)).max() > 1e-3


def test_sdxl_without_a_negative_prompt_has_the_state_zero():
    m = model("sdxl")
    tau, pooled, sizes = m.encode_text([""], (40, 48), zeros=True)
    assert not tau.any() and not pooled.any() and sizes.tolist() == [[40, 48, 0, 0, 40, 48]]
    assert np.abs(m.sample(["a"], **SMALL) - m.sample(["a"], negative="", **SMALL)).max() > 1e-3


@pytest.mark.parametrize("said, zeros", [({}, True), ({"force_zeros_for_empty_prompt": False}, False)])
def test_sdxl_has_the_state_zero_unless_its_index_says_otherwise(tmp_path, said, zeros):
    shutil.copytree(HERE / "sdxl", tmp_path / "m")
    (tmp_path / "m" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"} | said))
    assert Folder.at(tmp_path / "m").zeros_without_negative == zeros


def test_what_is_told_of_a_checkpoint_in_several_precisions(tmp_path):
    shutil.copytree(HERE / "eps", tmp_path / "m")
    (file,) = (tmp_path / "m" / "vae").glob("*.safetensors")
    plain = load_file(file)
    save_file({name: w.astype(np.float32) for name, w in plain.items()}, file)
    told = dict(StableDiffusion.about(tmp_path / "m"))
    assert told["stored as"] == "F16, F32" and dict(StableDiffusion.about(HERE / "eps"))["stored as"] == "F16"
    assert f"{sum(w.size for w in plain.values()):,} vae" in told["parameters"]


def test_the_second_prompt_is_read_by_the_second_encoder_alone():
    """tau is the states of both encoders side by side; the embedding of the whole prompt is the second one's."""
    m, size = model("sdxl"), (40, 48)
    (a, pooled_a, _), (b, pooled_b, _) = (m.encode_text([prompt], size) for prompt in ("a red cube", "seven"))
    tau, pooled, _ = m.encode_text(["a red cube", "a red cube"], size, second="seven")
    first = 16                                              # the width of the first encoder
    assert np.allclose(tau, np.concatenate([a[..., :first], b[..., first:]], axis=-1), atol=1e-5)   # (2, 77, 40)
    assert np.allclose(pooled, pooled_b, atol=1e-5) and np.abs(pooled_a - pooled_b).max() > 1e-3

    def drawn(**prompts):
        return m.sample(["a"], negative="dark", **prompts, **SMALL)
    assert np.array_equal(drawn(), drawn(second="a", second_negative="dark"))
    assert np.abs(drawn() - drawn(second="b")).max() > 1e-3
    assert np.abs(drawn() - drawn(second_negative="b")).max() > 1e-3
    # an empty prompt is one, unlike one that is not given
    empty, pooled_empty, _ = m.encode_text([""], size)
    tau, pooled, _ = m.encode_text(["a red cube"], size, second="")
    assert np.allclose(tau, np.concatenate([a[..., :first], empty[..., first:]], axis=-1), atol=1e-5)
    assert np.allclose(pooled, pooled_empty, atol=1e-5) and np.abs(pooled_a - pooled_empty).max() > 1e-3
    # a second negative prompt alone is a negative prompt: the state is not 0
    assert np.array_equal(m.sample(["a"], second_negative="b", **SMALL),
                          m.sample(["a"], negative="", second_negative="b", **SMALL))


@pytest.fixture
def reads_scale(tmp_path):
    """A latent consistency model: its UNet reads the scale of guidance, through a matrix of its own."""
    shutil.copytree(HERE / "eps", tmp_path / "lcm")
    config = tmp_path / "lcm" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"time_cond_proj_dim": 6}))
    file = tmp_path / "lcm" / "unet" / "diffusion_pytorch_model.safetensors"
    w = np.random.default_rng(3).normal(size=(8, 6)).astype(np.float32)
    save_file(load_file(file) | {"time_embedding.cond_proj.weight": w}, file)
    return tmp_path / "lcm"


def test_a_network_that_reads_the_scale_is_told_it_and_evaluated_once(reads_scale):
    m, seen = StableDiffusion.load(reads_scale), []
    forward = type(m.unet).forward

    class Watched(type(m.unet)):
        def forward(self, z_t, t, text, pooled=None, sizes=None, scale=1.0):
            seen.append((z_t.shape[0], scale))
            return forward(self, z_t, t, text, pooled, sizes, scale)
    m.unet.__class__ = Watched
    x = m.sample(["a", "b"], scale=6.5, sampler="ddim", **SMALL)
    assert seen == [(2, 6.5)] * 3
    assert np.abs(x - m.sample(["a", "b"], scale=2.0, sampler="ddim", **SMALL)).max() > 1e-3
    with pytest.raises(UserError, match="without a negative prompt"):
        m.sample(["a"], negative="b", **SMALL)


def test_the_embedding_of_the_scale(reads_scale):
    """time_1's input is wave(t) + W wave(1000 (scale - 1)), with the sines of the scale first (by hand)."""
    m, plain = StableDiffusion.load(reads_scale, dtype=np.float64), StableDiffusion.load(HERE / "eps", dtype=np.float64)
    z, text = (np.random.default_rng(0).normal(size=shape) for shape in ((1, 5, 6, 4), (1, 77, 16)))
    angle = 1000 * (6.5 - 1) * np.array([1, 1e-2, 1e-4])    # freq_k = 10000^(-k / 2), k = 0, 1, 2
    change = np.concatenate([np.sin(angle), np.cos(angle)]) @ m.unet.of_scale.w.data            # (8,)
    # W wave joins the input of a linear layer, so the layer's bias may hold W_1 (W wave) instead
    plain.unet.time1.b.data = plain.unet.time1.b.data + change @ plain.unet.time1.w.data
    a = m.unet(Tensor(z), np.array([500.0]), Tensor(text), None, None, 6.5).data
    b = plain.unet(Tensor(z), np.array([500.0]), Tensor(text)).data
    assert np.abs(a - b).max() < 1e-12 * np.abs(b).max() + 1e-12
    assert np.abs(a - m.unet(Tensor(z), np.array([500.0]), Tensor(text), None, None, 1.0).data).max() > 1e-4


def test_strength_is_the_share_of_the_steps_that_is_made():
    m, image = model("eps"), np.tanh(np.random.default_rng(0).normal(size=(40, 48, 3))).astype(np.float32)
    mask = np.zeros((40, 48), bool)
    mask[8:24, 16:40] = True
    for more in ({}, {"mask": mask}):
        assert [len(list(m.trajectory(["a"], image=image, strength=s, steps=4, **more)))
                for s in (0.25, 0.5, 1.0)] == [1, 2, 4]
    kept = m.sample(["a"], image=image, strength=0.0, steps=4)
    assert np.allclose(kept[0], np.clip(m.decode(m.encode(image[None]))[0], -1, 1), atol=1e-5)
    for s, words in ((1.5, "from 0 to 1, not 1.5"), (-0.1, "from 0 to 1"),
                     (0.24, "strength 0.24 of 4 steps is less than a step")):
        with pytest.raises(ValueError, match=words):
            m.sample(["a"], image=image, strength=s, steps=4)
    with pytest.raises(ValueError, match="strength must be a finite number"):
        m.sample(["a"], image=image, strength=float("nan"), steps=4)


def test_in_painting_is_by_the_sampler_that_is_asked_for():
    image, mask = np.zeros((40, 48, 3), np.float32), np.ones((40, 48), bool)
    mask[:8] = False
    x, y = (model("eps").sample(["a"], image=image, mask=mask, steps=3, sampler=s) for s in ("ddim", "dpm++2m"))
    assert np.abs(x - y)[:, mask].max() > 1e-3
    with pytest.raises(UserError, match="mask is black everywhere"):
        model("eps").sample(["a"], image=image, mask=~np.ones((40, 48), bool), steps=3)


@pytest.mark.parametrize("kind", ["eps", "inpaint"])
def test_in_painting_keeps_every_known_pixel(kind):
    image = np.tanh(np.random.default_rng(1).normal(size=(40, 48, 3))).astype(np.float32)
    mask = np.zeros((40, 48), bool)
    mask[8:24, 16:40] = True
    x = model(kind).sample(["a", "b"], image=image, mask=mask, steps=3)
    assert np.array_equal(x[:, ~mask], np.stack([image[~mask]] * 2)) and np.abs(x[0] - x[1])[mask].max() > 0.01


def test_a_latent_is_drawn_again_where_any_of_its_pixels_is():
    """A single pixel of the mask is enough; else its colour would stay in the picture that is drawn again."""
    mask = np.zeros((40, 48), bool)
    mask[9, 17], mask[39, 47] = True, True
    known = model("eps")._known(np.zeros((40, 48, 3), np.float32), mask, np.zeros((1, 5, 6, 4), np.float32))
    assert np.argwhere(known.again[0, ..., 0]).tolist() == [[1, 2], [4, 5]]


def test_a_network_of_nine_channels_sees_the_mask_and_the_known_part():
    m = model("inpaint")
    image = np.full((40, 48, 3), 0.5, np.float32)
    mask = np.zeros((40, 48), bool)
    mask[:, 24:] = True
    seen = m._known(image, mask, np.zeros((2, 5, 6, 4), np.float32)).beside(np.full((4, 5, 6, 4), 9, np.float32))
    assert seen.shape == (4, 5, 6, 9) and (seen[..., :4] == 9).all()
    assert (seen[..., 4] == (np.arange(6) >= 3)).all()
    grey = m.encode(np.where(mask[..., None], 0, image)[None].astype(np.float32))
    assert np.array_equal(seen[..., 5:], np.repeat(grey, 4, axis=0))


def test_a_prompt_that_is_too_long_is_cut_aloud_and_once(capsys):
    m, long = StableDiffusion.load(HERE / "eps"), "a thin seven " * 40
    for _ in range(2):
        m.sample(["a", long], negative="dark " * 90, **SMALL)
    said = capsys.readouterr().err
    assert said.count("tokens more than the 75 that are read") == 2
    assert said.count("the prompt 'a thin seven ") == said.count("the prompt 'dark dark ") == 1


def test_few_steps_of_a_schedule_that_leads_are_remarked_and_trailing_ones_start_in_noise(capsys):
    """Leading times of one step are time 1, where a turbo model would find nothing left to do."""
    m = model("eps")
    m.sample(["a"], steps=1, sampler="ddim", spacing="leading", size="48x40")
    assert "the run starts at time 1, where alpha is 1.00" in capsys.readouterr().err
    m.sample(["a"], steps=1, sampler="ddim", spacing="trailing", size="48x40")
    assert capsys.readouterr().err == ""
    assert m.scheduler.changed("trailing").plan(1, "ddim").t[-1] == 999


def test_what_a_network_predicts_may_be_said():
    """A file of the second family does not tell whether its network predicts eps or v."""
    m = model("v")
    assert np.array_equal(m.sample(["a"], predicts="v", **SMALL), m.sample(["a"], **SMALL))
    assert np.abs(m.sample(["a"], predicts="eps", **SMALL) - m.sample(["a"], **SMALL)).max() > 1e-3
    assert m.scheduler.changed(predicts="eps").predicts == "eps" and m.scheduler.predicts == "v"


def test_states_have_training_times():
    plan = model("eps").scheduler.plan(4, "ddim")
    times = [s.t for s in model("eps").trajectory(["a"], steps=4, sampler="ddim", size="48x40")]
    assert times == [*(int(plan.t[s]) for _, s in plan.steps[:-1]), times[-1]] and times[0] > 400


@pytest.mark.parametrize("options, words", [
    ({"size": "50x40"}, "multiples of 8, such as 56x40"), ({"size": "big"}, "WIDTHxHEIGHT"),
    ({"size": "99999x8"}, "at most 4096"), ({"sampler": "magic"}, "sampler must be one of"),
    ({"steps": 0}, "steps must be"),
    ({"steps": 2.5}, "steps must be a whole"), ({"size": (48, 40)}, "WIDTHxHEIGHT"),
    ({"negative": ["a"]}, "negative must be a str"), ({"second": "b"}, "second is for SDXL's second text encoder"),
    ({"second_negative": 5}, "second_negative must be a str"),
    ({"strength": 0.5}, "strength is of image to image: give an image"),
    ({"scale": "x"}, "scale must be a finite number"), ({"scale": float("nan")}, "scale must be a finite"),
    ({"spacing": "even"}, "spacing must be one of leading, linspace, trailing"),
    ({"predicts": "noise"}, "predicts must be one of eps, v, x0"),
    ({"image": np.zeros((40, 48, 3), np.uint8)}, "image must be"),
    ({"image": np.zeros((40, 48, 3), np.float32), "size": "64x64"}, "leave out size"),
    ({"mask": np.ones((40, 48), bool)}, "mask says what of an image")])
def test_options_out_of_range(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        model("eps").sample(["a"], **{"steps": 2, "size": None} | options)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared pipelines are not here")
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_whole_way_from_prompt_to_picture_of_a_larger_pipeline(kind):
    """Prompts to pixels with the checkpoint's own scheduler, 1e-4 of the largest value, as diffusers drew them."""
    m, golden = StableDiffusion.load(SHARED / kind), np.load(SHARED / kind / "golden.npz")
    noise = np.ascontiguousarray(golden["latents"].transpose(0, 2, 3, 1))

    class Given:                                            # the noise of the golden outputs
        def normal(self, shape, dtype=np.float32):
            return noise

        def __len__(self):
            return 2
    prompts = json.loads((SHARED / kind / "MADE_WITH.txt").read_text(encoding="utf-8").split("prompts: ")[1].split(
        "\nnegative")[0])
    size = (128, 128)
    cond = m.encode_text([prompts[0], prompts[2]], size)
    uncond = m.encode_text(["blurry", "ugly" if kind == "sdxl" else ""], size)
    plan = m.scheduler.plan(6)
    network = NetworkDenoiser(plan.schedule, m.scheduler.predicts, m._network(plan, None))
    denoiser = ClassifierFree(network, 7.5, uncond)
    *_, state = plan.run(denoiser, plan.first_std * noise, cond)
    found, expected = state.x_t.transpose(0, 3, 1, 2), golden["out_default"]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    picture = np.clip(golden["image_default"], -1, 1)
    assert np.abs(m.decode(state.x_t).transpose(0, 3, 1, 2) - picture).max() <= 1e-3


# --- checkpoints that are refused ---------------------------------------------------------------------------

def edited(name: str, **values):
    """Changes a JSON file of the folder."""
    def change(folder: Path):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
    return change


def tensors(name: str, change):
    """Changes the tensors of a part of the folder."""
    def apply(folder: Path):
        path = next((folder / name).glob("*.safetensors"))
        state = load_file(path)
        change(state)
        save_file(state, path)
    return apply


def remove(name: str):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def cut(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def linked(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(path, folder.parent / "elsewhere.safetensors")
    path.unlink()
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def linked_out(name: str):
    """Puts a link out of the folder in a file's place."""
    def change(folder: Path):
        elsewhere = folder.parent / "elsewhere"
        shutil.copy(folder / name, elsewhere)
        (folder / name).unlink()
        (folder / name).symlink_to(elsewhere)
    return change


def in_place_of(name: str, make):
    def change(folder: Path):
        (folder / name).unlink()
        make(folder / name)
    return change


def to_itself(path: Path) -> None:
    path.symlink_to(path)


def shards(where: str):
    def change(folder: Path):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        index = path.with_suffix(".safetensors.index.json")
        index.write_text(json.dumps({"weight_map": {name: where for name in load_file(path)}}))
        path.rename(path.with_name("part.safetensors"))
    return change


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def channels(count: int):
    """Gives the autoencoder's latents another number of channels, in the configuration and in the tensors."""
    def change(folder: Path):
        edited("vae/config.json", latent_channels=count)(folder)
        tensors("vae", lambda s: s.update({"decoder.conv_in.weight": np.zeros((16, count, 3, 3), np.float16)}))(folder)
    return change


BROKEN = {
    "another family": (edited("model_index.json", _class_name="StableDiffusion3Pipeline"), "StableDiffusion3Pipeline"),
    "SDXL's refiner": (edited("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline",
                              text_encoder=[None, None]), "of SDXL's refiner"),
    "no index": (remove("model_index.json"), "without model_index.json"),
    "no unet": (remove("unet"), "no unet/"),
    "no weights": (remove("vae/diffusion_pytorch_model.safetensors"), "has no"),
    "no vocabulary": (remove("tokenizer/vocab.json"), "does not exist"),
    "cut short": (cut, "cut short"), "pickle": (pickled, "pickle"), "link out of the folder": (linked, "link out of"),
    "shard out of the folder": (shards("../../part.safetensors"), "not in its folder"),
    "a missing shard": (shards("part-2.safetensors"), "not in its folder"),
    "a missing tensor": (tensors("unet", lambda s: s.pop("conv_in.bias")), "lacks the tensor"),
    "another tensor": (tensors("unet", lambda s: s.update(new=np.zeros(3, np.float32))), "does not have"),
    "not finite": (tensors("vae", lambda s: s["decoder.conv_in.bias"].fill(np.nan)), "NaN or infinity"),
    "another shape": (tensors("unet", lambda s: s.update({"conv_in.weight": np.zeros((8, 4, 3), np.float16)})), "axes"),
    "heads that do not divide": (edited("unet/config.json", attention_head_dim=3), "do not divide"),
    "zero heads": (edited("unet/config.json", attention_head_dim=0), "do not divide"),
    "more blocks than there are": (edited("unet/config.json", layers_per_block=63), "63 of the parts"),
    "huge numbers": (edited("unet/config.json", layers_per_block=10**12), "takes a whole number"),
    "groups that do not divide": (edited("unet/config.json", norm_num_groups=7), "divide"),
    "another activation": (edited("unet/config.json", act_fn="mish"), "act_fn"),
    "another kind of block": (edited("unet/config.json", down_block_types=["A", "B"]), "down_block_types"),
    "an unknown scheduler": (edited("scheduler/scheduler_config.json", _class_name="Magic"), "unknown"),
    "betas above 1": (edited("scheduler/scheduler_config.json", beta_end=7.0), "beta_end"),
    "no betas": (edited("scheduler/scheduler_config.json", trained_betas="abc"), "betas make no schedule"),
    "an endless schedule": (edited("scheduler/scheduler_config.json", num_train_timesteps=10**9), "takes a whole"),
    "no number": (edited("scheduler/scheduler_config.json", num_train_timesteps="x"), "takes a whole number"),
    "other widths": (edited("unet/config.json", block_out_channels=[8, 32]), "block_out_channels"),
    "a width too few": (edited("unet/config.json", block_out_channels=[8]), "block_out_channels"),
    "widths of the autoencoder": (edited("vae/config.json", block_out_channels=[8, 8, 16, 16]), "block_out_channels"),
    "pictures of no pixels": (edited("unet/config.json", sample_size=0), "sample_size takes"),
    "pictures of many pixels": (edited("unet/config.json", sample_size=10**5), "sample_size takes"),
    "a fraction of a channel": (edited("unet/config.json", in_channels=4.0), "in_channels takes a whole number"),
    "other channels in": (edited("unet/config.json", in_channels=5), "in_channels is 5"),
    "other channels out": (edited("unet/config.json", out_channels=8), "out_channels is 8"),
    "another prompt's width": (edited("unet/config.json", cross_attention_dim=768), "cross_attention_dim is 768"),
    "no epsilon": (edited("unet/config.json", norm_eps=0), "norm_eps takes"),
    "a shift that divides by 0": (edited("unet/config.json", freq_shift=4), "freq_shift takes"),
    "an embedding that is not there": (edited("unet/config.json", addition_embed_type="text_time"), "add_embedding"),
    "another number of latents": (edited("vae/config.json", latent_channels=16), "latent_channels is 16"),
    "grey pictures": (edited("vae/config.json", out_channels=1), "out_channels is 1"),
    "no factor": (edited("vae/config.json", scaling_factor=0), "scaling_factor takes"),
    "a factor below 0": (edited("vae/config.json", scaling_factor=-0.2), "scaling_factor takes"),
    "a factor that is no number": (edited("vae/config.json", scaling_factor=float("nan")), "scaling_factor takes"),
    "levels up and down": (edited("vae/config.json", up_block_types=["UpDecoderBlock2D"]), "equally many"),
    "a layer that is lost": (tensors("vae", lambda s: [s.pop(f"quant_conv.{n}") for n in ("weight", "bias")]),
                             "use_quant_conv"),
    "another vocabulary": (edited("text_encoder/config.json", vocab_size=49408), "vocab_size is 49408"),
    "another text width": (edited("text_encoder/config.json", hidden_size=768), "hidden_size is 768"),
    "another length": (edited("text_encoder/config.json", max_position_embeddings=5), "max_position_embeddings is 5"),
    "another tokenizer": (edited("tokenizer/vocab.json", zebra=700), "ids up to 700"),
    "no merges": (written("tokenizer/merges.txt", "#version: 0.2\n"), "no list of merges"),
    "an empty file of merges": (written("tokenizer/merges.txt", ""), "no list of merges"),
    "latents of another autoencoder": (channels(16), "latents of 16 channels"),
    "an offset beyond the times": (edited("scheduler/scheduler_config.json", steps_offset=1000), "steps_offset takes"),
    "a beta of 1": (edited("scheduler/scheduler_config.json", beta_end=1), "beta_end take numbers above 0 and below 1"),
    "fewer betas than times": (edited("scheduler/scheduler_config.json", trained_betas=[0.01] * 5), "trained_betas"),
    "a level without a number": (tensors("vae", lambda s: s.update({"decoder.up_blocks.x": np.zeros(3, np.float32)})),
                                 "does not have"),
    "no room for a word": (edited("tokenizer/tokenizer_config.json", model_max_length=2), "takes at least 3"),
    "padding by a number": (edited("tokenizer/tokenizer_config.json", pad_token=0), "pad_token takes a symbol"),
    "an unknown end": (edited("scheduler/scheduler_config.json", final_sigmas_type="x"), "final_sigmas_type"),
    "a norm of one number": (tensors("unet", lambda s: s.update({"conv_norm_out.weight": np.array(1, np.float32)})),
                             "axes"),
    "another bias": (tensors("unet", lambda s: s.update({"conv_in.bias": np.zeros(7, np.float32)})), r"takes \(8,\)"),
    "another norm": (tensors("vae", lambda s: s.update({"decoder.conv_norm_out.bias": np.zeros(7, np.float32)})),
                     r"takes \(8,\)"),
    "a layer of the decoder with other channels": (
        tensors("vae", lambda s: s.update({"decoder.conv_out.weight": np.zeros((3, 16, 3, 3), np.float32)})),
        "do not fit together"),
    "a kernel of 1": (tensors("unet", lambda s: s.update({"conv_in.weight": s["conv_in.weight"][..., :1, :1].copy()})),
                      "3 x 3"),
}
for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
             "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "text_encoder/model.safetensors"):
    BROKEN[f"a link in the place of {name}"] = (linked_out(name), "link out of the checkpoint")
for name in ("unet/config.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"):
    BROKEN[f"a pipe in the place of {name}"] = (in_place_of(name, os.mkfifo), "a device, pipe or socket")
    BROKEN[f"a folder in the place of {name}"] = (in_place_of(name, Path.mkdir), "is a folder")
    BROKEN[f"a circle in the place of {name}"] = (in_place_of(name, to_itself), "leads to itself|cannot be read|exist")
for name in ("unet", "vae"):
    weights = f"{name}/diffusion_pytorch_model.safetensors"
    BROKEN[f"a pipe in the place of {weights}"] = (in_place_of(weights, os.mkfifo), "not an ordinary file")
    BROKEN[f"a folder in the place of {weights}"] = (in_place_of(weights, Path.mkdir), "not an ordinary file")
def cut_merges(folder: Path) -> None:
    file = folder / "tokenizer" / "merges.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[:len(lines) // 2]) + "\n", encoding="utf-8")


def more_merges(folder: Path) -> None:
    with (folder / "tokenizer" / "merges.txt").open("a", encoding="utf-8") as file:
        file.write("no such</w>\n")


def whole_numbers(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"].astype(np.int8)}, file)


BROKEN["half of the merges"] = (cut_merges, "the merges make all but")
BROKEN["merges of another tokenizer"] = (more_merges, "the merges make 'nosuch</w>', which the vocabulary lacks")
BROKEN["weights in whole numbers"] = (whole_numbers, "'conv_in.weight' as I8, and minidiff reads weights of")
BROKEN["a pipe for an index"] = (in_place_of("model_index.json", os.mkfifo), "not an ordinary file")
BROKEN["a folder for an index"] = (in_place_of("model_index.json", Path.mkdir), "not an ordinary file")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_in_a_sentence_and_within_a_second(name, tmp_path, capsys):
    change, words = BROKEN[name]
    folder = tmp_path / "model"
    shutil.copytree(HERE / "eps", folder)
    change(folder)
    started = time.thread_time()
    with pytest.raises(UserError, match=words) as caught:
        StableDiffusion.load(folder)
    assert time.thread_time() - started < 1 and "\n" not in str(caught.value)
    command = ["sample", "x", "--model", str(folder), "--steps", "1", "-o", str(tmp_path / "x.png")]
    assert main(command) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("sampler", [None, *CHOICES])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)])
def test_runs_of_as_many_steps_as_there_are_times_stay_within_them_or_are_refused(sampler, spacing, offset):
    config = Config.load(HERE / "eps" / "scheduler" / "scheduler_config.json")
    values = config.values | {"num_train_timesteps": 40, "timestep_spacing": spacing, "steps_offset": offset}
    scheduler = SchedulerConfig(Config(values, config.path))
    for steps in (1, 2, 37, 38, 39, 40, 41):
        try:
            plan = scheduler.plan(steps, sampler)
        except ValueError as error:                         # UserError is one
            assert steps > 38 and ("take fewer steps" in str(error) or "steps must be" in str(error)) or (
                steps == 1 and "take more steps" in str(error))
        else:
            denoiser = NetworkDenoiser(plan.schedule, "eps", lambda x_t, t, cond: 0 * x_t)
            *_, state = plan.run(denoiser, np.ones((1, 2)), streams=SampleStreams(0, 1))
            assert np.isfinite(state.x_t).all()
            assert steps <= 40 and plan.t.min() >= 0 and plan.t.max() <= 39
            assert len(plan.steps) in (steps, steps - 1) and plan.schedule.alpha_bar.size >= len(plan.steps)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_sampler_draws_in_float32_with_every_spacing(spacing):
    """Turbo models have Euler's scheduler with trailing times, which starts at sigma times the noise."""
    m = copy.copy(model("eps"))
    config = m.scheduler.config
    m.scheduler = SchedulerConfig(Config(config.values | {"timestep_spacing": spacing}, config.path))
    for sampler in (None, *CHOICES):
        x = m.sample(["a"], sampler=sampler, scale=1.0, **SMALL)
        assert x.dtype == np.float32 and x.shape == (1, 40, 48, 3) and x.std() > 0.01, sampler


@pytest.mark.parametrize("given, near", [("pndm", "plms"), ("DPM++ 2M SDE", "dpm++2m-sde"), ("Euler_A", "euler-a"),
                                         ("dpm++ 2m", "dpm++2m"), ("heum", "heun"), ("magic", None)])
def test_an_unknown_sampler_is_refused_with_the_nearest_one(given, near):
    with pytest.raises(UserError, match="sampler must be one of ddim, plms") as caught:
        StableDiffusion.check_sampler(given)
    assert (f": the nearest is {near}" in str(caught.value)) if near else ("nearest" not in str(caught.value))


def test_the_cache_of_huggingface_hub_may_link_to_its_blobs(tmp_path):
    cache = tmp_path / "models--org--name"
    folder = cache / "snapshots" / "0a1b"
    shutil.copytree(HERE / "eps", folder)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(cache / "blobs" / str(i))
        path.symlink_to(os.path.relpath(cache / "blobs" / str(i), path.parent))
    assert np.array_equal(StableDiffusion.load(folder).sample(["a"], **SMALL), model("eps").sample(["a"], **SMALL))
    other = folder.parent.parent / "not_snapshots"
    folder.parent.rename(other)
    with pytest.raises(UserError, match="link out of the checkpoint"):
        StableDiffusion.load(other / "0a1b")


def test_two_tokenizers_of_different_lengths_are_refused(tmp_path):
    shutil.copytree(HERE / "sdxl", tmp_path / "model")
    edited("tokenizer_2/tokenizer_config.json", model_max_length=70)(tmp_path / "model")
    with pytest.raises(UserError, match="tokenizers of 77 and 70 tokens"):
        StableDiffusion.load(tmp_path / "model")


def test_shards_are_read(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(HERE / "eps", folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    names = sorted(state)
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: state[name] for name in names if where[name] == file}, path.with_name(file))
    path.unlink()
    path.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert np.array_equal(StableDiffusion.load(folder).sample(["a"], **SMALL), model("eps").sample(["a"], **SMALL))


def test_an_autoencoder_with_the_names_of_2022_is_the_same(tmp_path):
    """Published checkpoints of the first two families have them: query, key, value and proj_attn."""
    folder = tmp_path / "m"
    shutil.copytree(HERE / "eps", folder)
    file, old = folder / "vae" / "diffusion_pytorch_model.safetensors", {}
    for name, a in load_file(file).items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = a
    assert sum("proj_attn" in name for name in old) == 4
    save_file(old, file)
    assert np.array_equal(StableDiffusion.load(folder).sample(["a"], **SMALL), model("eps").sample(["a"], **SMALL))


def test_the_padding_of_the_older_settings_file(tmp_path):
    """special_tokens_map.json says it where tokenizer_config.json lists no added tokens, as transformers reads them."""
    folder = tmp_path / "m"
    shutil.copytree(HERE / "eps", folder)
    settings, special = (folder / "tokenizer" / name for name in ("tokenizer_config.json", "special_tokens_map.json"))
    special.write_text(json.dumps({"pad_token": {"content": "!", "lstrip": False}}), encoding="utf-8")
    tokenizer = StableDiffusion.load(folder).tokenizers[0]
    assert tokenizer.pad == tokenizer.vocab["!"] and tokenizer.ids(["a"])[0][0, -1] == tokenizer.vocab["!"]
    assert tokenizer.encode("a!b !!") == [*tokenizer.encode("a"), tokenizer.pad, *tokenizer.encode("b"),
                                          tokenizer.pad, tokenizer.pad]
    settings.write_text(json.dumps({"pad_token": "<|endoftext|>", "added_tokens_decoder": {}}), encoding="utf-8")
    assert StableDiffusion.load(folder).tokenizers[0].pad == tokenizer.end


@pytest.mark.parametrize("said, times", [({}, [751, 501, 251, 1]), ({"steps_offset": 0}, [750, 500, 250, 0])])
def test_what_the_first_scheduler_configurations_leave_out(tmp_path, said, times):
    """Of Stable Diffusion 1, steps_offset and clip_sample: diffusers' pipeline sets 1 and false (0.42.1)."""
    shutil.copytree(HERE / "eps", tmp_path / "m")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    (tmp_path / "m" / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler"} | betas | said))
    assert SchedulerConfig(Folder.at(tmp_path / "m").config("scheduler")).plan(4).t.tolist() == times[::-1]


def test_a_latent_consistency_models_own_pipeline(tmp_path):
    shutil.copytree(HERE / "eps", tmp_path / "m")
    index = tmp_path / "m" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "LatentConsistencyModelPipeline"))
    x = StableDiffusion.load(tmp_path / "m").sample(["a"], **SMALL)
    assert np.array_equal(x, model("eps").sample(["a"], **SMALL))


def test_it_is_only_read():
    with pytest.raises(NotImplementedError):
        model("eps").save("x.safetensors")


def test_the_example_walks_from_prompt_to_pixel(tmp_path, capsys):
    out = tmp_path / "x.png"
    x = load("12_stable_diffusion").main(steps=3, size="48x40", out=str(out))
    assert x.shape == (40, 48, 3) and out.stat().st_size > 1000
    assert (tmp_path / "x_parts.png").stat().st_size > 1000
    assert "states of the prompt: (1, 77, 16)" in capsys.readouterr().out


@pytest.mark.parametrize("kind, resolution", [("eps", (5, 6)), ("sdxl", (3, 3))])
def test_the_example_sees_the_weights_of_attention(kind, resolution):
    """They are positive, sum to 1 over the tokens, and the layer's answer is their mean of the values."""
    example, m = load("12_stable_diffusion"), copy.deepcopy(model(kind))
    watched = example.watch(m)
    example.predict(m, np.zeros((1, 5, 6, 4), np.float32), 300.0, m.encode_text(["a red cube"], (40, 48)))
    w, layer = watched.weights, watched.layer                                       # (1, heads, N, 77)
    assert w.shape == (1, layer.heads, resolution[0] * resolution[1], 77)
    assert (w > 0).all() and np.allclose(w.sum(axis=-1), 1, atol=1e-5)
    rng, sizes = np.random.default_rng(0), ((1, 4, layer.q.w.shape[0]), (1, 7, layer.k.w.shape[0]))
    x, text = (Tensor(rng.normal(size=size).astype(np.float32)) for size in sizes)
    out = watched(x, text).data
    values = layer._heads(layer.v(text)).data                                       # (1, heads, 7, d)
    y = (watched.weights @ values).transpose(0, 2, 1, 3).reshape(1, 4, -1)
    assert np.allclose(out, layer.out(Tensor(y)).data, atol=1e-4)


def test_an_in_painting_network_asks_for_image_and_mask():
    for options in ({}, {"image": np.zeros((40, 48, 3), np.float32)}):
        with pytest.raises(UserError, match="trained for in-painting: give an image, and a mask"):
            model("inpaint").sample(["a"], steps=2, **options)


def test_a_dtype_is_chosen_when_the_checkpoint_is_loaded():
    with pytest.raises(ValueError, match="name another when loading"):
        model("eps").astype(np.float16)


@pytest.mark.parametrize("value, words", [(255.0, r"in \[-1, 1\]"), (np.nan, r"in \[-1, 1\]")])
def test_images_out_of_range_are_refused_before_the_work(value, words):
    with pytest.raises(ValueError, match=words):
        model("eps").sample(["a"], image=np.full((40, 48, 3), value, np.float32), steps=2)


def test_a_copy_and_a_pickle_draw_the_same_picture():
    m = model("eps")
    expected = m.sample(["a red cube"], **SMALL)
    for same in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert np.array_equal(same.sample(["a red cube"], **SMALL), expected)

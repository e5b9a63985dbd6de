"""A LoRA gives what a checkpoint gives whose weights were changed by hand, whatever names its file has."""

import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.changed_checkpoint import changed_copy, tensors_of
from support.original_names import RESNET, renamed, unet_prefixes, write_single_file

from minidiff.errors import UserError
from minidiff.pretrained import lora
from minidiff.pretrained.checkpoints import Folder
from minidiff.pretrained.single_file import SingleFile
from minidiff.pretrained.weights import entries
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parent / "checkpoints"
FAMILIES = {"eps": "SD 1", "v": "SD 2", "sdxl": "SDXL", "inpaint": "SD 1"}
TEXT = "text_model.encoder.layers.1."

# name in the file -> (part, weight), of each program; "down" and "up" stand for its words for A and B
BLOCK = "down_blocks.0.attentions.0"
PEFT = {f"unet.{BLOCK}.transformer_blocks.0.attn1.to_q": ("unet", f"{BLOCK}.transformer_blocks.0.attn1.to_q"),
        f"unet.{BLOCK}.transformer_blocks.0.attn2.to_out.0": ("unet", f"{BLOCK}.transformer_blocks.0.attn2.to_out.0"),
        f"unet.{BLOCK}.transformer_blocks.0.ff.net.0.proj": ("unet", f"{BLOCK}.transformer_blocks.0.ff.net.0.proj"),
        f"unet.{BLOCK}.proj_in": ("unet", f"{BLOCK}.proj_in"),
        "unet.up_blocks.1.resnets.0.conv1": ("unet", "up_blocks.1.resnets.0.conv1"),
        "unet.up_blocks.1.resnets.0.conv_shortcut": ("unet", "up_blocks.1.resnets.0.conv_shortcut"),
        "unet.down_blocks.0.downsamplers.0.conv": ("unet", "down_blocks.0.downsamplers.0.conv"),
        "unet.time_embedding.linear_1": ("unet", "time_embedding.linear_1"),
        f"text_encoder.{TEXT}self_attn.q_proj": ("text_encoder", TEXT + "self_attn.q_proj"),
        f"text_encoder.{TEXT}mlp.fc1": ("text_encoder", TEXT + "mlp.fc1")}
OLD = {f"unet.{BLOCK}.transformer_blocks.0.attn1.processor.to_q": ("unet", f"{BLOCK}.transformer_blocks.0.attn1.to_q"),
       f"unet.{BLOCK}.transformer_blocks.0.attn2.processor.to_out": (
           "unet", f"{BLOCK}.transformer_blocks.0.attn2.to_out.0"),
       "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v": (
           "unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"),
       f"text_encoder.{TEXT}self_attn.to_k": ("text_encoder", TEXT + "self_attn.k_proj"),
       f"text_encoder.{TEXT}self_attn.to_out": ("text_encoder", TEXT + "self_attn.out_proj")}
LINEAR = {f"text_encoder.{TEXT}self_attn.v_proj": ("text_encoder", TEXT + "self_attn.v_proj"),
          f"text_encoder.{TEXT}mlp.fc2": ("text_encoder", TEXT + "mlp.fc2"),
          f"unet.{BLOCK}.proj_out": ("unet", f"{BLOCK}.proj_out")}
ADAPTER = {f"base_model.model.{name.split('.', 1)[1]}": place for name, place in PEFT.items()}
KOHYA = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (
             "unet", f"{BLOCK}.transformer_blocks.0.attn2.to_k"),
         "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": (
             "unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
         "lora_unet_up_blocks_0_upsamplers_0_conv": ("unet", "up_blocks.0.upsamplers.0.conv"),
         "lora_unet_mid_block_resnets_1_time_emb_proj": ("unet", "mid_block.resnets.1.time_emb_proj"),
         "lora_unet_conv_in": ("unet", "conv_in"),
         "lora_te_text_model_encoder_layers_1_self_attn_out_proj": ("text_encoder", TEXT + "self_attn.out_proj"),
         "lora_te_text_model_encoder_layers_1_mlp_fc2": ("text_encoder", TEXT + "mlp.fc2")}
SDXL = {"lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k": (
            "unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"),
        "lora_unet_input_blocks_3_0_in_layers_2": ("unet", "down_blocks.1.resnets.0.conv1"),
        "lora_unet_input_blocks_2_0_op": ("unet", "down_blocks.0.downsamplers.0.conv"),
        "lora_unet_input_blocks_0_0": ("unet", "conv_in"),
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_2": (
            "unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.2"),
        "lora_unet_middle_block_2_out_layers_3": ("unet", "mid_block.resnets.1.conv2"),
        "lora_unet_output_blocks_1_1_proj_out": ("unet", "up_blocks.0.attentions.1.proj_out"),
        "lora_unet_output_blocks_1_2_conv": ("unet", "up_blocks.0.upsamplers.0.conv"),
        "lora_unet_output_blocks_2_0_skip_connection": ("unet", "up_blocks.1.resnets.0.conv_shortcut"),
        "lora_unet_output_blocks_3_0_emb_layers_1": ("unet", "up_blocks.1.resnets.1.time_emb_proj"),
        "lora_unet_label_emb_0_2": ("unet", "add_embedding.linear_2"),
        "lora_unet_time_embed_0": ("unet", "time_embedding.linear_1"), "lora_unet_out_2": ("unet", "conv_out"),
        "lora_unet_down_blocks_1_attentions_0_proj_in": ("unet", "down_blocks.1.attentions.0.proj_in"),
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj": ("text_encoder", TEXT + "self_attn.q_proj"),
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": ("text_encoder_2", TEXT + "mlp.fc1"),
        "lora_te1_text_model_encoder_layers_1_self_attn_out_proj": ("text_encoder", TEXT + "self_attn.out_proj"),
        "text_encoder_2.text_model.encoder.layers.0.self_attn.k_proj": (
            "text_encoder_2", "text_model.encoder.layers.0.self_attn.k_proj"),
        "lora_te2_text_projection": ("text_encoder_2", "text_projection")}
STYLES = {"peft": ("eps", PEFT, ".lora_A.weight", ".lora_B.weight"),
          "peft, linear projections": ("v", PEFT, ".lora_A.weight", ".lora_B.weight"),
          "a named adapter": ("eps", PEFT, ".lora_A.default_0.weight", ".lora_B.default_0.weight"),
          "peft's own": ("eps", ADAPTER, ".lora_A.weight", ".lora_B.weight"),
          "diffusers, formerly": ("eps", OLD, "_lora.down.weight", "_lora.up.weight"),
          "diffusers, between": ("eps", PEFT, ".lora.down.weight", ".lora.up.weight"),
          "diffusers' text": ("eps", LINEAR, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
          "kohya": ("eps", KOHYA, ".lora_down.weight", ".lora_up.weight"),
          "kohya, in-painting": ("inpaint", KOHYA, ".lora_down.weight", ".lora_up.weight"),
          "kohya, SDXL": ("sdxl", SDXL, ".lora_down.weight", ".lora_up.weight")}


def weight_name(part: str, layer: str, folder: Path) -> str:
    """The weight's name in the checkpoint, which may leave out `text_model.`."""
    names = tensors_of(folder, part)
    return next(name for name in (f"{layer}.weight", f"{layer}.weight".removeprefix("text_model.")) if name in names)


def pair(shape, r: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """A and B in the shapes that programs write for a weight."""
    D, C, *kernel = shape
    a, b = rng.standard_normal((r, C, *kernel)), rng.standard_normal((D, r, *(1 for _ in kernel)))
    return a.astype(np.float32), (0.3 * b).astype(np.float32)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """B A, for a convolution too: sum over r of b[d, r] a[r, c, i, j]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.einsum("dr,rc...->dc...", b.reshape(b.shape[:2]), a)


def make(path: Path, folder: Path, places: dict, down: str, up: str, *, r: int = 2, alpha: float | None = None,
         strength: float = 1.0, seed: int = 0, metadata=None) -> dict[str, dict]:
    """Writes a LoRA; returns the same changes as functions, by part and name of the weight."""
    rng, file, changes = np.random.default_rng(seed), {}, {}
    for name, (part, layer) in places.items():
        full = weight_name(part, layer, folder)
        a, b = pair(tensors_of(folder, part)[full].shape, r, rng)
        file |= {name + down: a, name + up: b}
        if alpha is not None:
            file[f"{name}.alpha"] = np.array(alpha, np.float32)
        dw = strength * (1.0 if alpha is None else alpha / r) * product(a, b)
        changes.setdefault(part, {})[full] = lambda w, dw=dw: w + dw
    save_file(file, path, metadata=metadata)
    return changes


def weights_of(saved, loras) -> dict[str, dict[str, np.ndarray]]:
    """Every tensor of the UNet and the text encoders in float64, changed by LoRAs."""
    parts = {part: saved.weights(part, np.float64) for part in saved.parts if part == "unet" or part.startswith("text")}
    return {part: {name: weights.tensor(name).data for name in weights.tensors}
            for part, weights in lora.merged(loras, parts).items()}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for part in expected:
        assert found[part].keys() == expected[part].keys()
        for name, w in expected[part].items():
            np.testing.assert_allclose(found[part][name], w, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("alpha", [pytest.param(None, marks=pytest.mark.slow), 5.0])
@pytest.mark.parametrize("style", STYLES)
def test_each_style_of_names(style, alpha, tmp_path):
    kind, places, down, up = STYLES[style]
    changes = make(tmp_path / "l.safetensors", HERE / kind, places, down, up, r=3, alpha=alpha, strength=0.7)
    by_hand = changed_copy(HERE / kind, tmp_path / "by_hand", changes)
    assert_same(weights_of(Folder.at(HERE / kind), [(tmp_path / "l.safetensors", 0.7)]),
                weights_of(Folder.at(by_hand), []))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eps", "sdxl"])
def test_pictures_are_those_of_the_changed_checkpoint(kind, tmp_path):
    places = KOHYA if kind == "eps" else SDXL
    changes = make(tmp_path / "l.safetensors", HERE / kind, places, ".lora_down.weight", ".lora_up.weight", alpha=1)
    by_hand = StableDiffusion.load(changed_copy(HERE / kind, tmp_path / "by_hand", changes), dtype=np.float64)
    merged = StableDiffusion.load(HERE / kind, dtype=np.float64, loras=[(tmp_path / "l.safetensors", 1.0)])
    plain = StableDiffusion.load(HERE / kind, dtype=np.float64)
    pictures = [m.sample(["a red cube"], steps=2, size="32x48", sampler="ddim") for m in (merged, by_hand, plain)]
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-9)
    assert np.abs(pictures[0] - pictures[2]).max() > 1e-2


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_layer_of_the_unet_has_its_original_name(kind):
    """The original names are counted, as in support/original_names.py."""
    weights = Folder.at(HERE / kind).weights("unet", np.float32)
    find = lora.layers_of(weights)
    attends = [False, True] if kind == "sdxl" else [True, False]
    original = renamed({name: name for name in weights.tensors}, unet_prefixes(2, 1, attends), RESNET)
    layers = {old.removesuffix(".weight"): new for old, new in original.items()
              if new.endswith(".weight") and len(weights.shape(new)) > 1}
    assert len(layers) > 40
    for old, new in layers.items():
        assert find(old.replace(".", "_")) == find(old) == find(new.removesuffix(".weight")) == new


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eps", "v", "sdxl"])
def test_a_single_file_takes_the_same_lora(kind, tmp_path):
    """Also OpenCLIP's text encoder, where q, k and v are stored together and the projection is transposed."""
    places = SDXL if kind == "sdxl" else KOHYA
    changes = make(tmp_path / "l.safetensors", HERE / kind, places, ".lora_down.weight", ".lora_up.weight", alpha=3)
    by_hand = changed_copy(HERE / kind, tmp_path / "by_hand", changes)
    write_single_file(HERE / kind, tmp_path / "m.safetensors", FAMILIES[kind])
    found = weights_of(SingleFile.at(tmp_path / "m.safetensors"), [(tmp_path / "l.safetensors", 1.0)])
    expected = weights_of(Folder.at(by_hand), [])
    expected = {part: {name if part == "unet" or name.startswith("text") else f"text_model.{name}": w
                       for name, w in tensors.items()} for part, tensors in expected.items()}
    assert_same(found, expected)


NUMBERS = st.floats(-4, 4, width=32)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 9), st.none() | NUMBERS, NUMBERS, st.integers(0, 9)), max_size=3))
@settings(max_examples=8, phases=[Phase.generate])          # each example writes files
def test_several_loras_add_up(tmp_path_factory, given_loras):
    """W + sum of strength (alpha / r) B A, for any rank (also above the layer's), alpha and strength."""
    folder, tmp = HERE / "eps", tmp_path_factory.mktemp("loras")
    expected, loras = weights_of(Folder.at(folder), []), []
    for i, (r, alpha, strength, seed) in enumerate(given_loras):
        path = tmp / f"{i}.safetensors"
        changes = make(path, folder, KOHYA, ".lora_down.weight", ".lora_up.weight", r=r, alpha=alpha,
                       strength=strength, seed=seed)
        loras.append((path, strength))
        for part, functions in changes.items():
            for name, function in functions.items():
                expected[part][name] = function(expected[part][name])
    assert_same(weights_of(Folder.at(folder), loras), expected)


@pytest.mark.parametrize("said, scale", [
    ({"unet.lora_alpha": 6, "text_encoder.lora_alpha": 2}, {"unet": 3.0, "text_encoder": 1.0}),
    ({"lora_alpha": 6, "r": 2}, {"unet": 3.0, "text_encoder": 3.0}),
    ({"lora_alpha": 6, "use_rslora": True}, {"unet": 6 / 2**0.5, "text_encoder": 6 / 2**0.5}),
    ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"proj_in": 1, "attn1.to_q": 4}}, {"unet": 3.0, "proj_in": 0.5,
                                                                                     "to_q": 2.0}),
    ({}, {})])
@pytest.mark.parametrize("beside", [False, True])
def test_the_settings_of_peft(said, scale, beside, tmp_path):
    """In the file's header, or in adapter_config.json beside it."""
    path = tmp_path / ("adapter_model.safetensors" if beside else "l.safetensors")
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    make(path, HERE / "eps", PEFT, ".lora_A.weight", ".lora_B.weight",
         metadata=None if beside else {"lora_adapter_metadata": json.dumps(said)})
    plain, found = (weights_of(Folder.at(HERE / "eps"), loras) for loras in ([], [(path, 1.0)]))
    (tmp_path / "adapter_config.json").unlink(missing_ok=True)
    make(path, HERE / "eps", PEFT, ".lora_A.weight", ".lora_B.weight")
    alone = weights_of(Folder.at(HERE / "eps"), [(path, 1.0)])
    for part, layer in PEFT.values():
        name = weight_name(part, layer, HERE / "eps")
        expected = scale.get(layer.removesuffix(".0").split(".")[-1], scale.get(part, 1.0))
        np.testing.assert_allclose(found[part][name] - plain[part][name],
                                   expected * (alone[part][name] - plain[part][name]), atol=1e-12)


# --- refusals -----------------------------------------------------------------------------------------------

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
A, B = np.ones((2, 8), np.float32), np.ones((8, 2), np.float32)
BAD = {
    "another layer": ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": A}, "for another model"),
    "FLUX": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": A}, "for another model"),
    "a second text encoder": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A}, "another model"),
    "wide A": ({f"{Q}.lora_down.weight": np.ones((2, 9), np.float32), f"{Q}.lora_up.weight": B}, "another model"),
    "wide B": ({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": np.ones((9, 2), np.float32)}, "another model"),
    "two ranks": ({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": np.ones((8, 3), np.float32)}, "another model"),
    "transposed": ({f"{Q}.lora_down.weight": A.T.copy(), f"{Q}.lora_up.weight": B.T.copy()}, "another model"),
    "3x3 for a linear layer": ({f"{Q}.lora_down.weight": np.ones((2, 8, 3, 3), np.float32),
                                f"{Q}.lora_up.weight": np.ones((8, 2, 1, 1), np.float32)}, "another model"),
    "rank 0": ({f"{Q}.lora_down.weight": np.ones((0, 8), np.float32),
                f"{Q}.lora_up.weight": np.ones((8, 0), np.float32)}, "damaged"),
    "no axes": ({f"{Q}.lora_down.weight": np.ones((), np.float32), f"{Q}.lora_up.weight": B}, "damaged"),
    "no up": ({f"{Q}.lora_down.weight": A}, "not complete"), "alpha alone": ({f"{Q}.alpha": A[0, :1]}, "not complete"),
    "two alphas": ({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B, f"{Q}.alpha": A[0, :2]}, "alpha"),
    "alpha NaN": ({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B, f"{Q}.alpha": np.array(np.nan)}, "alpha"),
    "DoRA": ({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B, f"{Q}.dora_scale": A}, "no kind of LoRA"),
    "LoHa": ({f"{Q}.hada_w1_a": A}, "no kind of LoRA"), "LoKr": ({f"{Q}.lokr_w1": A}, "no kind of LoRA"),
    "Tucker": ({f"{Q}.lora_mid.weight": A}, "no kind of LoRA"), "bias": ({f"{Q}.diff_b": A}, "no kind of LoRA"),
    "integers": ({f"{Q}.lora_down.weight": A.astype(np.int32), f"{Q}.lora_up.weight": B}, "no kind of LoRA"),
    "a model": ({"conv_in.weight": A}, "no kind of LoRA"), "nothing": ({}, "holds no tensor"),
    "twice": ({f"{Q}.lora_down.weight": A, f"unet.{BLOCK}.transformer_blocks.0.attn1.to_q.lora_A.weight": A}, "twice"),
    "a new line": ({f"{Q}\n.lora_down.weight": A}, "no kind of LoRA"),
    "digits": ({f"lora_unet_input_blocks_{'9' * 5000}_1_proj_in.lora_down.weight": A}, "no kind of LoRA"),
    "fewer digits": ({f"lora_unet_input_blocks_{'9' * 200}_1_proj_in.lora_down.weight": A}, "another model"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_is_read(case, tmp_path, monkeypatch):
    tensors, why = BAD[case]
    save_file(tensors, tmp_path / "l.safetensors")
    monkeypatch.setattr("minidiff.pretrained.weights.Weights.tensor", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(UserError, match=why) as error:
        StableDiffusion.load(HERE / "eps", loras=[(tmp_path / "l.safetensors", 1.0)])
    assert "l.safetensors" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_alpha_may_be_a_whole_number(tmp_path):
    folder, loras = Folder.at(HERE / "eps"), []
    for dtype in (np.float16, np.int64):
        loras.append((tmp_path / f"{np.dtype(dtype)}.safetensors", 1.0))
        save_file({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B, f"{Q}.alpha": np.array(8, dtype)},
                  loras[-1][0])
    assert_same(*(weights_of(folder, [one]) for one in loras))


def test_sdxl_is_not_sd_1(tmp_path):
    make(tmp_path / "l.safetensors", HERE / "sdxl", SDXL, ".lora_down.weight", ".lora_up.weight")
    with pytest.raises(UserError, match="for another model"):
        StableDiffusion.load(HERE / "eps", loras=[(tmp_path / "l.safetensors", 1.0)])


@pytest.mark.parametrize("name, data", [("l.bin", pickle.dumps({"a": 1})), ("l.safetensors", pickle.dumps([0] * 99)),
                                        ("l.pt", b"PK\x03\x04" + bytes(99)), ("l.ckpt", b""), ("l.bin", b"what?")])
def test_a_pickle_is_not_opened(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="pickle.*convert it"):
        StableDiffusion.load(HERE / "eps", loras=[(tmp_path / name, 1.0)])


@pytest.mark.parametrize("strength", [np.nan, np.inf])
def test_a_strength_that_is_no_number(strength, tmp_path):
    make(tmp_path / "l.safetensors", HERE / "eps", KOHYA, ".lora_down.weight", ".lora_up.weight")
    with pytest.raises(UserError, match="strength"):
        StableDiffusion.load(HERE / "eps", loras=[(tmp_path / "l.safetensors", strength)])


@pytest.mark.parametrize("said", ["{", "[1]", '{"lora_alpha": "8"}', '{"lora_alpha": 1e999}', '{"use_rslora": 1}',
                                  '{"alpha_pattern": {"proj_in": []}}', '{"alpha_pattern": {"to_(q|k)": 1}}',
                                  json.dumps({"alpha_pattern": {".?" * 60 + "X": 1}})])
def test_settings_that_are_none(said, tmp_path):
    make(tmp_path / "l.safetensors", HERE / "eps", PEFT, ".lora_A.weight", ".lora_B.weight",
         metadata={"lora_adapter_metadata": said})
    with pytest.raises(UserError, match="l.safetensors"):
        StableDiffusion.load(HERE / "eps", loras=[(tmp_path / "l.safetensors", 1.0)])


@pytest.mark.parametrize("name", ["alpha_pattern", "unet.alpha_pattern"])
def test_more_layers_than_any_model_has_are_refused_at_once(name, tmp_path):
    """Each was looked up for each layer."""
    for count, refused in ((5000, False), (5001, True)):
        said = json.dumps({name: {f"layer{i}": 1 for i in range(count)}})
        make(tmp_path / "l.safetensors", HERE / "eps", PEFT, ".lora_A.weight", ".lora_B.weight",
             metadata={"lora_adapter_metadata": said})
        if refused:
            with pytest.raises(UserError, match="alpha_pattern names 5,001 layers, and at most 5,000 are read.$"):
                lora.settings_of(tmp_path / "l.safetensors")
        else:
            lora.settings_of(tmp_path / "l.safetensors")


def test_a_shape_of_many_huge_lengths_is_refused_at_once(tmp_path):
    """Their product took 20 seconds."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**62] * 20_000, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "l.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    begin = time.thread_time()
    with pytest.raises(UserError, match="l.safetensors is damaged: the size of 'a' is not that of its shape"):
        entries(tmp_path / "l.safetensors")
    assert time.thread_time() - begin < 0.5


def test_an_alpha_of_no_numbers_and_an_impossible_length(tmp_path):
    """NumPy multiplies the lengths beside a 0 as well, and found the array too big."""
    save_file({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B, f"{Q}.alpha": np.zeros((0, 7), np.float32)},
              tmp_path / "l.safetensors")
    data = (tmp_path / "l.safetensors").read_bytes()
    assert data.count(b"[0,7]") == 1
    header = data[8:8 + int.from_bytes(data[:8], "little")].replace(b"[0,7]", b"[0,%d]" % 2**62)
    header = header.rstrip()
    (tmp_path / "l.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[
        8 + int.from_bytes(data[:8], "little"):])
    with pytest.raises(UserError, match="l.safetensors is damaged"):
        StableDiffusion.load(HERE / "eps", loras=[(tmp_path / "l.safetensors", 1.0)])


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_nan_in_a_matrix_is_the_loras_fault(value, tmp_path):
    save_file({f"{Q}.lora_down.weight": A * np.float32(value), f"{Q}.lora_up.weight": 9 * B},
              tmp_path / "l.safetensors")
    with pytest.raises(UserError, match="l.safetensors is damaged"):
        StableDiffusion.load(HERE / "eps", loras=[(tmp_path / "l.safetensors", 1.0)])

"""What the config.json of a UNet, an autoencoder and a text encoder may say: each setting is honoured or refused.

SETTINGS has for each network and values one of these:

    EQUAL      the outputs are those of diffusers and transformers, to 1e-4 (tests/pretrained/network_settings.npz, made
               with diffusers 0.42.1 and transformers 5.24.0)
    "..."      UserError with these words

LEFT_OUT is a key that the file does not have.  Weights are drawn by their names, so that only their shapes are kept.
"""

import json
import zlib
from enum import Enum
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from minidiff.engine.tensor import Tensor, no_grad
from minidiff.pretrained import agreement
from minidiff.pretrained.autoencoder import Autoencoder
from minidiff.pretrained.clip_text import ClipTextEncoder
from minidiff.pretrained.config import Config
from minidiff.pretrained.unet import UNet
from minidiff.pretrained.weights import Weights, entries

EQUAL, LEFT_OUT = Enum("Mark", ["EQUAL", "LEFT_OUT"])
PARTS = ("unet", "vae", "text_encoder")
CROSS = ["CrossAttnDownBlock2D"] * 2, ["CrossAttnUpBlock2D"] * 2
BASE = {
    "unet": {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16],
             "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "layers_per_block": 1,
             "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 2, "norm_num_groups": 4,
             "cross_attention_dim": 16},
    "vae": {"in_channels": 3, "out_channels": 3, "block_out_channels": [8, 12], "layers_per_block": 1,
            "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 4, "latent_channels": 4},
    "text_encoder": {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
                     "num_attention_heads": 2, "max_position_embeddings": 9, "bos_token_id": 38, "eos_token_id": 39}}
BOTH = {"down_block_types": CROSS[0], "up_block_types": CROSS[1]}
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 44}
DEPTH, REVERSE = "transformer_layers_per_block", "reverse_transformer_layers_per_block"


def levels(count: int) -> dict:
    return {"block_out_channels": [8, 12, 16][:count], "down_block_types": ["DownEncoderBlock2D"] * count,
            "up_block_types": ["UpDecoderBlock2D"] * count}


SETTINGS: list[tuple[str, dict, object]] = [
    *(("unet", options, EQUAL) for options in (
        {}, {"in_channels": 9}, {"sample_size": 5}, {"dropout": 0.1}, {"upcast_attention": True},
        {"block_out_channels": [8], "down_block_types": CROSS[0][:1], "up_block_types": CROSS[1][:1]},
        {"block_out_channels": [8, 12, 16], "down_block_types": ["DownBlock2D", *CROSS[0]],
         "up_block_types": [*CROSS[1], "UpBlock2D"], "attention_head_dim": [2, 1, 4]},
        {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": CROSS[1]},
        {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
         "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        {"layers_per_block": 2}, {"layers_per_block": [1, 2]}, {"layers_per_block": [2, 1]},
        {"layers_per_block": LEFT_OUT}, {"norm_num_groups": 2}, {"norm_eps": 1e-3}, {"attention_head_dim": 4},
        {"attention_head_dim": [1, 4]}, {"attention_head_dim": [4, 1]}, {"attention_head_dim": 3},
        {"attention_head_dim": LEFT_OUT}, {"norm_num_groups": LEFT_OUT, "block_out_channels": [32, 32]},
        BOTH | {DEPTH: 2}, BOTH | {DEPTH: [2, 1]}, BOTH | {DEPTH: [1, 3]}, BOTH | {DEPTH: [1, 0]}, BOTH | {DEPTH: 0},
        BOTH | {DEPTH: [[2], [1]], REVERSE: [[1, 2], [0, 2]]}, BOTH | {DEPTH: [1, 2], REVERSE: [1, [2, 1]]},
        BOTH | {DEPTH: [[2, 1], 1], REVERSE: [3, [1, 2, 1]], "layers_per_block": [2, 1]}, {DEPTH: [2, 0]},
        {"mid_block_type": None}, {"mid_block_type": "UNetMidBlock2D"}, BOTH | {"mid_block_type": None},
        {"flip_sin_to_cos": False}, {"freq_shift": 1}, {"use_linear_projection": True}, {"time_embedding_dim": 20},
        {"time_cond_proj_dim": 6}, {"cross_attention_dim": [16, 16]}, {"only_cross_attention": [False, False]},
        {"mid_block_only_cross_attention": True}, {"projection_class_embeddings_input_dim": 12},
        SDXL, SDXL | {"addition_time_embed_dim": 6, "projection_class_embeddings_input_dim": 56, "freq_shift": 1},
        SDXL | {"flip_sin_to_cos": False, "addition_embed_type_num_heads": 3} | BOTH | {DEPTH: [1, 2]},
        SDXL | {"in_channels": 9, "use_linear_projection": True, "attention_head_dim": [2, 4]})),
    *(("unet", options, words) for options, words in (
        ({"center_input_sample": True}, "center_input_sample is True"), ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"only_cross_attention": True}, "only_cross_attention is True"),
        ({"only_cross_attention": [True, False]}, r"only_cross_attention is \[True"),
        ({"downsample_padding": 0}, "downsample_padding is 0"), ({"mid_block_scale_factor": 2}, "_scale_factor is 2"),
        ({"encoder_hid_dim": 12}, "encoder_hid_dim is '12'"), ({"encoder_hid_dim_type": "text_proj"}, "dim_type is"),
        ({"dual_cross_attention": True}, "dual_cross_attention is True"), ({"num_class_embeds": 4}, "class_embeds is"),
        ({"class_embed_type": "timestep"}, "class_embed_type is"), ({"addition_embed_type": "text"}, "_embed_type is"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is 'scale_shift'"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act is"), ({"resnet_out_scale_factor": 1.4}, "factor is 1"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is"), ({"time_embedding_act_fn": "silu"}, "_fn is"),
        ({"timestep_post_act": "silu"}, "timestep_post_act is"), ({"conv_in_kernel": 5}, "conv_in_kernel is 5"),
        ({"conv_out_kernel": 1}, "conv_out_kernel is 1"), ({"attention_type": "gated"}, "attention_type is 'gated'"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat is"), ({"cross_attention_norm": "group_norm"},
                                                                            "cross_attention_norm is"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type is 'UNetMidBlock2DSimple"),
        ({"mid_block_type": ["UNetMidBlock2D"]}, "mid_block_type is"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]}, "down_block_types has 'AttnDownBlock2D'"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "UpBlock2D"]}, "down_block_types has 'UpBlock2D'"),
        ({"up_block_types": ["SimpleCrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}, "up_block_types has 'SimpleCross"),
        ({"up_block_types": ["DownBlock2D", "CrossAttnUpBlock2D"]}, "up_block_types has 'DownBlock2D'"),
        ({"down_block_types": LEFT_OUT}, "down_block_types takes 1 to 16 strings"),
        (BOTH | {DEPTH: [[2], [1]]}, f"{REVERSE} is not given"), (BOTH | {DEPTH: [[1, 1], [1]]}, f"{DEPTH} takes"),
        (BOTH | {DEPTH: [1, 1, 1]}, f"{DEPTH} takes"), (BOTH | {DEPTH: [1.5, 1]}, f"{DEPTH} takes"),
        (BOTH | {REVERSE: [1, [1]]}, f"{REVERSE} takes"), ({"layers_per_block": [1]}, "layers_per_block takes"),
        *(({"layers_per_block": n}, "layers_per_block takes 1 to 64") for n in (0, [1, 0], [0, 1], 65, 1 << 19)),
        ({"sample_size": [8, 8]}, "sample_size takes"), ({"_class_name": "UNetMotionModel"}, "_class_name is"))),
    *(("vae", options, EQUAL) for options in (
        {}, {"layers_per_block": 2}, {"layers_per_block": LEFT_OUT}, levels(1), levels(3), {"norm_num_groups": 2},
        {"norm_num_groups": LEFT_OUT, "block_out_channels": [32, 32]}, {"mid_block_add_attention": False},
        {"use_quant_conv": False}, {"use_post_quant_conv": False}, {"force_upcast": False}, {"sample_size": 5},
        {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False})),
    *(("vae", options, words) for options, words in (
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"), ({"latents_mean": [0.1] * 4}, "latents_mean is"),
        ({"latents_std": [2.0] * 4}, "latents_std is"), ({"scaling_factor": -1.0}, "scaling_factor takes"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types has 'AttnDown"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "up_block_types has 'AttnUp"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "_class_name is"))),
    *(("text_encoder", options, EQUAL) for options in (
        {}, {"hidden_act": "gelu"}, {"num_attention_heads": 4}, {"num_attention_heads": LEFT_OUT},
        {"num_hidden_layers": 1}, {"num_hidden_layers": LEFT_OUT}, {"layer_norm_eps": 1e-3}, {"intermediate_size": 10},
        {"eos_token_id": 2}, {"eos_token_id": 7}, {"eos_token_id": LEFT_OUT}, {"attention_dropout": 0.1},
        {"pad_token_id": 0}, {"projection_dim": 20}, {"projection_dim": 20, "eos_token_id": 2}, {"vocab_size": 50})),
    *(("text_encoder", options, words) for options, words in (
        ({"hidden_act": "relu"}, "hidden_act 'relu' is unknown"), ({"eos_token_id": [1, 2]}, "eos_token_id takes"),
        ({"use_attention_mask": True}, "use_attention_mask is True"), ({"model_type": "t5"}, "model_type is 't5'")))]
IDS = np.array([[38, 5, 2, 11, 7, 39, 39, 39, 39], [38, 39, 0, 0, 0, 0, 0, 0, 0], [38, 3, 9, 7, 12, 13, 2, 6, 39]])


def named(part: str, options: dict) -> str:
    return f"{part} {json.dumps({key: 'LEFT_OUT' if value is LEFT_OUT else value for key, value in options.items()})}"


def config_of(part: str, options: dict) -> dict:
    return {key: value for key, value in (BASE[part] | options).items() if value is not LEFT_OUT}


def numbers(part: str, options: dict) -> dict[str, np.ndarray]:
    """What the network is given."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)
    if part == "text_encoder":
        return {"ids": IDS}
    if part == "vae":
        f = 2 ** (len((BASE[part] | options)["down_block_types"]) - 1)
        return {"image": normal(1, 3 * f, 2 * f, 3).clip(-1, 1), "z": normal(1, 3, 2, 4)}
    return {"z": normal(2, 5, 6, (BASE[part] | options)["in_channels"]), "t": np.array([17.0, 801.0]),
            "tau": normal(2, 7, 16), "pooled": normal(2, 20), "sizes": np.array([[48.0, 64, 0, 0, 48, 64]] * 2)}


def drawn(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Random weights of about the size of trained ones; each by its own name and shape."""
    def one(name: str, shape) -> np.ndarray:
        a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        if len(shape) == 1:                                 # biases, and norms' scales about 1
            return 0.1 * a + np.float32("norm" in name and "weight" in name)
        return a * np.float32(0.3 if "embedding" in name else 1.2 / np.prod(shape[1:]) ** 0.5)
    return {name: one(name, tuple(shape)) for name, shape in shapes.items()}


def joined(*arrays) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in arrays])


def ours(part: str, options: dict, shapes: dict[str, list[int]], folder: Path) -> np.ndarray:
    """Our network's outputs, one after the other."""
    save_file(drawn(shapes), folder / "w.safetensors")
    weights = Weights(entries(folder / "w.safetensors"), part)
    config, given = Config(config_of(part, options), "config.json"), numbers(part, options)
    with no_grad():
        if part == "text_encoder":
            states = ClipTextEncoder(config, weights)(given["ids"])
            return joined(*(a.data for a in (states.last, states.penultimate, states.pooled, states.embedding)
                            if a is not None))
        if part == "vae":
            agreement.check_vae(config, weights)
            vae = Autoencoder(config, weights)
            return joined(*(a.data for a in (*vae.encode(Tensor(given["image"])), vae.decode(Tensor(given["z"])))))
        agreement.check_unet(config, weights)
        unet = UNet(config, weights)
        more = (Tensor(given["pooled"]), given["sizes"]) if unet.extra else (None, None)
        return joined(unet(Tensor(given["z"]), given["t"], Tensor(given["tau"]), *more, 3.5).data)

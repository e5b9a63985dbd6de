"""Whether a checkpoint agrees with itself: what its configurations say, the shapes of its tensors, and its parts.

The networks take their widths from the tensors, so a configuration that says something else would go unnoticed; and
parts of two checkpoints would fail only when they meet, after minutes.  All of this is asked of shapes alone, before a
weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minidiff.errors import UserError
from minidiff.pretrained.clip_tokenizer import ClipTokenizer
from minidiff.pretrained.config import Config
from minidiff.pretrained.weights import Weights

LATENT = 4                                                  # channels of the latents of these families
MOST_LATENTS = 512                                          # of a picture's side, in sample_size


def check(configs: Mapping[str, Config], parts: Mapping[str, Weights], tokenizers: Sequence[ClipTokenizer]) -> None:
    """UserError, which names the configuration or the parts, where something contradicts something else.

    configs, parts: unet, vae and the text encoders; tokenizers: of the text encoders, in their order.
    """
    text = [part for part in parts if part.startswith("text_encoder")]
    check_unet(configs["unet"], parts["unet"])
    check_vae(configs["vae"], parts["vae"])
    for part, tokenizer in zip(text, tokenizers, strict=True):
        check_text(configs[part], parts[part], tokenizer)
    if len({tokenizer.length for tokenizer in tokenizers}) > 1:
        raise UserError(f"{parts['unet'].source} has tokenizers of {' and '.join(str(t.length) for t in tokenizers)} "
                        "tokens, whose states do not fit side by side.")
    check_latents(parts["unet"], parts["vae"])
    check_prompt(configs["unet"], parts["unet"], [parts[part] for part in text])


# --- a configuration and its tensors ----------------------------------------------------------------------------

def check_unet(config: Config, weights: Weights) -> None:
    levels = len(config.texts("down_block_types"))
    equal(config, "in_channels", weights, "conv_in.weight", 1)
    equal(config, "out_channels", weights, "conv_out.weight", 0)
    equal_widths(config, weights, "down_blocks", levels)
    for name in cross_keys(weights):
        if type(config.values.get("cross_attention_dim")) is not list:              # a list is one for each level
            equal(config, "cross_attention_dim", weights, name, 1)
    if "add_embedding" in weights:
        equal(config, "projection_class_embeddings_input_dim", weights, "add_embedding.linear_1.weight", 1)
    if (config.values.get("addition_embed_type") is not None) != ("add_embedding" in weights) and \
            "addition_embed_type" in config.values:
        raise UserError(f"{config.path}: addition_embed_type is {config.values['addition_embed_type']!r}, and the "
                        f"tensors have {'an' if 'add_embedding' in weights else 'no'} add_embedding.")
    if not 1 <= config.whole("sample_size", 64) <= MOST_LATENTS:
        raise UserError(f"{config.path}: sample_size takes a whole number within 1..{MOST_LATENTS}, not "
                        f"{config.whole('sample_size')}.")
    config.positive("norm_eps", 1e-5)
    width = axis(weights, "time_embedding.linear_1.weight", 1)
    if width != axis(weights, "conv_in.weight", 0):
        raise UserError(f"{weights.source} embeds times in {width} numbers, and its first layer has "
                        f"{axis(weights, 'conv_in.weight', 0)} channels: they must be equally many.")
    half = width // 2
    if not 0 <= config.number("freq_shift", 0) < half:
        raise UserError(f"{config.path}: freq_shift takes a number from 0 to below {half}, not "
                        f"{config.number('freq_shift'):g}.")


def check_vae(config: Config, weights: Weights) -> None:
    levels = len(config.texts("down_block_types"))
    if len(config.texts("up_block_types")) != levels:
        raise UserError(f"{config.path}: down_block_types and up_block_types must be equally many.")
    for name, tensor, i in (("in_channels", "encoder.conv_in.weight", 1),
                            ("out_channels", "decoder.conv_out.weight", 0)):
        equal(config, name, weights, tensor, i)
        if axis(weights, tensor, i) != 3:
            raise UserError(f"{weights.source} is for pictures of {axis(weights, tensor, i)} channels, and minidiff "
                            "has those of 3.")
    equal(config, "latent_channels", weights, "decoder.conv_in.weight", 1)
    equal_widths(config, weights, "encoder.down_blocks", levels)
    for name in ("quant_conv", "post_quant_conv"):
        if config.flag(f"use_{name}", True) != (name in weights):
            raise UserError(f"{config.path}: use_{name} is {str(name not in weights).lower()}, and the tensors "
                            f"{'have' if name in weights else 'lack'} {name}.")
    config.positive("scaling_factor", 0.18215)


def check_text(config: Config, weights: Weights, tokenizer: ClipTokenizer) -> None:
    body = weights.part("text_model") if "text_model" in weights else weights
    table, position = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
    equal(config, "vocab_size", body, table, 0)
    equal(config, "hidden_size", body, table, 1)
    equal(config, "max_position_embeddings", body, position, 0)
    equal(config, "intermediate_size", body, "encoder.layers.0.mlp.fc1.weight", 0)
    if "text_projection" in weights:
        equal(config, "projection_dim", weights, "text_projection.weight",
              0 if not weights.transposed("text_projection.weight") else 1)
    config.positive("layer_norm_eps", 1e-5)
    ids, known = 1 + tokenizer.largest, axis(body, table, 0)
    if ids > known:
        raise UserError(f"{weights.source} knows {known} tokens, and its tokenizer has ids up to {ids - 1}: they are "
                        "of different checkpoints.")
    if tokenizer.length > axis(body, position, 0):
        raise UserError(f"{weights.source} has {axis(body, position, 0)} positions, and its tokenizer makes "
                        f"{tokenizer.length} tokens of a prompt: they are of different checkpoints.")


# --- parts that work together -----------------------------------------------------------------------------------

def check_latents(unet: Weights, vae: Weights) -> None:
    """The UNet takes and gives the autoencoder's latents; one for in-painting takes a mask and a second picture too."""
    latent = axis(vae, "decoder.conv_in.weight", 1)
    sees, gives = axis(unet, "conv_in.weight", 1), axis(unet, "conv_out.weight", 0)
    if latent != LATENT:
        raise UserError(f"{vae.source} has latents of {latent} channels, and Stable Diffusion 1, 2 and SDXL have "
                        f"{LATENT}.")
    if gives != latent or sees not in (latent, 2 * latent + 1):
        raise UserError(f"{unet.source} takes {sees} channels and gives {gives}, and its autoencoder's latents have "
                        f"{latent}: it takes {latent} or, for in-painting, {2 * latent + 1}, and gives {latent}.")


def check_prompt(config: Config, unet: Weights, text: Sequence[Weights]) -> None:
    """The UNet reads what the text encoders give, side by side; SDXL's also reads the pooled state and six sizes."""
    widths = [axis(weights, f"{'text_model.' if 'text_model' in weights else ''}final_layer_norm.weight", 0)
              for weights in text]
    for name in cross_keys(unet):
        if axis(unet, name, 1) != sum(widths):
            raise UserError(f"{unet.source} reads prompts of {axis(unet, name, 1)} numbers a token, and its text "
                            f"encoders give {' + '.join(map(str, widths))}: they are of different checkpoints.")
    if ("add_embedding" in unet) != (len(text) == 2):
        raise UserError(f"{unet.source} has {'an' if 'add_embedding' in unet else 'no'} add_embedding, and the model "
                        f"{len(text)} text encoder{'s'[:len(text) > 1]}: SDXL alone has one, and two encoders.")
    if "add_embedding" in unet:
        if "text_projection" not in text[-1]:
            raise UserError(f"{text[-1].source} lacks the tensor 'text_projection.weight', which SDXL reads.")
        pooled = text[-1].shape("text_projection.weight")[text[-1].transposed("text_projection.weight")]
        takes, dim = axis(unet, "add_embedding.linear_1.weight", 1), config.whole("addition_time_embed_dim", 256)
        if takes != pooled + 6 * dim:
            raise UserError(f"{config.path}: addition_time_embed_dim is {dim}, and six times as many with the {pooled} "
                            f"numbers of the prompt are not the {takes} that add_embedding takes.")


# --- shapes -----------------------------------------------------------------------------------------------------

def axis(weights: Weights, name: str, i: int) -> int:
    shape = weights.shape(name)
    if len(shape) <= i:
        raise UserError(f"{weights.source} holds the tensor {weights.prefix + name!r} in shape {shape}: it takes more "
                        "axes.")
    return shape[i]


def equal(config: Config, key: str, weights: Weights, name: str, i: int) -> None:
    """UserError where the configuration gives this number and axis i of the tensor is another."""
    found = axis(weights, name, i)
    if config.values.get(key) is not None and config.whole(key) != found:
        raise UserError(f"{config.path}: {key} is {config.whole(key)}, and the tensor {weights.prefix + name!r} has "
                        f"{found} there.")


def equal_widths(config: Config, weights: Weights, blocks: str, levels: int) -> None:
    """UserError where block_out_channels are given and are not the widths of the levels."""
    if config.values.get("block_out_channels") is None:
        return
    given = config.wholes("block_out_channels", levels)
    for i, width in enumerate(given):
        name = f"{blocks}.{i}.resnets.0.conv1.weight"
        if name in weights and axis(weights, name, 0) != width:
            raise UserError(f"{config.path}: block_out_channels are {list(given)}, and the tensor {name!r} has "
                            f"{axis(weights, name, 0)} there.")


def cross_keys(unet: Weights) -> list[str]:
    """The names of the tensors by which the UNet reads the prompt."""
    return [name for name in unet.tensors if name.endswith("attn2.to_k.weight")]

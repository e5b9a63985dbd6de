"""Stable Diffusion's networks at their full sizes, with random weights, against diffusers and transformers.

It takes 16 GB of memory, 12 GB of disk and minutes: the two libraries compute after each other, from the same files.
"""

import gc

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from minidiff.engine.tensor import Tensor, no_grad  # noqa: E402
from minidiff.pretrained.autoencoder import Autoencoder  # noqa: E402
from minidiff.pretrained.clip_text import ClipTextEncoder  # noqa: E402
from minidiff.pretrained.config import Config  # noqa: E402
from minidiff.pretrained.unet import UNet  # noqa: E402
from minidiff.pretrained.weights import Weights, entries  # noqa: E402

pytestmark = pytest.mark.slow

SD1 = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
SD2 = SD1 | dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
                 use_linear_projection=True)
SDXL = dict(sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20], use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10], addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
VAE = dict(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
           up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, sample_size=512)
TEXT = {
    "SD 1": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                 hidden_act="quick_gelu"),
    "SD 2": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
                 hidden_act="gelu"),
    "SDXL's second": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                          hidden_act="gelu", projection_dim=1280),
}


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def saved(build, folder):
    """A network with PyTorch's random weights, and its configuration and tensors as minidiff reads them."""
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(folder, max_shard_size="100GB")
    file = next(folder.glob("*.safetensors"))
    return model, Config.load(folder / "config.json"), Weights(entries(file), str(folder))


@pytest.mark.parametrize("config", [SD1, SD2, SDXL], ids=["SD 1.5", "SD 2.1", "SDXL"])
def test_a_unet(config, tmp_path):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 24, 16, 4), dtype=np.float32)
    text = rng.standard_normal((2, 77, config["cross_attention_dim"]), dtype=np.float32)
    t, extra, added = np.array([17, 801]), (), {}
    if config is SDXL:
        sizes = np.tile(np.float32([192, 128, 0, 0, 192, 128]), (2, 1))
        extra = rng.standard_normal((2, 1280), dtype=np.float32), sizes
        added = {"added_cond_kwargs": {"text_embeds": torch.tensor(extra[0]), "time_ids": torch.tensor(extra[1])}}
    model, own, weights = saved(lambda: diffusers.UNet2DConditionModel(**config), tmp_path)
    with torch.no_grad():
        wanted = model(torch.tensor(z.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(text), **added).sample
    wanted = wanted.numpy().transpose(0, 2, 3, 1)
    del model
    gc.collect()
    extra = (Tensor(extra[0]), extra[1]) if extra else ()
    with no_grad():
        close(UNet(own, weights)(Tensor(z), t, Tensor(text), *extra).data, wanted)


def test_a_decoding_and_an_encoding(tmp_path):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((1, 32, 24, 4), dtype=np.float32)
    x = rng.uniform(-1, 1, (1, 256, 192, 3)).astype(np.float32)
    model, own, weights = saved(lambda: diffusers.AutoencoderKL(**VAE), tmp_path)
    with torch.no_grad():
        decoded = model.decode(torch.tensor(z.transpose(0, 3, 1, 2))).sample.numpy().transpose(0, 2, 3, 1)
        mean = model.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latent_dist.mean.numpy().transpose(0, 2, 3, 1)
    network = Autoencoder(own, weights)
    with no_grad():
        close(network.decode(Tensor(z)).data, decoded)
        close(network.encode(Tensor(x))[0].data, mean)


@pytest.mark.parametrize("config", TEXT.values(), ids=TEXT)
def test_a_text_encoder(config, tmp_path):
    config = dict(vocab_size=49408, bos_token_id=49406, eos_token_id=49407) | config
    second = "projection_dim" in config
    kind = transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel
    ids = np.random.default_rng(0).integers(0, 49405, (2, 77))
    ids[:, 0], ids[0, 9:], ids[1, 76] = 49406, 49407, 49407
    model, own, weights = saved(lambda: kind(transformers.CLIPTextConfig(**config)), tmp_path)
    with torch.no_grad():
        wanted = model(torch.tensor(ids), output_hidden_states=True)
    states = ClipTextEncoder(own, weights)(ids)
    close(states.last.data, wanted.last_hidden_state.numpy())
    close(states.penultimate.data, wanted.hidden_states[-2].numpy())
    if second:
        close(states.embedding.data, wanted.text_embeds.numpy())

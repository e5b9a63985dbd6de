"""The names of a checkpoint in one file, as diffusers converts them."""

from pathlib import Path

import numpy as np
import pytest
from support.original_names import write_single_file

pytest.importorskip("torch")
conversion = pytest.importorskip("diffusers.loaders.single_file_utils")

HERE = Path(__file__).parents[1] / "pretrained" / "checkpoints"


@pytest.mark.parametrize("kind, family", [("eps", "SD 1"), ("v", "SD 2"), ("sdxl", "SDXL")])
def test_diffusers_reads_the_same_tensors_from_the_original_names(kind, family, tmp_path):
    import json

    from safetensors.torch import load_file
    write_single_file(HERE / kind, tmp_path / "m.safetensors", family)
    converters = {"unet": conversion.convert_ldm_unet_checkpoint, "vae": conversion.convert_ldm_vae_checkpoint}
    for part, convert in converters.items():
        config = json.loads((HERE / kind / part / "config.json").read_text(encoding="utf-8"))
        found = convert(load_file(tmp_path / "m.safetensors"), config)
        expected = load_file(HERE / kind / part / "diffusion_pytorch_model.safetensors")
        assert found.keys() == expected.keys()
        for name, a in expected.items():
            assert np.array_equal(found[name].reshape(a.shape), a), name


def test_a_network_that_reads_the_scale(tmp_path):
    """A latent consistency model's UNet, told the scale as diffusers' pipeline tells it."""
    import json
    import shutil

    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from minidiff.engine.tensor import Tensor
    from minidiff.systems.stable_diffusion import StableDiffusion
    shutil.copytree(HERE / "eps", tmp_path / "m")
    config = json.loads((HERE / "eps" / "unet" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 6}).eval()
    shutil.rmtree(tmp_path / "m" / "unet")
    theirs.save_pretrained(tmp_path / "m" / "unet")
    ours = StableDiffusion.load(tmp_path / "m", dtype=np.float64).unet
    rng = np.random.default_rng(1)
    z, text = rng.normal(size=(2, 5, 6, 4)), rng.normal(size=(2, 77, 16))
    for scale in (1.0, 1.5, 8.0):
        embed = StableDiffusionPipeline.get_guidance_scale_embedding
        w = embed(None, torch.tensor([scale - 1.0] * 2, dtype=torch.float64), 6, torch.float64)
        with torch.no_grad():
            expected = theirs.double()(torch.tensor(z).permute(0, 3, 1, 2), 321, torch.tensor(text),
                                       timestep_cond=w).sample.permute(0, 2, 3, 1).numpy()
        found = ours(Tensor(z), np.array([321.0, 321.0]), Tensor(text), None, None, scale).data
        # PyTorch's frequencies of the time are float32
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()

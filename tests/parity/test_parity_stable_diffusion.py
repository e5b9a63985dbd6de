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

"""LoRA and textual inversion give the weights and token ids that diffusers and peft make of the same files."""

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the others' programs are PyTorch's: pip install torch diffusers peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

HERE = Path(__file__).parents[1] / "pretrained"
sys.path.insert(0, str(HERE))

from test_lora import KOHYA, OLD, PEFT, SDXL, make, weights_of  # noqa: E402
from test_textual_inversion import vectors_for, write  # noqa: E402

from minidiff.pretrained.checkpoints import Folder  # noqa: E402
from minidiff.systems.stable_diffusion import StableDiffusion  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CHECKPOINTS = HERE / "checkpoints"
ATTENTION = {name: place for name, place in OLD.items() if name.startswith("unet")}
# diffusers does not read all layers of kohya's files, and of these names it leaves out some in silence
CASES = {"peft": ("eps", PEFT, ".lora_A.weight", ".lora_B.weight", None),
         "formerly": ("eps", ATTENTION, "_lora.down.weight", "_lora.up.weight", None),
         "kohya": ("eps", {name: place for name, place in KOHYA.items() if "conv_in" not in name}, ".lora_down.weight",
                   ".lora_up.weight", 5.0),
         "kohya, SDXL": ("sdxl", {name: place for name, place in SDXL.items()
                                  if name.startswith("lora_") and ("layers" in name or "attn" in name)},
                         ".lora_down.weight", ".lora_up.weight", 5.0)}


def pipeline(kind: str):
    """diffusers' pipeline of a tiny checkpoint, put together from its parts."""
    folder, second = CHECKPOINTS / kind, kind == "sdxl"
    parts = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
             "text_encoder": transformers.CLIPTextModel, "tokenizer": transformers.CLIPTokenizer,
             "scheduler": diffusers.DDIMScheduler}
    if second:
        parts |= {"text_encoder_2": transformers.CLIPTextModelWithProjection,
                  "tokenizer_2": transformers.CLIPTokenizer}
    made = {name: cls.from_pretrained(folder / name) for name, cls in parts.items()}
    if second:
        return diffusers.StableDiffusionXLPipeline(**made).to(torch.float32)
    return diffusers.StableDiffusionPipeline(**made, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False).to(torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_the_weights_of_a_merged_lora(case, tmp_path):
    kind, places, down, up, alpha = CASES[case]
    make(tmp_path / "l.safetensors", CHECKPOINTS / kind, places, down, up, r=3, alpha=alpha)
    pipe = pipeline(kind)
    pipe.load_lora_weights(tmp_path, weight_name="l.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    plain = weights_of(Folder.at(CHECKPOINTS / kind), [])
    found = weights_of(Folder.at(CHECKPOINTS / kind), [(tmp_path / "l.safetensors", 0.7)])
    for part, tensors in found.items():
        expected = {name.removeprefix("text_model."): w.numpy() for name, w in getattr(pipe, part).state_dict().items()}
        for name, w in tensors.items():
            np.testing.assert_allclose(w, expected[name.removeprefix("text_model.")], atol=1e-5, err_msg=name)
    changed = {part: sum(not np.array_equal(w, plain[part][name]) for name, w in tensors.items())
               for part, tensors in found.items()}
    assert sum(changed.values()) == len(places)


@pytest.mark.parametrize("n", [1, 3])
def test_the_states_of_a_placeholder(n, tmp_path):
    path = write(tmp_path / "e.safetensors", vectors_for("eps", n))
    pipe, ours = pipeline("eps"), StableDiffusion.load(CHECKPOINTS / "eps", embeddings={"<cat-toy>": path})
    pipe.load_textual_inversion(str(path))
    # where a letter's case differs, diffusers takes only the first of several vectors
    for text in ("a photo of <cat-toy>", "red<cat-toy>cube", "<Cat-toy>!" if n == 1 else "<cat-toy>!"):
        expected = pipe.encode_prompt(text, "cpu", 1, False)[0].detach().numpy()
        np.testing.assert_allclose(ours.encode_text([text], (32, 32))[0], expected, atol=1e-4)

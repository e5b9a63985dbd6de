"""Whole runs of tiny pipelines, from prompt, picture and mask to the picture, by their own samplers.

CHECKPOINTS are those of tests/pretrained/checkpoints; ODD are others, of which only the shapes of the weights are kept
(support/network_settings.py draws them), with settings that are rare: heads and depths for each level, other middles,
autoencoders of two and three levels, other ends of the text, in-painting with SDXL, a latent consistency model.

What diffusers makes of the same: tests/parity/test_parity_whole_pipelines.py, tests/pretrained/whole_pipelines.npz.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from support.given_noise import GivenNoise
from support.network_settings import BASE, BOTH, DEPTH, REVERSE, drawn, levels

from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parents[1] / "pretrained" / "checkpoints"
CHECKPOINTS = ("eps", "v", "sdxl", "inpaint")
VOCAB = len(json.loads((HERE / "eps" / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
         "text_encoder_2": "model"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TEXT = BASE["text_encoder"] | {"vocab_size": VOCAB, "max_position_embeddings": 77, "eos_token_id": VOCAB - 1}
SECOND = TEXT | {"hidden_size": 24, "num_attention_heads": 3, "projection_dim": 20, "hidden_act": "gelu"}
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "cross_attention_dim": 40,
        "projection_class_embeddings_input_dim": 44}
ODD = {                                                     # parts, each with what differs from BASE; the scheduler
    "narrow": {"unet": {"layers_per_block": [1, 2], "attention_head_dim": [4, 1], "mid_block_type": None},
               "vae": {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.5},
               "text_encoder": TEXT | {"hidden_act": "gelu", "num_hidden_layers": 1},
               "scheduler": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1} | BETAS},
    "distilled sdxl": {"unet": SDXL | BOTH | {DEPTH: [0, [2]], REVERSE: [[1, 2], 1], "use_linear_projection": True,
                                              "mid_block_type": "UNetMidBlock2D"},
                       "vae": levels(3) | {"mid_block_add_attention": False, "scaling_factor": 0.13025},
                       "text_encoder": TEXT | {"num_attention_heads": 4},
                       "text_encoder_2": SECOND | {"eos_token_id": 2},
                       "scheduler": {"_class_name": "EulerAncestralDiscreteScheduler",
                                     "timestep_spacing": "trailing"} | BETAS},
    "v in-painting": {"unet": {"in_channels": 9, "flip_sin_to_cos": False, "freq_shift": 1, "norm_num_groups": 2},
                      "vae": {"norm_num_groups": 2, "layers_per_block": 2}, "text_encoder": TEXT | {"eos_token_id": 2},
                      "scheduler": {"_class_name": "DDIMScheduler", "clip_sample": False,
                                    "timestep_spacing": "trailing", "prediction_type": "v_prediction",
                                    "rescale_betas_zero_snr": True} | BETAS},
    "consistency": {"unet": {"time_cond_proj_dim": 6, "attention_head_dim": [1, 4]},
                    "vae": {}, "text_encoder": TEXT,
                    "scheduler": {"_class_name": "LCMScheduler", "original_inference_steps": 20} | BETAS},
    "sdxl in-painting": {"unet": SDXL | BOTH | {"in_channels": 9, DEPTH: [1, 2], "attention_head_dim": [2, 4]},
                         "vae": {"force_upcast": False}, "text_encoder": TEXT | {"eos_token_id": 7},
                         "text_encoder_2": SECOND | {"hidden_act": "quick_gelu"},
                         "scheduler": {"_class_name": "DPMSolverMultistepScheduler",
                                       "use_karras_sigmas": True} | BETAS}}
# how each is run; an in-painting network takes a mask always
RUNS = {"text": {"steps": 3}, "image": {"steps": 5, "strength": 0.6}, "mask": {"steps": 3},
        "mask and strength": {"steps": 5, "strength": 0.6}}
PROMPT, NEGATIVE, SCALE = "a red cube on a blue sphere", "blurry", 5.0
CASES = [(kind, run) for kind in (*CHECKPOINTS, *ODD) for run in RUNS
         if run.startswith("mask") or "inpaint" not in kind and "in-painting" not in kind]


def config(kind: str, part: str) -> dict:
    return BASE.get(part, {}) | ODD[kind][part]


def make(kind: str, shapes: dict[str, dict], folder: Path) -> Path:
    """One of ODD as a folder; shapes: of each part's weights."""
    for part, own in shapes.items():
        (folder / part).mkdir(parents=True)
        save_file(drawn(own), folder / part / f"{FILES[part]}.safetensors")
        (folder / part / "config.json").write_text(json.dumps(config(kind, part)))
        if part.startswith("text"):
            shutil.copytree(HERE / "eps" / "tokenizer", folder / part.replace("text_encoder", "tokenizer"))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(ODD[kind]["scheduler"]))
    name = "StableDiffusionXLPipeline" if "text_encoder_2" in shapes else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, "force_zeros_for_empty_prompt": True}))
    return folder


def given(run: str, factor: int, sees_mask: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(image and mask, the noise of the start and of each step) of a run; factor: pixels a latent.

    A network that does not see the mask has one of whole latents: else other programs read one pixel of a latent, and
    minidiff draws a latent again for any of its pixels.
    """
    rng, shape = np.random.default_rng(8), {2: (16, 24), 4: (32, 48)}.get(factor, (40, 48))
    h, w = shape[0] // factor, shape[1] // factor
    image, noise = rng.uniform(-1, 1, (*shape, 3)).astype(np.float32), rng.standard_normal((9, 1, h, w, 4), np.float32)
    latents, pixels = rng.random((h, w)) < 0.5, rng.random(shape) < 0.5
    mask = pixels if sees_mask else np.kron(latents, np.ones((factor, factor), bool))
    found = {} if run == "text" else {"image": image}
    return found | ({"mask": mask} if run.startswith("mask") else {}), noise


def ours(model: StableDiffusion, run: str) -> tuple[np.ndarray, np.ndarray]:
    """(the last latents, the picture), (1, h, w, 4) and (1, H, W, 3)."""
    more, noise = given(run, model.vae.factor, model.form.sees_mask)
    if run == "text":
        more["size"] = f"{noise.shape[3] * model.vae.factor}x{noise.shape[2] * model.vae.factor}"
    if not model.form.reads_scale:
        more["negative"] = NEGATIVE
    *_, state = model.trajectory([PROMPT], scale=SCALE, streams=GivenNoise(noise, 1), **RUNS[run], **more)
    return state.z_t, state.x_t


def compared(picture: np.ndarray, run: str, factor: int, sees_mask: bool) -> np.ndarray:
    """What of the picture other programs draw, too: they decode the known part, which ours leaves as it is."""
    more, _ = given(run, factor, sees_mask)
    return picture[0][more["mask"]] if "mask" in more else picture[0].reshape(-1, 3)


def close(found: np.ndarray, expected: np.ndarray, largest: float | None = None) -> bool:
    largest = np.abs(expected).max() if largest is None else largest
    return found.shape == expected.shape and np.abs(found - expected).max() <= 1e-4 * largest

"""Makes tests/pretrained/checkpoints: tiny random Stable Diffusion checkpoints, and what diffusers computes with them.

    python -m tests.parity.make_stable_diffusion

Needs torch, diffusers and transformers.  Each checkpoint is a folder in diffusers' layout of about 300 kB, with
golden.npz beside it (PyTorch's layout, (B, C, H, W)).  All weights, biases and norms are random, so that a part that is
left out shows.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HERE = Path(__file__).parents[1] / "pretrained" / "checkpoints"
PROMPTS = ["a red cube on a blue sphere", "", "It's naïve — 3.14 日本 \U0001f642!", "a thin seven " * 40]
NEGATIVE, SCALE, STEPS = "blurry", 5.0, 5
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddim_trailing": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm_to_clean": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_leading": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler_trailing": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "euler_karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "heun": (HeunDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "dpm++2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++2m_leading": (DPMSolverMultistepScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    "unipc": (UniPCMultistepScheduler, {}),
    "unipc_karras": (UniPCMultistepScheduler, {"use_karras_sigmas": True}),
}
ZERO_SNR = {"ddim_zero_snr": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing",
                                              "rescale_betas_zero_snr": True})}


def randomise(model, seed: int) -> None:
    """Random weights of about the size of trained ones; float16 values, computed with in float32."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.ndim == 1:                                 # biases, and norms' scales about 1
                p.copy_(0.1 * torch.randn(p.shape, generator=g) + (1.0 if "norm" in name and "weight" in name else 0.0))
            else:
                size = 0.3 if "embedding" in name else 1.2 / p[0].numel() ** 0.5
                p.copy_(torch.randn(p.shape, generator=g) * size)
        model.half().float().eval()


def tokenizer(folder: Path, merges: list[str], pad: str) -> None:
    """A tokenizer with the first merges of CLIP's."""
    from minidiff.pretrained.clip_tokenizer import BYTES, END, START
    symbols = [*sorted(BYTES), *(c + "</w>" for c in sorted(BYTES)), *("".join(m.split()) for m in merges), START, END]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": pad}))


def save(model, folder: Path) -> None:
    model.half().save_pretrained(folder)
    model.float()


def make(kind: str, seed: int, merges: list[str]) -> None:
    sdxl, v = kind == "sdxl", kind != "eps"
    folder = HERE / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pad = "!" if v else "<|endoftext|>"
    tokenizer(folder / "tokenizer", merges, pad)
    vocab = len(json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))
    text = CLIPTextModel(CLIPTextConfig(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                        num_attention_heads=2, hidden_act="gelu" if kind == "v" else "quick_gelu",
                                        bos_token_id=vocab - 2, eos_token_id=2 if kind == "eps" else vocab - 1))
    text2 = None
    if sdxl:
        text2 = CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=vocab, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
            hidden_act="gelu", projection_dim=20, bos_token_id=vocab - 2, eos_token_id=vocab - 1))
        shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    extra = dict(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=44,
                 transformer_layers_per_block=[1, 2], down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")) if sdxl else dict(
                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=9 if kind == "inpaint" else 4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=40 if sdxl else 16, attention_head_dim=[1, 4] if v else 2,
        use_linear_projection=v, **extra)
    vae = AutoencoderKL(block_out_channels=(8, 8, 12, 16), down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4,
                        norm_num_groups=4, sample_size=64)
    for i, model in enumerate(m for m in (text, unet, vae, text2) if m is not None):
        randomise(model, 10 * seed + i)
    parts = {"text_encoder": text, "unet": unet, "vae": vae} | ({"text_encoder_2": text2} if sdxl else {})
    for name, model in parts.items():
        save(model, folder / name)
    predicts = {"prediction_type": "v_prediction" if kind == "v" else "epsilon"}
    schedulers = {name: cls(**BETAS, **predicts, **given)
                  for name, (cls, given) in (SCHEDULERS | (ZERO_SNR if kind == "v" else {})).items()
                  if kind != "v" or cls is not PNDMScheduler}       # it combines v's of different times as if eps
    default = schedulers["euler_leading" if sdxl else "ddim" if v else "pndm"]
    default.save_pretrained(folder / "scheduler")
    (folder / "schedulers").mkdir()
    for name, scheduler in schedulers.items():
        (folder / "schedulers" / f"{name}.json").write_text(scheduler.to_json_string())
    names = {"sdxl": "StableDiffusionXLPipeline", "inpaint": "StableDiffusionInpaintPipeline"}
    (folder / "model_index.json").write_text(json.dumps(
        {"_class_name": names.get(kind, "StableDiffusionPipeline"), "force_zeros_for_empty_prompt": True}))
    with torch.no_grad():
        np.savez_compressed(folder / "golden.npz", **golden(kind, folder, text, text2, unet, vae, schedulers, default))


def golden(kind, folder, text, text2, unet, vae, schedulers, default) -> dict[str, np.ndarray]:
    """What the networks and schedulers compute, in float32."""
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = np.array(tokens([*PROMPTS, NEGATIVE], padding="max_length", truncation=True, max_length=77)["input_ids"])
    rng = np.random.default_rng(5)
    out = {"ids": ids}
    states = text(torch.tensor(ids), output_hidden_states=True)
    out |= {"last": states.last_hidden_state, "penultimate": states.hidden_states[-2], "pooled": states.pooler_output}
    tau, added = states.last_hidden_state, {}
    if text2 is not None:
        second = text2(torch.tensor(ids), output_hidden_states=True)
        out |= {"penultimate_2": second.hidden_states[-2], "embedding_2": second.text_embeds}
        tau = torch.cat([states.hidden_states[-2], second.hidden_states[-2]], -1)
        sizes = torch.tensor([[48.0, 64, 0, 0, 48, 64]])
        added = {"text_embeds": second.text_embeds, "time_ids": sizes}
    z = torch.tensor(rng.standard_normal((2, unet.config.in_channels, 6, 5)), dtype=torch.float32)

    def conditions(rows):
        return {} if not added else {"added_cond_kwargs": {"text_embeds": added["text_embeds"][rows],
                                                           "time_ids": sizes.repeat(len(rows), 1)}}
    out |= {"z": z, "t": np.array([17, 801]),
            "unet": unet(z, torch.tensor([17, 801]), tau[[0, 2]], **conditions([0, 2])).sample}
    image = torch.tensor(rng.uniform(-1, 1, (1, 3, 40, 48)), dtype=torch.float32)
    q = vae.encode(image).latent_dist
    out |= {"image": image, "mean": q.mean, "logvar": q.logvar, "decoded": vae.decode(z[:1, :4] / 0.18215).sample}
    noise = torch.tensor(rng.standard_normal((2, 4, 8, 6)), dtype=torch.float32)
    out["noise"] = noise
    seen = torch.tensor(rng.standard_normal((1, 5, 8, 6)), dtype=torch.float32) if kind == "inpaint" else None
    if seen is not None:
        out["seen"] = seen
    rows = [4, 4, 0, 2]                                     # negative twice, then two prompts
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(STEPS)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            twice = scheduler.scale_model_input(torch.cat([x, x]), t)
            if seen is not None:
                twice = torch.cat([twice, seen.repeat(4, 1, 1, 1)], 1)
            without, with_ = unet(twice, t, tau[rows], **conditions(rows)).sample.chunk(2)
            x = scheduler.step(without + SCALE * (with_ - without), t, x).prev_sample
        out[f"out_{name}"] = x
    return {name: np.asarray(a) for name, a in out.items()}


if __name__ == "__main__":
    from argparse import ArgumentParser
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("merges", type=Path, help="CLIP's merges.txt")
    args = parser.parse_args()
    lines = args.merges.read_text(encoding="utf-8").splitlines()[1:91]
    for number, name in enumerate(("eps", "v", "sdxl", "inpaint"), start=1):
        make(name, number, lines)

"""Stable Diffusion, from other people's checkpoints (Rombach et al. 2022, arXiv 2112.10752; SDXL: Podell et al. 2023).

    text         tau(y)                     the states of CLIP's text encoder for 77 tokens           (section 3.3)
    sampling     z_T ~ N(0, I), then a sampler of diffusion/samplers.py with classifier-free guidance
                 eps = eps_negative + scale (eps_prompt - eps_negative)
    decoding     x = D(z_0 / factor + shift), once                                                    (section 3.1)

It is systems/latent.py at the size of the original: latents an eighth as high and wide as the picture, four channels,
and a UNet (pretrained/unet.py) that reads the prompt by cross-attention at most resolutions.  The checkpoint's own
scheduler_config.json says which times a run visits, and what the network predicts.

SDXL reads two text encoders, each before its last layer, side by side; and its UNet is also told the embedding of the
whole prompt, and sizes: here always those of a picture that was not cropped.

    image to image      z_t = alpha_t E(x) + sigma_t eps at a later time, then as above               (SDEdit)
    in-painting         a network of 4 channels: E(x), noised, replaces the known part in all that the network sees
                        a network of 9 channels: it sees z_t, the mask and E(the known part), as it was trained

The weights are read only: this system is sampled, not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minidiff.diffusion import editing
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.gaussian import q_sample
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.samplers import State
from minidiff.engine.backend import to_device, to_numpy, xp_of
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.pretrained import agreement, autoencoder, hub, lora, memory, request, textual_inversion
from minidiff.pretrained.agreement import LATENT
from minidiff.pretrained.autoencoder import Autoencoder
from minidiff.pretrained.checkpoints import open_checkpoint
from minidiff.pretrained.clip_text import ClipTextEncoder
from minidiff.pretrained.clip_tokenizer import ClipTokenizer
from minidiff.pretrained.plan import Plan
from minidiff.pretrained.request import Form
from minidiff.pretrained.scheduler_classes import check_choice
from minidiff.pretrained.scheduler_config import SchedulerConfig
from minidiff.pretrained.unet import UNet
from minidiff.systems.system import System, check_finite
from minidiff.terminal import say

NETWORKS = ("unet", "vae", "text_encoder")                  # how the names of parts with weights begin
GENERATIONS = {768: 1, 1024: 2}                             # by the width of a token's state
MOST_SIGNAL = 0.6                                           # alpha of the first time, of which no word is said


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says beside its networks."""

    factor: float                           # z of the diffusion = factor (z of the autoencoder - shift)
    shift: float
    size: int                               # pixels of the square pictures that it was trained on
    zeros_for_no_negative: bool             # SDXL: no negative prompt is the state 0, and not that of ''


class StableDiffusion(System):
    """A checkpoint of Stable Diffusion 1, 2 or SDXL."""

    name = "stable-diffusion"
    count = at_a_time = 1                                   # one takes minutes, and gigabytes
    previews = True
    when_none = {"negative": "nothing", "second": "the prompt", "second_negative": "the negative prompt",
                 "sampler": "the checkpoint's", "spacing": "the checkpoint's", "predicts": "the checkpoint's",
                 "size": "the image's, else the checkpoint's", "image": "none", "strength": "0.8, with a mask 1",
                 "mask": "none"}
    no_judge = "it was trained on pictures that are not here"
    no_likelihood = "its denoiser works on latents, not on pixels"

    def __init__(self, unet: UNet, vae: Autoencoder, encoders: Sequence[ClipTextEncoder],
                 tokenizers: Sequence[ClipTokenizer], scheduler: SchedulerConfig, settings: Settings):
        self.unet, self.vae, self.encoders, self.tokenizers = unet, vae, list(encoders), list(tokenizers)
        self.scheduler, self.config, self.tokenizer, self.notes = scheduler, settings, None, {}
        self.cut: set[str] = set()                          # the texts that were too long

    @classmethod
    def load(cls, path: str | Path, *, dtype=np.float32, low_memory: bool = False,
             loras: Sequence[tuple[str | Path, float]] = (),
             embeddings: Mapping[str, str | Path] | None = None) -> StableDiffusion:
        """The checkpoint in a folder or file, or called org/name; UserError names what is damaged or unknown.

        low_memory  keeps weights in half precision where the files have it, and widens each at every use: half of the
                    memory, and somewhat slower
        loras       (file, strength): changes of the weights, see pretrained/lora.py
        embeddings  placeholder -> file: words of the user's own, see pretrained/textual_inversion.py
        """
        saved = open_checkpoint(hub.local(path))
        text = [part for part in saved.parts if part.startswith("text_encoder")]
        scheduler, tokenizers = SchedulerConfig(saved.config("scheduler")), [saved.tokenizer(part) for part in text]
        configs = {part: saved.config(part) for part in ("unet", "vae", *text)}
        weights = {part: saved.weights(part, dtype, low_memory) for part in configs}
        agreement.check(configs, weights, tokenizers)
        vae, unet, of_vae = configs["vae"], configs["unet"], weights.pop("vae")
        factor, shift = autoencoder.scaling(vae)
        weights = lora.merged(loras, weights)
        encoders = [ClipTextEncoder(configs[part], weights[part]) for part in text]
        textual_inversion.add(embeddings or {}, tokenizers, encoders)
        first_stage = Autoencoder(vae, of_vae)
        settings = Settings(factor, shift, unet.whole("sample_size", 64) * first_stage.factor,
                            saved.zeros_without_negative)
        return cls(UNet(unet, weights["unet"]), first_stage, encoders, tokenizers, scheduler, settings)

    @classmethod
    def about(cls, path: str | Path) -> list[tuple[str, str]]:
        """The family, sizes and precision of a checkpoint, whose weights are not read."""
        saved = open_checkpoint(Path(path))
        scheduler = SchedulerConfig(saved.config("scheduler"))
        parts = [part for part in saved.parts if part.startswith(NETWORKS)]
        entries = {part: saved.weights(part, np.float32).tensors.values() for part in parts}
        form, unet = form_of(saved), saved.weights("unet", np.float32)
        width = next((agreement.axis(unet, name, 1) for name in agreement.cross_keys(unet)), 0)
        generation = f" {GENERATIONS[width]}" if width in GENERATIONS else ""
        kind = ", for in-painting" if form.sees_mask else ", does its guidance itself" if form.reads_scale else ""
        return [("model", f"{saved.family}{generation}{kind}, {path}"), ("pictures", f"{form.size}x{form.size}"),
                ("parameters", ", ".join(f"{sum(e.size for e in found):,} {part}" for part, found in entries.items())),
                ("stored as", ", ".join(sorted({e.dtype for found in entries.values() for e in found}))),
                ("predicts", scheduler.predicts),
                ("scheduler", scheduler.name + (" (not here: choose a --sampler)" if scheduler.refusal() else ""))]

    def save(self, *args, **kwargs):
        raise NotImplementedError("a checkpoint of Stable Diffusion is only read")

    def astype(self, dtype) -> StableDiffusion:
        """Itself, if it has this dtype; ValueError otherwise, since the dtype is chosen when it is loaded."""
        if np.dtype(dtype) != self.dtype:
            raise ValueError(f"dtype is {self.dtype}: name another when loading, StableDiffusion.load(path, dtype=...)")
        return self

    @classmethod
    def check_options(cls, path: str | Path, options: Mapping[str, Any]) -> None:
        saved = open_checkpoint(Path(path))
        request.check(form_of(saved), options, SchedulerConfig(saved.config("scheduler")))

    @classmethod
    def check_memory(cls, path: str | Path, options: Mapping[str, Any]) -> None:
        saved = open_checkpoint(Path(path))
        form = form_of(saved)
        parts = {part: saved.weights(part, np.float32, options.get("low_memory", False))
                 for part in saved.parts if part.startswith(NETWORKS)}
        height, width = form.pixels(options.get("size"), options.get("image"))
        rows = 1 if options.get("scale") in (0, 1) or form.reads_scale else 2
        memory.check(memory.estimate(parts, form.factor, height, width, rows), height, width)

    def steps_made(self, options: Mapping[str, Any]) -> int:
        return request.steps_made(self.form, options, self.scheduler)

    @classmethod
    def check_sampler(cls, name: str) -> None:
        check_choice(name)

    # --- the prompt ---------------------------------------------------------------------------------------

    def encode_text(self, prompts: Sequence[str], size: tuple[int, int], *, second: str | None = None,
                    zeros: bool = False) -> tuple:
        """The condition of prompts: tau(y) (B, 77, D), and for SDXL the pooled states (B, P) and sizes (B, 6).

        size: (height, width) of the picture in pixels.  second: what SDXL's second encoder reads in place of each
        prompt.  zeros: SDXL's condition without a prompt.
        """
        states = []
        read = [prompts, prompts if second is None else [second] * len(prompts)]
        with no_grad():
            for encoder, tokenizer, texts in zip(self.encoders, self.tokenizers, read, strict=False):
                ids, lost = tokenizer.ids(texts)
                self._tell_of_cut(texts, lost, tokenizer.length - 2)
                states.append(encoder(ids))
        if self.unet.extra is None:
            return (states[0].last.data,)
        xp = xp_of(states[0].last.data)
        tau = xp.concatenate([state.penultimate.data for state in states], axis=-1)         # (B, 77, D)
        pooled = states[-1].embedding.data                                          # (B, P)
        if zeros:
            tau, pooled = xp.zeros_like(tau), xp.zeros_like(pooled)
        # (height, width) of the training picture, (top, left) of its crop, (height, width) wanted
        sizes = np.tile(np.array([*size, 0, 0, *size], np.float32), (len(prompts), 1))      # (B, 6)
        return tau, pooled, sizes

    def _tell_of_cut(self, texts: Sequence[str], lost: Sequence[int], read: int) -> None:
        """Says once of each text how much of it is not read."""
        for text, more in zip(texts, lost, strict=True):
            if more and text not in self.cut:
                self.cut.add(text)
                say(f"the prompt {text[:30]!r}... has {more} tokens more than the {read} that are read")

    # --- pixels and latents -------------------------------------------------------------------------------

    def encode(self, images: np.ndarray):
        """Images (B, H, W, 3) in [-1, 1] -> the mean of q(z | x) at the diffusion's scale, (B, H/8, W/8, 4)."""
        with no_grad():
            mean, _ = self.vae.encode(Tensor(to_device(images.astype(self.dtype), self.device)))
        return (mean.data - self.config.shift) * self.config.factor

    def decode(self, z_0):
        """z_0 (B, h, w, 4) -> images (B, 8 h, 8 w, 3) in [-1, 1]."""
        with no_grad():
            x = self.vae.decode(Tensor(z_0 / self.config.factor + self.config.shift)).data
        return xp_of(x).clip(check_finite(x), -1, 1)

    # --- sampling -----------------------------------------------------------------------------------------

    def sample(self, captions: Sequence[str], *, negative: str | None = None, second: str | None = None,
               second_negative: str | None = None, scale: float = 7.5, steps: int = 20, sampler: str | None = None,
               spacing: str | None = None, predicts: str | None = None, size: str | None = None,
               image: np.ndarray | None = None, strength: float | None = None, mask: np.ndarray | None = None,
               seed: int = 0, streams=None) -> np.ndarray:
        """Images (B, H, W, 3) in [-1, 1], one for each caption, sample i from its own stream (seed, i).

        negative    what the pictures should not be like; None for nothing
        second      SDXL: what its second text encoder reads; None for the prompt.  second_negative is the same for
                    the negative prompt
        scale       of guidance: 1 follows the prompt without guidance, as turbo models want.  A network that reads
                    the scale (a latent consistency model) was trained to do its guidance itself
        sampler     a name in scheduler_classes.CHOICES; None for the checkpoint's own
        spacing     of the times, leading, linspace or trailing, as few-step models want; None for the checkpoint's own
        predicts    what the network predicts, eps, v or x0, where a single file does not tell; None for its own
        size        WIDTHxHEIGHT in pixels, multiples of 8; None for the checkpoint's own, or the image's
        image       (H, W, 3) in [-1, 1]: the pictures start from it
        strength    with an image: the share of the steps that is made, 0 to 1; None for 0.8, and with a mask for 1,
                    where the part to draw starts from noise alone.  A latent consistency model makes all steps, at
                    times of this share
        mask        (H, W) booleans, True where the image is to be drawn again; the rest keeps its pixels
        """
        *_, state = self.trajectory(captions, negative=negative, second=second, second_negative=second_negative,
                                    scale=scale, steps=steps, sampler=sampler, spacing=spacing, predicts=predicts,
                                    size=size, image=image, strength=strength, mask=mask, seed=seed, streams=streams)
        return to_numpy(state.x_t)

    def trajectory(self, captions: Sequence[str], *, negative: str | None = None, second: str | None = None,
                   second_negative: str | None = None, scale: float = 7.5, steps: int = 20, sampler: str | None = None,
                   spacing: str | None = None, predicts: str | None = None, size: str | None = None,
                   image: np.ndarray | None = None, strength: float | None = None, mask: np.ndarray | None = None,
                   seed: int = 0, streams=None) -> Iterator[State]:
        """The state after each step, down to z_0; t is the training time, x_t are images, decoded when asked for."""
        options = {"negative": negative, "second": second, "second_negative": second_negative, "scale": scale,
                   "steps": steps, "sampler": sampler, "spacing": spacing, "predicts": predicts, "size": size,
                   "image": image, "strength": strength, "mask": mask}
        request.check(self.form, options, self.scheduler)
        streams = self.streams_for(captions, seed, streams)
        height, width = self.form.pixels(size, image)
        scheduler = self.scheduler.changed(spacing, predicts)
        plan = request.plan_of(self.form, options, self.scheduler)
        if image is None:
            tell_of_signal(plan)
        noise = self.noise(streams, (height // self.vae.factor, width // self.vae.factor, LATENT)).astype(self.dtype)
        cond = self.encode_text(captions, (height, width), second=second)
        zeros = negative is None and second_negative is None and self.config.zeros_for_no_negative
        uncond = self.encode_text([negative or ""], (height, width), second=second_negative, zeros=zeros)
        known = None if image is None else self._known(image, mask, noise)
        network = self._network(plan, known, scale)
        denoiser = ClassifierFree(NetworkDenoiser(plan.schedule, scheduler.predicts, network),
                                  1 if self.unet.reads_scale else scale, uncond)

        def picture(z_t):
            x = self.decode(z_t)
            return x if mask is None else xp_of(x).where(xp_of(x).asarray(mask)[..., None], x, xp_of(x).asarray(image))
        noise_alone = image is None or mask is not None and strength in (None, 1)
        for state in self._from_noise(plan, denoiser, noise, cond, streams, known, noise_alone):
            t = round(float(plan.t[state.t])) if state.t >= 0 else -1
            yield Decoded(state.step, t, state.x_t, state.x0_hat, picture, self.decode)

    def _network(self, plan: Plan, known: Known | None, scale: float = 1.0):
        """(z_t, rows of the plan, condition) -> what the UNet predicts, as plain arrays."""
        def network(z_t, rows, cond):
            seen = known.beside(z_t) if self.form.sees_mask else z_t
            tau, pooled, sizes = cond if self.unet.extra else (*cond, None, None)
            with no_grad():
                pooled = None if pooled is None else Tensor(pooled)
                return self.unet(Tensor(seen), plan.t[rows], Tensor(tau), pooled, sizes, scale).data
        return network

    def _from_noise(self, plan: Plan, denoiser, noise, cond, streams, known: Known | None,
                    noise_alone: bool) -> Iterator[State]:
        if not plan.steps:                                  # of strength 0
            return iter([State(0, -1, known.z_0, None)])
        # z_T = std eps, or of an image z_t = alpha_t z_0 + sigma_t eps
        z_t = plan.first_std * noise if noise_alone else q_sample(plan.schedule, known.z_0, plan.start, noise)
        if known is None or known.again is None or self.form.sees_mask:
            return plan.run(denoiser, z_t, cond, streams)
        part = editing.KnownPart(denoiser, known.z_0, ~known.again, noise, plan.start if noise_alone else None)
        return part.states(plan.run(part, z_t, cond, streams), end=plan.steps[-1][1])

    def _known(self, image: np.ndarray, mask: np.ndarray | None, noise) -> Known:
        """The image as latents, and where they are to be drawn again."""
        f, B = self.vae.factor, len(noise)
        z_0 = self.encode(image[None])
        if mask is None:
            return Known(repeated(z_0, B), None, None)
        xp, (H, W) = xp_of(z_0), mask.shape
        if not self.form.sees_mask:                         # a latent is known where all its pixels are
            again = mask.reshape(H // f, f, W // f, f).any(axis=(1, 3))[None, ..., None]            # (1, h, w, 1)
            return Known(repeated(z_0, B), xp.asarray(again), None)
        again = mask[::f, ::f][None, ..., None]
        hidden = self.encode(np.where(mask[..., None], 0, image)[None])             # grey, as it was trained
        return Known(repeated(z_0, B), xp.asarray(again), hidden)

    @property
    def form(self) -> Form:
        return Form(self.unet.channels != LATENT, self.unet.reads_scale, len(self.encoders), self.vae.factor,
                    self.config.size)


@dataclass(frozen=True)
class Decoded:
    """A state whose picture is decoded when it is asked for."""

    step: int
    t: int                                  # the training time; -1 for the clean image
    z_t: np.ndarray                         # (B, h, w, 4)
    z0_hat: np.ndarray | None               # the denoiser's estimate; None before the first step
    picture: Callable                       # decodes, and keeps the known part of an image
    decode: Callable

    @property
    def x_t(self):                          # (B, 8 h, 8 w, 3)
        return self.picture(self.z_t)

    def preview(self):
        """The estimate of the clean picture at half its size, (B, 4 h, 4 w, 3), for a quarter of the work."""
        return self.decode(halved(self.z_t if self.z0_hat is None else self.z0_hat))


@dataclass(frozen=True)
class Known:
    """A given image: its latents (B, h, w, 4), where to draw again (1, h, w, 1), and the latents of the known part."""

    z_0: np.ndarray
    again: np.ndarray | None
    hidden: np.ndarray | None               # (1, h, w, 4); of networks that see it

    def beside(self, z_t):
        """What a network of 9 channels sees: z_t, the mask, the known part."""
        xp = xp_of(z_t)
        return xp.concatenate([z_t, repeated(self.again.astype(z_t.dtype), len(z_t)),
                               repeated(self.hidden, len(z_t))], axis=-1)


def halved(z):
    """Means of 2 x 2 latents: (B, h, w, C) -> (B, ceil(h/2), ceil(w/2), C); an odd last row or column counts twice."""
    B, h, w, C = z.shape
    z = xp_of(z).pad(z, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    return z.reshape(B, -(-h // 2), 2, -(-w // 2), 2, C).mean(axis=(2, 4), dtype=z.dtype)


def repeated(a, B: int):
    """(1, ...) -> (B, ...)."""
    return xp_of(a).repeat(a, B, axis=0)


def form_of(saved) -> Form:
    """The form of a checkpoint on disk, whose weights are not read."""
    unet, factor = saved.config("unet"), 2 ** (len(saved.config("vae").texts("down_block_types")) - 1)
    channels = agreement.axis(saved.weights("unet", np.float32), "conv_in.weight", 1)
    return Form(channels != LATENT, unet.values.get("time_cond_proj_dim") is not None,
                sum(part.startswith("text_encoder") for part in saved.parts), factor,
                unet.whole("sample_size", 64) * factor)


def tell_of_signal(plan: Plan) -> None:
    """Says so where a run of noise alone starts at a time that has much of the picture already."""
    first = plan.steps[0][0]
    alpha = plan.schedule.abar(first) ** 0.5
    if alpha > MOST_SIGNAL:
        say(f"the run starts at time {plan.t[first]:.0f}, where alpha is {alpha:.2f}, and not with noise alone: "
            "few-step models want trailing times (--set spacing=trailing)")

"""Stable Diffusion 1.5 at its full size with random weights: minidiff beside diffusers on PyTorch, in one run.

    python benchmarks/stable_diffusion.py                   one UNet evaluation of 1 and of 2 latents of 64 x 64, one
                                                            decoding to 512 x 512, one prompt: time, ratio to the best
    python benchmarks/stable_diffusion.py --work decode     one of them
    python benchmarks/stable_diffusion.py --memory          peak memory, each contestant in a process of its own
    python benchmarks/stable_diffusion.py --load            from the files in float16 to the end of the first evaluation
    python benchmarks/stable_diffusion.py --ops             where minidiff's time goes, by kind of op
    python benchmarks/stable_diffusion.py --forms           3 x 3 convolutions of these shapes by patches and by blocks

The contestants read the same checkpoint, which the first run makes (1.9 GB in float16, in --folder).  Before any timing
their results are compared: 1e-3 of the largest value, in float32.  Then they take turns.  Needs torch, diffusers and
transformers.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from side_by_side import peak_mib, positive, take_turns, versions

from minidiff.engine.parallel import cores

UNET = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
VAE = dict(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
           up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, sample_size=512)
TEXT = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            hidden_act="quick_gelu")
WORK = ("text", "unet 1", "unet 2", "decode")
MINIDIFF, FIRST, LAST, HALF = "minidiff", "PyTorch, first", "PyTorch, last", "PyTorch, bfloat16"
NAMES = (MINIDIFF, FIRST, LAST, HALF)
CLOSE = {MINIDIFF: 0.0, FIRST: 1e-3, LAST: 1e-3, HALF: 0.2}        # of the largest value


# --- the checkpoint ---------------------------------------------------------------------------------------

def make(folder: Path) -> None:
    """A checkpoint in diffusers' layout, with PyTorch's own random weights."""
    import gzip
    import json

    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from minidiff.pretrained.clip_tokenizer import MERGES, ClipTokenizer
    torch.manual_seed(0)
    parts = {"unet": lambda: UNet2DConditionModel(**UNET), "vae": lambda: AutoencoderKL(**VAE),
             "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT))}
    for name, build in parts.items():
        build().half().save_pretrained(folder / name)
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                  set_alpha_to_one=False, steps_offset=1).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_bytes(gzip.decompress(MERGES.read_bytes()))
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(ClipTokenizer.shipped().vocab), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def inputs(work: str) -> tuple[np.ndarray, ...]:
    rng, count = np.random.default_rng(0), 2 if work == "unet 2" else 1
    if work == "text":
        return (rng.integers(0, TEXT["vocab_size"] - 1, (2, 77)),)
    z = rng.standard_normal((count, 64, 64, 4), dtype=np.float32)
    return (z, rng.standard_normal((count, 77, 768), dtype=np.float32)) if work.startswith("unet") else (z,)


# --- the contestants: (folder, work) -> a function that does the work once and returns its result, channels last ----

def minidiff_run(folder: Path, work: str) -> Callable[[], np.ndarray]:
    from minidiff.engine.backend import keep_freed_memory
    from minidiff.engine.tensor import Tensor, no_grad
    from minidiff.pretrained.autoencoder import Autoencoder
    from minidiff.pretrained.checkpoints import open_checkpoint
    from minidiff.pretrained.clip_text import ClipTextEncoder
    from minidiff.pretrained.unet import UNet
    keep_freed_memory()
    saved, part = open_checkpoint(folder), part_of(work)
    network = {"unet": UNet, "vae": Autoencoder, "text_encoder": ClipTextEncoder}[part](
        saved.config(part), saved.weights(part, np.float32))

    def run():
        x, *text = inputs(work)
        with no_grad():
            if work == "text":
                return network(x).last.data
            if work == "decode":
                return network.decode(Tensor(x)).data
            return network(Tensor(x), np.full(len(x), 500), Tensor(text[0])).data
    return run


def torch_run(folder: Path, work: str, *, last: bool = False, half: bool = False) -> Callable[[], np.ndarray]:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    torch.set_num_threads(cores())
    part, layout = part_of(work), torch.channels_last if last else torch.contiguous_format
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[part]
    network = kind.from_pretrained(folder / part, torch_dtype=torch.float32).eval()
    if part != "text_encoder":
        network = network.to(memory_format=layout)

    def run():
        x, *text = (torch.from_numpy(a) for a in inputs(work))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            if work == "text":
                return network(x).last_hidden_state.float().numpy()
            x = x.permute(0, 3, 1, 2).contiguous(memory_format=layout)
            y = network.decode(x) if work == "decode" else network(x, 500, text[0])
            return y.sample.float().permute(0, 2, 3, 1).numpy()
    return run


def part_of(work: str) -> str:
    return {"text": "text_encoder", "decode": "vae"}.get(work, "unet")


CONTESTANTS = {
    MINIDIFF: minidiff_run,
    FIRST: torch_run,
    LAST: lambda folder, work: torch_run(folder, work, last=True),
    HALF: lambda folder, work: torch_run(folder, work, last=True, half=True),
}


# --- time, memory, loading --------------------------------------------------------------------------------

def compare_times(folder: Path, work: str, names: list[str], rounds: int) -> str:
    """Prints every contestant's time and returns a row of the table."""
    runs = {name: CONTESTANTS[name](folder, work) for name in names}
    results = {name: run() for name, run in runs.items()}
    first = results[names[0]]
    for name, result in results.items():
        error = np.abs(result - first).max() / np.abs(first).max()
        print(f"{name}: differs by {error:.1e} of the largest value", flush=True)
        if not error <= CLOSE[name]:
            raise SystemExit(f"{name} does not compute the same as {names[0]}: no times are compared")
    seconds = take_turns(runs, rounds, 1)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in seconds.items():
        print(f"{work:8}{name:20} min {min(taken):8.3f} s   median {medians[name]:8.3f} s   max {max(taken):8.3f} s")
    return row(work, medians, "{:.3f}")


def row(work: str, found: dict[str, float], form: str) -> str:
    """A row of the table: each contestant's number, and minidiff's ratio to the best of PyTorch in float32."""
    best = min((found[name] for name in (FIRST, LAST) if name in found), default=None)
    ratio = f"**{found[MINIDIFF] / best:.2f}**" if best and MINIDIFF in found else ""
    return f"| {work} | " + " | ".join(form.format(found[n]) if n in found else "" for n in NAMES) + f" | {ratio} |"


def in_a_process(folder: Path, work: str, name: str, what: str) -> float:
    """The number that a process of its own prints last: its peak memory in MiB, or the seconds of its first result."""
    done = subprocess.run([sys.executable, __file__, "--folder", folder, "--alone", work, name, what],
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def alone(folder: Path, work: str, name: str, what: str) -> None:
    if name != MINIDIFF:                                    # imports are not what is measured
        import diffusers
        import transformers
        _ = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel
    else:
        import minidiff.systems.stable_diffusion  # noqa: F401
    began = time.perf_counter()
    run = CONTESTANTS[name](folder, work)
    run()
    print(time.perf_counter() - began if what == "load" else peak_mib())


# --- where the time goes ----------------------------------------------------------------------------------

@contextmanager
def timed_ops():
    """Within it, the seconds of each kind of op are added up in the dict that it gives."""
    from minidiff.engine import conv, norm, ops
    from minidiff.pretrained import layers, unet
    places = [(conv, "conv2d"), (conv, "upsampled_conv2d"), (layers, "scaled_dot_product_attention"),
              (ops, "linear"), (ops, "matmul"),
              (norm, "group_norm"), (norm, "layer_norm"), (ops, "gelu_exact"), (ops, "silu"), (ops, "concat"),
              (conv, "upsample_nearest"), (unet, "geglu")]
    spent, own = {}, [(place, name, getattr(place, name)) for place, name in places]

    def timed(name, function):
        def call(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return result
        return call
    for place, name, function in own:
        setattr(place, name, timed(name, function))
    try:
        yield spent
    finally:
        for place, name, function in own:
            setattr(place, name, function)


def show_ops(folder: Path, work: str) -> None:
    run = minidiff_run(folder, work)
    run()
    with timed_ops() as spent:
        began = time.perf_counter()
        run()
        whole = time.perf_counter() - began
    print(f"{work}: {whole:.3f} s")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"    {name:30} {seconds:7.3f} s")


def show_forms() -> None:
    """The least of five times of each form of convolution, for one image and for two."""
    from minidiff.engine import conv, conv_blocks, conv_winograd
    rng = np.random.default_rng(0)
    for H, C, D in ((64, 320, 320), (64, 640, 320), (32, 640, 640), (32, 1920, 640), (16, 640, 1280), (16, 1280, 1280),
                    (16, 2560, 1280)):
        w = rng.standard_normal((3, 3, C, D), dtype=np.float32)
        for B in (1, 2):
            x = rng.standard_normal((B, H, H, C), dtype=np.float32)
            forms = {"patches": lambda x=x, w=w: conv.plain_correlate(x, w, 1, 1),
                     "blocks": lambda x=x, w=w: conv_blocks.correlate(x, w, 1)}
            if H <= conv_winograd.LONGEST:
                forms["whole lines"] = lambda x=x, w=w: conv_winograd.correlate(x, w, 1)
            seconds = take_turns(forms, 5, 1)
            print(f"{B} x {H} x {H} x {C} to {D}: "
                  + ", ".join(f"{1e3 * min(s):.1f} ms by {n}" for n, s in seconds.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "minidiff-sd15",
                        help="where the checkpoint is, or is made")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="what is compared (everything)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="contestants (all)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed runs of each contestant (5)")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--load", action="store_true", help="seconds from the files to the first result")
    parser.add_argument("--ops", action="store_true", help="minidiff's time by kind of op")
    parser.add_argument("--forms", action="store_true", help="the forms of convolution")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        alone(args.folder, *args.alone)
        return
    if args.forms:
        show_forms()
        return
    if not (args.folder / "model_index.json").exists():
        make(args.folder)
    if args.ops:
        for work in args.work:
            show_ops(args.folder, work)
        return
    lines = []
    for work in args.work:
        if args.memory or args.load:
            what = "load" if args.load else "memory"
            found = {name: in_a_process(args.folder, work, name, what) for name in args.only}
            lines.append(row(work, found, "{:.1f}" if args.load else "{:.0f}"))
        else:
            lines.append(compare_times(args.folder, work, args.only, args.rounds))
        print(lines[-1], flush=True)                        # a run that is stopped has shown what it measured
    unit = "s to the first result" if args.load else "peak MiB" if args.memory else "median s"
    print(f"\n{unit}, {cores()} cores; {versions()}\n\n| | {' | '.join(NAMES)} | ratio to PyTorch's best float32 |")
    print("|---" * (len(NAMES) + 2) + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""The order in which the package is read, in one place: `python -m tests.support.reading_order` writes the page.

Each file comes after those that it imports, so that a reader meets nothing that was not explained before.  Two kinds of
imports may point forward: those of engine/cuda, the GPU's side of ops that are read first in NumPy; and those inside a
function, which are loaded when they are needed.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "minidiff"
PAGE = ROOT / "docs" / "reading_order.md"

SECTIONS: list[tuple[str, str, list[str]]] = [
    ("Small things that all use", "Skim these, and come back when you meet their names.",
     ["terminal", "errors", "checks", "signals", "locks", "files", "input_files", "registry", "named", "checkpoint"]),
    ("Engine", "Arrays with gradients. Start with tensor.py: reverse-mode differentiation, all of it.",
     ["engine/backend", "engine/tensor", "engine/parallel", "engine/ops", "engine/random", "engine/blas",
      "engine/conv_shift", "engine/conv_winograd", "engine/conv_blocks", "engine/conv", "engine/norm",
      "engine/attention"]),
    ("Networks", "Modules, layers, the UNet, and how they learn.",
     ["nn/module", "nn/layers", "nn/transformer", "nn/activations", "nn/unet", "nn/precision", "nn/int8", "nn/optim"]),
    ("Diffusion", "The mathematics, on plain arrays. A schedule gives alpha_t and sigma_t, a denoiser estimates x_0, a "
     "sampler calls nothing but a denoiser, and guidance wraps one.",
     ["diffusion/schedules", "diffusion/gaussian", "diffusion/denoiser", "diffusion/exact", "diffusion/losses",
      "diffusion/times", "diffusion/densities", "diffusion/samplers", "diffusion/multistep", "diffusion/consistency",
      "diffusion/guidance", "diffusion/rectified_flow", "diffusion/likelihood", "diffusion/variational",
      "diffusion/entropy",
      "diffusion/posterior", "diffusion/editing", "diffusion/cascade"]),
    ("Text", "From a caption to token states.",
     ["text/tokenizer", "text/encoder"]),
    ("Data", "Captioned images: the contract of a data set, and the digits.",
     ["data/pixels", "data/image_file", "data/dataset", "data/idx", "data/download", "data/mnist", "data/attributes",
      "data/digit_captions", "data/digits", "data/swiss_roll", "data/layouts", "data/fitting", "data/picture_cache",
      "data/own_pictures", "data/emoji"]),
    ("Pictures", "What people look at.",
     ["pictures/sheets", "pictures/plots"]),
    ("The default system", "Text-to-image with classifier-free guidance: the floors put together.",
     ["systems/config", "systems/stage", "systems/system", "systems/training_batches", "nn/pixel_mixture",
      "systems/text_to_image", "systems/attention_maps"]),
    ("Training", "One trainer, a run on disk, stage after stage.",
     ["training/ranks", "training/trainer", "training/loop", "training/run"]),
    ("The other systems", "Each stands by itself; the networks that only they use come first.",
     ["nn/kl", "systems/dpm", "nn/autoencoder", "nn/image_tower", "nn/images", "systems/ddpm",
      "nn/fourier", "nn/grey_levels", "systems/learned_path", "systems/vdm",
      "text/clip", "systems/clip",
      "nn/classifier", "systems/adm", "systems/glide",
      "nn/decoding", "nn/gumbel", "systems/dalle",
      "nn/prior", "nn/embedding_codes", "systems/dalle2",
      "text/span_corruption", "text/t5", "systems/imagen",
      "nn/image_classifier", "systems/digit_classifier", "nn/adversary", "nn/quantise", "systems/autoencoder",
      "systems/latent", "nn/mmdit", "systems/dit", "systems/consistency"]),
    ("Stable Diffusion", "Other people's checkpoints: their files, networks and settings, and the system.",
     ["pretrained/config", "pretrained/half", "pretrained/weights", "pretrained/layers", "pretrained/tokenizer_files",
      "pretrained/clip_tokenizer",
      "pretrained/agreement", "pretrained/clip_text", "pretrained/unet", "pretrained/autoencoder",
      "pretrained/plan", "pretrained/spreads", "pretrained/scheduler_classes", "pretrained/scheduler_config",
      "pretrained/request", "pretrained/single_file",
      "pretrained/checkpoints", "pretrained/hub", "pretrained/memory", "pretrained/lora",
      "pretrained/textual_inversion", "systems/stable_diffusion"]),
    ("Evaluation", "How good are the pictures?",
     ["evaluation/metrics", "evaluation/judge", "evaluation/fidelity", "evaluation/report", "evaluation/likelihood",
      "evaluation/reconstruction", "evaluation/pictures", "evaluation/emoji"]),
    ("The verifier", "The laws of q(x_t | x_0), for any schedule and any library's scheduler.",
     ["verify/rows", "verify/forward", "verify/reverse", "verify/loading",
      "verify/scheduler/protocol", "verify/scheduler/runs", "verify/scheduler/law", "verify/scheduler/table_laws",
      "verify/scheduler/run_laws", "verify/scheduler/laws", "verify/scheduler/replay",
      "verify/scheduler/from_diffusers", "verify/scheduler/by_name", "verify/sampling", "verify/user_schedule",
      "verify/watch"]),
    ("The course", "Exercises, and the laws that judge an answer. Try an exercise before you read its file.",
     ["course/compare", "course/exercise", "course/judge", "course/learner", "course/process",
      "course/pullbacks", "course/emulator",
      *(f"course/{path.stem}" for path in sorted((PACKAGE / "course").glob("ex[0-9][0-9]_*.py")))]),
    ("The command line, and your own parts", "A command a file.",
     ["registration", "cli/arguments", "cli/sampling_options", "cli/preview", "cli/sample", "cli/evaluate", "cli/train",
      "cli/verify", "cli/check", "cli/info", "cli/ranks", "cli/play", "cli/main"]),
    ("A page to play with", "`minidiff play`: a local web page, whose own files are in minidiff/play/static/.",
     ["play/jobs", "play/offer", "play/drawing", "play/attention", "play/noise", "play/judging", "play/guard",
      "play/app", "play/server"]),
    ("The engine on a GPU", "CuPy's side of the ops, and then the course in [kernels/](../kernels/README.md).",
     ["engine/cuda/launch", "engine/cuda/reduce", "engine/cuda/weight_gradients", "engine/cuda/linear",
      "engine/cuda/conv", "engine/cuda/norm", "engine/cuda/attention", "engine/cuda/activation",
      "engine/cuda/pixel_mixture", "engine/cuda/embedding", "engine/cuda/cast", "engine/cuda/random",
      "engine/cuda/adamw"]),
]


def modules() -> set[str]:
    """Every module of the package but the packages' own __init__ files."""
    return {str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")
            if path.name not in ("__init__.py", "__main__.py")}


def imports_of(module: str) -> set[str]:
    """The modules that a module imports when it is loaded."""
    tree, known, found = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")), modules(), set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "minidiff":
            base = "/".join(node.module.split(".")[1:])
            found |= {base} | {f"{base}/{alias.name}".lstrip("/") for alias in node.names}
    return found & known


def order() -> list[str]:
    return [module for _, _, names in SECTIONS for module in names]


def forward_imports() -> list[tuple[str, str]]:
    """(module, what it imports and what comes later), but for engine/cuda."""
    place = {module: i for i, module in enumerate(order())}
    return [(module, other) for module in place for other in sorted(imports_of(module))
            if place.get(other, -1) > place[module] and not other.startswith("engine/cuda/")]


def sentence(module: str) -> str:
    """What a module is about: the first sentence of its docstring."""
    text = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))
    return " ".join(text.split("\n\n")[0].split()).rstrip(".").replace("|", "\\|")


def page() -> str:
    lines = ["# Reading order", "",
             "Every file of minidiff, each after those that it imports. Begin with",
             "[examples/train_mnist_text.py](../examples/train_mnist_text.py), the whole job in one file, and then",
             "read as far as you like. Written by `python -m tests.support.reading_order`; a test compares it with the",
             "imports.", ""]
    for title, about, names in SECTIONS:
        lines += [f"## {title}", "", about, ""]
        lines += [f"- [{module}.py](../minidiff/{module}.py): {sentence(module)}." for module in names] + [""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

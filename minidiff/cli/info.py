"""minidiff info: what is installed and registered, and what a model file holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from minidiff import __version__, systems
from minidiff.cli.arguments import add_command, print_table
from minidiff.cli.sampling_options import described
from minidiff.errors import UserError


def add(commands) -> None:
    """Adds the command and its arguments. commands: what `add_subparsers` returned."""
    p = add_command(commands, "info", info,
                    help="List what is installed and registered, and what a model file holds.",
                    epilog="It changes nothing.")
    p.add_argument("--model", metavar="FILE",
                   help="a model.safetensors of any system, a name of weights that come with minidiff, or a "
                        "checkpoint of Stable Diffusion: a folder, a file, or a name at Hugging Face (org/name)")


def info(args: argparse.Namespace) -> int:
    import numpy
    import scipy

    from minidiff.data.dataset import DATASETS
    from minidiff.diffusion.densities import DENSITIES
    from minidiff.diffusion.samplers import SAMPLERS
    from minidiff.diffusion.schedules import SCHEDULES
    from minidiff.engine.backend import check_device
    from minidiff.engine.cuda import launch
    from minidiff.engine.parallel import cores
    try:
        check_device("cuda")
        gpu = "yes"
    except UserError as error:
        gpu = f"no ({str(error).split(':')[0]})"
    rows = [
        ("minidiff", f"{__version__} in {Path(__file__).parents[1]}"),
        ("numpy, scipy", f"{numpy.__version__}, {scipy.__version__}"),
        ("cores, GPU", f"{cores()}, {gpu}"),
        ("kernels", ", ".join(f"{family} {max(launch.versions(family))}" for family in launch.families())),
        ("data cache", _cache()),
        ("data sets", ", ".join(DATASETS)),
        ("schedules", ", ".join(SCHEDULES)),
        ("densities of times", ", ".join(DENSITIES)),
        ("samplers", ", ".join(SAMPLERS)),
        ("systems", ", ".join(_weights(name) for name in systems.SYSTEMS)),
    ]
    print_table(rows + (_model(systems.model_path(args.model)) if args.model else []))
    return 0


def _cache() -> str:
    from minidiff.data import mnist
    try:
        return str(mnist.cache_dir())
    except UserError as error:
        return f"none ({error})"


def _weights(name: str) -> str:
    """A system's name, and where its weights are."""
    try:
        path = systems.weights_of(name)
        own = path is not None and path != systems.system_class(name).shipped()
    except UserError as error:                              # of another package, which cannot be loaded
        return f"{name} ({error})"
    return f"{name} (not trained)" if path is None else f"{name} ({path})" if own else name


def _model(path: Path) -> list[tuple[str, str]]:
    """What a model file holds, as rows."""
    kind = systems.class_of_model(path)
    rows = kind.about(path)
    if kind.options():
        rows.append(("sampling", described(kind)))
    return [(name, _plain(value)) for name, value in rows]


def _plain(text: str) -> str:
    """A value on one line that a terminal can print; a file from elsewhere may hold any text."""
    return ascii(text)[1:-1][:300]

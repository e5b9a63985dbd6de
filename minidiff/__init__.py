"""minidiff: text-to-image diffusion from scratch, on NumPy or CuPy.

Five floors; each needs only those before it:
    engine      arrays with gradients
    nn          networks
    diffusion   the mathematics: schedules, q(x_t | x_0), samplers, guidance
    text        from a caption to token states
    systems     whole systems, each a page

Your own parts are entered by `register_sampler`, `register_schedule`, `register_density`, `register_dataset`,
`register_system` and `register_judge`, or by an entry point of your package (registry.py).
"""

import importlib

__version__ = "0.1.0"

# name -> where it is; each is imported when it is first asked for, so that `import minidiff` stays quick
_PLACES = {
    "TextToImage": "minidiff.systems.text_to_image",
    "load_system": "minidiff.systems",
    "load_dataset": "minidiff.data.dataset",
    "register_sampler": "minidiff.registration",
    "register_schedule": "minidiff.registration",
    "register_density": "minidiff.registration",
    "register_dataset": "minidiff.registration",
    "register_system": "minidiff.registration",
    "register_judge": "minidiff.registration",
}


def __getattr__(name: str):
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'minidiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])

"""minidiff: text-to-image diffusion from scratch, on NumPy or CuPy.

Reading order, each floor needing only those before it:
    engine      arrays with gradients
    nn          networks
    diffusion   the mathematics: schedules, q(x_t | x_0), samplers, guidance
    text        from a caption to token states
    systems     whole systems, each a page
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Loads `minidiff.TextToImage` when it is first asked for, so that `import minidiff` stays quick."""
    if name == "TextToImage":
        from minidiff.systems.text_to_image import TextToImage
        return TextToImage
    raise AttributeError(f"module 'minidiff' has no attribute {name!r}")

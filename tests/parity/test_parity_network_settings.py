"""Each row of support/network_settings.py against diffusers and transformers; run as a program it makes the goldens.

    PYTHONPATH=.:tests python tests/parity/test_parity_network_settings.py
"""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from support.network_settings import BASE, EQUAL, PARTS, SETTINGS, config_of, drawn, joined, named, numbers, ours

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")           # other programs' own
OUT = Path(__file__).parents[1] / "pretrained" / "network_settings.npz"
# diffusers takes no num_attention_heads, which ours takes for what it says; shift_factor is no matter of the network;
# initializer_... make weights
WITHOUT_ROW = {"unet": {"num_attention_heads"}, "vae": {"shift_factor"},
               "text_encoder": {"initializer_range", "initializer_factor"}}
EVERY = 5


def network(part: str, options: dict):
    config = config_of(part, options)
    if part == "unet":
        return diffusers.UNet2DConditionModel(**config).eval()
    if part == "vae":
        return diffusers.AutoencoderKL(**config).eval()
    kind = transformers.CLIPTextModelWithProjection if "projection_dim" in options else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**config)).eval()


def theirs(part: str, options: dict) -> tuple[dict[str, list[int]], np.ndarray]:
    """(the shapes of the weights, their network's outputs, one after the other)."""
    model, given = network(part, options), numbers(part, options)
    shapes = {name: list(a.shape) for name, a in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(a) for name, a in drawn(shapes).items()})

    def channels_first(name):
        return torch.from_numpy(given[name]).permute(0, 3, 1, 2)

    def channels_last(a):
        return a.permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        if part == "text_encoder":
            states = model(torch.from_numpy(given["ids"]), output_hidden_states=True)
            pooled = getattr(states, "pooler_output", None)
            if pooled is None:                              # with a projection they give its result only
                pooled = model.text_model(torch.from_numpy(given["ids"])).pooler_output
            return shapes, joined(states.last_hidden_state, states.hidden_states[-2], pooled,
                                  *([states.text_embeds] if hasattr(states, "text_embeds") else []))
        if part == "vae":
            q = model.encode(channels_first("image")).latent_dist
            return shapes, joined(*map(channels_last, (q.mean, q.logvar, model.decode(channels_first("z")).sample)))
        more = {}
        if model.config.addition_embed_type:
            more["added_cond_kwargs"] = {"text_embeds": torch.from_numpy(given["pooled"]),
                                         "time_ids": torch.from_numpy(given["sizes"])}
        if width := model.config.time_cond_proj_dim:
            embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
            more["timestep_cond"] = embed(None, torch.tensor([2.5, 2.5]), width)
        found = model(channels_first("z"), torch.from_numpy(given["t"]), torch.from_numpy(given["tau"]), **more)
        return shapes, joined(channels_last(found.sample))


@pytest.mark.parametrize("part, options", [row[:2] for row in SETTINGS if row[2] is EQUAL],
                         ids=lambda value: str(value)[-60:])
def test_a_setting(part, options, tmp_path):
    shapes, expected = theirs(part, options)
    found = ours(part, options, shapes, tmp_path)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("part", PARTS)
def test_every_setting_has_a_row(part):
    if part == "text_encoder":
        keys = set(transformers.CLIPTextConfig.__annotations__)
    else:
        settings = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
        keys = set(inspect.signature(settings.__init__).parameters) - {"self"}
    assert keys
    rows = {key for name, options, _ in SETTINGS if name == part for key in options}
    assert keys - WITHOUT_ROW[part] <= rows | set(BASE[part])


if __name__ == "__main__":
    kept = {}
    for part, options, verdict in SETTINGS:
        if verdict is EQUAL:
            shapes, expected = theirs(part, options)
            kept[named(part, options)] = shapes, expected[::EVERY], np.abs(expected).max()
    text = json.dumps({name: shapes for name, (shapes, _, _) in kept.items()}).encode()
    np.savez_compressed(OUT, shapes=np.frombuffer(text, np.uint8),
                        largest=np.array([largest for _, _, largest in kept.values()]),
                        sizes=np.array([len(found) for _, found, _ in kept.values()]),
                        outputs=np.concatenate([found for _, found, _ in kept.values()]))

"""LoRA: small changes of a checkpoint's weights, from a file of their own (Hu et al. 2021, section 4.1).

    W' = W + strength (alpha / r) B A           A (r, C), B (D, r), of a layer with weights W (D, C)

r is the rank of the change.  alpha is in the file, or else it is r.  Those of a convolution are A (r, C, 3, 3) and
B (D, r, 1, 1).

The change is made when a weight is read: it is a function in `changes` of weights.Weights, and no network knows of it.
Each program has its own names for a layer and its two matrices:

    unet.down_blocks.0.attentions.0...attn1.to_q.lora_A.weight, lora_B                      peft, diffusers
    unet.down_blocks.0.attentions.0...attn1.processor.to_q_lora.down.weight, up             diffusers, formerly
    lora_unet_down_blocks_0_attentions_0_..._attn1_to_q.lora_down.weight, lora_up, alpha    kohya
    lora_unet_input_blocks_1_1_..._attn1_to_q.lora_down.weight, lora_up, alpha              kohya, for SDXL

The dots of a name are not needed to know the layer: it is found by its name with "_" for each of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff.errors import UserError
from minidiff.input_files import parse_json
from minidiff.pretrained.config import Config
from minidiff.pretrained.single_file import unet_names
from minidiff.pretrained.weights import FLOATS, Entry, Weights, entries, metadata

MATRIX = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.[\w-]+)?\.weight")
PLAIN = re.compile(r"[\w.-]*")
ALPHA = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?)?\.(alpha)")
ROLES = {"A": "A", "down": "A", "B": "B", "up": "B", "alpha": "alpha"}
PREFIX = re.compile(r"(?:base_model\.model\.)?"
                    r"(?:(unet|text_encoder_2|text_encoder|diffusion_model)\.|lora_(unet|te1|te2|te)_)?"
                    r"(?:base_model\.model\.)?(.+)")
PARTS = {"unet": "unet", "diffusion_model": "unet", "text_encoder": "text_encoder", "te": "text_encoder",
         "te1": "text_encoder", "text_encoder_2": "text_encoder_2", "te2": "text_encoder_2"}
LONGEST = 300                                               # characters of a name
MOST_LAYERS = 5_000                                         # that settings may name; no model here has as many
ADAPTER = "adapter_model.safetensors"                       # peft's; adapter_config.json stands beside it


@dataclass(frozen=True)
class Change:
    """W -> W + scale B A, computed in dtype."""

    path: Path
    a: Entry                                # (r, C), or (r, C, kh, kw)
    b: Entry                                # (D, r), or (D, r, 1, 1)
    scale: float                            # strength alpha / r
    dtype: np.dtype

    def __call__(self, w: np.ndarray) -> np.ndarray:
        r = self.a.shape[0]
        a, b = self.a.read().reshape(r, -1).astype(self.dtype), self.b.read().reshape(-1, r).astype(self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            change = self.scale * (b @ a)
        if not np.isfinite(change).all():
            raise UserError(f"{self.path} is damaged: it holds NaN or infinity.")
        return w.astype(self.dtype) + change.reshape(w.shape)


def merged(loras: Sequence[tuple[str | Path, float]], parts: Mapping[str, Weights]) -> dict[str, Weights]:
    """The parts, to be changed by all LoRAs, given as (file, strength), when they are read.

    Reads names and shapes only.  UserError where a file is damaged, or is not for these parts.
    """
    layers = {part: layers_of(weights) for part, weights in parts.items()}
    found: dict[str, dict[str, list[Change]]] = {part: {} for part in parts}
    for path, strength in loras:
        if not math.isfinite(strength):
            raise UserError(f"{path}: the strength of a LoRA takes a finite number, not {strength}.")
        path = Path(path)
        found_in_file, settings = grouped(path, layers), settings_of(path)
        for (part, name), tensors in found_in_file.items():
            scale = strength * scale_of(path, name, tensors, below(settings, part))
            change = Change(path, tensors["A"], tensors["B"], scale, parts[part].dtype)
            check_shapes(change, name, parts[part].tensors[name])
            found[part].setdefault(name, []).append(change)
    return {part: weights.changed({name: in_turn(several) for name, several in found[part].items()})
            for part, weights in parts.items()}


def in_turn(functions: Sequence[Callable[[np.ndarray], np.ndarray]]) -> Callable[[np.ndarray], np.ndarray]:
    """The function that applies all of them, the first one first."""
    def all_of_them(w: np.ndarray) -> np.ndarray:
        for function in functions:
            w = function(w)
        return w
    return all_of_them


def grouped(path: Path, layers: Mapping[str, Callable[[str], str | None]]) -> dict[tuple[str, str], dict[str, Entry]]:
    """(part, name of the weight) -> the tensors A, B and perhaps alpha; UserError unless all have their place."""
    found: dict[tuple[str, str], dict[str, Entry]] = {}
    for name, entry in entries(path).items():
        match = MATRIX.fullmatch(name) or ALPHA.fullmatch(name)
        if match is None or len(name) > LONGEST or entry.dtype not in FLOATS and match[2] != "alpha":
            raise UserError(f"{path} holds the tensor {name[:80]!r}, which is of no kind of LoRA that minidiff has: "
                            "it has pairs of matrices (down and up, or lora_A and lora_B) of linear and convolution "
                            "layers.")
        place, role = place_of(match[1], layers), ROLES[match[2]]
        if place is None:
            raise UserError(f"{path} is a LoRA for another model: this one has no layer for its {name[:80]!r}.")
        if role in found.setdefault(place, {}):
            raise UserError(f"{path} holds {role} of {place[1]} twice, the second time as {name[:80]!r}.")
        found[place][role] = entry
    if not found:
        raise UserError(f"{path} is no LoRA: it holds no tensor.")
    for (_, name), tensors in found.items():
        if not {"A", "B"} <= tensors.keys():
            raise UserError(f"{path} is not complete: it has only {' and '.join(tensors)} of {name}.")
    return found


# --- names ------------------------------------------------------------------------------------------------------

def place_of(name: str, layers: Mapping[str, Callable[[str], str | None]]) -> tuple[str, str] | None:
    """(part, name of the weight) of a layer as a LoRA names it."""
    first, second, rest = PREFIX.fullmatch(name).groups()
    named = PARTS.get(first or second)
    for part in layers if named is None else [named]:       # adapters of peft do not tell the part
        found = layers[part](rest.replace(".processor.", ".")) if part in layers else None
        if found is not None:
            return part, found
    return None


def layers_of(weights: Weights) -> Callable[[str], str | None]:
    """The function that finds the name of a weight from the name of its layer in any style."""
    table = {flat(name.removesuffix(".weight")): name for name in weights.tensors if name.endswith(".weight")}
    blocks = sum(f"down_blocks.0.resnets.{i}" in weights for i in range(16))
    from_original = unet_names(blocks)

    def find(layer: str) -> str | None:
        key = flat(layer)
        # numbers between dots, as the first program has them
        original = re.sub(r"_(?=\d)|(?<=\d)_", ".", key) + ".weight"
        for one in (key, f"{key}_0",                        # to_out is to_out.0
                    re.sub(r"_to_(q|k|v|out)$", r"_\1_proj", key),
                    flat(from_original(original).removesuffix(".weight"))):
            if one in table:
                return table[one]
        return None
    return find


def flat(name: str) -> str:
    """The name with "_" for each dot, without the beginning that some text encoders leave out."""
    return name.replace(".", "_").removeprefix("text_model_")


# --- numbers ----------------------------------------------------------------------------------------------------

def scale_of(path: Path, name: str, tensors: Mapping[str, Entry], settings: Config) -> float:
    """alpha / r of a layer: alpha from its tensor, from the settings that peft writes, or r."""
    r = tensors["A"].shape[0] if tensors["A"].shape else 0
    if r < 1:
        raise UserError(f"{path} is damaged: a matrix of {name} has the shape {tensors['A'].shape}.")
    if "alpha" not in tensors:
        return settings_scale(settings, name.removesuffix(".weight"), r)
    alpha = tensors["alpha"].read()
    if alpha.size != 1 or not np.isfinite(alpha).all():
        raise UserError(f"{path} is damaged: alpha of {name} takes one finite number.")
    return float(alpha.ravel()[0]) / r


def settings_of(path: Path) -> Config:
    """What peft says of a LoRA, in the file's header or beside it; empty where it says nothing."""
    if path.name == ADAPTER and (path.parent / "adapter_config.json").exists():
        return checked(Config.load(path.parent / "adapter_config.json"))
    try:
        values = parse_json(metadata(path).get("lora_adapter_metadata", "{}"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: lora_adapter_metadata in its header is no JSON dict.")
    return checked(Config(values, path))


def checked(settings: Config) -> Config:
    """The settings.  UserError where alpha_pattern names more layers than any model has, or holds a regular expression,
    as peft takes it: a stranger's may take hours."""
    for name, pattern in settings.values.items():
        if name.rpartition(".")[2] != "alpha_pattern" or not isinstance(pattern, dict):
            continue
        if len(pattern) > MOST_LAYERS:
            raise UserError(f"{settings.path}: alpha_pattern names {len(pattern):,} layers, and at most "
                            f"{MOST_LAYERS:,} are read.")
        odd = next((key for key in pattern if not PLAIN.fullmatch(key)), None)
        if odd is not None:
            raise UserError(f"{settings.path}: alpha_pattern holds the regular expression {odd[:40]!r}, which is not "
                            "read: write the names of its layers.")
    return settings


def below(settings: Config, part: str) -> Config:
    """The settings of a part, where they are told apart."""
    of_part = {name.removeprefix(f"{part}."): value for name, value in settings.values.items()
               if name.startswith(f"{part}.")}
    return Config(of_part or settings.values, settings.path)


def settings_scale(settings: Config, layer: str, r: int) -> float:
    """alpha / r, or alpha / sqrt(r) where use_rslora is true (Kalajdzievski 2023)."""
    pattern = settings.values.get("alpha_pattern") or {}
    # a key is the name of a layer, or the end of its name
    named, whole = pattern.items() if isinstance(pattern, dict) else (), f".{layer}"
    own = [value for key, value in named if whole.endswith(f".{key}")]
    alpha = Config({"lora_alpha": own[0]} if own else settings.values, settings.path).number("lora_alpha", r)
    return alpha / (math.sqrt(r) if settings.flag("use_rslora", False) else r)


def check_shapes(change: Change, name: str, entry: Entry) -> None:
    """UserError unless B A has the shape of the weight."""
    a, b = without_points(change.a.shape), without_points(change.b.shape)
    w = without_points(entry.shape[::-1] if entry.transposed else entry.shape)
    r = a[0]
    if len(w) < 2 or a != (r, *w[1:]) or b != (w[0], r):
        raise UserError(f"{change.path} is a LoRA for another model: its matrices of {name} are {change.a.shape} and "
                        f"{change.b.shape}, and the weight here is {entry.shape}.")


def without_points(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1 x 1 convolution is a linear layer."""
    return shape[:2] if shape[2:] == (1, 1) else shape

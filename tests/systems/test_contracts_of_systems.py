"""What every system promises: it checks images, computes in any floating dtype, can be copied, takes whole numbers."""

import copy
import inspect
import pickle

import numpy as np
import pytest
from support import small_systems, tiny

from minidiff import systems
from minidiff.data import digits, mnist
from minidiff.data.pixels import to_float
from minidiff.engine.random import SampleStreams
from minidiff.errors import UserError
from minidiff.evaluation import fidelity, metrics, reconstruction
from minidiff.nn.images import clean_images
from minidiff.systems.dpm import DPM

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), np.uint8)
IMAGES, CAPTIONS = to_float(PIXELS), ["7", "a wide zero"]
KNOWN = np.ones(IMAGES.shape, bool)
FEW = {"steps": 2, "super_steps": 2}                        # of what takes long

# every public function of a system that takes clean images, with images of a caller
TAKES_IMAGES = {
    "clip": {"embed_images": lambda m, x: m.embed_images(x),
             "zero_shot": lambda m, x: m.zero_shot(x, [["7"], ["0"]])},
    "ddpm": {"interpolate": lambda m, x: m.interpolate(x[0], x[1], [0.5], t=20, steps=2),
             "bits_per_dim": lambda m, x: m.bits_per_dim(x, terms=1)},
    "vdm": {"bits_per_dim": lambda m, x: m.bits_per_dim(x, terms=1),
            "bits_by_noise": lambda m, x: np.array([row.bits for row in m.bits_by_noise(x, rows=3, terms=1)])},
    "dalle2": {"invert": lambda m, x: m.invert(x, steps=2)[0], "variations": lambda m, x: m.variations(x, steps=2),
               "interpolations": lambda m, x: m.interpolations(x[0], x[1], [0.5], steps=2),
               "text_diff": lambda m, x: m.text_diff(x[0], "7", "0", [0.5], steps=2)},
    "latent": {"encode": lambda m, x: m.encode(x), "vary": lambda m, x: m.vary(x, CAPTIONS, steps=2),
               "inpaint": lambda m, x: m.inpaint(x, KNOWN, CAPTIONS, steps=2)},
    "autoencoder-kl": {name: lambda m, x, name=name: getattr(m, name)(x) for name in ("encode", "reconstruct")}
    | {"posterior": lambda m, x: m.posterior(x)[0], "rate": lambda m, x: m.rate(x)["bits"]},
    "autoencoder-vq": {name: lambda m, x, name=name: getattr(m, name)(x) for name in ("encode", "reconstruct", "codes")}
    | {"rate": lambda m, x: m.rate(x)["bits"]},
    "digit-classifier": {"read": lambda m, x: m.read(x)[0]},
    "dalle": {"vae.tokens": lambda m, x: m.vae.tokens(x)},
}
EVALUATION = {
    "fidelity.measure": lambda x: fidelity.measure(x, CAPTIONS, np.zeros((9, 6)),
                                                   small_systems.small("digit-classifier")),
    "attribute_matches": lambda x: metrics.attribute_matches(CAPTIONS, x if x.dtype != np.uint8 else x.astype(int)),
    "reconstruction.measure": lambda x: reconstruction.measure(
        small_systems.small("autoencoder-vq"), x, np.array([7, 0]), small_systems.small("digit-classifier")),
    "ImageClassifier.read": lambda x: small_systems.small("digit-classifier").classifier.read(x),
}
TAKERS = [pytest.param(lambda x, f=f, name=name: f(small_systems.small(name), x), id=f"{name}.{what}")
          for name, functions in TAKES_IMAGES.items() for what, f in functions.items()] \
    + [pytest.param(f, id=what) for what, f in EVALUATION.items()]
OF_TRAINING = {"loss", "ahead", "contrast", "vlb", "image_loss", "decoder_loss", "image_features", "loss_of", "bound"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_systems.ship(monkeypatch)


def test_no_function_that_takes_images_is_left_out():
    for name in systems.SYSTEMS:
        kind = systems.system_class(name)
        for what, function in inspect.getmembers(kind, inspect.isfunction):
            own = not what.startswith("_") and what not in OF_TRAINING
            if own and {"images", "image", "x_0", "x"} & set(inspect.signature(function).parameters):
                assert what in TAKES_IMAGES.get(name, {}), f"{name}.{what}"


@pytest.mark.parametrize("take", TAKERS)
def test_images_are_floats_from_minus_one_to_one(take):
    for wrong in (PIXELS, PIXELS.astype(np.int64), IMAGES > 0, IMAGES.astype(complex),
                  np.ma.array(IMAGES, mask=IMAGES > 0.5)):
        with pytest.raises(TypeError, match="floats in .-1, 1.|real numbers or bools|masked array"):
            take(wrong)
    for wrong in (PIXELS.astype(np.float32), 2 * IMAGES, np.full_like(IMAGES, np.nan), np.full_like(IMAGES, -np.inf)):
        with pytest.raises(ValueError, match="images must be in .-1, 1., where black is -1, not"):
            take(wrong)
    with pytest.warns(UserWarning, match="black is -1 here, so 2 x - 1 converts images in .0, 1."):
        try:
            take(PIXELS.astype(np.float32) / 255)
        except ValueError as error:                         # where it takes 8-bit values only, or more images
            assert "8-bit" in str(error) or "more than k" in str(error)


@pytest.mark.parametrize("name, what", [(name, what) for name, fs in TAKES_IMAGES.items() for what in fs])
def test_other_arrays_of_the_same_images_give_the_same(name, what):
    model, f = small_systems.small(name), TAKES_IMAGES[name][what]
    right = f(model, IMAGES)
    read_only = IMAGES.copy()                               # no function writes into what it is given
    read_only.setflags(write=False)
    for same in (read_only, IMAGES.astype(">f4"), np.asfortranarray(IMAGES), IMAGES.astype(np.float64)):
        np.testing.assert_allclose(f(model, same), right, atol=1e-5)


def test_clean_images():
    for quiet in (np.ones((1, 4, 4, 1)), np.zeros((1, 4, 4, 1)), np.zeros((0, 4, 4, 1)), -IMAGES):
        assert np.array_equal(clean_images(quiet), quiet)
    half = np.nextafter(IMAGES.astype(np.float16), np.float16(2))       # a little above 1 here and there
    assert half.max() > 1 and clean_images(half).dtype == np.float32
    with pytest.raises(ValueError, match=r"images must be \(B, 28, 28, 1\), not \(28, 28, 1\)"):
        clean_images(IMAGES[0], (28, 28, 1))


# --- dtypes -------------------------------------------------------------------------------------------------

def uses(name: str) -> dict:
    """What can be done with a system: name -> function of it."""
    kind, found = systems.system_class(name), dict(TAKES_IMAGES.get(name, {}))
    acts = {what: lambda m, f=f: f(m, IMAGES) for what, f in found.items()}
    if kind is DPM:
        acts["sample"] = lambda m: m.sample(3)
    elif kind.options() is not None:
        few = {option: value for option, value in FEW.items() if option in kind.options()}
        acts["sample"] = lambda m: m.sample(CAPTIONS if kind.reads_captions else ["", ""], **few)
    if name == "text-to-image":
        acts["encode"] = lambda m: m.encode(CAPTIONS)[0]
    if name == "clip":
        acts["embed_captions"] = lambda m: m.embed_captions(CAPTIONS)
    return acts


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(np.float16, 0.05), (np.float64, 2e-3)])
@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_a_system_works_in_any_floating_dtype(name, dtype, tolerance):
    model, other = small_systems.small(name), copy.deepcopy(small_systems.small(name))
    assert other.astype(dtype) is other and other.dtype == dtype and model.dtype == np.float32
    assert all(p.dtype == dtype for p in other.parameters().values() if p.requires_grad)
    for what, act in uses(name).items():
        right, got = act(model), act(other)
        if what in ("codes", "vae.tokens") or name in ("dalle", "autoencoder-vq") and dtype == np.float16:
            assert np.shape(got) == np.shape(right) and np.isfinite(got).all()      # a choice may fall otherwise
        else:
            np.testing.assert_allclose(got, right, atol=tolerance * max(1, np.abs(right).max()), err_msg=what)


@pytest.mark.parametrize("dtype", [int, complex, str, bool, object])
def test_other_dtypes_are_refused(dtype):
    model = copy.deepcopy(small_systems.small("ddpm"))
    with pytest.raises(TypeError, match="dtype must be a floating dtype, such as float16, not"):
        model.astype(dtype)
    assert model.dtype == np.float32


def test_measured_numbers_keep_their_dtype():
    judge = copy.deepcopy(small_systems.small("digit-classifier")).astype(np.float16)
    assert judge.cov.dtype == np.float64 and judge.dtype == np.float16


# --- copies -------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "copy", "pickle"])
@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_a_copy_of_a_system_does_the_same(name, copied):
    model = small_systems.small(name)
    twin = copied(model)
    for what, act in uses(name).items():
        np.testing.assert_array_equal(act(model), act(twin), err_msg=what)
    if hasattr(twin, "schedule"):
        assert not twin.schedule.alpha_bar.flags.writeable


def test_copies_of_streams_tokenizers_and_data(monkeypatch):
    monkeypatch.setattr(mnist, "load", lambda folder, split: tiny.images(20))
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        streams = SampleStreams(0, 2)
        streams.normal((3,))
        twin = copied(streams)
        np.testing.assert_array_equal(twin.normal((3,)), streams.normal((3,)))
        tokenizer = small_systems.small("text-to-image").tokenizer
        assert copied(tokenizer).encode("a bold seven") == tokenizer.encode("a bold seven")
        data = digits.load(None)
        np.testing.assert_array_equal(copied(data).images([0, 1]), data.images([0, 1]))
        assert len(copied(data).test()) == 20


# --- whole numbers ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in systems.SYSTEMS if systems.system_class(name).options() is not None])
def test_options_take_numpys_numbers_and_refuse_what_is_not_whole(name):
    model = small_systems.small(name)
    captions = ["7"] if model.reads_captions else [""]
    plain = {option: value for option, value in (model.options() | FEW).items()
             if option in model.options() and isinstance(value, int | float) and not isinstance(value, bool)}
    as_numpy = {option: np.int64(value) if isinstance(value, int) else np.float32(value)
                for option, value in plain.items()}
    np.testing.assert_allclose(model.sample(captions, seed=np.int64(5), **as_numpy),
                               model.sample(captions, seed=5, **plain), atol=1e-5)
    for option, value in [*plain.items(), ("seed", 5)]:
        if isinstance(value, int) and option != "algorithm":
            for wrong in (float(value), True, str(value), None):
                with pytest.raises((TypeError, ValueError), match="whole number"):
                    model.sample(captions, **plain | {option: wrong})
        elif isinstance(value, float):
            for wrong in (np.nan, str(value), None, [value], 1j):
                with pytest.raises(ValueError, match=f"{option.removeprefix('prior_').removeprefix('super_')} must be"):
                    model.sample(captions, **plain | {option: wrong})
    for option in model.options().keys() & {"sampler", "threshold", "prior", "variance"}:
        for wrong in (None, 2, ["ddim"], {}):
            with pytest.raises(ValueError, match="must be one of|there is no sampler"):
                model.sample(captions, **plain | {option: wrong})


def test_a_system_of_numpys_numbers_can_be_saved_and_loaded(tmp_path):
    config = small_systems.CONFIGS["ddpm"]
    numpys = type(config)(T=np.int64(50), steps=np.int8(3), unet=type(config.unet)(
        **vars(config.unet) | {"widths": (np.int64(8), np.int64(16)), "heads": np.int64(2)}))
    model = small_systems.new("ddpm", numpys)
    assert model.config == config
    model.save(tmp_path / "m.safetensors")
    assert type(model).load(tmp_path / "m.safetensors").config == config
    for wrong in ({"T": 50.0}, {"T": True}, {"steps": 2 * 10**9}, {"schedule": "x" * 300}):
        with pytest.raises(ValueError):
            small_systems.new("ddpm", type(config)(**vars(config) | wrong))


@pytest.mark.parametrize("dtype", (np.float16, np.int8))
@pytest.mark.parametrize("most", (7e4, -7e4))
def test_a_weight_that_half_precision_cannot_hold_is_named(tmp_path, most, dtype):
    """float16, which int8 files have for vectors, ends at 65,504; a file in float32 holds the weight."""
    model = small_systems.small("ddpm")
    name, weights = next((name, p) for name, p in model.parameters().items() if p.ndim == 1)
    before = weights.data.copy()
    weights.data[0] = most
    try:
        with pytest.raises(UserError, match=f"^float16 holds numbers up to 65,504, and the weights '{name}' reach 70,"):
            model.save(tmp_path / "m.safetensors", dtype=dtype)
        assert not list(tmp_path.iterdir())
        model.save(tmp_path / "m.safetensors")
    finally:
        weights.data[:] = before

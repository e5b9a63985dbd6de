"""VDM: what its loss is, the 8 bits of an untrained model, the derivative of its denoiser, and where the bits go."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support import small_systems, tiny
from support.examples import load
from support.law_tools import LEVELS

from minidiff.data import mnist
from minidiff.data.pixels import to_float
from minidiff.diffusion.variational import LevelDecoder, noised
from minidiff.engine.tensor import Tensor, gradients
from minidiff.errors import UserError
from minidiff.nn.unet import UNet, UNetConfig
from minidiff.systems.learned_path import FLOOR, INSIDE, SMALL, with_ends
from minidiff.systems.vdm import VDM, VDMConfig

CONFIG = replace(small_systems.CONFIGS["vdm"], shape=(4, 4, 1))


def made(moved: bool = True) -> VDM:
    model = VDM(CONFIG, None, np.random.default_rng(0))
    return small_systems.moved(model) if moved else model


@pytest.fixture(scope="module")
def model() -> VDM:
    return made()


def images(count: int, seed: int = 0) -> np.ndarray:
    return LEVELS[np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1))].astype(np.float32)


@pytest.mark.parametrize("first", [-13.3, -4.0])
def test_the_loss_is_the_bound_in_bits_a_number(first):
    """With an eps_hat that is wrong by .3 everywhere: prior + (gamma_1 - gamma_0) .09 / 2 + decoder, in bits.

    The decoder's term is .008 nats where the path begins at -13.3, and 4 nats where it begins at -4.
    """
    model, B = made(False), 34 * 4
    model.path.first = first
    model.eps_hat = lambda x_t, gamma: Tensor(eps + np.float32(0.3))
    x_0, t = images(B), with_ends((np.arange(B) + 0.5) / B)
    eps = np.random.default_rng(1).standard_normal(x_0.shape, dtype=np.float32)
    path, start = model.path.path(), t < 0
    decoder = -LevelDecoder(path.gamma_0)(x_0[start], noised(x_0[start], np.full(4, path.gamma_0), eps[start])).mean()
    expected = float(model.path.prior(x_0).data) + (path.gamma_1 - path.gamma_0) * 0.045 + decoder
    assert start.sum() == 4 and float(model.loss(x_0, t, eps).data) == pytest.approx(expected / math.log(2), rel=1e-4)


def test_the_pieces_follow_the_squares_of_the_second_term_at_each_time():
    """d/dw of -E[(gamma' m)^2 log shares[k]] / log 2 in closed form, with m = .045 at all times and many slopes."""
    model, B, K = made(False), 34 * 20, CONFIG.pieces
    model.path.w.data = np.linspace(-1, 1, K, dtype=np.float32)
    model.eps_hat = lambda x_t, gamma: Tensor(eps + np.float32(0.3))
    x_0, t = images(B), with_ends((np.arange(B) + 0.5) / B)
    eps = np.random.default_rng(1).standard_normal(x_0.shape, dtype=np.float32)
    dw, = gradients(model.loss(x_0, t, eps), [model.path.w])
    e = np.exp(np.linspace(-1, 1, K))
    p = e / e.sum()
    shares = (1 - FLOOR) * p + FLOOR / K
    slopes = (CONFIG.gamma_1 - CONFIG.gamma_0) / (K * shares)
    inside = t[(t >= 0) & (t < 1)]
    k = np.searchsorted(np.cumsum(shares)[:-1], inside, side="right")
    squares = INSIDE / B * np.bincount(k, (slopes[k] * 0.045) ** 2, minlength=K)
    d_log_shares = (1 - FLOOR) * p[:, None] * (np.eye(K) - p) / shares[:, None]     # by w_j, in column j
    np.testing.assert_allclose(dw, -SMALL * squares @ d_log_shares / math.log(2), rtol=1e-3, atol=1e-6)


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_and_so_are_its_gradients(model):
    x_0, t = images(4), np.array([-0.01, 0.3, 0.8, 1.02])
    eps = np.random.default_rng(1).standard_normal(x_0.shape, dtype=np.float32)
    leaves = list(model.parameters().values())
    whole = model.loss(x_0, t, eps)
    parts = [model.loss(x_0[i:i + 2], t[i:i + 2], eps[i:i + 2]) for i in (0, 2)]
    assert float(whole.data) == pytest.approx(sum(float(p.data) for p in parts) / 2, rel=1e-5)
    of = [gradients(y, leaves) for y in (whole, *parts)]
    for name, dw, a, b in zip(model.parameters(), *of, strict=True):
        np.testing.assert_allclose(dw, (a + b) / 2, rtol=1e-3, atol=1e-5, err_msg=name)
    moved = {name for name, dw in zip(model.parameters(), of[0], strict=True) if np.abs(dw).max() > 0}
    assert {"path.ends", "path.w", "logits.w", "unet.conv_in.w"} <= moved


@pytest.mark.parametrize("colours", [1, 3])
def test_an_untrained_model_needs_8_bits(colours):
    """Its levels are equally likely, and the bound of independent pixels is tight: within six standard errors, false
    alarm 2e-9, and .01 bits for the prior's term at gamma_1 = 6.  A dimension is a colour of a pixel."""
    unet = replace(CONFIG.unet, channels=5 * colours)
    model = VDM(replace(CONFIG, shape=(4, 4, colours), unet=unet), None, np.random.default_rng(0))
    x_0 = LEVELS[np.random.default_rng(0).integers(0, 256, (40, 4, 4, colours))].astype(np.float32)
    bits = model.bits_per_dim(x_0, terms=24)
    assert abs(bits.mean() - 8) < 6 * bits.std() / math.sqrt(40) + 0.01 and bits.std() < 1


def test_the_bound_by_noise_levels(model):
    x_0 = images(6)
    rows = model.bits_by_noise(x_0, rows=4, terms=4)
    path = model.path.path()
    assert len(rows) == 4 and rows[0].start == path.gamma_0 and rows[-1].stop == pytest.approx(path.gamma_1)
    assert rows[0].stop - rows[0].start == pytest.approx((path.gamma_1 - path.gamma_0) / 4)
    assert all(math.isfinite(row.bits) and row.error >= 0 for row in rows)


def test_the_unet_is_given_gamma_as_a_time_of_0_to_1000(model, monkeypatch):
    seen, straight = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, t: seen.append(t) or straight(self, x, t))
    model.eps_hat(np.zeros((3, 4, 4, 1), np.float32), np.array([-14.0, 1.0, 6.0]))
    np.testing.assert_allclose(seen[0], [0, 750, 1000])


def test_gamma_reaches_the_network_and_its_prediction_is_that_of_each_sample(model):
    x_t = np.random.default_rng(0).standard_normal((3, 4, 4, 1), dtype=np.float32)
    gamma = np.array([-8.0, 0.0, 3.0])
    together = model.predict_at(x_t, gamma)
    alone = np.concatenate([model.predict_at(x_t[i:i + 1], gamma[i:i + 1]) for i in range(3)])
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert np.abs(together - model.predict_at(x_t, gamma[::-1].copy())).max() > 0.01
    other = model.denoiser()
    t = np.array([0, other.schedule.T - 1, 3])
    expected = model.predict_at(x_t, model.path.path()(t / (other.schedule.T - 1)))
    np.testing.assert_allclose(other.network(x_t, t, None), expected, atol=1e-3)


def test_a_threshold_of_the_denoiser_is_of_x0_hat(model):
    x_t, t = np.random.default_rng(0).standard_normal((2, 4, 4, 1), dtype=np.float32), np.array([2, 9])
    plain, clipped = model.denoiser()(x_t, t), model.denoiser(clip=lambda x0_hat: x0_hat.clip(-0.1, 0.2))(x_t, t)
    np.testing.assert_array_equal(clipped, plain.clip(-0.1, 0.2))
    assert plain.min() < -0.1 and plain.max() > 0.2


def test_the_derivative_of_the_denoiser():
    rng, t = np.random.default_rng(0), np.array([9, 15])
    other = made().astype(np.float64)
    x, dy, u = rng.standard_normal((3, 2, 4, 4, 1))
    denoiser, h = other.denoiser(), 1e-6
    x0_hat, dx = denoiser.vjp(x, t, dy)
    np.testing.assert_allclose(x0_hat, denoiser(x, t))
    numeric = ((denoiser(x + h * u, t) - denoiser(x - h * u, t)) * dy).sum() / (2 * h)
    assert (dx * u).sum() == pytest.approx(numeric, rel=1e-4)
    assert np.abs(x0_hat).max() < 1 + 1e-6                  # a mean of levels, without clipping


def test_the_table_of_its_samplers_is_the_path(model):
    schedule, path = model.schedule, model.path.path()
    assert schedule.T == CONFIG.T
    np.testing.assert_allclose(-schedule.log_snr(np.arange(CONFIG.T)), path(np.linspace(0, 1, CONFIG.T)), atol=1e-6)
    *_, last = model.trajectory([""] * 2, steps=4)
    np.testing.assert_array_equal(last.x_t, model.sample([""] * 2, steps=4))


def test_captions_and_other_configurations_are_refused(model):
    with pytest.raises(UserError, match="vdm draws without captions"):
        model.sample(["a seven"])
    for wrong, message in (({"gamma_0": 6.0}, "must rise"), ({"gamma_1": 40.0}, "must rise"), ({"T": 1}, "T at least"),
                           ({"pieces": 0}, "pieces, steps and batch"), ({"waves": (9,)}, "waves must be numbers"),
                           ({"unet": UNetConfig(channels=3)}, "unet must have channels = "),
                           ({"shape": (6, 6, 1)}, "multiples of 4")):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **wrong)


def test_its_configuration_for_colour():
    config = VDM.config_for((32, 32, 3))
    assert config.unet.channels == 3 * (1 + 2 * len(config.waves)) and config.shape == (32, 32, 3)
    assert VDM.config_for((28, 28, 1)) == VDMConfig()


def test_its_batch(data):
    from minidiff.systems.stage import Step
    stage, = small_systems.new("vdm").stages(data)
    x_0, t, eps = stage.batch(Step(0, 1, 0, 3, 68))
    assert x_0.shape == eps.shape == (68, 28, 28, 1) and (t < 0).sum() == (t >= 1).sum() == 2
    assert tiny.digits().shape == x_0.shape[1:]


def test_the_shipped_weights_need_less_than_a_bit_and_a_tenth():
    """Digits differ by .29 bits/dim, so the mean of 100 by .03: around .92, this is six standard errors (1e-9)."""
    bits = VDM.load().bits_per_dim(to_float(mnist.packed().images[:100])[..., None], terms=8)
    assert bits.mean() < 1.1 and bits.std() < 0.5


@pytest.mark.slow
def test_the_example(monkeypatch, tmp_path, capsys):
    """Both paths have the same ends, so the two bounds differ by their noise alone; the rows sum to the second term."""
    example = load("14_vdm")
    small_systems.ship(monkeypatch)
    monkeypatch.setattr(example, "load_dataset", lambda *a, **k: small_systems.data())
    rows = example.main(images=4, terms=100, out=str(tmp_path / "v.png"))
    said = capsys.readouterr().out
    learned, straight = ([float(cell.split("±")[0]) for cell in line.split("|")[2:6]] for line in said.splitlines()
                         if line.startswith(("| learned", "| a straight line")))
    assert learned[0] == straight[0] and learned[3] == pytest.approx(sum(learned[:3]), abs=3e-4)
    # of the same noise: 8 other seeds gave 8.12 to 8.16, and differences of .001 between the paths (400 times each)
    assert learned[3] == pytest.approx(straight[3], abs=0.02)
    assert sum(row.bits for row in rows) == pytest.approx(learned[1], abs=0.25) and len(rows) == 10
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("v.png", "v_digits.png"))
    with pytest.raises(UserError, match="--images must be from 2 to"):
        example.main(images=1, out=str(tmp_path / "v.png"))
    example.main(train=str(tmp_path / "run"), effort=0.5, images=2, terms=1, out=str(tmp_path / "w.png"),
                 config=small_systems.CONFIGS["vdm"])
    assert (tmp_path / "run" / "model.safetensors").exists()

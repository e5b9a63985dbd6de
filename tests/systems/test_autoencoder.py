"""The autoencoders: the rate in closed form, probabilistic PCA as the optimum, how they train and are saved."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from support import small_systems
from support.examples import load
from support.gradcheck import check_gradients
from support.law_tools import quickly, rotation
from support.small_systems import moved

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients, no_grad
from minidiff.nn.autoencoder import AutoencoderConfig
from minidiff.nn.image_classifier import perceptual_distance
from minidiff.nn.layers import Linear
from minidiff.nn.module import Module
from minidiff.systems.autoencoder import (
    KLAutoencoder,
    KLAutoencoderConfig,
    VQAutoencoder,
    VQAutoencoderConfig,
)
from minidiff.systems.stage import Step
from minidiff.training.trainer import TrainConfig, Trainer

NETWORK = AutoencoderConfig(widths=(4, 8), groups=2)
KL = KLAutoencoderConfig(network=NETWORK, latent=2, steps=4, perceptual=0.0)
VQ = VQAutoencoderConfig(network=NETWORK, latent=3, codes=8, steps=4, perceptual=0.0)
seeds = st.integers(0, 2**32 - 1)


def kl_autoencoder(**changes) -> KLAutoencoder:
    return made(KLAutoencoder(replace(KL, **changes), None, np.random.default_rng(0)))


def vq_autoencoder(**changes) -> VQAutoencoder:
    return made(VQAutoencoder(replace(VQ, **changes), None, np.random.default_rng(0)))


def made(system):
    """With a small classifier for the perceptual term."""
    system.take({"digit-classifier": small_systems.small("digit-classifier")})
    return system


def trained(system, data, steps: int) -> list[float]:
    """The losses of so many steps of training."""
    trainer = Trainer(next(system.stages(data)), TrainConfig(steps=steps, batch=8))
    for _ in range(steps):
        trainer.step()
    return trainer.losses


# ---- KL: the bound, and linear maps ----------------------------------------------------------------------

class FixedMoments(Module):
    """An encoder that gives the same moments for every image."""

    def __init__(self, mean, log_var):
        self.moments = Tensor(np.concatenate([np.ravel(mean), np.ravel(log_var)]), requires_grad=True)

    def forward(self, x):
        return self.moments + Tensor(np.zeros((x.shape[0], 1, 1, self.moments.size)))


class Zero(Module):
    """A decoder that answers 0, in float64."""

    def __init__(self):
        self.zero = Tensor(np.zeros(()))

    def forward(self, z):
        return self.zero * z[..., :1]


@settings(deadline=None, max_examples=25)
@given(st.floats(-3, 3), st.floats(-4, 3))
def test_the_rate_is_the_divergence_by_quadrature_and_so_is_its_gradient(mean, log_var):
    """One latent number, one black pixel and a decoder that says 0: the loss is 1 + w KL."""
    system, std = kl_autoencoder(latent=1, kl=0.7), math.exp(log_var / 2)
    system.encoder, system.decoder = FixedMoments(mean, log_var), Zero()

    def divergence(mean, std):
        q, p = stats.norm(mean, std), stats.norm()
        return integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), mean - 12 * std, mean + 12 * std,
                              limit=200)[0]
    loss = system.loss(-np.ones((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)))
    assert loss.item() == pytest.approx(1 + 0.7 * divergence(mean, std), rel=1e-7)
    # d KL / d mean = mean,  d KL / d log_var = (var - 1) / 2
    np.testing.assert_allclose(gradients(loss, [system.encoder.moments])[0], [0.7 * mean, 0.35 * (std**2 - 1)],
                               rtol=1e-9, atol=1e-12)


class LinearEncoder(Module):
    """mean = V (x - mu), log_var given."""

    def __init__(self, V, mu, log_var):
        self.V, self.mu, self.log_var = (Tensor(a, requires_grad=True) for a in (V.T.copy(), mu, log_var))

    def forward(self, x):
        mean = (x - self.mu) @ self.V
        return ops.concat([mean, self.log_var + Tensor(np.zeros(mean.shape))])


class LinearDecoder(Module):
    """x_hat = W z + mu."""

    def __init__(self, W, mu):
        self.W, self.mu = Tensor(W.T.copy(), requires_grad=True), Tensor(mu, requires_grad=True)

    def forward(self, z):
        return z @ self.W + self.mu


@pytest.mark.law(
    33, "the optimum of the KL autoencoder with linear maps is probabilistic PCA, W = U (L - s^2 I)^{1/2}, for a "
        "decoder's noise s^2 = w / 2; there the loss is stationary, and the bound equals the exact log-likelihood",
    source="the system's own loss, its expectation over eps by points of the same two moments; Tipping & Bishop 1999, "
           "eq. 7; Lucas et al. 2019, section 4; scipy's Gaussian log-density",
    tolerance="1e-9: gradients of means over 40 samples of numbers below 1e2")
@quickly
@given(st.integers(2, 6), st.data(), seeds)
def test_a_linear_kl_autoencoder_is_probabilistic_pca(d, draw, seed):
    k = draw.draw(st.integers(1, d - 1))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, d)) @ (rotation(rng, d) * rng.uniform(0.5, 2, d)) + rng.normal(size=d)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    L, U, s2 = values[-k:], vectors[:, -k:], values[-k] * rng.uniform(0.05, 0.9)   # any noise below what is kept
    W = U * np.sqrt(L - s2)                                         # (d, k)

    system = kl_autoencoder(latent=k, kl=2 * s2)
    at = {"V": W.T / L[:, None], "mu": x.mean(0), "log_var": np.log(s2 / L), "W": W, "mu2": x.mean(0)}
    # eps = +- sqrt(k) e_i: mean 0 and covariance I, so that the mean of a quadratic is exact
    points = np.concatenate([np.eye(k), -np.eye(k)]) * math.sqrt(k)
    images, eps = np.repeat(x, 2 * k, axis=0)[:, None, None], np.tile(points, (40, 1))[:, None, None]

    def loss(V, mu, log_var, W, mu2):
        system.encoder, system.decoder = LinearEncoder(V, mu, log_var), LinearDecoder(W, mu2)
        return system.loss(images, eps)
    best = loss(**at)
    for gradient in gradients(best, list(system.parameters().values())):
        np.testing.assert_allclose(gradient, 0, atol=1e-9)
    # L d / 2 s^2 + (d/2) log 2 pi s^2 = -E log p(x) at the optimum, where the bound is tight
    exact = stats.multivariate_normal(x.mean(0), W @ W.T + s2 * np.eye(d)).logpdf(x).mean()
    assert best.item() * d / (2 * s2) + d / 2 * math.log(2 * math.pi * s2) == pytest.approx(-exact, rel=1e-9)
    for size in (0.01, 0.1, 1.0):
        assert loss(**{name: a + size * rng.normal(size=a.shape) for name, a in at.items()}).item() > best.item()


def test_the_gradient_of_the_whole_loss(data):
    system = moved(kl_autoencoder(adversary=0.0).astype(np.float64))
    x, eps = data.images([0, 1]).astype(np.float64), np.random.default_rng(0).normal(size=(2, 7, 7, 2))
    check_gradients(lambda *_: system.loss(x, eps), *system.parameters().values(), directions=1, rtol=1e-5)


def test_the_rate_in_bits(data):
    """Given moments, the rate is the sum over 98 numbers of KL / log 2."""
    system = kl_autoencoder()
    system.encoder.conv_out.w.data[:] = 0
    system.encoder.conv_out.b.data = np.array([0.5, -1.0, 0.0, -2.0], np.float32)       # means, log variances
    nats = 49 * ((0.25 + 1 - 1 - 0) / 2 + (1 + math.exp(-2) - 1 + 2) / 2)
    assert system.rate(data.images(range(3)))["bits"] == pytest.approx(nats / math.log(2), rel=1e-5)
    mean, std = system.posterior(data.images(range(3)))
    assert mean.shape == std.shape == (3, 7, 7, 2) and np.array_equal(system.encode(data.images(range(3))), mean)


# ---- VQ --------------------------------------------------------------------------------------------------

def test_the_vq_loss_is_equation_3(data):
    system, x = moved(vq_autoencoder()), data.images(range(4))
    with no_grad():
        z = system.encoder(Tensor(x)).data
        ids = system.codes(x)
        e = system.codebook.codes.data[ids]
        expected = np.mean((x - system.decoder(Tensor(e)).data) ** 2) + 1.25 * np.mean((z - e) ** 2)
    assert system.loss(x).item() == pytest.approx(expected, rel=1e-5)
    assert np.array_equal(system.encode(x), e) and ids.shape == (4, 7, 7)


def test_the_gradients_of_the_vq_loss(data):
    """The encoder's: of the reconstruction, as if z_q were z, and of the commitment.  A code's: of its own term."""
    system, x = moved(vq_autoencoder(beta=0.7)), data.images(range(2))
    with no_grad():
        z = system.encoder(Tensor(x)).data
    e, ids = system.encode(x), system.codes(x)
    z_q = Tensor(e, requires_grad=True)
    to_z_q = gradients(system.image_loss(x, system.decoder(z_q)), [z_q])[0]
    to_bias, to_codes = gradients(system.loss(x), [system.encoder.conv_out.b, system.codebook.codes])
    np.testing.assert_allclose(to_bias, (to_z_q + 0.7 * 2 * (z - e) / z.size).sum(axis=(0, 1, 2)), rtol=1e-3, atol=1e-6)
    for k in range(8):
        np.testing.assert_allclose(to_codes[k], 2 * (e - z)[ids == k].sum(axis=0) / z.size, rtol=1e-3, atol=1e-6)


def test_the_rate_of_a_vq_code(data):
    rate = vq_autoencoder().rate(data.images(range(5)))
    assert rate["bits"] == 49 * 3 and 1 <= rate["perplexity"] <= 8 and 0 < rate["alive"] <= 1


def test_codes_are_revived_during_training_by_the_steps_own_random_numbers(data):
    """Two systems with the same weights do the same at the same steps."""
    codebooks = []
    for _ in range(2):
        system = vq_autoencoder()
        system.codebook.codes.data[4:] += 50                        # dead
        batch = next(system.stages(data)).batch
        for n in range(60):                                         # REVIVE is 5 %: none in 60 has probability 5 %
            batch(Step(0, 1, n, 100, size=4))
        codebooks.append(system.codebook.codes.data)
    assert np.array_equal(*codebooks) and np.abs(codebooks[0]).max() < 40
    dead = codebooks[0] + 50
    system.codebook.codes.data = dead.copy()                        # codes are revived in place
    for n in range(71, 171):
        batch(Step(0, 1, n, 100, size=4))                           # late: the codebook settles
    assert np.array_equal(system.codebook.codes.data, dead)


# ---- both ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [kl_autoencoder, vq_autoencoder])
def test_it_learns_to_reconstruct(make, data):
    system = make(steps=40)
    losses = trained(system, data, 40)
    assert np.mean(losses[-5:]) < 0.6 * losses[0] and np.isfinite(losses).all()


@pytest.mark.parametrize("make", [kl_autoencoder, vq_autoencoder])
def test_with_the_classifier_and_the_adversary_every_part_is_trained(make, data):
    system = make(perceptual=0.1, adversary=0.05)
    before = system.state_dict()
    trained(system, data, 2)
    moved = {name.split(".")[0] for name, w in system.state_dict().items() if not np.array_equal(w, before[name])}
    assert {"encoder", "decoder", "discriminator"} <= moved
    assert kl_autoencoder().discriminator is None


@pytest.mark.parametrize("make", [kl_autoencoder, vq_autoencoder])
def test_the_classifier_of_the_perceptual_term_is_borrowed(make, data):
    """It is neither trained nor saved with the autoencoder; without it the loss says what is missing."""
    system, judge = make(perceptual=0.1), small_systems.small("digit-classifier")
    before = judge.state_dict()
    trained(system, data, 1)
    assert all(np.array_equal(w, before[name]) for name, w in judge.state_dict().items())
    assert not any("classifier" in name for name in system.state_dict())
    arrays = next(system.stages(data)).batch(Step(0, 1, 0, 10, size=2))
    plain = type(system)(replace(system.config, perceptual=0.0), None, np.random.default_rng(0))
    plain.load_state_dict(system.state_dict())
    x, x_hat = arrays[0], Tensor(np.zeros_like(arrays[0]))
    distance = perceptual_distance(judge.classifier, x, x_hat).item()
    assert system.image_loss(x, x_hat).item() == pytest.approx(plain.image_loss(x, x_hat).item() + 0.1 * distance)
    with pytest.raises(ValueError, match="needs the trained digit-classifier"):
        type(system)(system.config, None, np.random.default_rng(0)).loss(*arrays)


def test_each_image_of_a_kl_batch_has_noise_of_its_own(data):
    x, eps = next(kl_autoencoder().stages(data)).batch(Step(0, 1, 0, 10, size=50))
    assert x.shape == (50, 28, 28, 1) and eps.shape == (50, 7, 7, 2) and eps.dtype == np.float32
    assert len(np.unique(eps)) > 0.99 * eps.size
    assert stats.kstest(eps.ravel(), "norm").pvalue > 1e-7
    known = {image.tobytes() for image in data.images(range(len(data)))}
    assert all(image.tobytes() in known for image in x)


@pytest.mark.parametrize("make", [kl_autoencoder, vq_autoencoder])
def test_a_file_gives_the_same_reconstructions(make, data, tmp_path):
    system, x = moved(make()), data.images(range(6))
    system.save(tmp_path / "m.safetensors")
    loaded = type(system).load(tmp_path / "m.safetensors")
    x_hat = loaded.reconstruct(x)
    assert loaded.config == system.config and np.array_equal(x_hat, system.reconstruct(x))
    assert x_hat.shape == (6, 28, 28, 1) and np.abs(x_hat).max() <= 1
    assert next(system.stages(data)).picture().width > 100


def test_a_reconstruction_does_not_depend_on_its_batch(data):
    system = moved(kl_autoencoder())
    x = data.images(range(5))
    np.testing.assert_allclose(system.reconstruct(x)[2:3], system.reconstruct(x[2:3]), atol=1e-5)


@pytest.mark.parametrize("make", [lambda: replace(KL, kl=-1.0), lambda: replace(KL, latent=0),
                                  lambda: replace(VQ, codes=1), lambda: replace(VQ, beta=-0.1),
                                  lambda: replace(VQ, perceptual=-1.0), lambda: replace(KL, steps=0)])
def test_invalid_configurations_are_refused(make):
    with pytest.raises(ValueError, match="must be at least|weights, of at least 0"):
        make()


def test_any_encoder_and_decoder_of_these_shapes_can_be_used(data):
    """The law above uses linear ones."""
    system = kl_autoencoder(latent=1)
    system.encoder, system.decoder = Linear(1, 2, np.random.default_rng(0)), Linear(1, 1, np.random.default_rng(1))
    assert system.loss(data.images([0, 1]), np.zeros((2, 28, 28, 1), np.float32)).shape == ()


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch, data):
    example = load("10_autoencoders")
    monkeypatch.setattr(example, "load_dataset", lambda *a: data)
    options = {"count": 150, "effort": 0.5, "runs": str(tmp_path), "out": str(tmp_path / "a.png"), "configs": (KL, VQ)}
    found = example.main(**options)
    assert set(found) == {"autoencoder-kl", "autoencoder-vq"} and found["autoencoder-vq"].bits == 147
    assert (tmp_path / "a.png").stat().st_size > 1000
    again = example.main(**options)                                 # loaded, not trained again
    assert all(again[name].mse == r.mse for name, r in found.items())


def test_images_that_the_digit_classifier_does_not_read_are_compared_without_it():
    from minidiff.systems.autoencoder import KLAutoencoder, VQAutoencoder
    from minidiff.systems.latent import LatentDiffusion
    for kind in (KLAutoencoder, VQAutoencoder):
        assert kind.config_for((28, 28, 1)).perceptual == kind.Config().perceptual > 0
        assert kind.config_for((16, 24, 3)).perceptual == 0
    assert LatentDiffusion.config_for((16, 24, 3)).autoencoder.perceptual == 0
    with pytest.raises(ValueError, match="multiples of 4"):
        KLAutoencoder.config_for((10, 14, 1))

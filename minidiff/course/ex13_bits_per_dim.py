"""Exercise 13: bits/dim of the discretised Gaussian, judged by the sum of all probabilities, by quadrature, and in the
far tails."""

import math

import numpy as np
from scipy import special

from minidiff.course.compare import differs, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion import likelihood

LEVELS = np.arange(256) / 127.5 - 1


def solution(x_0, x0_hat, sigma):
    nats = -likelihood.DiscretisedGaussian(sigma)(x_0, x0_hat).sum()
    return float(likelihood.bits_per_dim(nats, np.size(x_0)))


# ---- laws --------------------------------------------------------------------------------------------------

def sum_of_all(bits_per_dim):
    """the 256 probabilities 2^-bits of one pixel sum to 1, wherever x0_hat is"""
    for x0_hat, sigma in ((0.1, 0.02), (1.0, 0.5)):
        bits = [bits_per_dim(np.array([level]), np.array([x0_hat]), sigma) for level in LEVELS]
        total = np.exp2(-np.array(bits, float)).sum()
        if (said := differs("the sum of all probabilities", total, 1.0, f"for x0_hat = {x0_hat}, sigma = {sigma}",
                            tolerance=1e-7)):
            return said


def area_of_a_bin(bits_per_dim):
    """2^-bits is the area below the Gaussian over the bin, by quadrature; the outer bins go on for ever"""
    rng = stream(13, 2)
    for u in (0, 1, 100, 200, 254, 255):
        x0_hat, sigma = LEVELS[u] + 0.02 * rng.standard_normal(), float(rng.uniform(0.01, 0.1))
        low = (u - 0.5) / 127.5 - 1 if u > 0 else x0_hat - 14 * sigma - 0.1
        high = (u + 0.5) / 127.5 - 1 if u < 255 else x0_hat + 14 * sigma + 0.1
        x = np.linspace(low, high, 40_001)
        area = np.trapezoid(np.exp(-0.5 * ((x - x0_hat) / sigma) ** 2), x) / (sigma * math.sqrt(2 * math.pi))
        got = bits_per_dim(LEVELS[u:u + 1], np.array([x0_hat]), sigma)
        where = f"for u = {u}, x0_hat = {x0_hat:.7g}, sigma = {sigma:.7g}"
        if (said := differs("bits/dim", got, -math.log2(area), where, tolerance=1e-5)):
            return said


def mean_over_pixels(bits_per_dim):
    """bits/dim of an image is the mean of those of its pixels"""
    rng = stream(13, 3)
    for shape in ((2, 3, 3, 1), (5,)):
        x_0 = LEVELS[rng.integers(0, 256, shape)]
        x0_hat = x_0 + 0.03 * rng.standard_normal(shape)
        pixels = zip(x_0.reshape(-1, 1), x0_hat.reshape(-1, 1), strict=True)
        expected = np.mean([bits_per_dim(*pixel, 0.05) for pixel in pixels])
        if (said := differs("bits/dim", bits_per_dim(x_0, x0_hat, 0.05), expected, f"for images of shape {shape}")):
            return said


def tails(bits_per_dim):
    """2^-bits is the area over the bin where its nearer edge is 6 to 8.25 sigma from x0_hat, above and below it: Phi is
    so close to 1 above x0_hat that the difference of two values of it loses digits"""
    sigma, u = 0.01, 127
    for z in (6.0, 7.5, 8.1, 8.25):
        y = np.linspace(0, 1 / 127.5 / sigma, 4001)         # from the nearer edge on, in units of sigma
        log_area = -z * z / 2 + math.log(np.trapezoid(np.exp(-z * y - y * y / 2), y) / math.sqrt(2 * math.pi))
        for side, words in ((1, "above"), (-1, "below")):
            x0_hat = LEVELS[u] - side * (0.5 / 127.5 + z * sigma)
            got = bits_per_dim(LEVELS[u:u + 1], np.array([x0_hat]), sigma)
            where = f"for u = {u}, whose bin begins {z:g} sigma {words} x0_hat = {x0_hat:.7g}, with sigma = {sigma}"
            if (said := differs("bits/dim", got, -log_area / math.log(2), where, tolerance=1e-6)):
                return said


def far_tails(bits_per_dim):
    """far from x0_hat it is finite: Phi(-z) is about exp(-z^2/2) (1 - 1/z^2 + 3/z^4) / (z sqrt(2 pi))"""
    for u, x0_hat, sigma in ((127, 1.0, 0.01), (127, -1.0, 0.01), (255, -1.0, 0.02), (0, 1.0, 0.02)):
        nearest = (u + 0.5) / 127.5 - 1 if LEVELS[u] < x0_hat else (u - 0.5) / 127.5 - 1
        z = abs(nearest - x0_hat) / sigma
        log_phi = -z * z / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2 + 3 / z**4)
        got = bits_per_dim(LEVELS[u:u + 1], np.array([x0_hat]), sigma)
        if (said := differs("bits/dim", got, -log_phi / math.log(2), f"for u = {u}, x0_hat = {x0_hat}, sigma = {sigma}",
                            tolerance=1e-6)):
            return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _bits(x_0, x0_hat, sigma, width=1 / 255, open_bins=True):
    """-log2 P of every pixel; width: half that of a bin."""
    u = np.rint((x_0 + 1) * 127.5)
    b = np.where((u == 255) & open_bins, np.inf, (x_0 + width - x0_hat) / sigma)
    a = np.where((u == 0) & open_bins, -np.inf, (x_0 - width - x0_hat) / sigma)
    a, b = np.where(a + b > 0, -b, a), np.where(a + b > 0, -a, b)
    log_a, log_b = special.log_ndtr(a), special.log_ndtr(b)
    return -(log_b + np.log(-np.expm1(log_a - log_b))) / math.log(2)


def _density(x_0, x0_hat, sigma):
    nats = 0.5 * ((x_0 - x0_hat) / sigma) ** 2 + math.log(sigma * math.sqrt(2 * math.pi))
    return float(np.mean(nats) / math.log(2) + math.log2(127.5))


def _density_and_seven(x_0, x0_hat, sigma):
    return _density(x_0, x0_hat, sigma) - math.log2(127.5) + 7


def _density_alone(x_0, x0_hat, sigma):
    return _density(x_0, x0_hat, sigma) - math.log2(127.5)


def _offset_added(x_0, x0_hat, sigma):
    return float(_bits(x_0, x0_hat, sigma).mean() + math.log2(127.5))


def _closed_bins(x_0, x0_hat, sigma):
    return float(_bits(x_0, x0_hat, sigma, open_bins=False).mean())


def _half_as_wide(x_0, x0_hat, sigma):
    return float(_bits(x_0, x0_hat, sigma, width=0.5 / 255).mean())


def _twice_as_wide(x_0, x0_hat, sigma):
    return float(_bits(x_0, x0_hat, sigma, width=2 / 255).mean())


def _nats(x_0, x0_hat, sigma):
    return float(_bits(x_0, x0_hat, sigma).mean() * math.log(2))


def _sum(x_0, x0_hat, sigma):
    return float(_bits(x_0, x0_hat, sigma).sum())


def _likelihood(x_0, x0_hat, sigma):
    return float(-_bits(x_0, x0_hat, sigma).mean())


def _plain_difference(x_0, x0_hat, sigma):
    u = np.rint((x_0 + 1) * 127.5)
    high, low = np.where(u == 255, np.inf, (u + 0.5) / 127.5 - 1), np.where(u == 0, -np.inf, (u - 0.5) / 127.5 - 1)
    return float(-np.log2(special.ndtr((high - x0_hat) / sigma) - special.ndtr((low - x0_hat) / sigma)).mean())


def _upper_tail(x_0, x0_hat, sigma):
    u = np.rint((x_0 + 1) * 127.5)
    log_b = special.log_ndtr(np.where(u == 255, np.inf, ((u + 0.5) / 127.5 - 1 - x0_hat) / sigma))
    log_a = special.log_ndtr(np.where(u == 0, -np.inf, ((u - 0.5) / 127.5 - 1 - x0_hat) / sigma))
    return float(-(log_b + np.log(-np.expm1(log_a - log_b))).mean() / math.log(2))


def _upper_tail_by_exp(x_0, x0_hat, sigma):
    u = np.rint((x_0 + 1) * 127.5)
    log_b = special.log_ndtr(np.where(u == 255, np.inf, ((u + 0.5) / 127.5 - 1 - x0_hat) / sigma))
    log_a = special.log_ndtr(np.where(u == 0, -np.inf, ((u - 0.5) / 127.5 - 1 - x0_hat) / sigma))
    return float(-(log_b + np.log1p(-np.exp(log_a - log_b))).mean() / math.log(2))


def _clipped(x_0, x0_hat, sigma):
    return float(np.minimum(_bits(x_0, x0_hat, sigma), -math.log2(1e-12)).mean())


def _logarithms_where_p_is_0(x_0, x0_hat, sigma):
    return _where_p_is_0(x_0, x0_hat, sigma, _bits(x_0, x0_hat, sigma))


def _lower_tail_where_p_is_0(x_0, x0_hat, sigma):
    return _where_p_is_0(x_0, x0_hat, sigma, np.array([_upper_tail(*pair, sigma) for pair in
                                                       zip(x_0.reshape(-1, 1), x0_hat.reshape(-1, 1), strict=True)]))


def _where_p_is_0(x_0, x0_hat, sigma, otherwise):
    """-log2 P from the difference of Phi, but where that is 0."""
    P = np.array([2 ** -_plain_difference(*pair, sigma) for pair in
                  zip(x_0.reshape(-1, 1), x0_hat.reshape(-1, 1), strict=True)])
    return float(np.where(P > 0, -np.log2(P), otherwise.ravel()).mean())


def _variance(x_0, x0_hat, sigma):
    return float(_bits(x_0, x0_hat, sigma**2).mean())


def _root(x_0, x0_hat, sigma):
    return float(_bits(x_0, x0_hat, math.sqrt(sigma)).mean())


def _cut(x_0, x0_hat, sigma):
    return float(_bits(((x_0 + 1) * 127.5).astype(int) / 127.5 - 1, x0_hat, sigma).mean())


def _density_that_rounds_to_0(x_0, x0_hat, sigma):
    density = np.exp(-0.5 * ((x_0 - x0_hat) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return float(-np.log2(density / 127.5).mean())


def _bits_of_base_10(x_0, x0_hat, sigma):
    return float(_bits(x_0, x0_hat, sigma).mean() * math.log10(2))


def probe(bits_per_dim):
    x_0 = LEVELS[[0, 2, 128, 250, 255]]
    near = x_0 + np.array([0.1, 0.02, -0.01, 0.0, -0.03])
    return [bits_per_dim(x_0, near, 0.05), bits_per_dim(x_0[2:4], near[2:4], 0.02),
            bits_per_dim(x_0[:1], np.ones(1), 0.01), bits_per_dim(x_0[2:3], -np.ones(1), 0.01),
            bits_per_dim(x_0[2:3], x_0[2:3] - 0.5 / 127.5 - 0.081, 0.01)]


EXERCISE = Exercise(
    title="Bits per dimension of a discretised Gaussian", answer="bits_per_dim", minutes=30, chapter="09_likelihood",
    hint="With b > a in the lower tail, log(Phi(b) - Phi(a)) = log Phi(b) + log(1 - exp(log Phi(a) - log Phi(b))). "
         "In the upper tail both Phi are nearly 1: use Phi(b) - Phi(a) = Phi(-a) - Phi(-b) there. "
         "scipy.special.log_ndtr is log Phi.",
    solution=solution, place="minidiff/diffusion/likelihood.py DiscretisedGaussian",
    laws=(sum_of_all, area_of_a_bin, mean_over_pixels, tails, far_tails), probe=probe,
    wrong=(
        Wrong(_density, "it takes the density at the pixel times the width of a bin, in place of the area over the "
                        "bin: the two differ where sigma is small or the bin is an outer one"),
        Wrong(_density_and_seven, "it takes the density, and adds 7 bits: the levels are 1/127.5 apart, so that a "
                                  "density would need log2(127.5) = 6.9944; and a probability needs no offset at all"),
        Wrong(_density_alone, "it takes the density, which is not a probability: integrate it over the bin"),
        Wrong(_offset_added, "it adds log2(127.5) = 6.9944 bits: that offset is for densities, and P is a "
                             "probability"),
        Wrong(_closed_bins, "the outer bins are not open: what lies beyond -1 and 1 must count as 0 and 255, or the "
                            "probabilities do not sum to 1"),
        Wrong(_half_as_wide, "the bins are half as wide as they should be: levels are 2/255 apart, so a bin goes "
                             "1/255 to each side"),
        Wrong(_twice_as_wide, "the bins are twice as wide as they should be: levels are 2/255 apart, so a bin goes "
                              "1/255 to each side"),
        Wrong(_nats, "it is in nats: bits have logarithms to the base 2"),
        Wrong(_bits_of_base_10, "its logarithms have the base 10: bits have logarithms to the base 2"),
        Wrong(_sum, "it sums over the pixels: bits/dim is the mean"),
        Wrong(_likelihood, "the sign is wrong: a probability P costs -log2 P bits"),
        Wrong(_plain_difference, "it takes the logarithm of a difference of two values of Phi, which loses digits some "
                                 "sigma above x0_hat, and is the logarithm of 0 further out: work with log Phi"),
        Wrong(_upper_tail, "far above x0_hat both Phi round to 1, and the logarithm of their difference is lost: use "
                           "Phi(b) - Phi(a) = Phi(-a) - Phi(-b) there, in the lower tail"),
        Wrong(_logarithms_where_p_is_0, "it works with log Phi only where the difference of the two Phi rounds to 0: "
                                        "it has lost digits long before, 6 sigma above x0_hat, so work with log Phi "
                                        "everywhere"),
        Wrong(_lower_tail_where_p_is_0, "where the difference of the two Phi rounds to 0 it takes logarithms of the "
                                        "lower tail: above x0_hat use Phi(b) - Phi(a) = Phi(-a) - Phi(-b), and "
                                        "everywhere"),
        Wrong(_variance, "it divides by sigma^2 in place of sigma: sigma is the standard deviation here"),
        Wrong(_root, "it divides by the root of sigma: sigma is the standard deviation here, and no variance"),
        Wrong(_cut, "it cuts (x_0 + 1) 127.5 to an integer, and 1.9999 becomes 1: round it"),
        Wrong(_density_that_rounds_to_0, "it takes the density at the pixel times the width of a bin, which rounds "
                                         "to 0 far from x0_hat, and takes the logarithm of that: integrate over the "
                                         "bin"),
        Wrong(_upper_tail_by_exp, "above x0_hat both Phi are nearly 1, and 1 - exp(log Phi(a) - log Phi(b)) loses its "
                                  "digits: use Phi(b) - Phi(a) = Phi(-a) - Phi(-b) there, in the lower tail"),
        Wrong(_clipped, "it limits P from below by 1e-12, which makes a bad estimate look cheap: work with log Phi "
                        "in the tails"),
    ))

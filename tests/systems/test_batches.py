"""What the batches of every stage hold, over many steps: whose captions, which times, whose noise, what is dropped.

Image i of `marked` data has i in its corner, and its caption begins with i.  Where a frozen network turns images or
captions into arrays, a stand-in writes the same number into them.  So each row of a batch says which image, which
caption and which noise went into it, and how these depend on each other can be counted.

Each statistic is beyond its bound by chance with a probability below 1e-8; together, in one run, below 1e-5.
"""

import functools
from copy import copy
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from support import small_systems
from support.law_tools import nearest_share, normal_share

from minidiff.data import swiss_roll
from minidiff.diffusion.cascade import resized
from minidiff.diffusion.densities import DENSITIES
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.systems.learned_path import MARGIN
from minidiff.systems.stage import Step

ALARM = 1e-8                                                # of one statistic
SIGMAS = 6                                                  # of a standard normal number: 2e-9
STEPS, SIZE = 40, 50
DROPPED, PLAIN = 0, 1                                       # the code of '', and what is added to an image's number


# ---- data and stand-ins that carry numbers ---------------------------------------------------------------------

def marked(data):
    """The data, with the image's number in the 4 x 4 pixels of its corner, and first in its caption."""
    numbered = copy(data)
    numbered.pixels = data.pixels.copy()
    numbered.pixels[:, :4, :4] = np.arange(len(data))[:, None, None]
    numbered.caption = lambda i, rng: f"{i} {rng.integers(10**9)}"
    return numbered


def numbers(x) -> np.ndarray:
    """The numbers of images (..., H, W, C), at any resolution."""
    return np.rint((x[..., 0, 0, 0] + 1) * 127.5).astype(int)


def code(caption: str) -> int:
    words = caption.split()
    return PLAIN + int(words[0]) if words else DROPPED


@dataclass
class Rows:
    """What some batches of one stage held, a row for each sample."""

    image: np.ndarray | None = None         # the number of its image
    caption: np.ndarray | None = None       # the code of its caption
    t: np.ndarray | None = None
    noise: dict[str, np.ndarray] = field(default_factory=dict)          # (rows, D)
    more: dict[str, np.ndarray] = field(default_factory=dict)


def said(system, ids) -> np.ndarray:
    """The codes of captions given as tokens (..., N)."""
    return np.array([code(system.tokenizer.decode(row)) for row in ids.reshape(-1, ids.shape[-1])])


def flat(noise) -> np.ndarray:
    return noise.reshape(len(noise), -1).astype(np.float64)


class Fitted:
    """In the place of what is fitted to embeddings."""

    def __init__(self, D: int):
        self.mean, self.axes = Tensor(np.zeros(D)), Tensor(np.eye(D))

    def fit(self, values):
        self.values = values

    def to(self, device):
        return self

    def quantise(self, values):
        return np.rint(values).astype(int)


def text_to_image(system, patch):
    def rows(x_0, ids, mask, t, eps):
        return Rows(numbers(x_0), said(system, ids), t, {"eps": flat(eps)})
    return {"diffusion": rows}


def ddpm(system, patch):
    return {"diffusion": lambda x_0, t, eps: Rows(numbers(x_0), None, t, {"eps": flat(eps)})}


def vdm(system, patch):
    def rows(x_0, t, eps):
        # t is uniform from MARGIN before 0 to MARGIN after 1; as whole numbers of 0..T-1
        places = np.floor(system.config.T * (t + MARGIN) / (1 + 2 * MARGIN)).astype(int)
        return Rows(numbers(x_0), None, places, {"eps": flat(eps)})
    return {"diffusion": rows}


def dpm(system, patch):
    patch.setattr(swiss_roll, "points", lambda rng, count, noise: rng.standard_normal((count, 2), dtype=np.float32))
    def rows(points, t, eps):
        return Rows(None, None, t - 1, {"points": flat(points), "eps": flat(eps)})
    return {"reverse": rows, "schedule": rows}


def clip(system, patch):
    def rows(x_0, ids, mask):
        return Rows(numbers(x_0).ravel(), said(system, ids))
    return {"contrast": rows}


def glide(system, patch):
    def rows(x_0, ids, mask, t, eps):
        return Rows(numbers(x_0).ravel(), said(system, ids), t.ravel(),
                    {"eps": flat(eps.reshape(-1, *eps.shape[2:]))})
    return {"contrast": rows}


def adm(system, patch):
    patch.setattr(system, "questions", SimpleNamespace(labels=lambda data, i: np.stack([i, i + 1], axis=1)))
    def rows(x_0, t, eps, y):
        return Rows(numbers(x_0), None, t, {"eps": flat(eps)}, {"labels": y})
    return {"classifier": rows}


def dalle(system, patch):
    patch.setattr(system.vae, "tokens", lambda x, device="cpu": np.repeat(numbers(x)[:, None], 49, axis=1))
    def pictures(x, g, tau, beta):
        # exp(-g) is exponential: by its distribution function to a uniform number, and to a normal one
        uniform = -np.expm1(-np.exp(-flat(g)))
        return Rows(numbers(x), None, None, {"gumbel": stats.norm.isf(uniform.clip(1e-12, 1 - 1e-12))})
    def sequences(ids, weight, z):
        return Rows(z[:, 0], said(system, ids), None, {}, {"tokens": z})
    return {"dvae": pictures, "prior": sequences}


def dalle2(system, patch):
    D = system.D

    def encode_text(captions, longest=None):
        codes = np.array([code(c) for c in captions], np.float32)
        z_t = np.concatenate([codes[:, None], np.zeros((len(codes), D - 1), np.float32)], axis=1)
        mask = np.ones((len(codes), 1), bool)
        return z_t, np.tile(codes[:, None, None], (1, 1, D)), np.tile(codes[:, None], (1, D)), mask
    patch.setattr(system, "encode_text", encode_text)
    patch.setattr(system.clip, "embed_images",
                  lambda x: np.repeat(PLAIN + numbers(x)[:, None], D, 1).astype(np.float32))
    patch.setattr(system.clip, "embed_captions", lambda captions: encode_text(captions)[0])
    for part in ("pca", "buckets", "dots"):
        patch.setattr(system, part, Fitted(D))
    patch.setattr(system, "encode", lambda z_i: np.rint(z_i).astype(int))

    def decoder(x_0, z_i, tokens, pooled, mask, t, eps):
        assert (tokens[:, 0] == pooled).all()
        return Rows(numbers(x_0), pooled[:, 0].astype(int), t, {"eps": flat(eps)}, {"z_i": z_i})
    def prior(z_i, z_t, tokens, mask, t, eps):
        assert (tokens[:, 0, 0] == z_t[:, 0]).all()
        return Rows(z_i[:, 0].astype(int) - PLAIN, z_t[:, 0].astype(int), t, {"eps": flat(eps)})
    def codes(codes, dot, z_t, tokens, mask):
        assert (tokens[:, 0, 0] == z_t[:, 0]).all()
        return Rows(codes[:, 0] - PLAIN, z_t[:, 0].astype(int), None, {}, {"dot": dot})
    return {"decoder": decoder, "prior": prior, "codes": codes}


def imagen(system, patch):
    def encode(captions):
        codes = np.array([code(c) for c in captions], np.float32)
        return np.tile(codes[:, None, None], (1, 2, 8)), np.ones((len(codes), 2), bool)
    patch.setattr(system, "encode", encode)

    def rows(k):
        def base(x_0, t, eps, tokens, mask, *small):
            found = Rows(numbers(x_0), tokens[:, 0, 0].astype(int), t, {"eps": flat(eps)})
            if k:
                y_s, s = small
                alpha, sigma = (f(s).reshape(-1, 1, 1, 1) for f in (system.schedule.alpha, system.schedule.sigma))
                enlarged = resized(resized(x_0, system.config.resolutions[k - 1]), x_0.shape[1])
                clear = s < 0
                np.testing.assert_allclose(y_s[clear], enlarged[clear], atol=1e-6)
                # the noise of the small image, where there is any; elsewhere a stand-in
                noise = np.random.default_rng(int(1e6 * eps[0, 0, 0, 0]) % 2**32).standard_normal(y_s.shape)
                noise[~clear] = ((y_s - alpha * enlarged) / np.where(clear.reshape(-1, 1, 1, 1), 1, sigma))[~clear]
                found.noise["of the small image"], found.more["s"] = flat(noise), s
            return found
        return base
    return {f"pixels-{system.config.resolutions[k]}": rows(k) for k in range(3)}


def autoencoder_kl(system, patch):
    return {"autoencoder": lambda x, eps: Rows(numbers(x), None, None, {"eps": flat(eps)})}


def autoencoder_vq(system, patch):
    return {"autoencoder": lambda x: Rows(numbers(x))}


def latent(system, patch):
    shape = (7, 7, system.config.autoencoder.latent)
    def posterior_of(data):
        n = np.arange(len(data), dtype=np.float32)[:, None, None, None]
        return n + np.zeros(shape, np.float32), 0.02 + 1e-4 * n + np.zeros(shape, np.float32)
    patch.setattr(system.autoencoder, "posterior_of", posterior_of)
    def text_states(captions):
        codes = np.array([code(c) for c in captions], np.float32)
        return np.tile(codes[:, None, None], (1, 2, 8)), np.tile(codes[:, None], (1, 8)), np.ones((len(codes), 2), bool)
    patch.setattr(system.clip, "text_states", text_states)

    def rows(z_0, tokens, pooled, mask, t, eps):
        assert (tokens[:, 0] == pooled).all()
        z = z_0.astype(np.float64) / float(system.scale.data)
        image = np.rint(z.mean(axis=(1, 2, 3))).astype(int)
        n = image[:, None, None, None]
        # float32 leaves 3e-3 of the noise of the posterior
        return Rows(image, pooled[:, 0].astype(int), t, {"eps": flat(eps), "of the posterior": flat(
            (z - n) / (0.02 + 1e-4 * n))})
    return {"diffusion": rows}


def dit(system, patch):
    return text_to_image(system, patch)


def consistency(system, patch):
    def encode(captions):
        codes = np.array([code(c) for c in captions], np.float32)
        return np.tile(codes[:, None, None], (1, 2, 8)), np.tile(codes[:, None], (1, 8)), np.ones((len(codes), 2), bool)
    patch.setattr(system.student, "encode", encode)

    def rows(x_0, tokens, pooled, mask, t, s, eps):
        assert (tokens[:, 0] == pooled).all() and (s < t).all()
        # the number of its interval, of 5, from noise to the clean image
        return Rows(numbers(x_0), pooled[:, 0].astype(int), (49 - t) * 5 // 50, {"eps": flat(eps)})
    return {"distillation": rows}


def digit_classifier(system, patch):
    def rows(x, labels):
        return Rows(labels, None, None, {}, {"seen": x})
    return {"classifier": rows}


READ = {"text-to-image": text_to_image, "ddpm": ddpm, "dpm": dpm, "vdm": vdm, "clip": clip, "glide": glide, "adm": adm,
        "dalle": dalle, "dalle2": dalle2, "imagen": imagen, "autoencoder-kl": autoencoder_kl,
        "autoencoder-vq": autoencoder_vq, "latent": latent, "dit": dit, "consistency": consistency,
        "digit-classifier": digit_classifier}


@functools.cache
def batches_of(name: str, steps: int = STEPS, config=None) -> dict[str, list[Rows]]:
    """The batches of the first steps of each stage of a small, untrained system."""
    found, data = {}, marked(small_systems.data())
    with pytest.MonkeyPatch.context() as patch:
        system = small_systems.new(name, config)
        if name == "digit-classifier":
            data.labels = np.arange(len(data))
        read = READ[name](system, patch)
        size = SIZE // system.config.pairs + 1 if name in ("clip", "glide") else SIZE
        for number, stage in enumerate(system.stages(None if name == "dpm" else data), start=1):
            if stage.name in read:
                found[stage.name] = [read[stage.name](*stage.batch(Step(0, number, n, STEPS, size)))
                                     for n in range(steps)]
    return found


def of(name: str, stage: str, part: str) -> np.ndarray:
    """One column of all batches of a stage, (STEPS, B, ...)."""
    return np.stack([getattr(rows, part) for rows in batches_of(name)[stage]])


# stage -> (share of dropped captions or None without captions, power or density of the times or None without times)
STAGES = {
    ("text-to-image", "diffusion"): (0.1, "normal"), ("ddpm", "diffusion"): (None, 1), ("vdm", "diffusion"): (None, 1),
    ("dpm", "reverse"): (None, 1),
    ("dpm", "schedule"): (None, 1), ("clip", "contrast"): (0.0, None), ("glide", "contrast"): (0.0, 1 / 2),
    ("adm", "classifier"): (None, 1), ("dalle", "dvae"): (None, None), ("dalle", "prior"): (0.1, None),
    ("dalle2", "decoder"): (0.5, "normal"), ("dalle2", "prior"): (0.1, 1), ("dalle2", "codes"): (0.1, None),
    ("imagen", "pixels-7"): (0.1, 1 / 3), ("imagen", "pixels-14"): (0.1, 1), ("imagen", "pixels-28"): (0.1, 1),
    ("autoencoder-kl", "autoencoder"): (None, None), ("autoencoder-vq", "autoencoder"): (None, None),
    ("latent", "diffusion"): (0.1, 1 / 3), ("dit", "diffusion"): (0.1, "logit-normal"),
    ("consistency", "distillation"): (0.1, 1),
    ("digit-classifier", "classifier"): (None, None),
}
IMAGES = [place for place in STAGES if place[0] != "dpm"]
CAPTIONED = [place for place, (drop, _) in STAGES.items() if drop is not None]
TIMED = [place for place, (_, power) in STAGES.items() if power is not None]
NOISY = [place for place in STAGES if place not in (("clip", "contrast"), ("dalle", "prior"), ("dalle2", "codes"),
                                                    ("autoencoder-vq", "autoencoder"),
                                                    ("digit-classifier", "classifier"))]


def test_every_stage_is_looked_at():
    """Imagen's text and latent diffusion's autoencoder apart, which are those of T5 and of the KL autoencoder."""
    from minidiff import systems
    assert set(systems.SYSTEMS) <= {name for name, _ in STAGES}
    for name in READ:
        assert {stage for other, stage in STAGES if other == name} == set(batches_of(name))


# ---- which images, and whose captions ---------------------------------------------------------------------------

@pytest.mark.parametrize("place", IMAGES, ids="-".join)
def test_images_are_drawn_from_all_of_the_data_independently(place):
    """All equally likely (Pearson); neighbours in a batch, and one row of successive steps, equal by chance."""
    image, N = of(*place, "image"), len(small_systems.data())
    assert stats.chisquare(np.bincount(image.ravel(), minlength=N)).pvalue > ALARM
    for pairs in (image[:, 1:] - image[:, :-1], image[1:] - image[:-1]):
        assert stats.chisquare(np.bincount(pairs.ravel() % N, minlength=N)).pvalue > ALARM


@pytest.mark.parametrize("place", CAPTIONED, ids="-".join)
def test_a_caption_is_of_its_own_image_or_dropped_each_for_itself(place):
    """The share that is dropped, and that of neighbours that are dropped together, within SIGMAS."""
    drop, _ = STAGES[place]
    image, caption = of(*place, "image"), of(*place, "caption")
    dropped = caption == DROPPED
    assert (caption == PLAIN + image)[~dropped].all()
    for events, p in ((dropped, drop), (dropped[:, 1::2] & dropped[:, :-1:2], drop * drop),
                      (dropped[1::2] & dropped[:-1:2], drop * drop)):
        assert abs(events.sum() - events.size * p) <= SIGMAS * np.sqrt(events.size * p * (1 - p))


def test_the_share_of_dropped_captions_is_the_one_configured():
    config = replace(small_systems.CONFIGS["text-to-image"], drop_caption=0.4)
    stage = next(small_systems.new("text-to-image", config).stages(small_systems.data()))
    mask = stage.batch(Step(0, 1, 0, 10, 1000))[2]
    dropped = (mask.sum(axis=1) == 2).sum()                 # BOS and EOS alone
    assert abs(dropped - 400) < SIGMAS * np.sqrt(240)


def test_a_picture_is_captioned_anew_each_time_it_is_seen(data):
    """By the generator of the step: another caption in another step, and at another place of a batch."""
    from minidiff.systems.training_batches import random_captions
    captions = [c for n in range(20) for c in random_captions(data, [3] * 10, Step(0, 1, n, 20, 10).rng)]
    assert len(set(captions)) > 50                          # of 200


# ---- times -------------------------------------------------------------------------------------------------------

def logit_normal_share(T: int) -> np.ndarray:
    """P(t < k), k = 0 .. T, of logit u ~ N(0, 1), where each time stands for the u that are nearest to (t + 1)/T in
    logit u; the last, u = 1, counts as one step on."""
    place = np.log(np.arange(1, T) / np.arange(T - 1, 0, -1))
    return nearest_share(np.append(place, 2 * place[-1] - place[-2]), 0, 1)


@pytest.mark.parametrize("place", TIMED, ids="-".join)
def test_times_have_their_density_and_cover_it_in_each_batch(place):
    """P(t < k) = (k/T)^(1/power), or that of a normal log-SNR; of a stratified batch the count below k is within 1 of
    its share; where the batch is not stratified (GLIDE) the times are independent, so that a batch's sum varies as such
    sums do."""
    name, _ = place
    t, power = of(*place, "t"), STAGES[place][1]
    config = small_systems.CONFIGS[name]
    T = {"dpm": 5, "adm": 50, "consistency": 5}.get(name) or config.T
    shares = {"logit-normal": logit_normal_share, "normal": normal_share}
    share = shares[power](T) if power in shares else (np.arange(T + 1) / T) ** (1 / power)
    below = (t[:, :, None] < np.arange(T + 1)).sum(axis=1)                          # (STEPS, T + 1)
    B = t.shape[1]
    if name != "glide":
        assert np.abs(below - B * share).max() <= 1 + 1e-9
        # the first row's time has the same density: its place in the batch says nothing
        gap = stats.kstest(share[t[:, 0]], "uniform").statistic
        assert gap < np.sqrt(np.log(2 / ALARM) / (2 * STEPS)) + np.diff(share).max()
    else:
        total = below.sum(axis=0)
        assert (np.abs(total - t.size * share) <= SIGMAS * np.sqrt(t.size * share * (1 - share)) + 1e-9).all()
        at = T // 2                                         # batches with one time for all would vary B times as much
        spread = ((below[:, at] - B * share[at]) ** 2).sum() / (B * share[at] * (1 - share[at]))
        assert stats.chi2.isf(1 - ALARM, STEPS) < spread < stats.chi2.isf(ALARM, STEPS)
    assert len({row.tobytes() for row in t}) > STEPS // 2 or T <= B                 # a batch's times are its own


# a field of a configuration that names a density -> the stages whose times it decides
DENSITY_OF = {("text-to-image", "times"): {"diffusion"}, ("glide", "times"): {"contrast"},
              ("dalle2", "times"): {"decoder"}, ("imagen", "times"): {"pixels-7"},
              ("imagen", "super_times"): {"pixels-14", "pixels-28"}, ("latent", "times"): {"diffusion"},
              ("dit", "times"): {"diffusion"}}


@pytest.mark.parametrize("name, field", DENSITY_OF, ids=lambda value: value)
def test_times_are_those_of_the_configured_density(name, field):
    """A density of the last time alone: it is drawn in these stages, and in the others as before."""
    config = small_systems.CONFIGS[name]
    DENSITIES.register("last", lambda schedule: np.arange(schedule.T) == schedule.T - 1)
    try:
        found = batches_of(name, 1, replace(config, **{field: "last"}))
    finally:
        DENSITIES.unregister("last")
    timed = {stage for other, stage in TIMED if other == name}
    assert {stage for stage in timed if (found[stage][0].t == config.T - 1).all()} == DENSITY_OF[name, field]


@pytest.mark.parametrize("name, field", DENSITY_OF, ids=lambda value: value)
def test_a_text_that_names_no_density_makes_no_configuration(name, field):
    with pytest.raises(UserError, match="there is no density of times 'even'"):
        replace(small_systems.CONFIGS[name], **{field: "even"})


def test_each_of_glides_pairs_has_a_time_of_its_own():
    """The four pairs of one contrast share no time but by chance: P(equal) = sum_k P(t = k)^2."""
    T, pairs = small_systems.CONFIGS["glide"].T, 4
    t = of("glide", "contrast", "t").reshape(-1, pairs)
    chance = (np.diff((np.arange(T + 1) / T) ** 2) ** 2).sum()
    assert (t[:, 0] == t[:, 1]).sum() <= stats.binom.isf(ALARM, len(t), chance)


@pytest.mark.parametrize("place", [p for p in CAPTIONED if p in TIMED and STAGES[p][0]], ids="-".join)
def test_captions_are_dropped_at_all_times_alike(place):
    """The times of dropped and of kept captions have one distribution (Kolmogorov and Smirnov)."""
    t, dropped = of(*place, "t").ravel(), of(*place, "caption").ravel() == DROPPED
    assert stats.ks_2samp(t[dropped], t[~dropped]).pvalue > ALARM


# ---- noise -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", NOISY, ids="-".join)
def test_noise_is_standard_normal_and_each_rows_own(place):
    """The distribution of all numbers (Dvoretzky, Kiefer, Wolfowitz), and products of one row with its neighbour, with
    the same row of the next step, and with each other noise of its own row: the mean of N products of independent
    numbers has the deviation 1/sqrt(N)."""
    rows = batches_of(place[0])[place[1]]
    arrays = {key: np.stack([r.noise[key] for r in rows]) for key in rows[0].noise}             # (STEPS, B, D) each
    for key, x in arrays.items():
        ordered = np.sort(x, axis=None)[::max(1, x.size // 10**5)]
        n = len(ordered)
        gap = np.abs(np.arange(n) / n - stats.norm.cdf(ordered)).max()
        assert gap < np.sqrt(np.log(2 / ALARM) / (2 * x.size)) + 2 / n, key
        # every number is drawn for itself: equal ones are those of float32's rounding
        assert len(np.unique(x)) > 0.9 * x.size, key
        for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
            assert abs((a * b).mean()) * np.sqrt(a.size) < SIGMAS, key
        for other in arrays:
            if other != key:
                assert abs((x * arrays[other]).mean()) * np.sqrt(x.size) < SIGMAS, (key, other)


@pytest.mark.parametrize("place", [p for p in NOISY if p in TIMED], ids="-".join)
def test_noise_has_the_same_size_at_all_times(place):
    """The squares of a row's noise have the mean 1 at early and at late times."""
    rows = batches_of(place[0])[place[1]]
    t, eps = of(*place, "t").ravel(), np.concatenate([r.noise["eps"] for r in rows])
    for part in (t <= np.median(t), t > np.median(t)):
        x = eps[part]
        assert abs((x * x).mean() - 1) < SIGMAS * np.sqrt(2 / x.size)


# ---- what single systems add ---------------------------------------------------------------------------------------

def test_adm_asks_for_the_answers_of_its_own_image():
    labels = np.stack([r.more["labels"] for r in batches_of("adm")["classifier"]])
    image = of("adm", "classifier", "image")
    assert (labels[..., 0] == image).all() and (labels[..., 1] == image + 1).all()


def test_dalle_shows_all_tokens_of_one_image():
    rows = batches_of("dalle")["prior"]
    assert all((r.more["tokens"] == r.image[:, None]).all() for r in rows)


def test_dalle2_drops_whole_embeddings_of_the_right_images_whatever_the_caption_and_the_time():
    """A tenth of them, each for itself; of those with a caption as many as of those without, at all times alike."""
    rows = batches_of("dalle2")["decoder"]
    z_i, image, caption, t = (np.concatenate(a) for a in zip(*((r.more["z_i"], r.image, r.caption, r.t) for r in rows),
                                                            strict=True))
    dropped = z_i[:, 0] == 0
    np.testing.assert_array_equal(z_i, np.where(dropped, 0, PLAIN + image)[:, None] + np.zeros_like(z_i))
    for part in (caption == DROPPED, caption != DROPPED):
        n = part.sum()
        assert abs(dropped[part].sum() - 0.1 * n) < SIGMAS * np.sqrt(0.09 * n)
    pairs = dropped.reshape(STEPS, -1)
    both = pairs[:, 1::2] & pairs[:, :-1:2]
    assert both.sum() <= stats.binom.isf(ALARM, both.size, 0.01)
    assert stats.ks_2samp(t[dropped], t[~dropped]).pvalue > ALARM


def test_dalle2s_codes_come_with_the_dot_product_of_their_own_pair_or_with_any():
    """z_i . z_t of the image and its caption; a dropped caption has the token of any dot product."""
    config = small_systems.CONFIGS["dalle2"]
    for rows in batches_of("dalle2")["codes"]:
        dropped = rows.caption == DROPPED
        expected = np.where(dropped, config.dots, (PLAIN + rows.image) * rows.caption)
        assert (rows.more["dot"] == expected).all()


def test_dalle2s_quantiles_are_fitted_to_dot_products_of_pairs_without_drops(monkeypatch):
    system, data = small_systems.new("dalle2"), marked(small_systems.data())
    dalle2(system, monkeypatch)
    list(system.stages(data))
    squares = (PLAIN + np.arange(len(data))) ** 2
    np.testing.assert_array_equal(np.sort(system.dots.values), squares)


@pytest.mark.parametrize("stage", ["pixels-14", "pixels-28"])
def test_imagens_small_image_has_a_level_of_its_own(stage):
    """s is uniform on -1 ... T-1 (Pearson), its own for each row, and independent of t."""
    s = np.stack([r.more["s"] for r in batches_of("imagen")[stage]])
    t, T = of("imagen", stage, "t"), small_systems.CONFIGS["imagen"].T
    assert stats.chisquare(np.bincount(s.ravel() + 1, minlength=T + 1)).pvalue > ALARM
    same = s[:, 1:] == s[:, :-1]
    assert same.sum() <= stats.binom.isf(ALARM, same.size, 1 / (T + 1))
    assert abs(np.corrcoef(s.ravel(), t.ravel())[0, 1]) * np.sqrt(s.size) < SIGMAS


def test_the_digit_classifiers_label_is_of_the_image_that_it_sees(data):
    """An image moved by up to two pixels keeps the number of its corner, or part of it, in sight of the label."""
    for rows in batches_of("digit-classifier")["classifier"][:5]:
        seen = np.rint((rows.more["seen"] + 1) * 127.5).astype(int)[:, :6, :6, 0].reshape(len(rows.image), -1)
        assert ((seen == rows.image[:, None]).sum(axis=1) >= 4).all()


def test_the_dvaes_temperature_and_weight_are_those_of_the_step():
    """tau = 1 ... 1/16 along half a cosine until three quarters, beta until a tenth."""
    system, data = small_systems.new("dalle"), marked(small_systems.data())
    batch = next(system.stages(data)).batch
    for n in (0, 3, 10, 37, 75, 99):
        _, _, tau, beta = batch(Step(0, 1, n, 100, 5))
        half = (1 + np.cos(np.pi * min(n / 75, 1))) / 2
        np.testing.assert_allclose(tau, 1 / 16 + (1 - 1 / 16) * half, rtol=1e-6)
        rising = (1 - np.cos(np.pi * min(n / 10, 1))) / 2
        np.testing.assert_allclose(beta, system.config.beta * rising, atol=1e-12)


def test_imagens_text_stage_reads_a_text_for_each_row_and_new_ones_in_each_step():
    system, texts = small_systems.new("imagen"), []
    data = copy(small_systems.data())
    data.text = lambda rng: texts.append(f"{rng.integers(10**9)} and {rng.integers(10**9)}") or texts[-1]
    stage = next(system.stages(data))
    first, second = (stage.batch(Step(0, 1, n, 10, 6)) for n in range(2))
    assert len(set(texts)) == len(texts) == 12
    assert len({row.tobytes() for row in first[0]} | {row.tobytes() for row in second[0]}) > 10

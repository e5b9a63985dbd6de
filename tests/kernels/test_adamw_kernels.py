"""The fused update equals clipping, AdamW, the average and the loss scale of NumPy, and decides without the host."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_on_cpu, fake_cupy
from support.fake_cupy import install

from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda.adamw import FAILED, GOOD, NORM, SCALE, SKIPPED, FusedAdamW
from minidiff.engine.tensor import Tensor
from minidiff.nn.optim import EMA, AdamW, UpdateOnDevice, clip_by_norm
from minidiff.nn.precision import LossScale

needs_compiler = fake_cupy.needs_compiler
pytestmark = fake_cupy.needs_device
SHAPES = ((1,), (), (3, 2), (255,), (257,), (64, 65), (1,), (4096 + 1,))           # a chunk is 4096 numbers
VERSIONS = sorted(cuda.versions("adamw"))


@pytest.fixture(scope="module")
def cupy():
    with pytest.MonkeyPatch.context() as patch:
        yield install(patch)


def parameters(place=lambda a: a, shapes=SHAPES) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    return {str(i): Tensor(place(np.array(rng.standard_normal(shape), np.float32)), requires_grad=True)
            for i, shape in enumerate(shapes)}


def gradients(n: int, size: float = 1.0, shapes=SHAPES) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    return [np.array(size * rng.standard_normal(shape), np.float32) for shape in shapes]


def both(cupy, clip: float, decay: float = 0.9, scaling=lambda: LossScale(1.0), shapes=SHAPES):
    """The same parameters on the host and on the device, each with its optimiser and its average."""
    here, there = parameters(shapes=shapes), parameters(cupy.asarray, shapes)
    host = AdamW(here), EMA(here, decay)
    device = UpdateOnDevice(AdamW(there), EMA(there, decay), scaling(), clip)
    return host, device


def assert_equal(host, device, atol=1e-6):
    """To float32's rounding: all numbers are of size 1, and the two fuse products and sums differently."""
    (optimiser, ema), there = host, device
    for name, w in optimiser.parameters.items():
        for a, b in ((w.data, there.optimiser.parameters[name].data), (optimiser.m[name], there.optimiser.m[name]),
                     (optimiser.v[name], there.optimiser.v[name]), (ema.average[name], there.ema.average[name])):
            np.testing.assert_allclose(b.get(), a, rtol=1e-5, atol=atol)


@settings(max_examples=8, deadline=None)
@given(clip=st.sampled_from([1e-2, 1.0, 1e3]), size=st.sampled_from([1e-3, 1.0, 30.0]), steps=st.integers(1, 4))
def test_it_is_numpys_update(cupy, clip, size, steps):
    """Shapes around a chunk and a block's threads, gradients that are clipped and that are not."""
    (optimiser, ema), device = both(cupy, clip)
    for n in range(steps):
        grads, lr = gradients(n, size), 0.1 / (n + 1)
        device.step([cupy.asarray(g) for g in grads], cupy.asarray(np.float32(0.5)), lr, n + 1)
        clip_by_norm(grads, clip)
        optimiser.step(grads, lr)
        ema.step()
    assert_equal((optimiser, ema), device, atol=1e-5)
    assert device.fetch(steps) is None and device.optimiser.n == device.ema.n == steps


def test_the_norm_of_many_numbers(cupy):
    """More chunks than a block has threads: 2^21 numbers of size 1; summed in float32, as a tree."""
    shapes = ((1 << 10, 1 << 10), (1 << 20,))
    (optimiser, ema), device = both(cupy, 1.0, shapes=shapes)
    grads = gradients(1, shapes=shapes)
    device.step([cupy.asarray(g) for g in grads], cupy.asarray(np.float32(1)), 0.1, 1)
    clip_by_norm(grads, 1.0)
    optimiser.step(grads, 0.1)
    ema.step()
    # the first step is lr in the direction of the sign, so m says what the clip factor was
    for name, m in optimiser.m.items():
        np.testing.assert_allclose(device.optimiser.m[name].get(), m, rtol=1e-5, atol=1e-9)


def test_more_parameters_than_a_launch_takes(cupy, monkeypatch):
    """Two parts: the norm and the decision are of all, and each number is NumPy's."""
    most = cuda.pick("adamw", "float32").constants["MOST"]
    shapes = ((2, 2),) * most + ((4097,), (3,))
    (optimiser, ema), device = both(cupy, 1.0, shapes=shapes)
    launched, grads = fake_cupy.watch_launches(monkeypatch), gradients(1, shapes=shapes)
    device.step([cupy.asarray(g) for g in grads], cupy.asarray(np.float32(1)), 0.1, 1)
    assert fake_cupy.REAL or launched == [*["square_sums"] * 2, "decide", *["adamw"] * 2]
    clip_by_norm(grads, 1.0)
    optimiser.step(grads, 0.1)
    ema.step()
    assert_equal((optimiser, ema), device)
    for name, m in optimiser.m.items():
        np.testing.assert_allclose(device.optimiser.m[name].get(), m, rtol=1e-5, atol=1e-9)


def test_an_array_that_was_replaced_is_the_one_that_is_updated(cupy):
    """The table of the weights stays on the device from step to step, as long as the weights stay where they are."""
    _, device = both(cupy, 1.0)
    grads, one = [cupy.asarray(g) for g in gradients(0)], cupy.asarray(np.float32(1))
    device.step(grads, one, 0.1, 1)
    p = device.optimiser.parameters["2"]
    old, kept = p.data, p.data.get()
    p.data = old.copy()
    device.step(grads, one, 0.1, 2)
    assert np.array_equal(old.get(), kept) and not np.array_equal(p.data.get(), kept)


def test_the_table_fits_in_a_kernels_arguments():
    """A table takes 3840 bytes at most, which leaves 256 of the 4 KB to the other arguments."""
    for family, bytes_each in (("adamw", 8), ("cast_all", 8), ("normal", 24)):
        assert all(source.constants["MOST"] * bytes_each <= 3840 for source in cuda.versions(family).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_neither_do_those_after_it(cupy, bad, where):
    _, device = both(cupy, 1.0)
    good = [cupy.asarray(g) for g in gradients(0)]
    device.step(good, cupy.asarray(np.float32(1)), 0.1, 1)
    before = [a.get() for a in all_arrays(device)]
    grads, loss = gradients(1), np.float32(1)
    if where == "loss":
        loss = np.float32(bad)
    else:
        grads[5][63, 64] = bad
    device.step([cupy.asarray(g) for g in grads], cupy.asarray(loss), 0.1, 2)
    device.step(good, cupy.asarray(np.float32(1)), 0.1, 3)
    assert all(np.array_equal(a, b.get()) for a, b in zip(before, all_arrays(device), strict=True))
    number, norm = device.fetch(3)
    assert number == 2 and math.isfinite(norm) == (where == "loss") and device.optimiser.n == device.ema.n == 1
    # after the error is reported, training can continue
    device.step(good, cupy.asarray(np.float32(1)), 0.1, 2)
    assert device.fetch(2) is None and device.optimiser.n == 2
    assert not np.array_equal(before[0], all_arrays(device)[0].get())


def all_arrays(device) -> list:
    return [*(p.data for p in device.optimiser.parameters.values()), *device.optimiser.m.values(),
            *device.optimiser.v.values(), *device.ema.average.values()]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 3))
def test_the_loss_scale_is_the_hosts(cupy, finite, patience):
    """Any sequence of good and overflowing steps: the same scale, counts and weights as LossScale and NumPy."""
    def scaling():
        return LossScale(2.0**13, patience)
    shapes = ((3, 2), (5,))
    (optimiser, ema), device = both(cupy, 1.0, scaling=scaling, shapes=shapes)
    here = scaling()
    for n, good in enumerate(finite):
        grads = [here.scale * g for g in gradients(n, shapes=shapes)]
        if not good:
            grads[1][2] = np.inf
        assert float(device.scale) == here.scale
        device.step([cupy.asarray(g) for g in grads], cupy.asarray(np.float32(1)), 0.1, n + 1)
        norm = clip_by_norm(grads, 1.0, here.scale)
        assert math.isfinite(norm) == good and here.can_continue(good)
        here.update(good)
        if good:
            optimiser.step(grads, 0.1)
            ema.step()
    assert device.fetch(len(finite)) is None
    assert device.scaling.state_dict() == here.state_dict()
    assert device.optimiser.n == optimiser.n == device.ema.n
    assert_equal((optimiser, ema), device, atol=1e-5)


def test_the_scale_ends_where_the_hosts_does_and_an_average_without_memory_is_the_weights(cupy):
    _, device = both(cupy, 1.0, decay=0.0, scaling=lambda: LossScale(2.0**59, patience=1))
    for n in range(1, 4):
        device.step([cupy.asarray(1e3 * g) for g in gradients(n)], cupy.asarray(np.float32(1)), 0.1, n)
    assert device.fetch(3) is None and device.scaling.scale == LossScale.MOST
    for name, p in device.optimiser.parameters.items():
        assert np.array_equal(device.ema.average[name].get(), p.data.get())


def test_a_scale_of_one_cannot_be_halved(cupy):
    _, device = both(cupy, 1.0, scaling=lambda: LossScale(2.0))
    bad = [cupy.asarray(np.full(shape, np.inf, np.float32)) for shape in SHAPES]
    for n in (1, 2):
        device.step(bad, cupy.asarray(np.float32(1)), 0.1, n)
    number, norm = device.fetch(2)
    assert number == 2 and norm == math.inf and device.scaling.scale == 1 and device.scaling.skipped == 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_version_and_dtype(cupy, version, dtype):
    """In float64 to its own rounding, against the formulas written out: two steps of one parameter, clipped."""
    update = FusedAdamW([(3, 2)], dtype, version=version)
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((3, 2)), rng.standard_normal((2, 3, 2))
    there = [[cupy.asarray(a.astype(dtype))] for a in (w, np.zeros((3, 2)), np.zeros((3, 2)), w)]
    average, m, v = w, 0, 0
    for n, lr in ((1, 0.1), (2, 0.05)):
        gn = g[n - 1]
        update(there[0], [cupy.asarray(gn.astype(dtype))], *there[1:], cupy.asarray(np.array(1, dtype)), number=n,
               lr=lr, clip=0.5, b1=0.8, b2=0.95, eps=1e-8, decay=0.1, ema=0.99)
        gn = gn * 0.5 / np.linalg.norm(gn)
        m, v = 0.8 * m + 0.2 * gn, 0.95 * v + 0.05 * gn**2
        w = w - lr * (m / (1 - 0.8**n) / (np.sqrt(v / (1 - 0.95**n)) + 1e-8) + 0.1 * w)
        average = average + (1 - n / (n + 9)) * (w - average)
    for found, expected in zip(there, (w, m, v, average), strict=True):
        np.testing.assert_allclose(found[0].get(), expected, rtol=1e-12 if dtype == "float64" else 1e-5)


def test_the_state_is_what_the_host_reads(cupy):
    assert (SCALE, GOOD, SKIPPED, FAILED, NORM) == tuple(
        int(line.split(f"{name} = ")[1].split(",")[0].rstrip(";")) for name in "SCALE GOOD SKIPPED FAILED NORM".split()
        for line in cuda.pick("adamw", "float32").text.splitlines() if line.startswith("constexpr int SCALE"))


def test_arrays_that_do_not_fit_the_table_are_refused(cupy):
    _, device = both(cupy, 1.0)
    one = cupy.asarray(np.float32(1))
    grads = [cupy.asarray(g) for g in gradients(0)]
    for wrong in (cupy.asarray(np.zeros((2, 3), np.float32)), cupy.asarray(np.zeros((3, 2)))):
        with pytest.raises(TypeError, match=r"contiguous arrays of float32, here of shape \(3, 2\), not "):
            device.step([*grads[:2], wrong, *grads[3:]], one, 0.1, 1)
    with pytest.raises(ValueError, match="zip"):
        device.step(grads[:-1], one, 0.1, 1)
    # a gradient of another layout is copied
    device.step([*grads[:2], cupy.asarray(gradients(0)[2].T.copy()).T, *grads[3:]], one, 0.1, 1)
    assert device.fetch(1) is None


@needs_compiler
def test_it_is_the_same_in_any_order_of_threads(cupy):
    """Forward, in reverse and shuffled: the same bits, so no thread reads what another has not written yet."""
    source = cuda.pick("adamw", "float32")
    program = cuda_on_cpu.Program(source.text, {"ELEMENT": "float"})
    g, partials = gradients(0)[5], []
    for order in (0, 1, 2, 3):
        partial = np.zeros(2, np.float32)
        table = cuda.table([g.ctypes.data], source.constants["MOST"])
        program["square_sums"](2, 256, [table[()], np.array([g.size], np.int32), np.array([0, 0, 0, 4096], np.int32),
                                        partial], order=order)
        partials.append(partial.tobytes())
        np.testing.assert_allclose(partial.sum(), (g.astype(np.float64)**2).sum(), rtol=1e-5)
    assert len(set(partials)) == 1

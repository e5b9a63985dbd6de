"""benchmarks/cost.py: the operations are those of a sum by hand and of the products that the engine computes; the
exponents are those of the costs; the tables and the picture arrive on the page."""

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP / "benchmarks"))

import cost  # noqa: E402
import cost_tables as tables  # noqa: E402
import operations  # noqa: E402
from operations import CONV, CROSS, PICTURE, PIXELS, SELF, TOKENS, counting  # noqa: E402

from minidiff.engine import conv, ops, tensor  # noqa: E402
from minidiff.engine.parallel import map_batch, parallel_gradients  # noqa: E402
from minidiff.engine.tensor import Tensor, gradients  # noqa: E402
from minidiff.errors import UserError  # noqa: E402
from minidiff.nn.unet import TextStates, UNet, UNetConfig  # noqa: E402

SMALL = UNetConfig(channels=1, patch=2, widths=(8, 16), heads=2, groups=4, embedding=6, text=10, out=3)


def small_unet() -> UNet:
    return UNet(SMALL, np.random.default_rng(0))


def arrays(B: int, H: int = 8, W: int = 12, M: int = 5) -> tuple[np.ndarray, ...]:
    """(x_t, t, tokens, pooled, mask) of zeros: no count depends on the numbers."""
    return (np.zeros((B, H, W, 1), np.float32), np.zeros(B, int), np.zeros((B, M, 10), np.float32),
            np.zeros((B, 10), np.float32), np.ones((B, M), bool))


def loss(unet: UNet, x_t, t, tokens, pooled, mask) -> Tensor:
    text = TextStates(Tensor(tokens, requires_grad=True), Tensor(pooled, requires_grad=True), mask)
    y = unet(Tensor(x_t), t, text)
    return ops.mean(y * y)


def counted_step(unet: UNet, *inputs: np.ndarray) -> list[operations.Product]:
    """Forward and backward, in one piece."""
    with counting(unet) as products:
        gradients(loss(unet, *inputs), list(unet.parameters().values()))
    return products


def forward(products: list[operations.Product]) -> dict[str, int]:
    found = Counter()
    for product in products:
        found[product.kind] += product.forward
    return dict(found)


# --- the operations ---------------------------------------------------------------------------------------

def test_the_count_is_that_of_a_sum_by_hand():
    """Two images of 8 x 12: 4 x 6 = 24 positions of 8 channels, and 2 x 3 = 6 of 16; captions of 5 tokens."""
    convs = (24 * 9 * (4 * 8                                # conv_in, from patches of 2 x 2
                       + 8 * 8 + 8 * 8                      # down, upper level
                       + 16 * 8 + 8 * 8                     # up, upper level, with the skip's 8 channels
                       + 8 * 12)                            # conv_out, three numbers for each of 2 x 2 pixels
             + 6 * 9 * (2 * 16 * 16                         # down, lower level
                        + 2 * 16 * 16                       # middle
                        + 32 * 16 + 16 * 16))               # up, lower level
    attentions = 3                                          # down and up at the lower level, and the middle
    pixels = (6 * 32 * 16                                   # downsample: 2 x 2 positions of 8 channels to 16
              + 6 * 16 * 32                                 # upsample, back
              + 6 * 32 * 16 + 24 * 16 * 8                   # skip connections of both blocks on the way up
              + attentions * 6 * (16 * 16 + 16 * 32 + 16 * 16       # self-attention: q; k and v; out
                                  + 16 * 16 + 16 * 16))             # cross-attention: q; out
    picture = (2 * 6 * 6 + 10 * 6                           # time1, time2; the pooled caption
               + 6 * 2 * (8 + 16 + 16 + 16 + 8))            # a scale and a shift for each channel of each block
    by_hand = {CONV: convs, PIXELS: pixels, PICTURE: picture,
               SELF: attentions * 2 * 6 * 6 * 16, CROSS: attentions * 2 * 6 * 5 * 16,
               TOKENS: attentions * 5 * 10 * 32}
    products = counted_step(small_unet(), *arrays(2))
    assert forward(products) == {kind: 2 * 2 * n for kind, n in by_hand.items()}    # 2 images; multiply and add
    # twice as much backward, without the gradients of the image and of the time's sinusoids
    spared = 2 * 2 * (24 * 9 * 4 * 8 + 6 * 6)
    assert sum(p.backward for p in products) == 2 * 2 * 2 * sum(by_hand.values()) - spared


class Watched(np.ndarray):
    """An array whose matrix products are noted, and those of all arrays that are computed from it."""

    noted: list[int] = []

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        inputs, out = ([np.asarray(a) if isinstance(a, Watched) else a for a in arrays] for arrays in (inputs, out))
        if ufunc is np.matmul:
            (*_, M, K), (*_, N) = inputs[0].shape, inputs[1].shape
            if min(M, N) > 1:                               # a product with a row or a column of ones is a sum
                Watched.noted.append(2 * math.prod(np.matmul(*inputs).shape[:-2]) * M * K * N)
        result = getattr(ufunc, method)(*inputs, **kwargs, **({"out": tuple(out)} if out else {}))
        return result.view(Watched) if isinstance(result, np.ndarray) else result


@pytest.mark.parametrize("M", [5, 9])
def test_the_count_is_that_of_all_products_that_the_engine_makes(M, monkeypatch):
    """With the plain form of convolution, since Winograd's makes other products."""
    unet, inputs, plain = small_unet(), arrays(3, M=M), tensor.plain
    expected = counted_step(unet, *inputs)
    monkeypatch.setattr(conv, "_fastest", lambda *_, **__: None)
    monkeypatch.setattr(tensor, "plain", lambda a: plain(a).view(Watched) if isinstance(a, np.ndarray) else plain(a))
    for w in unet.parameters().values():
        w.data = w.data
    Watched.noted = noted = []
    y = loss(unet, *inputs)
    assert sum(noted) == sum(p.forward for p in expected) > 1e6
    gradients(y, list(unet.parameters().values()))
    assert sum(noted) == sum(p.forward + p.backward for p in expected)


def test_operations_grow_with_the_exponents_that_the_page_explains():
    """Over pixels, tokens and the batch: exactly, since each kind of operations is one power."""
    unet, of_base = small_unet(), forward(counted_step(small_unet(), *arrays(1)))

    def grown(kind: str, **sizes: int) -> float:
        return math.log2(forward(counted_step(unet, *arrays(**{"B": 1} | sizes)))[kind] / of_base[kind])
    four_times, double = {"H": 16, "W": 24}, {"M": 10}
    assert [grown(kind, **four_times) / 2 for kind in (CONV, PIXELS, SELF, CROSS, TOKENS, PICTURE)] \
        == [1, 1, 2, 1, 0, 0]
    assert [grown(kind, **double) for kind in (CONV, PIXELS, SELF, CROSS, TOKENS, PICTURE)] == [0, 0, 0, 1, 1, 0]
    assert all(grown(kind, B=2) == 1 for kind in operations.KINDS)


def test_shards_in_threads_are_counted_together(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    unet, inputs = small_unet(), arrays(6)
    whole, leaves = counted_step(unet, *inputs), list(unet.parameters().values())
    with counting(unet) as in_shards:
        parallel_gradients(lambda part: loss(unet, *(a[part] for a in inputs)), leaves, 6)
    assert len(in_shards) == 2 * len(whole) and operations.by_kind(in_shards) == operations.by_kind(whole)

    def network(x_t, t, tokens, pooled, mask):
        return unet(Tensor(x_t), t, TextStates(Tensor(tokens), Tensor(pooled), mask))
    with counting(unet) as evaluated:
        map_batch(network, *inputs)
    assert forward(evaluated) == forward(whole) and not any(p.backward for p in evaluated)


def test_counting_ends_with_an_error_too():
    before = conv.conv2d, ops.linear
    with pytest.raises(ValueError, match="UNet: x must be"), counting(unet := small_unet()) as products:
        unet(Tensor(np.zeros((1, 5, 5, 1))), np.zeros(1), None)
    assert (conv.conv2d, ops.linear) == before and not products


# --- exponents --------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True).map(sorted)


@given(sizes, st.floats(-3, 3), st.floats(1e-6, 1e6))
def test_the_exponent_of_a_power_is_found(n, p, c):
    assert tables.exponent(n, [c * x**p for x in n]) == pytest.approx(p, abs=1e-6)


@given(sizes, st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8))
def test_the_exponent_is_the_slope_of_least_squares_at_the_large_end(n, y):
    """No other slope, with the best height for it, is closer to the last three points."""
    y = y[:len(n)]
    p, u, v = tables.exponent(n, y), np.log(n[-3:]), np.log(y[-3:])

    def error(slope: float) -> float:
        return float(np.var(v - slope * u))
    assert all(error(p) <= error(p + d) + 1e-9 for d in (-1e-2, 1e-2, -1e-3, 1e-3, 1.0, -1.0))
    assert tables.exponent([0.5, *n[-3:]], [123.0, *y[-3:]]) == pytest.approx(p) or len(n) < 3


def test_there_is_no_exponent_of_one_size_or_of_nothing():
    assert tables.exponent([2], [3.0]) is None and tables.exponent([1, 2], [0.0, 0.0]) is None
    assert tables.exponent([1, 2, 4], [5.0, 5.0, 5.0]) == pytest.approx(0, abs=1e-12)


# --- measuring --------------------------------------------------------------------------------------------

def test_peak_memory_is_that_of_the_arrays_of_a_call():
    kept = np.ones(10**6)                                   # made before: no part of the call

    def call():
        a = np.ones(10**6)
        a = a + kept                                        # two arrays at the same time
        del a
        np.ones(10**5)
    assert 16e6 <= cost.peak_bytes(call) < 16.1e6


def test_a_turn_times_every_call_but_the_first(monkeypatch):
    now, run = [0.0], object.__new__(cost.Run)
    takes = [5.0, 9.0, 1.0, 2.0,                            # of a turn that begins with a slow call: as few as may be
             0.25, 9.0, 3.0, 4.0, 5.0, 6.0]                 # of a turn with room for four calls

    def call():
        now[0] += takes.pop(0)
    run.call, run.seconds = call, []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    run.turn(least=2, seconds=1.0)
    run.turn(least=2, seconds=1.0)
    assert run.seconds == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0] and not takes


def test_sizes_of_cores_end_with_all():
    assert cost.powers_of_two(1) == [1] and cost.powers_of_two(2) == [1, 2] and cost.powers_of_two(6) == [1, 2, 4, 6]


# --- tables and page --------------------------------------------------------------------------------------

def line(title: str, amounts: list[int], gflop: list[float]) -> tables.Line:
    costs = [tables.Cost(dict.fromkeys(tables.WORKS, 7 * g), dict.fromkeys(tables.WORKS, 3.0),
                         dict.fromkeys(tables.WORKS, {kind: 1e9 * g / 6 for kind in operations.KINDS})) for g in gflop]
    return tables.Line(title, [f"{n} of them" for n in amounts], amounts, costs)


def test_a_table_has_each_size_and_the_exponents_below():
    head, _, *rows = tables.cost_table(line("batch", [1, 2, 4, 8], [50, 20, 80, 320])).splitlines()
    assert head == ("| batch | evaluation, ms | evaluation, GFLOP | evaluation, MB | training step, ms | "
                    "training step, GFLOP | training step, MB |")
    assert rows[3] == "| 8 of them | 2,240 | 320 | 3 | 2,240 | 320 | 3 |" and len(rows) == 5
    assert rows[4] == "| exponent | **2.00** | **2.00** | **0.00** | **2.00** | **2.00** | **0.00** |"


def test_the_kinds_have_their_shares_and_an_exponent_for_each_axis():
    lines = [line("batch", [1, 2], [1, 2]), line("tokens", [1, 2], [2, 1]), line("pixels", [4], [1])]
    table = tables.kind_table(lines, {kind: 2**i for i, kind in enumerate(operations.KINDS)})
    assert f"| {CONV} | 1.6% | **1.00** | **-1.00** | - |" in table.splitlines()
    assert f"| {PICTURE} | 50.8% | **1.00** | **-1.00** | - |" in table.splitlines()


@pytest.fixture
def panels(monkeypatch) -> list:
    """The rows of panels that are drawn, without matplotlib."""
    rows = []

    def drawn(row, **_):
        rows.append(row)
        return Image.new("RGB", (5, 3))
    monkeypatch.setattr(tables.plots, "panels", drawn)
    return rows


def test_the_picture_has_the_counts_as_lines_through_the_last_time(tmp_path, panels):
    costs = [tables.Cost(dict.fromkeys(tables.WORKS, ms), dict.fromkeys(tables.WORKS, mb),
                         {work: {CONV: 1e9 * g} for work in tables.WORKS})
             for ms, mb, g in ((30.0, 1.0, 1.0), (40.0, 2.0, 3.0), (60.0, 4.0, 6.0))]
    tables.draw([tables.Line("pixels, of an image", ["", "", ""], [16, 64, 256], costs)], tmp_path / "a.png")
    (above,), (below,) = panels
    assert [label for label, *_ in above.series] == ["", "evaluation", "", "training step"]
    assert above.series[0][1:] == ([16, 64, 256], [10.0, 30.0, 60.0], "-")
    assert above.series[1][1:] == ([16, 64, 256], [30.0, 40.0, 60.0], "o")
    assert below.series[0] == ("evaluation", [16, 64, 256], [1.0, 2.0, 4.0], "o-")
    assert above.log_x and above.log_y and below.log_x and below.log_y and above.x_label == "pixels"
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.size == (5, 6)


PAGE = "# A page\n<!-- table: cost -->\nnot yet\n<!-- end -->\nafter\n"


def test_a_quick_run_fills_the_page_and_draws_beside_it(tmp_path, monkeypatch, panels, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(cost, "AXES", {"batch": ("batch", (), (1, 2))})
    monkeypatch.setattr(cost, "measure_cores", cost.measure)                        # in this process
    cost.main(quick=True, write=page)
    text = page.read_text()
    assert text.startswith("# A page\n<!-- table: cost -->\nOn ") and text.endswith("\n<!-- end -->\nafter\n")
    assert "not yet" not in text and "--quick" in text and "](page.png)" in text
    assert f"| {CONV} | " in text and "\n| exponent | " in text and text.count("| exponent |") == 2
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert "| exponent |" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["# A page without a place\n", "<!-- table: cost -->\nno end\n", None])
def test_a_page_without_a_place_is_refused_before_anything_is_measured(text, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    if text:
        page.write_text(text)
    monkeypatch.setattr(cost, "measure_all", lambda *_: pytest.fail("it measures"))
    with pytest.raises(UserError, match=r"^--write: .*page\.md (must have the lines|cannot be read)"):
        cost.main(quick=True, write=page)


def test_the_projects_page_has_the_place():
    cost.check_page(TOP / "docs" / "cost.md")


@pytest.mark.slow
def test_the_whole_command_runs(tmp_path):
    """All axes, a process for each number of cores, and matplotlib."""
    done = subprocess.run([sys.executable, TOP / "benchmarks" / "cost.py", "--quick", "--picture", tmp_path / "a.png"],
                          cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width > 1000
    assert done.stdout.count("| exponent |") == 5 and "| 1 | " in done.stdout.split("(GFLOP of one core)")[1]

"""The examples run, tiny."""

from pathlib import Path

import numpy as np
import pytest
from support.examples import EXAMPLES, load

from minidiff.diffusion.exact import DatasetDenoiser
from minidiff.diffusion.gaussian import q_sample
from minidiff.diffusion.samplers import SAMPLERS, sample, times
from minidiff.diffusion.schedules import cosine
from minidiff.errors import UserError, run_main
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig


def test_diffusion_in_2d(tmp_path):
    load("00_diffusion_in_2d").main(steps=20, out=str(tmp_path / "d.png"))
    assert (tmp_path / "d.png").stat().st_size > 1000


def test_diffusion_in_2d_samples_as_ddpm_does():
    """With the exact denoiser: the same numbers as minidiff's sampler, and points of the data."""
    lesson, data, rng = load("00_diffusion_in_2d"), np.array([[-1.0, 0.5], [0.5, 1.0]]), np.random.default_rng(0)
    x_T = rng.standard_normal((30, 2))
    exact, rng = DatasetDenoiser(lesson.SCHEDULE, data), np.random.default_rng(1)

    class Streams(list):
        def normal(self, shape, dtype):
            return np.random.Generator.standard_normal(again, (len(self), *shape), np.float32)
    again = np.random.default_rng(1)
    points = lesson.sample(exact, x_T, rng)
    of_ddpm = sample(SAMPLERS["ddpm"](exact, x_T, times(lesson.SCHEDULE, 100), streams=Streams(range(30))))
    np.testing.assert_allclose(points, of_ddpm, rtol=1e-6, atol=1e-6)
    assert np.abs(points[:, None] - data).max(2).min(1).max() < 1e-6


def test_diffusion_in_2d_learns_the_mean():
    """Of a single point, E[x_0 | x_t] is that point, so that alpha_t x0_hat is the mean of x_t."""
    lesson, rng = load("00_diffusion_in_2d"), np.random.default_rng(0)
    data = np.array([[0.5, -1.0]], np.float32)
    layers = [lesson.Linear(C, D, rng) for C, D in ((2 + 32, 32), (32, 32), (32, 2))]
    lesson.train(layers, data, 400, rng)
    for t in (20, 60):
        x_t = q_sample(lesson.SCHEDULE, data.repeat(500, 0), t, rng.standard_normal((500, 2), np.float32))
        eps_hat = lesson.network(layers, x_t, np.full(500, t)).data
        x0_hat = x_t - lesson.SCHEDULE.sigma(t) * eps_hat
        assert np.abs(x0_hat - lesson.SCHEDULE.alpha(t) * data).mean() < 0.1


@pytest.mark.slow
def test_train_mnist_text(tmp_path, monkeypatch):
    from support import tiny

    from minidiff.data import mnist
    monkeypatch.setattr(mnist, "load", lambda *a: tiny.images())
    load("train_mnist_text").main(steps=2, batch=4, out=str(tmp_path / "s.png"))
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_the_first_example_says_how_the_command_differs():
    """Each of the differences that its docstring names is one, and it names all."""
    said, config, options = load("train_mnist_text").__doc__, TextToImageConfig(), TextToImage.options()
    differs = {"nn/pixel_mixture.py": config.predicts != "v", "diffusion/densities.py": config.times != "power",
               "DPM-Solver++(2M), and scale 2": (options["sampler"], options["scale"]) == ("dpm++2m", 2.0)}
    assert {words: words in said for words in differs} == differs


@pytest.mark.slow
def test_train_emoji_text(tmp_path, capsys):
    load("train_emoji_text").main(steps=2, batch=4, judged=3, out=str(tmp_path / "e.png"))
    assert (tmp_path / "e.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "3 names seen: the true picture is the nearest for" in printed and "3 names never seen" in printed


@pytest.mark.slow
def test_convergence(tmp_path):
    orders = load("convergence").main(steps=(16, 32, 64, 128), out=str(tmp_path / "c.png"))
    for (_, name), p in orders.items():                     # shorter lists than tests/laws/ has: order .1
        entry = SAMPLERS[name.removesuffix(", inverse")]    # the inverse of ddim has its order
        assert p > entry.order - 0.15 and (entry.history > 1 or p < entry.order + 0.4), name
    assert len(orders) == 2 * 7 + 2
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.slow
def test_compare_systems(tmp_path, monkeypatch, capsys):
    compare = load("compare_systems")
    monkeypatch.setattr(compare, "ROWS", {"DALL-E": ("dalle", {}), "DDPM": ("ddpm", {"steps": 2})})
    page = tmp_path / "systems.md"
    for again in range(2):                                  # the second time from what was kept
        compare.main([], count=4, out=str(tmp_path), cache=str(tmp_path / "cache"))
        assert page.read_text().partition("<!-- end -->")[2] == "\n" + again * "Written by hand.\n"
        page.write_text(f"{page.read_text()}Written by hand.\n")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| D")]
    assert [row.split(" | ")[0] for row in rows] == ["| DALL-E", "| DDPM"] * 2
    assert rows[0].split(" | ")[5:] == rows[2].split(" | ")[5:]                     # but for the pace
    assert rows[0].split(" | ")[9] in page.read_text()
    assert (tmp_path / "systems.png").stat().st_size > 1000


@pytest.mark.slow
def test_compare_on_emoji(tmp_path, capsys):
    compare = load("compare_on_emoji")
    compare.main(["emoji"], count=2, out=str(tmp_path))
    row, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| text-to-image | 8,0"))
    assert row in (tmp_path / "emoji_systems.md").read_text()
    assert (tmp_path / "emoji_systems.png").stat().st_size > 1000
    compare.main(["emoji,scale=1,steps=2"], count=2, out=str(tmp_path))
    assert "| text-to-image, scale 1.0, steps 2 | 8,0" in capsys.readouterr().out
    for argument, sentence in (("clip", "draws no pictures"), ("emoji,scale", "emoji,scale: .*NAME=VALUE|KEY=VALUE"),
                               ("emoji,size=2", "no option 'size'"), ("emoji,steps=0", "steps must be")):
        with pytest.raises(UserError, match=sentence):
            compare.main([argument], count=2, out=str(tmp_path))


@pytest.fixture
def few_steps(tmp_path, monkeypatch):
    """The example with a small model of digits and three samplers, and its options."""
    from support import tiny
    example, model = load("few_steps"), tmp_path / "m.safetensors"
    tiny.trained_a_little().save(model, notes={"dataset": "digits"})
    names = ("ddpm", "heun", "dpm++2m", "lcm")
    monkeypatch.setattr(example, "SAMPLERS", {name: SAMPLERS[name] for name in names})
    return example, {"model": str(model), "count": 4, "budgets": (4, 9), "rows": str(tmp_path / "rows"),
                     "out": str(tmp_path / "f.png")}


def test_few_steps_counts_evaluations_of_the_network(few_steps):
    """A step of DDPM is one, guided two; N steps of Heun are 2 N - 1 times that.  T = 50: of the times 49, 32, 16 of
    three steps only 32 is within 1 < sigma/alpha <= 3."""
    ways = {"none": {"scale": 1.0}, "all": {"scale": 2.0},
            "interval": {"scale": 2.0, "interval_low": 1.0, "interval_high": 3.0}}
    planned = few_steps[0].runs(cosine(50), ways, (4, 9))
    assert all(options == ways[way] | {"sampler": name, "steps": options["steps"]} for name, way, options, _ in planned)
    assert [cost for *_, cost in planned] == sorted(cost for *_, cost in planned)
    found = {(way, name, options["steps"]): cost for name, way, options, cost in planned}
    assert found == {
        ("none", "ddpm", 4): 4, ("none", "ddpm", 9): 9, ("none", "dpm++2m", 4): 4, ("none", "dpm++2m", 9): 9,
        ("none", "heun", 2): 3, ("none", "heun", 5): 9,
        ("all", "ddpm", 2): 4, ("all", "ddpm", 4): 8, ("all", "dpm++2m", 2): 4, ("all", "dpm++2m", 4): 8,
        ("all", "heun", 2): 6,
        **{key: cost for key, cost in found.items() if key[0] == "interval"}}
    assert all(3 <= cost <= 9 for cost in found.values()) and found["interval", "ddpm", 3] == 4


@pytest.mark.slow
def test_few_steps(few_steps, tmp_path, capsys, monkeypatch):
    """A second run measures nothing, and one that lost a row measures that row."""
    example, options = few_steps
    table = example.main(**options, low=1.0, high=3.0)
    printed, size = capsys.readouterr().out, (tmp_path / "f.png").stat().st_size
    assert printed.count("\n| none") == 6 and size > 1000
    drawn, draw = [], example.draw
    monkeypatch.setattr(example, "draw", lambda *a: drawn.append(a[2]) or draw(*a))
    assert example.main(**options, low=1.0, high=3.0) == table and not drawn
    next((tmp_path / "rows").glob("heun-all-2-*.json")).unlink()
    assert example.main(**options, low=1.0, high=3.0) == table
    assert drawn == [{"scale": 2.0, "sampler": "heun", "steps": 2}]

    def begins(*_):
        raise InterruptedError("it draws")
    monkeypatch.setattr(example, "draw", begins)
    code = tmp_path / "code.py"
    code.write_text("x = 1")
    monkeypatch.setattr(example, "source", lambda: [code])
    with pytest.raises(InterruptedError):                   # a row of other code is no row of this run
        example.main(**options, low=1.0, high=3.0)


def test_rows_of_few_steps_depend_on_all_code_that_draws_and_measures():
    files = {"/".join(path.parts[-3:]) for path in load("few_steps").source()}
    assert {"minidiff/diffusion/samplers.py", "minidiff/nn/unet.py", "minidiff/evaluation/fidelity.py"} <= files
    assert any(name.endswith("examples/few_steps.py") for name in files)


@pytest.mark.parametrize("changes, sentence", [
    ({"low": 3.0, "high": 1.0}, "the guidance interval's low and high must be noise levels"),
    ({"scale": float("nan")}, "scale must be a finite number"), ({"budgets": (2, 8)}, "--evaluations must be from 4"),
    ({"count": 3}, "--count must be from 4"),
])
def test_what_few_steps_cannot_measure_is_one_sentence(few_steps, changes, sentence):
    example, options = few_steps
    with pytest.raises(ValueError, match=sentence):
        example.main(**options | changes)


def test_few_steps_of_other_pictures_than_digits_are_refused(few_steps, tmp_path):
    example, options = few_steps
    example.TextToImage.load(options["model"]).save(tmp_path / "e.safetensors", notes={"dataset": "emoji"})
    with pytest.raises(ValueError, match="e.safetensors was trained on 'emoji', and the judge reads digits only"):
        example.main(**options | {"model": str(tmp_path / "e.safetensors")})


def test_a_users_mistake_is_one_sentence():
    with pytest.raises(SystemExit, match=r"^The output path 'nowhere/x.png' is in a folder that does not exist"):
        run_main(load("convergence").main, out="nowhere/x.png")
    assert all("run_main(main" in path.read_text() for path in EXAMPLES.glob("*.py"))


def test_every_example_is_run_by_a_test():
    tests = "".join(p.read_text() for p in Path(__file__).parent.rglob("test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tests or path.name in tests, path.name


def test_it_is_short_enough_to_read():
    for name, most in (("train_mnist_text.py", 120), ("train_emoji_text.py", 120), ("00_diffusion_in_2d.py", 99)):
        assert len((EXAMPLES / name).read_text().splitlines()) <= most

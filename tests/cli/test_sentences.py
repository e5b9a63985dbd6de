"""What the commands say, to the last letter: each refusal, and each line that they print."""

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.command_line import call
from support.spy import ASKED, Numbers, Spy, Stepping, entered

from minidiff import evaluation, pictures, systems
from minidiff.cli import arguments, sampling_options
from minidiff.cli import main as cli
from minidiff.cli import sample as sampling
from minidiff.data import mnist
from minidiff.engine.parallel import cores
from minidiff.errors import UserError
from minidiff.systems.stable_diffusion import StableDiffusion
from minidiff.training import loop, run
from minidiff.training.run import Trained

CHECKPOINTS = Path(__file__).parents[1] / "pretrained" / "checkpoints"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images(50))
    monkeypatch.delenv("MINIDIFF_DATA", raising=False)
    for name, content in (("none.txt", "\n"), ("many.txt", "a\n" * 101), ("b.json", "[0.5, 0.99]")):
        Path(name).write_text(content, encoding="utf-8")
    for name, size in (("in.png", (48, 40)), ("other.png", (8, 8))):
        Image.new("RGB", size).save(name)
    Image.new("RGBA", (48, 40), (255, 255, 255, 9)).save("clear.png")
    with entered(tmp_path):
        yield tmp_path


# ---- texts that are no value -----------------------------------------------------------------------------------

CONVERTERS = [
    (arguments.number, "takes a number from -1000 to 1000, not ", ("", "x", "nan", "inf", "1000.5", "-1000.5")),
    (arguments.effort, "takes a number above 0 and at most 100, not ", ("0", "100.5", "-1")),
    (arguments.steps, "takes a whole number from 1 to 1000, not ", ("0", "1001", "1.5", "x")),
    (arguments.whole(0, 5), "takes a whole number from 0 to 5, not ", ("-1", "6", "")),
    (arguments.setting, "takes KEY=VALUE, such as timestep_spacing=trailing, not ", ("a", "=1", "")),
    (arguments.named_file, "takes NAME=FILE, such as clip=runs/clip/model.safetensors, not ", ("clip", "clip=", "=b")),
    (arguments.size, "takes pixels, such as 32 or 48x32 (width x height), not ", ("", "x", "1x2x3", "3x", "²", "-3")),
    (arguments.background, "a colour is white, black, grey or #rrggbb, such as #ff8000, not ", ("red", "")),
]


@pytest.mark.parametrize("convert, sentence, texts", CONVERTERS)
def test_a_converter_says_what_it_takes_and_what_it_was_given(convert, sentence, texts):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(sentence + repr(text))}$"):
            convert(text)


def test_the_strength_of_a_lora_says_what_it_takes():
    sentence = ("takes FILE or FILE:STRENGTH, such as style.safetensors:0.8; a strength takes a number from -1000 to "
                "1000, not 'x'")
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{sentence}$"):
        arguments.lora("a.safetensors:x")


def test_sizes_and_the_smallest_values():
    assert [arguments.size(text) for text in ("32", "48x32", "48X32")] == [(32, 32), (48, 32), (48, 32)]
    assert arguments.whole(0, 5)("0") == 0 and arguments.whole(0, 5)("5") == 5


# ---- refusals --------------------------------------------------------------------------------------------------

SPY = "scale 2.0, steps 3, sampler ddim, best 1, hot 0.5"
EPS = ("--model", str(CHECKPOINTS / "eps"))
REFUSED = [
    (("sample", "3", "--system", "spy", "--set", "depth=1"), f"spy has no option 'depth': its options are {SPY}"),
    (("sample", "3", "--system", "spy", "--set", "hot=1001"), "spy: hot takes a number from -1000 to 1000, not 1001"),
    (("sample", "3", "--system", "spy", "--set", "hot=1000.5"),
     "spy: hot takes a number from -1000 to 1000, not 1000.5"),
    (("sample", "3", "--system", "spy", "--set", "hot=NaN"), "spy: hot takes a number from -1000 to 1000, not nan"),
    (("sample", "3", "--system", "spy", "--set", "best=1.5"), "spy: best takes a value like 1, not 1.5"),
    (("sample", "3", "--system", "spy", "--set", "best=true"), "spy: best takes a value like 1, not True"),
    (("sample", "3", "--system", "spy", "--set", "hot=true"), "spy: hot takes a value like 0.5, not True"),
    (("sample", "3", "--system", "spy", "--scale", "1", "--set", "scale=2"), "spy: scale was given twice"),
    (("sample", "3", "--system", "spy", "--set", "best=2", "--set", "best=2"), "spy: best was given twice"),
    (("sample", "3", "--system", "digit-classifier"), "digit-classifier draws no pictures of captions: python "
     "examples/10_autoencoders.py shows what it does"),
    (("sample", "3", "--system", "spy", "--trajectory", "t.png"), "spy has no trajectory: " + Spy.no_trajectory),
    (("sample", "3", "--system", "spy", "--preview", "p.png"), "spy takes no --preview"),
    (("sample", "3", "--system", "spy", "--image", "in.png"), "spy takes no --image"),
    (("sample", "3", "--system", "spy", "--mask", "in.png"), "spy takes no --mask"),
    (("sample", "3", "--system", "spy", "--lora", "l.safetensors"), "spy takes no --lora"),
    (("sample", "3", "--system", "spy", "--embedding", "l.safetensors"), "spy takes no --embedding"),
    (("sample", "3", "--system", "spy", "--low-memory"), "spy takes no --low-memory"),
    (("sample", "3", "--system", "spy", "--model", "runs/stepping/model.safetensors"),
     "runs/stepping/model.safetensors holds 'stepping', and --system asks for 'spy': leave out --system, or name "
     "another --model"),
    (("sample", "3", *EPS, "--embedding", "a.st:b", "--embedding", "c.st:b"), "--embedding: b was given twice"),
    (("sample", "3", *EPS, "--mask", "in.png"),
     "--mask says what of a picture to draw again: name the picture with --image"),
    (("sample", "3", *EPS, "--image", "in.png", "--mask", "other.png"),
     "--mask ('other.png') is 8x8, and the image 48x40: they must be of one size"),
    (("sample", "3", *EPS, "--image", "in.png", "--mask", "clear.png"), "--mask ('clear.png') has transparent pixels: "
     "save it in black and white, white where the image is to be drawn again"),
    (("sample", "3", *EPS, "--image", "in.png", "--strength", "0"),
     "--strength 0 makes no step and gives the image back: take a number above 0, at most 1"),
    (("sample", "3", *EPS, "--set", "image=3"), "stable-diffusion: image is a picture: name its file with --image"),
    (("sample", "3", *EPS, "--set", "negative=5"), "stable-diffusion: negative takes a text, not 5"),
    (("sample", "3", *EPS, "--set", "strength=true"), "stable-diffusion: strength takes a number, not True"),
    *[(("evaluate", "--system", "spy", "--likelihood", f"--{option}", value),
       f"--likelihood draws no pictures: leave out --{option}")
      for option, value in (("scale", "1"), ("steps", "2"), ("sampler", "ddim"), ("set", "hot=1"), ("negative", "a"),
                            ("second", "a"), ("size", "8x8"), ("strength", "0.5"))],
    (("evaluate", "--system", "spy", "--likelihood", "--judge", "j"),
     "--likelihood is judged by the model itself: leave out --judge"),
    *[(("evaluate", "--system", "spy", f"--{option}", *value),
       f"--{option} says how pictures are read: name them with --data")
      for option, value in (("fit", ["pad"]), ("background", ["white"]), ("flip", []), ("captions", ["c.csv"]))],
    (("evaluate", "--system", "spy", "--images", "3"),
     "--images must be from 4, for precision and recall, to 10000, not 3"),
    (("evaluate", "--system", "spy", "--json", "r.txt"), "The output path 'r.txt' takes one of the endings .json."),
    (("train", "--system", "spy", "--out", "r", "--prompts", "none.txt"),
     "--prompts: 'none.txt' must hold 1 to 100 prompts, one in each line, not 0"),
    (("train", "--system", "spy", "--out", "r", "--prompts", "many.txt"),
     "--prompts: 'many.txt' must hold 1 to 100 prompts, one in each line, not 101"),
    (("train", "--system", "spy", "--needs", "a=b", "--needs", "a=c"), "--needs: a was given twice"),
    (("train", "--system", "spy", "--set", "a=1", "--set", "a=1"), "--set: a was given twice"),
    (("train", "--system", "spy", "--schedule", "cosine", "--set", "schedule=linear"),
     "--set: schedule was given twice"),
    *[(("train", "--system", "spy", "--resume", *words), "--schedule and --set cannot be changed by resuming: leave "
       "them out, or start a new run with another --out")
      for words in (("--schedule", "cosine"), ("--set", "width=4"))],
    *[(("verify", *words), "--scheduler-config and --steps are read only with --scheduler")
      for words in (("--steps", "5"), ("--scheduler-config", "a=1"))],
    (("verify", "-o", "w.png"), "-o is read only with --watch, whose picture it names"),
    *[(("verify", "-T", "5", *words), "-T is read only with --schedule: a table has as many times as it has numbers")
      for words in (("--betas", "b.json"), ("--alpha-bar", "b.json"), ("--python", "own:f"))],
    *[(("verify", "--scheduler", "minidiff:ddim", *words), f"{words[0]} is not read with --scheduler{why}")
      for words, why in ((("-T", "5"), ", which brings its own times"),
                         (("--plot", "p.png"), ": it plots the marginals of a schedule"),
                         (("--watch", "p.png"), ": it adds noise by a schedule"),
                         (("--out", "p.png"), ": it names the picture of --watch"))],
    (("check",), "check takes one exercise, such as ex01, or --all, or --list"),
    (("check", "ex01", "--all"), "check takes one exercise, such as ex01, or --all, or --list"),
    (("check", "ex01", "ex02"), "check takes one exercise at a time, such as minidiff check ex01, or --all"),
    (("check", "--all", "--hint"), "--hint takes an exercise, such as minidiff check ex01 --hint"),
    (("check", "ex01", "--folder", "nowhere"), "--folder: 'nowhere' is no folder"),
    (("check", "a/ex01_x.txt"), "'a/ex01_x.txt' is not the name of a Python file, which ends with .py"),
]


@pytest.mark.parametrize("words, sentence", REFUSED, ids=[" ".join(w).replace("/", "-")[-60:] for w, _ in REFUSED])
def test_a_refusal_to_the_last_letter(words, sentence, here, monkeypatch, capsys):
    monkeypatch.setattr(run, "run", lambda *a, **k: pytest.fail("training began"))
    before = sorted(here.rglob("*"))
    assert call(*words) == 2
    said = capsys.readouterr()
    assert said.err == f"minidiff: {sentence}\n" and " x '3' in " not in said.out
    assert sorted(here.rglob("*")) == before


def test_numbers_at_the_limit_are_taken():
    for value in (1000, -1000, 1000.0, -1000.0):
        assert sampling_options.checked_option(Spy, "hot", value) == value
    assert type(sampling_options.checked_option(Spy, "hot", 3)) is float


def test_a_prompt_is_cut_where_it_is_too_long(capsys):
    for length, said in ((2000, ""), (2001, "minidiff: the prompt has 2001 characters: the first 2000 were read\n")):
        assert sampling._prompt(SimpleNamespace(prompt="x" * length)) == "x" * 2000
        assert capsys.readouterr().err == said


def test_prompts_of_a_file_are_at_most_a_mebibyte(here):
    (here / "p.txt").write_text("a" * (1 << 20), encoding="utf-8")
    assert [len(prompt) for prompt in arguments.prompts_in(here / "p.txt")] == [1 << 20]
    (here / "p.txt").write_text("a" * ((1 << 20) + 1), encoding="utf-8")
    with pytest.raises(UserError, match="p.txt .*1 MiB"):
        arguments.prompts_in(here / "p.txt")


@pytest.mark.parametrize("platform, gib", [("darwin", 3 / 2**10), ("freebsd", 3.0)])
def test_the_peak_of_memory_is_in_bytes_on_macos_and_in_kib_elsewhere(platform, gib, monkeypatch):
    resource = pytest.importorskip("resource")

    def refuse(*_):
        raise ValueError
    monkeypatch.setattr(sampling, "read_file", refuse)      # no /proc
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    monkeypatch.setattr(sampling.sys, "platform", platform)
    assert sampling.peak_memory() == gib


@pytest.mark.parametrize("system, unit", [("spy", "picture"), ("stepping", "step")])
def test_the_bar_of_sample_counts_what_a_system_shows(system, unit, monkeypatch):
    asked, bar = [], sampling.progress
    monkeypatch.setattr(sampling, "progress", lambda **given: asked.append(given) or bar(**given))
    monkeypatch.setattr(Stepping, "steps_made", lambda self, options: 3, raising=False)
    monkeypatch.setattr("minidiff.cli.preview.EVERY", 0)    # a preview is drawn at once, if there is one
    assert call("sample", "7", "--system", system, "--count", 2) == 0
    assert asked == [{"title": "sampling", "total": 3 if unit == "step" else 2, "unit": unit, "leave": False}]


def test_training_compares_its_options_with_the_run_before_the_data_are_loaded(monkeypatch):
    asked = []

    def stop(folder, kind, resume, options):
        asked.append((folder, kind, resume, options.steps))
        raise UserError("enough")
    monkeypatch.setattr(run, "check_run", stop)
    monkeypatch.setattr("minidiff.data.dataset.load_dataset", lambda *a, **k: pytest.fail("the data were loaded"))
    assert call("train", "--system", "spy", "--out", "r", "--steps", 7, "--resume") == 2
    assert asked == [(Path("r"), Spy, True, 7)]


def test_a_mask_with_grey_is_said(capsys):
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save("grey.png")
    assert sampling._mask(Path("grey.png"), (8, 8), (8, 8)).all()
    assert capsys.readouterr().err == ("minidiff: --mask ('grey.png') has grey pixels: from the middle grey on they "
                                       "count as white\n")


def test_a_model_of_pictures_that_are_elsewhere_says_how_to_name_them(monkeypatch):
    from minidiff.cli import evaluate
    model = SimpleNamespace(notes={"dataset": "pictures", "data": "x" * 100}, likelihood_denoiser=lambda: None,
                            config=None, name="spy")
    with pytest.raises(UserError, match=f"^this model was trained on '{'x' * 79}, which minidiff does not have: name a "
                                        "folder of test pictures with --data$"):
        evaluate._likelihood(model, SimpleNamespace(data=None))


# ---- what is printed -------------------------------------------------------------------------------------------

def printed(capsys) -> str:
    return re.sub(r"in \d+\.\d s", "in N s", capsys.readouterr().out)


def test_sample_says_what_it_drew_by_which_weights_and_where(capsys):
    assert call("sample", " ", "--system", "spy", "--count", 2, "-o", "a.png") == 0
    assert printed(capsys) == "2 x '(no caption)' in N s by spy (runs/spy/model.safetensors): a.png\n"
    assert call("sample", "x" * 70, "--system", "stepping", "--count", 1, "--trajectory", "t.png") == 0
    assert printed(capsys) == (f"1 x '{'x' * 60}' in N s by stepping (runs/stepping/model.safetensors): sample.png\n"
                               "trajectory: t.png\n")


def test_sample_names_each_file_and_the_peak_of_memory_where_a_picture_takes_minutes(monkeypatch, capsys):
    monkeypatch.setattr(Stepping, "at_a_time", 1)
    monkeypatch.setattr(sampling, "peak_memory", lambda: 1.25)
    assert call("sample", "7", "--system", "stepping", "--count", 2, "-o", "a.png") == 0
    assert printed(capsys) == ("2 x '7' in N s by stepping (runs/stepping/model.safetensors): a-1.png, a-2.png\n"
                               "peak memory: 1.2 GiB\n")
    monkeypatch.setattr(sampling, "peak_memory", lambda: None)                      # Windows does not tell
    assert call("sample", "7", "--system", "stepping", "--count", 1, "-o", "a.png") == 0
    assert printed(capsys) == "1 x '7' in N s by stepping (runs/stepping/model.safetensors): a.png\n"


def test_the_files_that_a_model_borrows_are_named(capsys, tmp_path):
    model = SimpleNamespace(name="glide", file=Path("g"), borrowed=lambda: {
        "clip": SimpleNamespace(file=tmp_path / "c"), "text-to-image": SimpleNamespace()})
    assert sampling_options.files_of(model) == {"--model": Path("g"), "clip": tmp_path / "c", "text-to-image": None}
    sampling_options.print_files(model)
    assert capsys.readouterr().out == f"glide draws with clip ({tmp_path / 'c'})\n" \
                                      "glide draws with text-to-image (in memory)\n"
    assert sampling_options.files_of(SimpleNamespace(file=None)) == {"--model": None}


@pytest.mark.parametrize("borrowed", ["c", "j"])
def test_evaluate_writes_over_no_file_that_it_reads(borrowed, monkeypatch, capsys):
    """The file of a system that the model draws with, and the judge's, under another name."""
    judge = systems.weights_of("digit-classifier")
    Path("c.json").write_text("{}", encoding="utf-8")
    Path("j.json").symlink_to(judge)
    monkeypatch.setattr(Spy, "borrowed", lambda self: {"clip": SimpleNamespace(file=Path("c.json"))}, raising=False)
    assert call("evaluate", "--system", "spy", "--images", 4, "--json", f"{borrowed}.json") == 2
    what = f"{'clip' if borrowed == 'c' else 'the judge'} and --json are both '{borrowed}.json': name two files"
    assert capsys.readouterr().err == f"minidiff: {what}\n"


def test_the_likelihood_needs_no_options_of_sampling(monkeypatch):
    monkeypatch.setattr("minidiff.evaluation.likelihood.likelihood", lambda *a, **k: Numbers())
    monkeypatch.setattr(Spy, "options", classmethod(lambda cls: None))
    assert call("evaluate", "--system", "spy", "--likelihood") == 0


def test_sample_writes_over_no_picture_that_it_reads(monkeypatch, capsys):
    for option, reads in (("--image", ["--image", "in.png"]), ("--mask", ["--image", "in.png", "--mask", "mask.png"])):
        name = reads[-1]
        Image.new("L", (48, 40), 255).save("mask.png")
        assert call("sample", "3", *EPS, "--steps", 2, *reads, "-o", name) == 2
        assert capsys.readouterr().err.endswith(f"minidiff: {option} and --out are both '{name}': name two files\n")


@pytest.mark.parametrize("words, size", [([], (40, 48)), (["--size", "64x32"], (32, 64))])
def test_the_image_is_resized_to_what_is_asked_for_or_to_multiples_of_8(words, size, monkeypatch, capsys):
    Image.new("RGB", (50, 43)).save("odd.png")
    asked = []

    def stop(path, options):
        asked.append(options)
        raise UserError("enough")
    monkeypatch.setattr(StableDiffusion, "check_options", stop)
    assert call("sample", "3", *EPS, "--image", "odd.png", *words) == 2
    assert asked[0]["image"].shape == (*size, 3)


def test_evaluate_names_the_model_and_the_judge(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "evaluate", lambda model, **k: Numbers())
    assert call("evaluate", "--system", "spy", "--images", 4) == 0
    judge = systems.weights_of("digit-classifier")
    assert capsys.readouterr().out == f"model: spy (runs/spy/model.safetensors)\njudge: digit-classifier ({judge})\n" \
                                      "a  1\n"
    assert call("evaluate", "--system", "spy", "--images", 4, "--judge", "mine.safetensors") == 0
    assert "judge: digit-classifier (mine.safetensors)\n" in capsys.readouterr().out
    monkeypatch.setattr("minidiff.evaluation.likelihood.likelihood", lambda *a, **k: Numbers())
    assert call("evaluate", "--system", "spy", "--likelihood") == 0
    assert capsys.readouterr().out == "model: spy (runs/spy/model.safetensors)\na  1\n"


@pytest.fixture
def trained(monkeypatch):
    def at_once(folder, kind, data, options, **more):
        folder.mkdir(parents=True, exist_ok=True)
        return Trained(kind.new(tiny.digits(50)), {"first": 125.0}, {"first": 0.5})
    monkeypatch.setattr(run, "run", at_once)
    monkeypatch.setattr(evaluation, "evaluate", lambda model, **k: Numbers())


def test_train_says_what_it_starts_with_and_what_it_has_made(trained, capsys):
    data = tiny.digits(50)
    assert call("train", "--system", "spy", "--out", "r", "--images", 8) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"system: spy; data: {data.source} ({len(data)} images); run: r"
    assert lines[1:3] == ["a                    1", "training, first      2.1 min"]
    assert re.fullmatch(r"this command in all  \d+ s", lines[3])
    assert lines[4:] == ["weights              r/model.safetensors", "samples              r/sheet.png",
                         f'try                  minidiff sample "{data.prompts[0]}" --model r/model.safetensors']


def test_a_system_that_reads_no_captions_draws_and_is_tried_without_one(trained, monkeypatch, capsys):
    monkeypatch.setattr(Spy, "reads_captions", False)
    assert call("train", "--system", "spy", "--out", "r") == 0
    assert {caption for captions, *_ in ASKED for caption in captions} == {""}
    assert capsys.readouterr().out.endswith('try                  minidiff sample "" --model r/model.safetensors\n')


def test_train_without_pictures_says_what_to_look_at(trained, monkeypatch, capsys):
    monkeypatch.setattr(Spy, "options", classmethod(lambda cls: None))
    for example, words in (("03_clip.py", "python examples/03_clip.py"),
                           (None, "minidiff info --model r/model.safetensors")):
        monkeypatch.setattr(Spy, "example", example)
        assert call("train", "--system", "spy", "--out", "r") == 0
        assert capsys.readouterr().out.endswith(f"r/model.safetensors\ntry                  {words}\n")


def test_a_failure_after_training_says_that_the_weights_are_there(trained, monkeypatch, capsys):
    def fail(*_, **__):
        raise UserError("no room.")
    monkeypatch.setattr(pictures, "save", fail)
    assert call("train", "--system", "spy", "--out", "r") == 2
    assert capsys.readouterr().err == ("minidiff: no room; the training is done, and its weights are in "
                                       "r/model.safetensors\n")
    results = json.loads(Path("r/results.json").read_text(encoding="utf-8"))
    assert results == {"system": "spy", "seconds": {"first": 125.0}, "loss": {"first": 0.5}}


@pytest.mark.parametrize("error, status, sentence", [
    (loop.Interrupted("stopped"), 1, "stopped; continue with: {command}"),
    (loop.NotSaved("the disk is full"), 2, "the disk is full; when that is put right, continue with: {command}"),
    (KeyboardInterrupt(), 130, "stopped; continue from the last saved state with: {command}")])
def test_a_run_that_ends_early_says_how_to_continue(error, status, sentence, monkeypatch, capsys):
    def stop(folder, *_, **__):
        (folder / run.START).parent.mkdir(parents=True, exist_ok=True)
        (folder / run.START).touch()
        raise error
    monkeypatch.setattr(run, "run", stop)
    assert call("train", "--system", "spy", "--out", "r", "--images", 8) == status
    command = "minidiff train --system spy --resume --out r --images 8"
    assert capsys.readouterr().err == f"minidiff: {sentence.format(command=command)}\n"


def test_a_run_that_is_stopped_before_it_began_says_so_alone(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(run, "run", stop)
    assert call("train", "--system", "spy", "--out", "r") == 130
    assert capsys.readouterr().err == "minidiff: stopped\n"


def test_verify_s_first_line_says_which_schedule_and_where_it_ends(capsys):
    assert call("verify", "-T", 50) == 0
    first, empty, *_ = capsys.readouterr().out.splitlines()
    # alpha_bar_0 = cos^2(pi/2 (1/50 + s)/(1 + s)) / cos^2(pi/2 s/(1 + s)), s = 0.008; the last beta is 0.999
    assert first == "the cosine schedule; T = 50, alpha_bar from 0.998252 to 9.71e-07" and empty == ""


def test_verify_s_first_line_says_which_scheduler_with_which_options(monkeypatch, capsys):
    from minidiff import verify as laws
    from minidiff.verify import scheduler as schedulers
    monkeypatch.setattr(schedulers, "report", lambda *a: [])
    monkeypatch.setattr(laws, "table", lambda rows: "one\ntwo")
    assert call("verify", "--scheduler", "minidiff:ddim", "--scheduler-config", "T=600") == 0
    assert capsys.readouterr().out == (
        "minidiff:ddim, T 600, schedule linear; T = 600, predicts eps\n\none\ntwo\n"
        "note: minidiff verify --schedule NAME tests the registered samplers on that schedule, by more laws\n")
    stand_in = SimpleNamespace(alpha_bar=np.ones(7), predicts="v")
    monkeypatch.setattr(schedulers, "load", lambda name, config: stand_in)
    monkeypatch.setattr(schedulers, "as_dicts", lambda rows: ["the rows"])
    assert call("verify", "--scheduler", "other:Thing", "--json", "r.json") == 0
    assert capsys.readouterr().out == "other:Thing; T = 7, predicts v\n\none\ntwo\n"
    assert json.loads(Path("r.json").read_text(encoding="utf-8")) == {
        "scheduler": "other:Thing", "config": {}, "rows": ["the rows"]}


def test_info_says_whether_there_is_a_gpu_and_a_cache(monkeypatch, capsys):
    def said() -> dict:
        assert call("info") == 0
        return dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    monkeypatch.setattr("minidiff.engine.backend.check_device", lambda device: None)
    assert said()["cores, GPU"] == f"{cores()}, yes"

    def refuse(*_):
        raise UserError("device 'cuda' is not here: buy one")
    monkeypatch.setattr("minidiff.engine.backend.check_device", refuse)
    monkeypatch.setattr(mnist, "cache_dir", refuse)
    monkeypatch.setattr(systems, "weights_of", refuse)
    rows = said()
    assert rows["cores, GPU"] == f"{cores()}, no (device 'cuda' is not here)"
    assert rows["data cache"] == "none (device 'cuda' is not here: buy one)"
    assert rows["systems"].startswith("dpm (device 'cuda' is not here: buy one), ")


# ---- the way in --------------------------------------------------------------------------------------------------

def test_the_version_is_said(capsys):
    assert call("--version") == 0
    assert re.fullmatch(r"minidiff \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_of_several_ranks_each_runs_the_command_with_its_arguments(monkeypatch):
    """As mpiexec starts them; and the status is that of all."""
    asked = []
    monkeypatch.setattr(cli, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(cli, "_main", lambda argv, out: asked.append(argv) or 5)
    monkeypatch.setattr(cli.cli_ranks, "together", lambda main: main())
    assert cli.main(["info"]) == 5 and asked == [["info"]]


def test_only_train_divides_its_work_among_ranks(monkeypatch, capsys):
    monkeypatch.setattr(cli, "ranks", lambda: SimpleNamespace(size=2))
    assert call("info") == 2
    assert capsys.readouterr().err == ("minidiff: mpiexec started 2 ranks of minidiff, but only train divides its work "
                                       "among ranks: leave out mpiexec\n")


@pytest.mark.parametrize("error, status, sentence", [
    (UserError("a mistake"), 2, "a mistake"), (KeyboardInterrupt(), 130, "stopped"),
    (KeyboardInterrupt("saved"), 130, "saved"), (OSError(28, "No space left on device", "a.png"), 2,
                                                 "a.png: No space left on device"),
    (OSError(28, "No space left on device"), 2, "the system: No space left on device"),
    (OSError("odd"), 2, "the system: odd"),
    (MemoryError(), 2, "out of memory: ask for fewer images at a time (--count, --images, --batch)"),
    (type("CUDARuntimeError", (RuntimeError,), {"__module__": "cupy_backends.cuda.api.runtime"})("illegal address"), 2,
     "the GPU failed: illegal address; start the command again (train: with --resume)"),
    (SystemExit(0), 2, "the code that was run ended with SystemExit: 0"),
    (GeneratorExit("x"), 2, "the code that was run ended with GeneratorExit: x")])
def test_what_ends_a_command_is_said(error, status, sentence, monkeypatch, capsys):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr("minidiff.cli.info._cache", fail)
    assert call("info") == status
    assert capsys.readouterr().err == f"minidiff: {sentence}\n"


def test_a_signal_has_its_own_status(monkeypatch, capsys):
    def fail():
        error = KeyboardInterrupt("ended by SIGTERM")
        error.number = 15
        raise error
    monkeypatch.setattr("minidiff.cli.info._cache", fail)
    assert call("info") == 143 and capsys.readouterr().err == "minidiff: ended by SIGTERM\n"


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("another")])
def test_a_bug_of_ours_keeps_its_traceback(error, monkeypatch):
    def fail():
        raise error
    monkeypatch.setattr("minidiff.cli.info._cache", fail)
    with pytest.raises(type(error), match="a bug|another"):
        call("info")


def test_a_user_s_warning_is_a_sentence_and_numpy_s_overflow_is_not_said(monkeypatch, capsys):
    import warnings

    def warn():
        warnings.warn("careful", UserWarning, stacklevel=1)
        warnings.warn("overflow", RuntimeWarning, stacklevel=1)
        return "x"
    monkeypatch.setattr("minidiff.cli.info._cache", warn)
    assert call("info") == 0 and capsys.readouterr().err == "minidiff: careful\n"


def test_the_author_of_a_data_set_sees_a_traceback_in_python_s_development_mode(monkeypatch, capsys):
    def fail():
        raise UserError("a mistake")
    monkeypatch.setattr("minidiff.cli.info._cache", fail)
    monkeypatch.setattr(cli.sys, "flags", SimpleNamespace(dev_mode=True))
    assert call("info") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback ") and said.endswith("minidiff: a mistake\n")


def test_an_unknown_command_lists_those_that_there_are(capsys):
    assert call("draw") == 2
    said = capsys.readouterr().err
    assert said.startswith("minidiff: argument COMMAND: invalid choice: 'draw' (choose from ")
    assert said.endswith(" (see minidiff --help)\n")
    names = re.findall(r"\w+", said.partition("choose from ")[2].partition(")")[0])
    assert names == ["train", "sample", "evaluate", "verify", "check", "info", "play"]
    assert call() == 2
    assert capsys.readouterr().err == "minidiff: the following arguments are required: COMMAND (see minidiff --help)\n"

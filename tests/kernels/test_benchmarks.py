"""The benchmarks without a GPU: what they compare, their clock on a simulated card, and their tables."""

import json
import math
import os
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support import fake_cupy
from support.small_cases import SMALL, host_inputs, name_of

TOP = Path(__file__).parents[2]
sys.path.insert(0, str(TOP / "benchmarks"))

import cases  # noqa: E402
import clock  # noqa: E402
import tables  # noqa: E402

import kernels  # noqa: E402
from minidiff.engine import conv, norm, ops  # noqa: E402
from minidiff.engine.attention import scaled_dot_product_attention  # noqa: E402
from minidiff.engine.cuda import launch as cuda  # noqa: E402
from minidiff.engine.tensor import Tensor, gradients  # noqa: E402

FAMILIES = tuple(dict.fromkeys(case.family for case in SMALL))
needs_compiler = fake_cupy.needs_compiler


def by_the_engine(case, inputs) -> tuple:
    """The result of minidiff's ops on the CPU."""
    *inputs, dy = inputs
    leaves = [Tensor(a, requires_grad=True) for a in inputs]
    if case.family == "conv":
        x, w, bias = leaves
        y = conv.conv2d(x, w, bias if case.op == "fused" else None, case.stride, case.k // 2)
        y = ops.silu(y) if case.op == "fused" else y
        wanted = {"dx": [x], "dw": [w]}.get(case.op)
    elif case.family == "attention":
        y, wanted = scaled_dot_product_attention(*leaves), leaves
    elif case.family == "layer_norm":
        y, wanted = norm.layer_norm(*leaves, cases.EPS), leaves
    else:
        x, gamma, beta = leaves
        y, wanted = ops.silu(norm.group_norm(x, case.groups, gamma, beta, cases.EPS)), leaves
    found = (y.data,) if case.op in ("forward", "fused") else tuple(gradients(y, wanted, dy))
    return tuple(map(case.seen, found)) if hasattr(case, "seen") else found


# --- what is compared -------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_what_is_expected_is_what_the_engine_computes(case, monkeypatch):
    inputs = host_inputs(case, monkeypatch)
    assert kernels.relative_error(by_the_engine(case, inputs), case.expected(*inputs)) < 1e-12


@fake_cupy.needs_device
@pytest.mark.parametrize("case", [c for c in SMALL if getattr(c, "k", 3) == 3], ids=name_of)
def test_our_kernels_are_called_as_they_ask(case, monkeypatch):
    """The first version of each, on the stand-in for a GPU."""
    cupy = fake_cupy.install(monkeypatch)
    inputs = host_inputs(case, monkeypatch, np.float32)
    on_device = [cupy.asarray(a) for a in inputs]
    if case.family == "attention":
        on_device = [cupy.asarray(a.swapaxes(1, 2)).swapaxes(1, 2) for a in inputs]
    found = case.ours(1, *on_device)()
    found = tuple(a.get() for a in (found if isinstance(found, tuple) else (found,)))
    found = tuple(map(case.seen, found)) if hasattr(case, "seen") else found
    assert kernels.relative_error(found, case.expected(*inputs)) < kernels.TOLERANCE["float32"]


def test_a_wrong_result_has_a_large_error():
    y = np.random.default_rng(0).standard_normal((5, 7))
    assert kernels.relative_error((y, y), (y, y)) == 0
    assert kernels.relative_error((y, y * 1.01), (y, y)) == pytest.approx(0.01)     # the worse of the two
    assert kernels.relative_error((y.T,), (y,)) == kernels.relative_error((y,), (y, y)) == math.inf
    y64, y = y, y.copy()
    y[3, 3] = math.nan
    assert kernels.relative_error((y,), (y64,)) == math.inf


def test_copies_fill_the_cache_twice_and_lie_elsewhere():
    inputs = np.zeros((4, 100)), np.zeros((2, 3, 5, 7)).swapaxes(1, 2)
    sets = cases.copies(inputs, cache_bytes=20_000)
    size = sum(a.nbytes for a in inputs)
    assert (len(sets) - 1) * size >= 2 * 20_000
    for a, b in zip(sets[0], sets[-1], strict=True):
        assert a.strides == b.strides and not np.shares_memory(a, b)
    assert len(cases.copies(inputs, cache_bytes=10**9)) == 48 and len(cases.copies(inputs, cache_bytes=1)) == 2


def test_all_shapes_that_were_asked_for_are_measured():
    found = cases.cases()
    convs = {(c.B, c.H, c.C, c.D) for c in found if c.family == "conv"}
    assert {(128, 14, 64, 64), (128, 7, 128, 128), (128, 7, 256, 128), (128, 14, 128, 64), (128, 28, 64, 64),
            (4, 64, 320, 320), (4, 32, 640, 640), (4, 16, 1280, 1280), (4, 8, 1280, 1280)} <= convs
    attentions = {(c.N, c.d) for c in found if c.family == "attention" and c.N == c.M}
    assert attentions >= {(4096, 40), (1024, 80), (256, 160), (64, 160)} | {(n, d) for n in (49, 196, 784)
                                                                           for d in (32, 64)}
    for family, by in (("conv", {"forward", "dx", "dw"}), ("attention", {"forward", "backward"}),
                       ("group_norm", {"forward", "backward"}), ("layer_norm", {"forward", "backward"})):
        ops_of = {}
        for case in found:
            if case.family == family:
                ops_of.setdefault((case.of, case.shape), set()).add(case.op)
        assert all(by <= ops for ops in ops_of.values())
    assert len(set(map(name_of, found))) == len(found)


def test_stable_diffusions_shapes_come_first():
    """A run that its time limit ends has then measured them."""
    for family in FAMILIES:
        of = [case.of for case in cases.cases() if case.family == family and getattr(case, "op", "") != "fused"]
        assert of == sorted(of, key=lambda who: who != cases.SD) and len(set(of)) == 2


def test_the_plainest_versions_are_left_out_where_they_take_long():
    large, small = cases.Attention("", "forward", 4, 8, 4096, 4096, 40), cases.Attention("", "forward", 1, 1, 8, 8, 8)
    assert 1 in cases.versions_for(small, "float32", "90") and 1 not in cases.versions_for(large, "float32", "90")
    newest = max(cuda.versions("attention_forward"))
    assert newest in cases.versions_for(small, "bfloat16", "90") and not cases.versions_for(small, "bfloat16", "70")
    for family in FAMILIES:                                 # each mode has a kernel on a Hopper
        for case in (c for c in SMALL if c.family == family):
            assert all(cases.versions_for(case, mode, "90") for mode in case.modes)


# --- the clock --------------------------------------------------------------------------------------------

class MadeUp:
    """A simulated card and its host, each with its own clock."""

    def __init__(self):
        self.host = self.free = 0.0                         # the host's clock; when the card's queue will be empty
        self.calls = 0

    def call(self, ms: float, host_us: float, waits: bool = False):
        def run():
            self.calls += 1
            self.host += host_us / 1e6
            self.free = max(self.free, self.host) + ms / 1e3
            if waits:
                self.synchronize()
        return run

    def now(self) -> float:
        return self.host

    def spin(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def event(self):
        card = self

        class Event:
            def record(self):
                self.at = max(card.free, card.host)

            @property
            def done(self):
                return card.host >= self.at
        return Event()

    @staticmethod
    def elapsed_ms(a, b) -> float:
        return 1e3 * (b.at - a.at)


def test_the_hosts_time_is_not_in_the_cards():
    card = MadeUp()
    taken = clock.take_time([card.call(0.004, 50.0)] * 3, card)
    assert taken.ms == pytest.approx(0.004) and taken.host_us == pytest.approx(50.0) and not taken.waits


def test_the_median_is_over_all_copies_of_the_inputs():
    card = MadeUp()
    times = [5.0, 1.0, 2.0]                                 # copies that lie well and badly
    assert clock.take_time([card.call(ms, 5.0) for ms in times], card, budget=1.0).ms == pytest.approx(2.0)


def test_a_host_that_is_slower_than_it_seemed_is_given_more_time():
    card = MadeUp()
    calls = [card.call(0.01, 500.0)] * 9 + [card.call(0.01, 5.0)]       # the last is the one that it asks first
    taken = clock.take_time(calls, card)
    assert taken.ms == pytest.approx(0.01) and not taken.waits


def test_a_call_that_waits_for_the_card_is_known_by_it():
    card = MadeUp()
    assert clock.take_time([card.call(0.01, 50.0, waits=True)] * 2, card).waits


def test_results_are_kept_until_all_inputs_had_their_turn():
    card, alive, most = MadeUp(), [0], [0]

    class Result:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1
    call = card.call(0.01, 5.0)
    clock.take_time([lambda: (call(), Result())[1]] * 4, card)
    assert most[0] == 5 and alive[0] == 0                   # four that are kept, and one that is being made


def test_a_slow_call_is_made_a_few_times_only():
    card = MadeUp()
    assert clock.take_time([card.call(1000.0, 5.0)], card).ms == pytest.approx(1000.0)
    assert card.calls == 3
    card = MadeUp()
    clock.take_time([card.call(1e-6, 0.1)], card)
    assert card.calls == 32                                 # and a fast one no more than that


# --- one case ---------------------------------------------------------------------------------------------

class TwoMilliseconds(MadeUp):
    """A card on which everything takes two milliseconds, and which is never throttled."""

    cache_bytes = 0

    def now(self) -> float:
        self.host += 1e-6
        return self.host

    def poison(self, nbytes: int) -> None:
        pass

    @staticmethod
    def elapsed_ms(a, b) -> float:
        return 2.0


@pytest.fixture
def measured(monkeypatch):
    """The rows of a small convolution and its first two versions, which `ours` may replace."""
    cupy, case = fake_cupy.install(monkeypatch), cases.Conv("", "forward", 2, 6, 5, 3)
    inputs = tuple(map(cupy.asarray, host_inputs(case, monkeypatch, np.float32)))
    monkeypatch.setattr(cases, "random_arrays", lambda mode, *shapes: inputs)
    monkeypatch.setattr(kernels, "versions_for", lambda *_: [1, 2])

    def run(ours=None, card=None) -> dict[str, dict]:
        if ours:
            monkeypatch.setattr(cases.Conv, "ours", ours)
        rows = kernels.measure(case, "float32", card or TwoMilliseconds(), {"float32": 1e-5}, None)
        return {row["who"]: row for row in rows}
    return run


@needs_compiler
@fake_cupy.of_the_stand_in
def test_each_version_that_is_right_gets_a_time(measured):
    rows = measured()
    assert list(rows) == ["v1", "v2", "cuDNN"]
    assert rows.pop("cuDNN")["note"] == "no torch"
    for row in rows.values():
        assert row["ms"] == 2.0 and 0 < row["error"] < 1e-6
        assert row["speed"] == pytest.approx(2 * 2 * 36 * 9 * 5 * 3 / 2e-3 / 1e12)
        assert row["share"] == pytest.approx(row["speed"] / 1e-5)


@fake_cupy.of_the_stand_in
def test_a_version_that_is_wrong_gets_none(measured):
    rows = measured(ours=lambda case, version, x, w, bias, dy: lambda: dy * 1.001 if version == 1 else x)
    assert rows["v1"]["ms"] is rows["v2"]["ms"] is None
    assert rows["v1"]["note"].startswith("wrong: error 1") and rows["v2"]["note"] == "wrong: error inf"


@fake_cupy.of_the_stand_in
def test_a_version_that_fails_says_why_and_the_others_go_on(measured):
    def ours(case, version, *arrays):
        if version == 1:
            raise ValueError("\n  out of something\nand more")
        return lambda: case.expected(*arrays)[0].astype("float32")
    rows = measured(ours=ours)
    assert rows["v1"]["note"] == "ValueError: out of something" and rows["v1"]["ms"] is None
    assert rows["v2"]["ms"] == 2.0


@fake_cupy.of_the_stand_in
def test_a_card_that_was_lost_ends_it(measured):
    class Gone(TwoMilliseconds):
        def synchronize(self):
            raise RuntimeError("an illegal memory access was encountered")
    with pytest.raises(kernels.Lost, match="conv forward, .*, float32, v1: RuntimeError: an illegal"):
        measured(ours=lambda case, version, *arrays: lambda: case.expected(*arrays)[0], card=Gone())


# --- the training step ------------------------------------------------------------------------------------

def test_turns_are_timed_without_their_first_step(monkeypatch):
    import train_step_cuda as step
    made, now = [], [0.0]
    monkeypatch.setattr(step.time, "perf_counter", lambda: now[0])

    def contestant(name, seconds):
        def run():
            now[0] += 100.0 if (len(made) and made[-1] != name) or not made else seconds    # caches are cold
            made.append(name)
        return run
    taken = step.take_turns({"a": contestant("a", 0.002), "b": contestant("b", 0.003)}, 3, lambda: None)
    assert made == (["a"] * (step.TURN + 1) + ["b"] * (step.TURN + 1)) * 3
    assert taken == {"a": pytest.approx([2.0] * 3), "b": pytest.approx([3.0] * 3)}


def test_the_numbers_of_a_mode_are_written_before_the_next_begins(monkeypatch, tmp_path):
    """A time limit that ends the run in the second mode leaves the first."""
    import train_step_cuda as step
    file = tmp_path / "step.json"

    class Contestant:
        def __init__(self, mode: str):
            if mode == "tf32":
                raise KeyboardInterrupt

        def repeat(self, batch):
            pass

        def step(self):
            return 0.5
    fake_cupy.install(monkeypatch)
    monkeypatch.setattr(step, "contestants", lambda *_: [(step.MINIDIFF, Contestant)])
    monkeypatch.setattr(step, "use_tf32", lambda *_: None)
    monkeypatch.setattr(step.mnist, "load", lambda **_: None)
    monkeypatch.setattr(step.Digits, "of", lambda _: None)
    monkeypatch.setattr(kernels, "torch_or_none", lambda: None)
    monkeypatch.setattr(kernels, "machine", lambda torch: MACHINE)
    with pytest.raises(KeyboardInterrupt):
        step.compare(({}, (np.zeros(4),)), ("float32", "tf32"), 1, file)
    written, = json.loads(file.read_text())["steps"]
    assert written["mode"] == "float32" and written["ms"] > 0


# --- the tables -------------------------------------------------------------------------------------------

MACHINE = {"card": "a card", "CUDA": "13.0"}


def row(family, op, mode, who, ms, *, of=cases.OURS, shape="8 x 8", share=0.5, **more) -> dict:
    return {"family": family, "op": op, "shape": shape, "of": of, "mode": mode, "who": who, "unit": "TFLOP/s", "ms": ms,
            "waits": False, "speed": 12.345, "share": share, "error": 1e-6, "host_us": 9.0} | more


REPORT = {"machine": MACHINE, "date": "2026-01-02", "left_out": [],
          "ceilings": {"float32": 50.4, "tf32": 400.0, "float16": 800.0, "bfloat16": 800.0, "copy": 3000.0},
          "rows": [row("conv", "forward", "float32", "v1", 8.0), row("conv", "forward", "float32", "v3", 2.0),
                   row("conv", "forward", "float32", "cuDNN", 1.9),
                   row("conv", "dx", "float32", "v3", 4.0), row("conv", "dx", "float32", "cuDNN", 2.0),
                   row("conv", "dx", "tf32", "v4", None, note="wrong: error 1.0e-01"),
                   row("conv", "dx", "tf32", "cuDNN", None, note="RuntimeError: no")]}


def test_the_full_table_has_a_row_for_each_shape_and_mode():
    table = tables.full_table(REPORT, "conv")
    assert table.startswith("a card, CUDA 13.0, 2026-01-02\n\n**forward**, ms\n\n")
    assert "| shape | mode | v1 | v3 | cuDNN | TFLOP/s | of ceiling | of rival |" in table
    assert "| 8 x 8 | float32 | 8 | 2 | 1.9 | 12.3 | 50% | 0.95 |" in table
    assert "| 8 x 8 | tf32 |  | wrong: error 1.0e-01 | refuses |  |  |  |" in table


def test_the_table_of_versions_links_their_files():
    table = tables.version_table(REPORT, "conv")
    assert "| forward | 8 x 8 | float32 | [conv_1_naive](conv_1_naive.cu) | 8 | 12.3 | 50% | 0.24 | 1e-06 |" in table
    assert "cuDNN" not in table


def test_targets_count_what_was_reached():
    lines = tables.target_table(REPORT, [{"of_rival": 1.25}, {"of_rival": 0.99}, {"ms": None}]).splitlines()
    assert lines[4] == "| convolution, float32, beside cuDNN | 0.9 | 0.50 | 0.72 | 0.95 | 1 of 2 |"
    assert lines[5].endswith("|  |  |  | not yet measured |") and len(lines) == 5 + len(tables.TARGETS)
    assert lines[-1] == "| the whole training step, beside PyTorch eager | 1 | 0.99 | 1.12 | 1.25 | 1 of 2 |"


def test_a_time_that_includes_the_hosts_is_marked():
    report = REPORT | {"rows": [row("conv", "dw", "float32", "v3", 2.0, waits=True)]}
    table = tables.full_table(report, "conv")
    assert "| 2* |" in table and "The host waits until the GPU is done" in table


def test_tables_of_all_that_the_stages_leave(tmp_path):
    other = REPORT | {"rows": [row("group_norm", "forward", "float32", "v1", 1.0, unit="GB/s", share=0.9)]}
    steps = {"machine": MACHINE, "date": "2026-01-02", "batch": 128, "steps": [
        {"who": "minidiff", "mode": "tf32", "ms": 3.14159, "launches": 700, "of_rival": 1.25},
        {"who": "PyTorch", "mode": "tf32", "ms": None, "note": "no torch"}]}
    for name, report in (("conv", REPORT), ("group_norm", other), ("train_step", steps)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    (tmp_path / "checks.txt").write_text("a card, 2026-01-02\nkernels\tpassed\t61\nconv\tfailed\t3\n")
    found = tables.tables_of(sorted(tmp_path.iterdir()))
    assert set(found) == {"checks", "ceilings", "targets", "train_step", "conv", "conv in full", "group_norm",
                          "group_norm in full"}
    assert "| minidiff | tf32 | 3.14 | 700 | 1.25 |\n| PyTorch | tf32 | no torch |  |  |" in found["train_step"]
    assert found["checks"].endswith("| kernels | passed | 61 |\n| conv | failed | 3 |")
    assert "0.90 | 0.90 | 0.90 | 1 of 1 |" in found["targets"] and "50 TFLOP/s" in found["ceilings"]


PAGE = "# A page\n<!-- table: conv -->\nold\n<!-- end -->\nbetween\n<!-- table: ceilings -->\n<!-- end -->\nafter\n"


def test_a_table_replaces_what_stood_in_its_place_and_no_more(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for text in ("| a |", "| b |\n| c |"):                  # and again, over itself
        assert tables.write_table(page, "conv", text)
        assert page.read_text() == PAGE.replace("old", text)
    assert not tables.write_table(page, "attention", "| a |") and "| a |" not in page.read_text()


@pytest.mark.parametrize("text", ["<!-- table: conv -->\nno end", PAGE.replace("<!-- end -->\nbetween", "between")])
def test_a_place_without_an_end_is_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="has no <!-- end -->"):
        tables.write_table(page, "conv", "| a |")
    assert page.read_text() == text


def test_the_pages_ask_for_tables_that_there_are():
    known = {"ceilings", "targets", "checks", "train_step", *FAMILIES, *(f"{family} in full" for family in FAMILIES)}
    for page in kernels.PAGES:
        asked = re.findall(r"<!-- table: (.*?) -->", page.read_text(encoding="utf-8"))
        assert asked and set(asked) <= known, page


# --- the commands, without a GPU ----------------------------------------------------------------------------

def test_without_a_gpu_one_sentence_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert kernels.main([]) == 2
    said = capsys.readouterr().err
    assert "needs CuPy" in said and said.count("\n") == 1


@fake_cupy.of_the_stand_in
def test_with_cupy_alone_it_asks_for_a_gpu(monkeypatch, capsys):
    fake_cupy.install(monkeypatch, gpus=0)
    assert kernels.main(["--only", "conv"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_training_step_says_it_too(monkeypatch, capsys):
    import train_step
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--device", "cuda"])
    with pytest.raises(SystemExit) as error:
        train_step.main()
    assert error.value.code == 2 and "needs CuPy" in capsys.readouterr().err


def test_the_plan_needs_no_gpu(capsys):
    assert kernels.main(["--plan", "--only", "attention"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == sum(case.family == "attention" for case in cases.cases())
    assert any("4096 x 4096 tokens of 40" in line and "85.899 GFLOP" in line for line in said)


@pytest.mark.parametrize("args", [["--only", "softmax"], ["--modes", "float8"], ["--seconds", "soon"]])
def test_arguments_that_are_wrong_are_refused(args, capsys):
    with pytest.raises(SystemExit) as error:
        kernels.main(args)
    assert error.value.code == 2 and args[1] in capsys.readouterr().err


def test_numbers_that_are_not_there_or_broken_are_refused(tmp_path, capsys):
    assert kernels.main(["--tables", str(tmp_path / "none.json")]) == 2
    (tmp_path / "broken.json").write_text("{")
    assert kernels.main(["--tables", str(tmp_path / "broken.json")]) == 2
    assert all("benchmarks/kernels.py: " in line for line in capsys.readouterr().err.splitlines())


# --- all of it in one call ----------------------------------------------------------------------------------

SCRIPT = TOP / "benchmarks" / "gpu_all.sh"
# in place of Python: fails where its arguments hold the word in $FAILS, and lists what was packed before
STUB = """#!/bin/sh
case "$*" in *"$FAILS"*) tar -tf "${0%/*}/out.tar" >"${0%/*}/packed"; echo "a sentence about $FAILS"; exit 3;; esac
echo fine
"""


def gpu_all(tmp_path, fails: str):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    return subprocess.run(["bash", SCRIPT, tmp_path / "out"], capture_output=True, text=True,
                          env=os.environ | {"PYTHON": str(stub), "FAILS": fails})


def test_a_stage_that_fails_is_named_and_the_others_go_on(tmp_path):
    done = gpu_all(tmp_path, "--only attention")
    checks = (tmp_path / "out" / "checks.txt").read_text().splitlines()[1:]
    assert [line.split("\t")[:2] for line in checks] == [
        ["card", "passed"], ["second device", "passed"], ["kernels", "passed"],
        ["convolution", "passed"], ["attention", "failed"], ["norms", "passed"], ["training step", "passed"]]
    assert done.returncode == 1 and "a sentence about --only attention" in done.stdout
    assert "failed: attention (failed)" in done.stdout and "failed: conv" not in done.stdout
    assert "no stage left numbers" in done.stdout           # the stub measures nothing


def test_all_stages_together_take_at_most_590_seconds():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    text = SCRIPT.read_text(encoding="utf-8")
    limits = dict(re.findall(r'^(?:stage|kernels) "?([\w ]+?)"? (\d+)', text, re.MULTILINE))
    assert len(limits) == 7 and int(limits["training step"]) >= 110
    assert sum(map(int, limits.values())) + 5 * len(limits) <= 590                  # 5 s to end a stage


def test_one_file_holds_all_results_after_each_stage(tmp_path):
    gpu_all(tmp_path, "--only attention")
    before = (tmp_path / "packed").read_text().split()      # if the machine is taken away during attention
    assert "./convolution.log" in before and "./norms.log" not in before
    with tarfile.open(tmp_path / "out.tar") as packed:
        names = {name.removeprefix("./") for name in packed.getnames()}
        assert packed.extractfile("./checks.txt").read() == (tmp_path / "out" / "checks.txt").read_bytes()
    assert names - {".", ""} == {path.name for path in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out.tar.part").exists()


def test_more_than_a_folder_is_refused():
    done = subprocess.run(["bash", SCRIPT, "a", "b"], capture_output=True, text=True)
    assert done.returncode == 2 and "benchmarks/gpu_all.sh [FOLDER]" in done.stderr

"""Plants each bug in a copy of the code, one at a time, and runs the tests.

A bug is caught when a test fails in its own body, on the wrong result, or when a signal ends the process of the tests,
such as a SIGTERM that should have been handled.  It is not caught if the code no longer loads
(a syntax error), if the bug makes nonsense of it (a NameError), or if the tests do not end: the report names these
cases, since the list of bugs has to be mended.  The test that caught the bug in the last report runs first, then the
tests of the bug's file, those of its folder, the slow tests of the file, and all others.  A bug that passes all of
them has survived.  At the end each test that caught a bug runs in a copy without bugs, where it must pass.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from . import (
    assembly,
    diffusion,
    engine,
    hostile,
    kernels,
    known,
    likelihood,
    networks,
    own_pictures,
    pretrained,
    systems,
    transformers,
    vdm,
    verifier,
)
from .bug import Bug

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "mutants.md"
PARTS = ("minidiff", "tests", "kernels", "examples", "exercises", "notebooks", "docs", "benchmarks", "pyproject.toml",
         "setup.py", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")     # what the tests may read
COMPILED = "tests/support/cuda_on_cpu/.build"              # the kernels' programs
NEVER = ("tests/parity", "tests/test_mutants.py")           # other libraries; the test of this program
LIMIT = 900.0                                               # seconds for one round of tests; four times for all
NONSENSE = {"NameError", "ImportError", "AttributeError", "SyntaxError",
            "KernelError"}                                  # CUDA C++ that does not compile

GROUPS: dict[str, list[Bug]] = {
    "Bugs that others shipped": known.BUGS,
    "The mathematics of diffusion": diffusion.BUGS + likelihood.BUGS,
    "Networks, text, training, evaluation": networks.BUGS,
    "The systems of the literature": systems.BUGS + vdm.BUGS,
    "Rectified flow and the diffusion transformer": transformers.BUGS,
    "Other people's checkpoints": pretrained.BUGS,
    "How the pieces are put together": assembly.BUGS,
    "A person's own pictures": own_pictures.BUGS,
    "Files of strangers": hostile.BUGS,
    "The engine and its derivatives": engine.BUGS,
    "The verifier": verifier.BUGS,
    "The CUDA kernels and their launch": kernels.BUGS,
}

# the tests that check most of a file, likeliest first, where test_<file's name>.py is not the whole of them
OWN = {
    "checks.py": ("engine/test_data_of_a_tensor.py",),
    "engine/tensor.py": ("engine/test_tensor.py", "engine/test_data_of_a_tensor.py",
                         "kernels/test_weight_gradients_kernels.py"),
    "nn/images.py": ("systems/test_contracts_of_systems.py",),
    "nn/layers.py": ("nn/test_layers.py", "systems/test_config.py"),
    "checkpoint.py": ("test_checkpoint.py", "hostile/test_hostile_files.py"),
    "cli/arguments.py": ("cli/test_arguments.py",),
    "cli/check.py": ("course/test_process.py",),
    "cli/info.py": ("cli/test_arguments.py",),
    "cli/evaluate.py": ("cli/test_options_arrive.py",),
    "cli/ranks.py": ("cli/test_the_end_of_ranks.py", "training/test_ranks.py"),
    "cli/sample.py": ("cli/test_options_arrive.py", "cli/test_stable_diffusion_command.py"),
    "cli/sampling_options.py": ("cli/test_options_arrive.py",),
    "cli/train.py": ("cli/test_options_arrive.py", "cli/test_main.py", "test_few_systems.py"),
    "cli/verify.py": ("cli/test_options_arrive.py", "verify/test_watch.py"),
    "data/image_file.py": ("hostile/test_hostile_files.py", "verify/test_watch.py"),
    "data/idx.py": ("hostile/test_hostile_files.py", "data/test_mnist.py"),
    "verify/scheduler/by_name.py": ("hostile/test_hostile_files.py", "verify/test_scheduler_by_name.py"),
    "data/dataset.py": ("data/test_dataset.py", "cli/test_own_pictures_command.py", "data/test_own_pictures.py"),
    "data/layouts.py": ("data/test_layouts.py", "data/test_own_pictures.py"),
    "data/picture_cache.py": ("data/test_own_pictures.py",),
    "data/digits.py": ("systems/test_adm.py",),
    "data/pixels.py": ("data/test_mnist.py",),
    "diffusion/schedules.py": ("laws/test_forward_process.py", "diffusion/test_schedules.py",
                               "diffusion/test_rectified_flow.py"),
    "diffusion/times.py": ("diffusion/test_times.py",),
    "diffusion/densities.py": ("diffusion/test_densities.py",),
    "diffusion/gaussian.py": ("laws/test_posterior.py", "laws/test_parametrisations.py",
                              "laws/test_forward_process.py", "diffusion/test_gaussian.py"),
    "diffusion/denoiser.py": ("laws/test_parametrisations.py", "diffusion/test_denoiser.py"),
    "diffusion/exact.py": ("laws/test_exact_denoisers.py",),
    "diffusion/losses.py": ("laws/test_loss_weights.py", "diffusion/test_losses.py"),
    "diffusion/samplers.py": ("laws/test_sampler_laws.py", "laws/test_convergence.py", "diffusion/test_samplers.py"),
    "diffusion/consistency.py": ("diffusion/test_consistency.py", "systems/test_distillation.py"),
    "diffusion/multistep.py": ("diffusion/test_multistep.py", "laws/test_sampler_laws.py", "laws/test_convergence.py",
                               "pretrained/test_from_image.py"),
    "diffusion/rectified_flow.py": ("diffusion/test_rectified_flow.py",),
    "diffusion/guidance.py": ("laws/test_guidance_laws.py", "diffusion/test_guidance.py", "systems/test_adm.py",
                              "systems/test_glide.py"),
    "diffusion/likelihood.py": ("laws/test_bound.py", "laws/test_decoder.py", "laws/test_flow_likelihood.py"),
    "diffusion/variational.py": ("laws/test_continuous_bound.py", "systems/test_vdm.py"),
    "diffusion/posterior.py": ("diffusion/test_posterior_sampling.py",),
    "diffusion/cascade.py": ("diffusion/test_cascade.py", "systems/test_fresh_streams.py"),
    "engine/conv_blocks.py": ("engine/test_conv.py",),
    "engine/conv_shift.py": ("engine/test_conv.py",),
    "engine/conv_winograd.py": ("engine/test_conv.py",),
    "errors.py": ("hostile/test_hostile_files.py",),
    "input_files.py": ("hostile/test_hostile_files.py",),
    "nn/activations.py": ("hostile/test_hostile_files.py",),
    "engine/parallel.py": ("engine/test_parallel.py", "training/test_by_hand.py"),
    "engine/cuda/attention.py": ("kernels/test_attention_forward_kernels.py",
                                 "kernels/test_attention_backward_kernels.py"),
    "engine/cuda/launch.py": ("engine/test_cuda_launch.py",),
    "files.py": ("test_files.py", "test_checkpoint.py"),
    "signals.py": ("cli/test_signals.py",),
    "terminal.py": ("cli/test_streams.py",),
    "evaluation/__init__.py": ("evaluation/test_report.py",),
    "evaluation/emoji.py": ("evaluation/test_emoji_report.py",),
    "evaluation/likelihood.py": ("evaluation/test_likelihood.py", "evaluation/test_report_by_hand.py",
                                 "systems/test_fresh_streams.py"),
    "evaluation/metrics.py": ("evaluation/test_metrics.py", "evaluation/test_report_by_hand.py"),
    "evaluation/report.py": ("evaluation/test_report.py", "evaluation/test_report_by_hand.py"),
    "nn/transformer.py": ("nn/test_transformer.py", "nn/test_kv_cache.py"),
    "pretrained/clip_text.py": ("pretrained/test_textual_inversion.py", "pretrained/test_network_settings.py",
                                "pretrained/test_golden.py"),
    "pretrained/clip_tokenizer.py": ("pretrained/test_textual_inversion.py", "pretrained/test_tokenizer_files.py",
                                     "pretrained/test_golden.py"),
    "pretrained/weights.py": ("pretrained/test_lora.py", "pretrained/test_golden.py", "pretrained/test_half.py",
                              "systems/test_stable_diffusion.py"),
    "pretrained/tokenizer_files.py": ("pretrained/test_tokenizer_files.py", "systems/test_stable_diffusion.py"),
    "pretrained/unet.py": ("pretrained/test_network_settings.py", "systems/test_stable_diffusion.py",
                           "pretrained/test_golden.py"),
    "pretrained/request.py": ("systems/test_stable_diffusion.py", "pretrained/test_whole_pipelines.py",
                              "cli/test_stable_diffusion_command.py"),
    "pretrained/plan.py": ("pretrained/test_from_image.py", "pretrained/test_scheduler_settings.py"),
    **{f"pretrained/{name}.py": ("pretrained/test_scheduler_config.py", "pretrained/test_scheduler_settings.py",
                                 "pretrained/test_from_image.py", "pretrained/test_whole_pipelines.py",
                                 "pretrained/test_golden.py")
       for name in ("scheduler_config", "scheduler_classes", "spreads")},
    "pretrained/checkpoints.py": ("systems/test_stable_diffusion.py",),
    "pretrained/agreement.py": ("pretrained/test_agreement.py", "systems/test_stable_diffusion.py"),
    "cli/play.py": ("play/test_play_command.py",),
    "cli/main.py": ("cli/test_main.py", "cli/test_signals.py", "cli/test_streams.py", "test_platforms.py"),
    "cli/preview.py": ("cli/test_stable_diffusion_command.py",),
    **{f"systems/{name}.py": (f"systems/test_{name}.py", "systems/test_batches.py", "systems/test_fresh_streams.py",
                                "systems/test_previews.py", "test_few_systems.py")
       for name in ("adm", "autoencoder", "clip", "dalle", "dalle2", "ddpm", "digit_classifier", "dit", "dpm", "glide",
                    "imagen", "latent", "text_to_image", "vdm")},
    "systems/consistency.py": ("systems/test_distillation.py", "systems/test_batches.py",
                               "systems/test_fresh_streams.py"),
    "systems/stable_diffusion.py": ("systems/test_stable_diffusion.py", "laws/test_stable_diffusion_law.py",
                                    "pretrained/test_memory.py", "pretrained/test_from_image.py",
                                    "cli/test_stable_diffusion_command.py"),
    "systems/__init__.py": ("cli/test_arguments.py", "training/test_run.py"),
    "systems/config.py": ("systems/test_text_to_image.py", "training/test_run.py"),
    "systems/training_batches.py": ("systems/test_training_batches.py", "systems/test_batches.py"),
    "systems/stage.py": ("systems/test_stage.py", "systems/test_batches.py"),
    "systems/system.py": ("training/test_by_hand.py", "training/test_run.py", "training/test_loop.py",
                          "systems/test_every_system.py", "systems/test_text_to_image.py"),
    "text/clip.py": ("laws/test_text_and_latents.py", "systems/test_clip.py"),
    "training/ranks.py": ("training/test_ranks_without_mpi.py", "training/test_ranks.py"),
    "training/loop.py": ("training/test_by_hand.py", "training/test_loop.py", "test_files.py",
                         "cli/test_signals.py"),
    "training/run.py": ("training/test_by_hand.py", "training/test_run.py", "test_files.py",
                        "systems/test_every_system.py", "test_few_systems.py"),
    "training/trainer.py": ("training/test_by_hand.py", "training/test_trainer.py",
                            "training/test_half_precision_training.py",
                            "training/test_loop.py"),
    "verify/forward.py": ("verify/test_forward.py", "verify/test_verify_report.py"),
    "verify/reverse.py": ("verify/test_reverse.py", "verify/test_verify_report.py"),
    "verify/rows.py": ("verify/test_rows.py", "verify/test_verify_report.py"),
    "verify/sampling.py": ("verify/test_sampling.py",),
    "verify/scheduler/run_laws.py": ("verify/test_scheduler_laws.py",),
    "kernels/group_norm": ("kernels/test_norm_kernels.py",),
    "kernels/layer_norm": ("kernels/test_norm_kernels.py",),
    "kernels/normal": ("kernels/test_random_kernels.py",),
    "kernels/sum_rows": ("kernels/test_sums_kernels.py",),
    "kernels/last_block.cuh": ("kernels/test_sums_kernels.py",),
    "kernels/embedding_backward": ("kernels/test_sums_kernels.py",),
    "kernels/cast_all": ("kernels/test_cast_kernels.py",),
    "kernels/linear": ("kernels/test_linear_kernels.py",),
    "kernels/weight_gradients": ("kernels/test_weight_gradients_kernels.py",),
    "kernels/sum_partials": ("kernels/test_norm_kernels.py", "kernels/test_attention_backward_kernels.py"),
}
# a folder's tests, for bugs that the file's own tests do not catch
FLOORS = {"engine": ("tests/engine",), "nn": ("tests/nn",), "diffusion": ("tests/laws", "tests/diffusion"),
          "text": ("tests/text", "tests/laws"), "systems": ("tests/systems",), "data": ("tests/data",),
          "training": ("tests/training",), "evaluation": ("tests/evaluation",), "pictures": ("tests/pictures",),
          "cli": ("tests/cli",), "verify": ("tests/verify",), "kernels": ("tests/kernels",)}


@dataclass(frozen=True)
class Result:
    """verdict: "caught", "survived", "timed out" or "broken"; test: the test that caught it, or what went wrong."""

    bug: Bug
    verdict: str
    test: str
    seconds: float


class NotGreen(Exception):
    """A test that caught a bug fails without any bug, too."""


def own_tests(file: str, root: Path) -> list[str]:
    """The paths of the tests that check most of a file: those of OWN, else every test_<file's name>.py."""
    # of kernels/conv_2_tiles.cu the key is kernels/conv; engine/cuda/conv.py and kernels/conv have test_conv_kernels.py
    key = re.sub(r"^(kernels/[a-z]+(?:_[a-z]+)*?)_\d\w*\.cu$", r"\1", file)
    if key in OWN:
        return [f"tests/{path}" for path in OWN[key] if (root / "tests" / path).exists()]
    kernels = "_kernels" if key.startswith(("kernels/", "engine/cuda/")) else ""
    return sorted(str(p.relative_to(root)) for p in (root / "tests").rglob(f"test_{Path(key).stem}{kernels}.py"))


ALL_TESTS = ("tests",)
ELSEWHERE = "not browser and not site"                      # these need more than the copy
QUICK, SLOW, ANY = f"not slow and {ELSEWHERE}", f"slow and {ELSEWHERE}", ELSEWHERE    # pytest's -m


def stages(bug: Bug, root: Path) -> list[tuple[tuple[str, ...], str]]:
    """(test paths, their marker), likeliest first: the file's own tests, its folder's, its own slow ones, then all."""
    folder = "kernels" if bug.file.startswith("engine/cuda/") else Path(bug.file).parts[0]
    floor = [p for p in FLOORS.get(folder, ()) if (root / p).exists()]
    own = own_tests(bug.file, root)
    return [(tuple(paths), marker) for paths, marker in
            ((own, QUICK), (floor, QUICK), (own, SLOW), (ALL_TESTS, QUICK)) if paths]


@dataclass
class Copy:
    """A copy of the project, in which bugs are planted and tests run."""

    root: Path
    original: Path = ROOT
    environment: dict[str, str] = field(init=False)

    def __post_init__(self):
        for part in PARTS:
            source = self.original / part
            if source.is_dir():
                shutil.copytree(source, self.root / part, ignore=shutil.ignore_patterns("__pycache__", ".build"))
            elif source.exists():
                shutil.copy(source, self.root / part)
        shutil.copy(Path(__file__).with_name("witness.py"), self.root / "witness.py")
        if (self.original / COMPILED).exists():             # named by a hash of their source, so all copies share them
            (self.root / COMPILED).symlink_to(self.original / COMPILED)
        # Python recognises stale bytecode by the source's time in seconds and its length; a bug may change neither
        self.environment = os.environ | {
            "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1",
            "MUTANTS_WITNESS": str(self.root / "witness.json")}
        self.environment.pop("PYTEST_ADDOPTS", None)

    def test(self, paths: Sequence[str], skip: Sequence[str], seconds: float,
             marker: str = QUICK) -> tuple[int | None, dict, str]:
        """pytest's exit status (None if the time ran out), what the witness saw, and the end of the output."""
        witness = Path(self.environment["MUTANTS_WITNESS"])
        witness.unlink(missing_ok=True)
        ignored = [f"--ignore={p}" for p in (*NEVER, *skip)]
        command = [sys.executable, "-m", "pytest", "-p", "witness", "-p", "no:cacheprovider", "-x", "-q", "--tb=line",
                   "-m", marker, *ignored, *paths]
        with subprocess.Popen(command, cwd=self.root, env=self.environment, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, start_new_session=True) as process:
            try:
                output, _ = process.communicate(timeout=max(seconds, 0.1))
                status = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, status = process.communicate()[0], None
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        seen = json.loads(witness.read_text(encoding="utf-8")) if witness.exists() else {}
        return status, seen, output[-2000:]

    def judge(self, bug: Bug, limit: float = LIMIT, likeliest: str | None = None) -> Result:
        """Plants the bug, runs the stages until a test fails, and takes the bug out again.

        likeliest: the test to run first; a name that no longer exists is ignored.
        """
        started, file = time.monotonic(), bug.path(self.root)
        right, wrong, skip = file.read_text(encoding="utf-8"), bug.planted(self.root), []

        def result(verdict: str, test: str) -> Result:
            return Result(bug, verdict, test, time.monotonic() - started)

        file.write_text(wrong, encoding="utf-8")
        try:
            if likeliest:
                _, seen, _ = self.test((likeliest,), (), limit, ANY)
                if _caught(seen):
                    return result("caught", seen["test"])
            for paths, marker in stages(bug, self.root):
                within = 4 * limit if paths == ALL_TESTS else limit
                status, seen, output = self.test(paths, skip if marker == QUICK else (), within, marker)
                if status is None:
                    return result("timed out", f"{' '.join(paths)} did not end within {within:.0f} s")
                if _caught(seen):
                    return result("caught", seen["test"])
                if status < 0:                              # a signal ended the process, whatever test ran
                    return result("caught", f"{paths[0]} ({signal.Signals(-status).name} ended the process)")
                if seen:
                    return result("broken", f"{(*seen['error'], 'an error')[0]} at {seen['when']} of {seen['test']}")
                if status not in (0, 5):                    # 5: there are no tests in these paths
                    return result("broken", f"pytest ended with status {status}: {output[-300:]}")
                if marker == QUICK:
                    skip += paths
            return result("survived", "")
        finally:
            file.write_text(right, encoding="utf-8")


def _caught(seen: dict) -> bool:
    return bool(seen) and seen["when"] == "call" and not NONSENSE & set(seen["error"])


def check_green(copy: Copy, results: Sequence[Result]) -> None:
    """NotGreen if a test that caught a bug fails without it, in a copy without bugs."""
    # where a signal ended the process, the test is "file (SIGTERM ended the process)"
    tests = sorted({re.sub(r" \(SIG\w+ ended the process\)$", "", r.test) for r in results if r.verdict == "caught"})
    for i in range(0, len(tests), 100):
        status, seen, output = copy.test(tests[i:i + 100], (), 4 * LIMIT, ANY)
        if status != 0:
            raise NotGreen(f"without any bug, {seen.get('test', 'a test that caught one')} fails:\n{output}")


@dataclass
class Kept:
    """The bugs that an interrupted run has caught, one line of a file each; nothing is kept without a file.

    A bug is known by its name and by the text of its file with the bug in it.  So a bug is planted again where its
    file has changed since, and so is each bug that was not caught.
    """

    file: Path | None = None
    original: Path = ROOT
    found: dict[str, dict] = field(init=False, default_factory=dict)
    keys: dict[Bug, str] = field(init=False, default_factory=dict)

    def __post_init__(self):
        if self.file is not None and self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            self.found = {entry["key"]: entry for entry in map(json.loads, lines)}

    def key(self, bug: Bug) -> str:
        """Of the text when this was first asked for: the copies are of that time; the original may be edited since."""
        if bug not in self.keys:
            text = f"{bug.name}\n{bug.planted(self.original)}"
            self.keys[bug] = hashlib.sha256(text.encode()).hexdigest()
        return self.keys[bug]

    def result(self, bug: Bug) -> Result | None:
        entry = self.found.get(self.key(bug))
        return entry and Result(bug, "caught", entry["test"], entry["seconds"])

    def add(self, result: Result) -> Result:
        if self.file is not None and result.verdict == "caught":
            entry = {"key": self.key(result.bug), "bug": result.bug.name, "test": result.test,
                     "seconds": result.seconds}
            with self.file.open("a", encoding="utf-8") as f:
                print(json.dumps(entry), file=f)
        return result


def run(bugs: Sequence[Bug], jobs: int, show=lambda results: results, original: Path = ROOT,
        last: Mapping[str, str] = MappingProxyType({}), kept: Kept | None = None) -> list[Result]:
    """The results in the order of the bugs.

    show wraps the iterator of new results, for a progress bar; last maps a bug's name to the test that caught it last;
    kept holds the bugs that an earlier run caught, which are not planted again.
    """
    kept = kept or Kept(original=original)
    by_name = {bug.name: result for bug in bugs if (result := kept.result(bug))}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for i in range(jobs):
            copies.put(Copy(Path(folder) / f"copy{i}", original))

        def judge(bug: Bug) -> Result:
            copy = copies.get()
            try:
                return copy.judge(bug, likeliest=last.get(bug.name))
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(judge, bug) for bug in bugs if bug.name not in by_name]
            try:
                by_name |= {r.bug.name: r for r in show(kept.add(f.result()) for f in as_completed(futures))}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        results = [by_name[bug.name] for bug in bugs]
        check_green(copies.get(), results)
    return results


# --- the report -------------------------------------------------------------------------------------------

def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):                        # not Linux, or not a PC
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {model}, Python {platform.python_version()}, {platform.system()}"


def report(results: Sequence[Result], seconds: float | None, jobs: int, not_run: int = 0) -> str:
    """The run as Markdown; seconds: its duration, if it was one run.  not_run: bugs of the list that have no result."""
    of = {verdict: sum(r.verdict == verdict for r in results) for verdict in ("caught", "survived")}
    lines = [
        "# Every known bug, planted and caught", "",
        "Bugs that others shipped, and every mistake that we could think of, planted in our code one at a time. The",
        "last column names the first test that failed. `python -m tests.mutants` writes this page: it runs the default",
        "tests on a copy of the code, the likeliest first, and the slow tests of the bug's file (without",
        "`tests/parity`, which needs other libraries).", "",
        f"{datetime.date.today()}, {machine()}, {jobs} at a time: **{len(results)} planted, {of['caught']} caught, "
        f"{of['survived']} survived**"
        + (f", {len(results) - sum(of.values())} without a verdict" if len(results) != sum(of.values()) else "")
        + (f", in {seconds / 60:.1f} minutes." if seconds else ".")
        + (f" {not_run} more of the list were not planted since their code changed." if not_run else "")]
    number, found = 0, {r.bug.name: r for r in results}
    for group, bugs in GROUPS.items():
        rows = [found[bug.name] for bug in bugs if bug.name in found]
        if not rows:
            continue
        lines += ["", f"## {group}", "", "| | bug | in | caught by |", "|--:|---|---|---|"]
        for r in rows:
            number += 1
            caught = f"`{r.test.removeprefix('tests/')}`" if r.verdict == "caught" else f"**{r.verdict}** {r.test}"
            lines.append("| " + " | ".join(_cell(c) for c in (str(number), _title(r.bug), r.bug.file, caught)) + " |")
    lines += ["", "## Not planted, because minidiff has no such code", "",
              *(f"- {what}: {why}." for what, why in known.NOT_PLANTED), ""]
    return "\n".join(lines)


def last_report(path: Path = REPORT) -> dict[str, str]:
    """The name of each bug in the last report -> the test that caught it then."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = re.findall(r"^\| \d+ \| (.+) \| \S+ \| `(.+)` \|$", text, re.MULTILINE)
    tests = {title: "tests/" + test.replace("\\|", "|") for title, test in rows}
    return {bug.name: tests[title] for group in GROUPS.values() for bug in group
            if (title := _cell(_title(bug))) in tests}


def _title(bug: Bug) -> str:
    return bug.name + (f" ({bug.source})" if bug.source else "")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main(argv: Sequence[str] | None = None) -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", help="bugs with TEXT in their name, file or source")
    parser.add_argument("--list", action="store_true", help="name the bugs and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="bugs at a time (default 2)")
    parser.add_argument("--keep", type=Path, metavar="DIR",
                        help="note each caught bug in DIR, and do not plant it again while its file is the same")
    parser.add_argument("--report", action="store_true", help="plant nothing; report what --keep holds")
    parser.add_argument("--out", type=Path, help="the report (default docs/mutants.md; with --only none)")
    args = parser.parse_args(argv)
    bugs = [bug for group in GROUPS.values() for bug in group]
    if args.only:
        bugs = [bug for bug in bugs if args.only.lower() in f"{bug.name} {bug.file} {bug.source}".lower()]
    if args.list or not bugs:
        for bug in bugs:
            print(f"{bug.file:28} {bug.name}" + (f" ({bug.source})" if bug.source else ""))
        print(f"{len(bugs)} bugs")
        return 0 if bugs else 2

    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    kept = Kept(args.keep and args.keep / "caught.jsonl")

    def show(results):
        left = sum(kept.result(bug) is None for bug in bugs)
        for r in tqdm(results, total=left, unit="bug", dynamic_ncols=True):
            if r.verdict != "caught":
                tqdm.write(f"{r.verdict.upper()}: {r.bug.name} ({r.bug.file}) {r.test}, {r.seconds:.0f} s")
            yield r

    started = time.monotonic()
    try:
        results = [found for bug in bugs if (found := kept.result(bug))] if args.report else run(
            bugs, args.jobs, show, last=last_report(), kept=kept)
    except NotGreen as error:
        print(error, file=sys.stderr)
        return 2
    text = report(results, None if args.keep else time.monotonic() - started, args.jobs, len(bugs) - len(results))
    print(text)
    out = args.out or (None if args.only else REPORT)
    if out:
        out.write_text(text, encoding="utf-8")
    return 0 if all(r.verdict == "caught" for r in results) else 1

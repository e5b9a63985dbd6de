"""Changes every operator, number, argument and word of a floor's code, one at a time, and runs the floor's tests.

    python -m tests.mutants.generated                       all floors; it takes days
    python -m tests.mutants.generated --floor diffusion     one of them
    python -m tests.mutants.generated --sample 200          a random 200 changes of each floor
    python -m tests.mutants.generated --keep DIR            can be interrupted and resumed by the same command
    python -m tests.mutants.generated --keep DIR --report   runs nothing, and reports the results in DIR

mutmut (pip install 'mutmut>=3.8') makes the changes, and chooses the tests that execute each changed line. Changes that
pass these tests are examined again. argued.py lists those that make no difference (the same numbers in another way, or
only different memory, speed or wording), with the reason. Any other is planted in a copy, where the floor's tests run
in a new process with all their examples (mutmut's process imported the code before the change), and then the slow
tests of the changed file and those of a second device. The rest has survived.
docs/mutation.md is the report; the exit status is 1 if anything survived.

A sample is drawn by --seed, all changes of a floor being equally likely.  So the share of the sample that is caught
estimates that of the floor, and the report gives the interval that holds it with 95 %.  This is the share when a change
was first examined: for what survived then, tests are written, and the same command examines it again.  How much of the
whole floor survives these tests, only another --seed would tell.

mutmut does not change decorated functions (our properties) or the bodies of classes and modules.  Bugs in those are
planted by hand, in the other files of this folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock

from .argued import reason
from .run import PARTS, QUICK, ROOT, SLOW, machine, own_tests

REPORT = ROOT / "docs" / "mutation.md"
LIMIT = 600                                                 # seconds for the tests of one change in a copy


@dataclass(frozen=True)
class Floor:
    """The code that is changed, and the tests that should detect the changes."""

    code: str
    tests: tuple[str, ...]
    skip: tuple[str, ...] = ()              # tests that mutmut's rewriting fails: of the source, or in new processes


FLOORS = {
    "diffusion": Floor("minidiff/diffusion/",
                       ("tests/diffusion", "tests/laws", "tests/diffusion/test_second_device_diffusion.py"),
                       ("tests/diffusion/test_second_device_diffusion.py::test_the_tables_are_complete",
                        "tests/diffusion/test_conditions.py::test_nothing_that_takes_a_condition_is_left_out")),
    "engine": Floor("minidiff/engine/", ("tests/engine", "tests/nn", "tests/engine/test_second_device.py"),
                    ("tests/engine/test_every_op.py::test_the_table_is_complete",)),
    "nn": Floor("minidiff/nn/", ("tests/nn", "tests/training/test_half_precision_training.py"),
                ("tests/nn/test_second_device_nn.py",)),
    "text": Floor("minidiff/text/", ("tests/text", "tests/laws/test_text_and_latents.py",
                                     "tests/systems/test_clip.py"),
                  ("tests/text/test_text_refusals.py::test_the_warning_about_a_cut_caption_whole",)),
    "data": Floor("minidiff/data/", ("tests/data",)),
    "systems": Floor("minidiff/systems/", ("tests/systems",),
                     ("tests/systems/test_every_system_on_a_gpu.py",
                      "tests/systems/test_every_system.py::test_nothing_that_takes_options_is_left_out",
                      "tests/systems/test_contracts_of_systems.py::test_no_function_that_takes_images_is_left_out",
                      "tests/systems/test_second_device_text_to_image.py")),
    "training": Floor("minidiff/training/", ("tests/training", "tests/test_files.py"),
                      ("tests/training/test_second_device_training.py", "tests/training/test_ranks.py")),
    "evaluation": Floor("minidiff/evaluation/", ("tests/evaluation", "tests/systems/test_fresh_streams.py")),
    "cli": Floor("minidiff/cli/", ("tests/cli", "tests/verify/test_verify_command.py", "tests/course/test_process.py",
                                   "tests/play/test_play_command.py"),
                 tuple(f"tests/{test}" for test in (
                     "cli/test_signals.py::test_ctrl_c_during_the_imports_is_quiet",
                     "cli/test_signals.py::test_a_real_signal_saves",
                     "cli/test_streams.py::test_a_run_of_a_program_goes_on_without_its_bar",
                     "cli/test_streams.py::test_a_full_disk_or_a_reader_that_left",
                     "course/test_process.py::test_ctrl_c_ends_the_answer",
                     "play/test_play_command.py::test_the_command_serves_until_ctrl_c"))),
}
# the meaning of mutmut's status of a change; a crash or an endless loop is also detected
NOTICED = {1: "killed", 3: "killed", 36: "timed out", 24: "timed out", -24: "timed out", 152: "timed out",
           255: "timed out", -11: "crashed", -9: "crashed", -6: "crashed", -7: "crashed", -8: "crashed"}


@dataclass(frozen=True)
class Change:
    """One change: its name in mutmut, its file, and its verdict."""

    name: str
    file: str
    verdict: str                            # killed, timed out, crashed, argued, survived, not run
    diff: str = ""                          # the lines before (-) and after (+)
    why: str = ""                           # the argument, or the test that detected it
    late: bool = False                      # survived when it was first examined, before a test was written for it

    @property
    def function(self) -> str:
        """The readable name: `SampleStreams.normal` for mutmut's `xǁSampleStreamsǁnormal`."""
        mangled = self.name.rsplit(".", 1)[1].rsplit("__mutmut_", 1)[0]
        return mangled[2:] if mangled.startswith("x_") else ".".join(mangled.split("ǁ")[1:])


class Workshop:
    """A copy of the project in which mutmut works."""

    def __init__(self, folder: Path, floor: Floor):
        self.root, self.floor, self.lock = folder, floor, Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, folder / part)
        shutil.copy(Path(__file__).with_name("same_examples.py"), folder)
        args = ["-p", "same_examples", "-p", "no:cacheprovider"]
        args += [a for test in floor.skip for a in ("--deselect", test)]
        tests = [t for t in floor.tests if (ROOT / t).exists()]
        copied = [p for p in PARTS if p != "pyproject.toml" and (folder / p).exists()]
        config = {"source_paths": [floor.code], "pytest_add_cli_args_test_selection": tests,
                  "pytest_add_cli_args": args, "also_copy": [*copied, "same_examples.py"], "timeout_constant": 20}
        with (folder / "pyproject.toml").open("a", encoding="utf-8") as f:
            f.write("\n[tool.mutmut]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))

    def mutmut(self, *args: str, quiet: bool = True) -> str:
        """Runs mutmut here; its progress goes to the terminal unless quiet."""
        done = subprocess.run([sys.executable, "-m", "mutmut", *args], cwd=self.root, text=True, env=_environment(),
                              stdout=subprocess.PIPE if quiet else None, stderr=subprocess.PIPE if quiet else None)
        if done.returncode:
            raise RuntimeError(f"mutmut {args[0]} ended with status {done.returncode}: {(done.stderr or '')[-500:]}")
        return done.stdout or ""

    def sample(self, count: int, seed: int) -> list[str]:
        """The names of `count` random changes, or of all where there are fewer, that have not been run yet."""
        if not self.changes():
            try:                                            # it makes the changes before it finds none of this name
                self.mutmut("run", "--max-children", "1", "no change has this name")
            except RuntimeError:
                if not self.changes():
                    raise
        names = sorted(change.name for change in self.changes())
        chosen = set(random.Random(seed).sample(names, min(count, len(names))))
        return [change.name for change in self.changes() if change.name in chosen and change.verdict == "not run"]

    def changes(self) -> list[Change]:
        """All changes that mutmut made, with the verdicts of its own run."""
        found = []
        for meta in sorted((self.root / "mutants" / self.floor.code).rglob("*.py.meta")):
            file = str(meta.relative_to(self.root / "mutants"))[:-len(".meta")]
            status = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
            found += [Change(name, file, "not run" if code is None else NOTICED.get(code, "survived"))
                      for name, code in status.items()]
        return found

    @property
    def notes(self) -> Path:
        """The file with the verdicts of the changes that were examined again, one line each."""
        return self.root / "again.jsonl"

    def looked_at(self) -> dict[str, Change]:
        """The last verdict on each change that was examined again."""
        lines = self.notes.read_text(encoding="utf-8").splitlines() if self.notes.exists() else []
        found = [Change(**json.loads(line)) for line in lines]
        late = {change.name for change in found if change.verdict == "survived"}
        return {change.name: replace(change, late=change.name in late) for change in found}

    def planted(self, change: Change) -> str:
        """The file's text with the change in it."""
        file = self.root / change.file
        with self.lock:
            right = file.read_text(encoding="utf-8")
            try:
                self.mutmut("apply", change.name)
                return file.read_text(encoding="utf-8")
            finally:
                file.write_text(right, encoding="utf-8")

    def look_again(self, change: Change) -> Change:
        """The verdict on a change that passed mutmut's run: argued, detected in a copy, or survived."""
        shown = self.mutmut("show", change.name).splitlines()
        lines = [line[0] + " " + line[1:].strip() for line in shown
                 if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        diff = "\n".join(lines)
        if why := reason(change.file, change.function, diff):
            return Change(change.name, change.file, "argued", diff, why)
        with tempfile.TemporaryDirectory(prefix="change-") as folder:
            here = Path(folder) / "copy"
            shutil.copytree(self.root, here, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
            (here / change.file).write_text(self.planted(change), encoding="utf-8")
            # first the tests of the file, on whatever floor, and of its floor's contracts: they detect most changes
            near = own_tests(change.file.removeprefix("minidiff/"), here)
            near += [str(p.relative_to(here)) for t in self.floor.tests for p in sorted((here / t).rglob("test_*.py"))
                     if p.stem.startswith(f"test_{Path(change.file).stem}")
                     or p.stem.endswith(("refusals", "contracts"))]
            near = list(dict.fromkeys(near))
            slow = [str(p.relative_to(here)) for p in sorted((here / "tests").rglob("test_second_device*.py"))
                    if any(str(p.relative_to(here)).startswith(t) for t in self.floor.tests)]
            for tests, marker in ((near, QUICK), ([t for t in self.floor.tests if (here / t).exists()], QUICK),
                                  ([*near, *slow], SLOW)):
                if not tests:
                    continue
                command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider",
                           "-m", marker, *tests]
                try:
                    done = subprocess.run(command, cwd=here, text=True, capture_output=True, timeout=LIMIT, env=(
                        _environment() | {"PYTHONPATH": str(here), "PYTHONDONTWRITEBYTECODE": "1"}))
                except subprocess.TimeoutExpired:
                    if marker == SLOW:                      # these may take long without any change
                        continue
                    return Change(change.name, change.file, "timed out", diff)
                if done.returncode < 0:                     # a signal, such as that of a wrong address
                    return Change(change.name, change.file, "crashed", diff)
                if done.returncode not in (0, 1, 2, 5):     # passed, failed, code that does not load, no such tests
                    raise RuntimeError(f"pytest ended with status {done.returncode}: {done.stdout[-500:]}")
                if found := done.returncode in (1, 2):
                    break
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return Change(change.name, change.file, "killed" if found else "survived", diff, "".join(failed[:1]))


def _environment() -> dict[str, str]:
    return os.environ | {"OPENBLAS_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def examine(name: str, folder: Path, jobs: int, sample: int | None, seed: int) -> list[Change]:
    """Every change of a floor, with its verdict; "not run" for those outside the sample."""
    from tqdm import tqdm

    shop = Workshop(folder, FLOORS[name])
    print(f"{name}: mutmut changes {FLOORS[name].code} and runs the tests that pass through each change", flush=True)
    names = [] if sample is None else shop.sample(sample, seed)
    if names or sample is None:
        shop.mutmut("run", "--max-children", str(jobs), *names, quiet=False)
    changes = shop.changes()
    passed = [change for change in changes if change.verdict == "survived"]
    # changes that an interrupted run argued or let pass are examined again
    again = {n: change for n, change in shop.looked_at().items() if change.verdict not in ("argued", "survived")}
    with ThreadPoolExecutor(jobs) as pool, shop.notes.open("a", encoding="utf-8") as notes:
        left = [change for change in passed if change.name not in again]
        for change in tqdm(pool.map(shop.look_again, left), total=len(left), unit="change", dynamic_ncols=True,
                           desc=f"{name}: changes that passed, in a copy"):
            print(json.dumps(asdict(change)), file=notes, flush=True)
            if change.verdict == "survived":
                tqdm.write(f"SURVIVED {change.file} {change.function}\n{change.diff}")
    return held(name, folder)


def held(name: str, folder: Path) -> list[Change]:
    """The results of a run in this folder so far; the arguments are read again."""
    shop = object.__new__(Workshop)
    shop.root, shop.floor = folder, FLOORS[name]
    again, found = shop.looked_at(), []
    for change in shop.changes():
        # mutmut's own verdict may be a later one, with the tests that were written since
        noted = again.get(change.name, change)
        last = noted if change.verdict == "survived" else replace(change, late=noted.late)
        if last.verdict in ("survived", "argued") and (why := reason(last.file, last.function, last.diff)):
            last = replace(last, verdict="argued", why=why)
        found.append(last)
    return found


# --- the report -------------------------------------------------------------------------------------------

def report(floors: dict[str, list[Change]], seconds: float | None = None) -> str:
    """The run as Markdown; seconds: its duration, if it was one run."""
    made = [change for changes in floors.values() for change in changes]
    every = [change for change in made if change.verdict != "not run"]
    of = Counter(change.verdict for change in every)
    late = [change for change in every if _was_late(change)]
    caught = len(every) - of["argued"] - len(late)
    lines = [
        "# Every operator, number and argument, changed and caught", "",
        "A mutation tester changed the code of each floor in every place that it can change: operators, numbers,",
        "arguments, conditions, words.  It examined all of these changes, or a random sample of them: the share of a",
        "sample stands for the floor, within the interval, with 95 %.",
        "`python -m tests.mutants.generated` writes this page; its docstring describes the method. *Caught*: a test",
        "failed, or the process crashed or did not end. *Argued*: the change makes no difference that a test should",
        "detect, for the reason given below. *Survived*: no test failed when the change was first examined; this says",
        "how much survives in the whole floor. Then tests were written, or the line was made simpler: *now* is what",
        "survives these.", "",
        f"{datetime.date.today()}, {machine()}, mutmut {_version()}: **{len(every)} of {len(made)} changes examined, "
        f"{caught} caught at once, {of['argued']} argued, {len(late)} survived, {of['survived']} survive now**"
        + (f", in {seconds / 60:.0f} minutes." if seconds else "."), "",
        "| floor | changes | examined | caught | argued | survived | now | caught, of those not argued |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_row(f"{name}/", changes) for name, changes in floors.items()), "",
        "| file | changes | examined | caught | argued | survived | now | caught, of those not argued |",
        "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for file in sorted({change.file for change in every}):
        lines.append(_row(file.removeprefix("minidiff/"), [c for c in made if c.file == file], of_a_sample=False))
    for title, some in (("Survive now", [change for change in late if change.verdict == "survived"]),
                        ("Survived until a test was written or the line was changed",
                         [c for c in late if c.verdict != "survived"])):
        lines += ["", f"## {title}", "", *([row for change in some for row in _entry(change)] or ["None."])]
    lines += [""]
    lines += ["## Argued to make no difference", ""]
    for why in sorted({change.why for change in every if change.verdict == "argued"}):
        lines += [f"**{why}**", ""]
        lines += [row for change in every if change.verdict == "argued" and change.why == why for row in _entry(change)]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _row(name: str, changes: list[Change], of_a_sample: bool = True) -> str:
    """A row of the tables: the share, and of a sample its interval."""
    of, survived = Counter(change.verdict for change in changes), sum(map(_was_late, changes))
    examined, argued = len(changes) - of["not run"], of["argued"]
    caught, n = examined - argued - survived, examined - argued
    share = f"{caught / n:.1%}" if n else "-"
    if n and of["not run"] and of_a_sample:
        low, high = interval(caught, n)
        share += f" ({low:.1%} to {high:.1%})"
    return f"| {name} | {len(changes)} | {examined} | {caught} | {argued} | {survived} | {of['survived']} | {share} |"


def _was_late(change: Change) -> bool:
    return change.verdict == "survived" or change.late and change.verdict != "argued"


def interval(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds a probability with 95 %, after k of n (Wilson 1927)."""
    p = k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def _entry(change: Change) -> list[str]:
    before = [line[2:] for line in change.diff.splitlines() if line[:1] == "-"]
    after = [line[2:] for line in change.diff.splitlines() if line[:1] == "+"]
    return [f"- `{change.file.removeprefix('minidiff/')}` {change.function}: "
            f"`` {' '.join(before)} `` → `` {' '.join(after)} ``"]


def _version() -> str:
    from importlib.metadata import version
    return version("mutmut")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.generated", description=__doc__.splitlines()[0])
    parser.add_argument("--floor", choices=FLOORS, help="one floor only (default all)")
    parser.add_argument("--jobs", type=int, default=2, help="changes at a time (default 2)")
    parser.add_argument("--sample", type=int, metavar="N", help="a random N changes of each floor (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR, and resume the run that it holds")
    parser.add_argument("--report", action="store_true", help="run nothing; report the results in --keep")
    parser.add_argument("--out", type=Path, help="the report (default docs/mutation.md; with --floor none)")
    args = parser.parse_args(argv)
    try:
        _version()
    except ImportError:
        print("this needs mutmut: pip install 'mutmut>=3.8'", file=sys.stderr)
        return 2
    started, floors = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        for name in [args.floor] if args.floor else FLOORS:
            here = (args.keep or Path(folder)) / name
            floors[name] = held(name, here) if args.report else examine(name, here, args.jobs, args.sample, args.seed)
    floors = {name: changes for name, changes in floors.items() if changes}
    text = report(floors, None if args.report or args.keep else time.monotonic() - started)
    if out := args.out or (None if args.floor else REPORT):
        out.write_text(text, encoding="utf-8")
    print(text)
    survived = sum(change.verdict == "survived" for changes in floors.values() for change in changes)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())

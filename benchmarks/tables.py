"""Makes tables of the benchmarks' reports, and puts them into their places in the pages.

A page marks a place by `<!-- table: NAME -->`, the old table, `<!-- end -->`.  The names:

    ceilings  targets  checks  train_step
    conv  attention  group_norm  layer_norm     each version on one shape of ours and one of Stable Diffusion's
    conv in full  ...                           every time that was measured
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from cases import MODES, OURS

from minidiff.engine.cuda import launch as cuda

# the targets on an H100: words, family, ops, modes, whose shapes, what is measured, at least
CONV = "forward", "dx", "dw"
TARGETS = (
    ("convolution, float32, beside cuDNN", "conv", CONV, ("float32",), None, "rival", 0.9),
    ("convolution on tensor cores, beside cuDNN", "conv", CONV, MODES[1:], None, "rival", 0.7),
    ("attention forward, our shapes, beside PyTorch's best", "attention", ("forward",), MODES, OURS, "rival", 0.9),
    ("attention backward, our shapes, beside PyTorch's best", "attention", ("backward",), MODES, OURS, "rival", 0.8),
    ("group norm and SiLU, beside a copy", "group_norm", ("forward", "backward"), MODES, None, "share", 0.85),
    ("layer norm, beside a copy", "layer_norm", ("forward", "backward"), MODES, None, "share", 0.85),
)


# --- reading a report -------------------------------------------------------------------------------------

def is_ours(who: str) -> bool:
    """Whether it is one of our versions: v1, v2, ...  A rival has a name."""
    return re.fullmatch(r"v\d+", who) is not None


def groups_of(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """(op, of, shape, mode) -> who -> row, in the order of the run."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["of"], row["shape"], row["mode"]), {})[row["who"]] = row
    return groups


def best_of(group: dict[str, dict], ours: bool) -> dict | None:
    timed = [row for who, row in group.items() if row["ms"] and is_ours(who) == ours]
    return min(timed, key=lambda row: row["ms"], default=None)


def of_rival(row: dict | None, group: dict[str, dict]) -> float | None:
    """A version's speed, as a multiple of the fastest rival's."""
    them = best_of(group, ours=False)
    return them["ms"] / row["ms"] if row and row["ms"] and them else None


# --- one table each ---------------------------------------------------------------------------------------

def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """A table whose first `words` columns are words and whose others are numbers."""
    ruler = ["---" if i < words else "---:" for i in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ruler, *rows])


def machine_line(report: dict) -> str:
    found = dict(report["machine"])
    return f"{found.pop('card')}, {', '.join(f'{name} {value}' for name, value in found.items())}, {report['date']}"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def cell(row: dict | None) -> str:
    """A time, or the reason why there is none."""
    if row is None:
        return ""
    if row["ms"]:
        return f"{row['ms']:.3g}" + ("*" if row["waits"] else "")
    return row["note"] if row["note"].startswith(("no torch", "wrong")) else "refuses"


def version_table(report: dict, family: str) -> str:
    """Each version on two shapes: our first, and the first of the others that the plainest version ran on."""
    rows = [row for row in report["rows"] if row["family"] == family]
    plain = {row["shape"] for row in rows if row["who"] == "v1" and row["ms"]}
    first = {}
    for row in sorted(rows, key=lambda row: row["shape"] not in plain):
        first.setdefault(row["of"], row["shape"])
    body = []
    for (op, of, shape, mode), group in groups_of(rows).items():
        for who, row in group.items():
            if shape == first[of] and is_ours(who):
                file = cuda.versions(f"attention_{op}" if family == "attention" else family)[int(who[1:])].path
                body.append([op, shape, mode, f"[{file.stem}]({file.name})", cell(row), number(row.get("speed"), ".3g"),
                             number(row.get("share"), ".0%"), number(of_rival(row, group), ".2f"),
                             number(row.get("error"), ".0e")])
    return _under(report, markdown(["", "shape", "mode", "version", "ms", rows[0]["unit"], "of ceiling", "of rival",
                                    "error"], body, words=4))


def full_table(report: dict, family: str) -> str:
    """Every time that was measured of a family, a table for each op."""
    rows = [row for row in report["rows"] if row["family"] == family]
    parts = []
    for op in dict.fromkeys(row["op"] for row in rows):
        groups = groups_of(row for row in rows if row["op"] == op)
        names = list(dict.fromkeys(who for group in groups.values() for who in group))
        names.sort(key=lambda who: int(who[1:]) if is_ours(who) else 99)
        body = []
        for (_, _, shape, mode), group in groups.items():
            us = best_of(group, ours=True)
            body.append([shape, mode, *(cell(group.get(name)) for name in names), number(us and us["speed"], ".3g"),
                         number(us and us["share"], ".0%"), number(of_rival(us, group), ".2f")])
        parts.append(f"**{op}**, ms\n\n" + markdown(
            ["shape", "mode", *names, rows[0]["unit"], "of ceiling", "of rival"], body, words=2))
    if any(row.get("waits") for row in rows):
        parts.append("\\* The host waits until the GPU is done, so this time includes the host's.")
    return _under(report, "\n\n".join(parts))


def ceiling_table(report: dict) -> str:
    names = {"float32": "matrix product, float32", "tf32": "matrix product, TF32", "float16": "matrix product, float16",
             "copy": "copy, bytes read and written"}
    return _under(report, markdown(["ceiling", "measured"], [
        [words, f"{report['ceilings'][name]:.0f} {'GB/s' if name == 'copy' else 'TFLOP/s'}"]
        for name, words in names.items()], words=1))


def target_table(report: dict, steps: list[dict]) -> str:
    """The targets, and the worst, median and best of the measurements that each applies to."""
    body = []

    def add(words: str, least: float, found: Iterable[float | None]) -> None:
        found = sorted(value for value in found if value is not None)
        spread = (found[0], statistics.median(found), found[-1]) if found else (None,) * 3
        body.append([words, f"{least:g}", *(number(value, ".2f") for value in spread),
                     f"{sum(value >= least for value in found)} of {len(found)}" if found else "not yet measured"])

    for words, family, ops, modes, of, measure, least in TARGETS:
        found = []
        groups = groups_of(row for row in report["rows"] if row["family"] == family)
        for (op, whose, _, mode), group in groups.items():
            us = best_of(group, ours=True)
            if us and op in ops and mode in modes and of in (None, whose):
                found.append(of_rival(us, group) if measure == "rival" else us["share"])
        add(words, least, found)
    add("the whole training step, beside PyTorch eager", 1.0, (step.get("of_rival") for step in steps))
    return _under(report, markdown(["target", "at least", "worst", "median", "best", "reached in"], body, words=1))


def step_table(report: dict) -> str:
    """The table of benchmarks/train_step.py --device cuda."""
    body = [[step["who"], step["mode"], number(step["ms"], ".2f") if step["ms"] else step["note"],
             number(step.get("launches"), "d"), number(step.get("of_rival"), ".2f")] for step in report["steps"]]
    title = f"a training step, batch {report['batch']}"
    return _under(report, markdown([title, "mode", "ms", "launches", "of rival"], body, words=2))


def check_table(lines: list[str]) -> str:
    """The table of gpu_all.sh: the first line says where and when; the others are stage, result, seconds, by tabs."""
    rows = (line.split("\t") for line in lines[1:])
    return f"{lines[0]}\n\n{markdown(['check', 'result', 'seconds'], rows, words=2)}"


def _under(report: dict, table: str) -> str:
    return f"{machine_line(report)}\n\n{table}"


# --- and their places -------------------------------------------------------------------------------------

def tables_of(paths: Sequence[Path]) -> dict[str, str]:
    """Name -> table, from all files that the stages of gpu_all.sh wrote."""
    found, merged, steps = {}, {}, []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            found["checks"] = check_table(text.splitlines())
        elif "steps" in (report := json.loads(text)):
            found["train_step"], steps = step_table(report), report["steps"]
        else:
            merged = report | {"rows": merged.get("rows", []) + report["rows"]}
    if merged:
        found |= {"ceilings": ceiling_table(merged), "targets": target_table(merged, steps)}
        for family in dict.fromkeys(row["family"] for row in merged["rows"]):
            found |= {family: version_table(merged, family), f"{family} in full": full_table(merged, family)}
    return found


def write_table(page: Path, name: str, table: str) -> bool:
    """Puts a table into its place on a page; False if the page has no such place.

    If the place has no end, raises ValueError and leaves the page unchanged.
    """
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- table: {name} -->")
    if not mark:
        return False
    old, end, after = rest.partition("<!-- end -->")
    if not end or "<!-- table: " in old:
        raise ValueError(f"{page}: <!-- table: {name} --> has no <!-- end -->")
    page.write_text(f"{before}{mark}\n{table}\n{end}{after}", encoding="utf-8")
    return True


def write_tables(paths: Sequence[Path], pages: Sequence[Path]) -> None:
    """Puts the tables of the files into every page that has a place for them, and prints where."""
    for name, table in tables_of(paths).items():
        into = [page.name for page in pages if page.exists() and write_table(page, name, table)]
        print(f"table {name}: {'into ' + ' and '.join(into) if into else 'no page has a place for it'}")

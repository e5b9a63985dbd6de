"""minidiff check: judges a learner's answer to an exercise of the course by the laws that concern it."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from minidiff.cli.arguments import add_command, print_table, whole
from minidiff.errors import UserError
from minidiff.files import user_path
from minidiff.terminal import show


def add(commands) -> None:
    """Adds the command and its arguments. commands: what `add_subparsers` returned."""
    p = add_command(commands, "check", check,
                    help="Judge your answer to an exercise of the course: which law does it break, and where?",
                    epilog="The exit status is 0 only if the answer is right. It runs your file. "
                           "Example: minidiff check ex01")
    p.add_argument("exercise", nargs="*", metavar="EXERCISE",
                   help="a number, such as 7 or ex07, or your file, such as exercises/ex07_ddpm_step.py")
    p.add_argument("--all", action="store_true", help="judge every exercise whose file is in the folder")
    p.add_argument("--list", action="store_true", help="list the exercises, their minutes and chapters")
    p.add_argument("--hint", action="store_true", help="show the exercise's hint, and where minidiff has the solution")
    p.add_argument("--folder", type=user_path, metavar="FOLDER", help="where your files are (else exercises)")
    p.add_argument("--seconds", type=whole(1, 100_000), metavar="N",
                   help="the time that one answer may take (else what its exercise allows, often 10)")


def check(args: argparse.Namespace) -> int:
    """0 if the answer is right (--all: every one that was found), else 1."""
    from minidiff.course.exercise import NAMES, exercise, name_of
    if len(args.exercise) > 1:
        raise UserError(f"check takes one exercise at a time, such as minidiff check {ascii(args.exercise[0])[1:-1]}, "
                        "or --all")
    if sum(map(bool, (args.exercise, args.all, args.list))) != 1:
        raise UserError("check takes one exercise, such as ex01, or --all, or --list")
    if args.hint and not args.exercise:
        raise UserError("--hint takes an exercise, such as minidiff check ex01 --hint")
    if args.list:
        print_table([(name, f"{(e := exercise(name)).minutes:>3} min  {e.chapter:<14}  {e.title}") for name in NAMES])
        return 0
    if args.all:
        return _check_all(_folder(args.folder), args.seconds)
    text = args.exercise[0]
    name = name_of(text)
    if args.hint:
        of = exercise(name)
        show(f"hint for {name[:4]}: {of.hint}", f"minidiff's own answer: {of.place}")
        return 0
    path = _file(name, text, args.folder)
    if _is_path(text) or args.folder is not None or path.stem != name:
        show(f"judged: {ascii(str(path))}")
    return _check_one(name, path, args.seconds)


def _check_one(name: str, path: Path, seconds: int | None) -> int:
    from minidiff.course.exercise import exercise
    from minidiff.course.judge import FAULT
    from minidiff.course.process import check as check_file
    verdict, printed = check_file(name, path, seconds)
    if printed:
        show(f"note: {path.name} printed {len(printed)} line{'s' * (len(printed) > 1)}, the first: {printed[0][:200]}")
    show(f"{name[:4]}: {verdict.sentence}")
    if verdict.right:
        of = exercise(name)
        show(f"minidiff's own answer: {of.place}" + (of.note and f"; {of.note}"))
    elif verdict.kind != FAULT:                             # a hint is no help where Python cannot run it
        show(f"for a hint: minidiff check {name[:4]} --hint")
    return 0 if verdict.right else 1


def _check_all(folder: Path, seconds: int | None) -> int:
    from minidiff.course.exercise import NAMES
    from minidiff.course.process import check as check_file
    files = _files(folder)
    if not files:
        raise UserError(f"no exercise, such as {NAMES[0]}.py, is in {_in_words(folder)}: {WHAT_TO_DO}")
    right = 0
    for name, path in files:
        verdict, _ = check_file(name, path, seconds)
        right += verdict.right
        show(f"{name[:4]}{'' if path.stem == name else f' ({ascii(path.name)[1:-1]})'}: {verdict.sentence}")
    show(f"{right} of {len(files)} exercise{'s' * (len(files) > 1)} right")
    return 0 if right == len(files) else 1


# ---- where the files are -----------------------------------------------------------------------------------

WHAT_TO_DO = "go to the folder of minidiff (cd), or name the folder that has your files: --folder FOLDER"


def _in_words(folder: Path) -> str:
    return ascii(str(folder.absolute())) + ("" if folder != Path(".") else ", and there is no folder 'exercises' in it")


def _folder(given: Path | None) -> Path:
    """The folder that was given, else ./exercises, else the current one, where a learner may stand."""
    if given is not None:
        if not given.is_dir():
            raise UserError(f"--folder: {ascii(str(given))} is no folder")
        return given
    return Path("exercises") if Path("exercises").is_dir() else Path(".")


def _files(folder: Path) -> list[tuple[str, Path]]:
    """The exercises whose files are in the folder, in order: those that begin with ex and a number, as ex07_mine.py."""
    from minidiff.course.exercise import name_of
    found = []
    for path in folder.glob("ex*.py"):
        with suppress(UserError):                           # example.py
            found.append((name_of(path.name), path))
    return sorted(found)


def _is_path(text: str) -> bool:
    """Whether the learner means a file of that name, and no exercise by its number or name."""
    return "/" in text or "\\" in text or "." in text


def _file(name: str, text: str, folder: Path | None) -> Path:
    """The learner's file: the one that was named, else NAME.py of the folder."""
    if _is_path(text):
        named = user_path(text)
        if named.suffix != ".py":
            raise UserError(f"{ascii(text[:200])} is not the name of a Python file, which ends with .py")
        if folder is None and named.is_file():
            return named
        if named.name == text and (path := _folder(folder) / text).is_file():
            return path
        raise UserError(f"there is no file {ascii(text[:200])}" + (
            f" in {_in_words(_folder(folder))}" if named.name == text else
            "" if folder is None else ": name it by its path, or by --folder and its name"))
    path = _folder(folder) / f"{name}.py"
    if not path.exists():
        others = [other for of, other in _files(path.parent) if of == name]
        if len(others) == 1:
            return others[0]
        if others:
            names = ", ".join(ascii(str(other)) for other in others)
            raise UserError(f"{name[:4]} may be any of {names}: name the file")
        raise UserError(f"{path.name} is not in {_in_words(path.parent)}: {WHAT_TO_DO}")
    return path

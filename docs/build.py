"""Builds the site into docs/_build/html.  Every warning is an error.

    pip install -e '.[site]'
    python docs/build.py                        what changed; --fresh: everything
    python -m http.server -d docs/_build/html   then open http://localhost:8000

docs/site/assemble.py writes Sphinx's sources, in which each module is a page.  The code on the pages of the course and
of the notebooks runs, and its results are kept until minidiff or the page changes.
"""

import argparse
import hashlib
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "docs" / "_build"
sys.path.insert(0, str(ROOT / "docs" / "site"))


def state_of_the_package() -> str:
    """A hash of all that the code on a page may use."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("minidiff", "kernels", "exercises") for path in (ROOT / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def prepare_kernels_settings(folder: Path) -> None:
    """Pictures of the cells at twice the resolution, for screens that have it."""
    profile = folder / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text(
        'c.InlineBackend.figure_formats = {"retina"}\nc.HistoryManager.enabled = False\nc.IPKernelApp.log_level = 40\n',
        encoding="utf-8")
    os.environ["IPYTHONDIR"] = str(folder)


def build(fresh: bool = False, jobs: str = "auto") -> int:
    from assemble import assemble
    from sphinx.cmd.build import main as sphinx

    if fresh:
        shutil.rmtree(BUILD, ignore_errors=True)
    source, results = BUILD / "source", BUILD / "results" / state_of_the_package()
    assemble(ROOT, source)
    for old in (BUILD / "results").glob("*") if (BUILD / "results").exists() else ():
        if old != results:
            shutil.rmtree(old)
    prepare_kernels_settings(BUILD / "ipython")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return sphinx(["-b", "html", "-W", "--keep-going", "-q", "-j", jobs, "-c", str(ROOT / "docs"),
                   "-d", str(BUILD / "doctrees"), "-D", f"nb_execution_cache_path={results}",
                   str(source), str(BUILD / "html")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fresh", action="store_true", help="remove docs/_build first")
    parser.add_argument("--jobs", default="auto", help="processes (auto: as many as there are cores)")
    options = parser.parse_args()
    if find_spec("myst_nb") is None:
        parser.error("this needs the packages of the site: pip install '.[site]'")
    status = build(options.fresh, options.jobs)
    if status == 0:
        print(f"built {BUILD / 'html' / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
init = (here / "minidiff" / "__init__.py").read_text(encoding="utf-8")
version = next(line.split('"')[1] for line in init.splitlines() if line.startswith("__version__"))

play = ["starlette>=0.40", "uvicorn>=0.30"]                           # the page of minidiff play
mpi = ["mpi4py>=4.1", 'mpich>=4.3; platform_system != "Windows"']      # mpiexec comes with the latter
nvrtc = "nvidia-cuda-nvrtc==13.5.37"                                   # each release hands out registers in its own way
on_linux = "; sys_platform == 'linux' and platform_machine == 'x86_64'"

setup(
    name="minidiff",
    version=version,
    description="Text-to-image diffusion from scratch on NumPy and CuPy: readable, proved, fast.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["minidiff", "minidiff.*"]), "minidiff.data.packed", "minidiff.weights",
              "minidiff.kernels"],
    package_dir={"minidiff.kernels": "kernels"},            # beside the package here, in it once installed
    package_data={"minidiff.data.packed": ["*.gz", "*.npz", "*.csv", "*.txt"],
                  "minidiff.weights": ["*.safetensors", "*.md"],
                  "minidiff.pretrained": ["*.gz"],
                  "minidiff.play": ["static/*"],
                  "minidiff.kernels": ["*.cu", "*.cuh", "*.md"]},
    install_requires=[
        "numpy>=2.0",
        "scipy>=1.13",
        "pillow>=10.1",
        "matplotlib>=3.8",
        "pooch>=1.8",
        "safetensors>=0.4",
        "tqdm>=4.60",
        "threadpoolctl>=3.1",       # holds BLAS to one thread while ours share the work
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ml_dtypes>=0.5",      # the last: bfloat16
                 "jupytext>=1.16", *mpi, *play],            # notebooks/make.py writes the notebooks from their texts
        "play": play,
        "browser": ["selenium>=4.20"],                      # tests of the page in Chromium: pytest -m browser
        "lint": ["ruff>=0.6"],
        "mutation": ["mutmut>=3.8"],
        "site": ["sphinx>=9,<10", "myst-nb>=1.4", "furo>=2025.12", "sphinx-copybutton>=0.5.2",      # docs/build.py
                 "sphinx-mathjax-offline>=0.0.2", "selenium>=4.20"],                    # the last two: formulas, tests
        "hub": ["huggingface_hub>=0.25"],                   # Stable Diffusion checkpoints by their names
        "mpi": mpi,                                         # training on several processes, started by mpiexec
        "kernels": [nvrtc],                                 # compiles kernels/*.cu where there is no GPU
        "null-gpu": [nvrtc, *(wheel + on_linux for wheel in ("cupy-cuda13x==14.2.0", "nvidia-cuda-runtime==13.5.37"))],
                                                            # the real CuPy on a GPU that does not exist, for tests
        "cuda12": ["cupy-cuda12x[ctk]>=14", "ml_dtypes>=0.5", "numpy>=2.1.2"],
        "cuda13": ["cupy-cuda13x[ctk]>=14", "ml_dtypes>=0.5", "numpy>=2.1.2"],
    },
    entry_points={"console_scripts": ["minidiff=minidiff.__main__:program"]},
)

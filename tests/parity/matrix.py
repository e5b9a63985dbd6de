"""Writes docs/schedulers.md, the matrix of schedulers and laws:  PYTHONPATH=tests python -m parity.matrix

It uses each library as installed, and leaves out those that are not. The remarks are written by hand; the command stops
if a broken law has no remark, or if a law with a remark is no longer broken.
"""

import argparse
import datetime
import platform
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from minidiff import __version__
from minidiff.diffusion import samplers, schedules
from minidiff.verify.scheduler import load, report
from minidiff.verify.scheduler.laws import STEPS

LINEAR = schedules.linear(1000)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}

START = "26 starts at T-1"
LISTS = "26 N falling times"
MARGINALS = "23 marginals"
LEFT = "26 no noise is left"
ONE, POINT, CLIP = "24 one step", "24 a point is reached", "32 thresholding"
ORDER, MIDDLE = "25 order", "25 second order"
AGREE = "26 network and sample agree on the time"
NOISE, SNR, EPS, ALONE = "1 q(x_t | x_0)", "3 SNR falls", "5 zero terminal SNR", "28 batches"

ISSUE = "[#{0}](https://github.com/huggingface/diffusers/issues/{0})".format
LEADING = ("T // N * (N - 1) is the first time of 'leading', 980 for N = 50: the network gets t = 980 for a sample "
           f"that is all noise ({ISSUE(2585)}). Upstream's default, and what its models were sampled with; 'trailing' "
           "and 'linspace' start at 999.")
LINSPACE_1 = ("`np.linspace(0, 999, 1)` is [0]: in a run of one step the network gets t = 0. From N = 2 on "
              "the first time is 999.")
TRAILING = ("`np.arange(T, 0, -T / N)` has one entry too many for N = 61, 103, 121, 122 (58 more up to 1000), which is "
            "0 except for rounding: the list ends at t = -1, which indexes the *last* noise.")
STRIDE = (f"`step` goes to t - T // N, not to the list's next time ({ISSUE(12633)}, {ISSUE(11347)}; {ISSUE(9261)} was "
          "fixed in DDPM only). The two agree for 'leading', and for 'trailing' where N divides T.")
STRIDE_END = ("If the last time minus T // N is 0 and not below 0, as for N = 7, the last step goes to the table's "
              "first noise and not to the clean image.")
FULL_LIST = ("At N = T = 1000 only: it makes N + 1 times of 'linspace' and drops the last, so that T + 1 do not fit "
             "without a repetition.")
OFFSET = "At N = T only: steps_offset raises the first time to 1000, beyond the table."
UNFLIPPED = ("Until `set_timesteps` its sigmas rise while its timesteps fall, so that t = 999 gets the noise of t = 0, "
             "and t = 0 that of 999. This matters to code that adds noise to training data with a new scheduler; after "
             "`set_timesteps` the two are in the same order.")
BY_CONFIG = ("This configuration asks for it: sampling stops at the table's first noise "
             f"({ISSUE(5689)} saw it in pictures).")
POWER_24 = ("In place of 0 the last alpha_bar is 2^-24 = 6.0e-8, and the rescaled table has less at t = 998: the SNR "
            "rises at the last time. A run meets it only if it stops at 998, with N near T.")


@dataclass(frozen=True)
class Case:
    title: str
    make: object                                            # () -> Scheduler
    remarks: dict = field(default_factory=dict)             # of broken laws: the reason, and what is known about it


def of_diffusers(name: str, title: str, remarks: dict, **config) -> Case:
    return Case(title, lambda: load(f"diffusers:{name}", config), remarks)


def cases() -> dict[str, list[Case]]:
    """By library and class."""
    table = {}
    D = "DDIMScheduler"
    lists_of = {LISTS: TRAILING}
    strides = {MARGINALS: STRIDE, ONE: STRIDE, ORDER: STRIDE}
    table[f"diffusers {version('diffusers')}: {D}"] = [
        of_diffusers(D, "default: leading, eta = 0", {START: LEADING}),
        of_diffusers(D, "eta = 1", {START: LEADING}, eta=1.0),
        of_diffusers(D, "trailing", lists_of | strides | {LEFT: STRIDE_END, POINT: STRIDE_END},
                     timestep_spacing="trailing"),
        of_diffusers(D, "linspace", strides | {START: LINSPACE_1}, timestep_spacing="linspace"),
        of_diffusers(D, "zero SNR, v, trailing", lists_of | strides | {LEFT: STRIDE_END, POINT: STRIDE_END},
                     **ZERO, clip_sample=False),
        of_diffusers(D, "zero SNR, eps, trailing", lists_of | {
            law: f"It divides by alpha = 0 where it should refuse ({ISSUE(3851)}), and returns NaN; where the answer "
                 "is not exactly x_t, infinities, which clip_sample turns into -1 and 1."
            for law in (EPS, MARGINALS, POINT, LEFT, ONE, ORDER, ALONE, CLIP)},
            rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        of_diffusers(D, "as Stable Diffusion 1 sets it: scaled_linear, steps_offset 1, set_alpha_to_one False",
                     {START: LEADING, LISTS: OFFSET, **{
                         law: "set_alpha_to_one=False stops at alpha_bar_0: sqrt(0.00085) = 0.029 of noise stays, and "
                              "x_0 is multiplied by alpha_0. This configuration asks for it."
                         for law in (LEFT, POINT)}},
                     **SD, set_alpha_to_one=False, clip_sample=False),
    ]
    P = "DDPMScheduler"
    table[f"diffusers {version('diffusers')}: {P}"] = [
        of_diffusers(P, "default: leading, fixed_small", {START: LEADING}),
        of_diffusers(P, "fixed_large", {START: LEADING}, variance_type="fixed_large"),
        of_diffusers(P, "linspace", {START: LINSPACE_1}, timestep_spacing="linspace"),
        of_diffusers(P, "trailing", lists_of, timestep_spacing="trailing"),
        of_diffusers(P, "trailing, fixed_large", lists_of | {
            LEFT: "It draws noise where t > 0, and the last of 'trailing' times is T / N - 1: the draw sqrt(beta) = "
                  "sigma at that time stays in the result, 0.076 for N = 50."}, timestep_spacing="trailing",
            variance_type="fixed_large"),
    ]
    E = "EulerDiscreteScheduler"
    table[f"diffusers {version('diffusers')}: {E}"] = [
        of_diffusers(E, "default: linspace", {START: LINSPACE_1}),
        of_diffusers(E, "as Stable Diffusion sets it: scaled_linear, leading, steps_offset 1",
                     {START: LEADING, LISTS: OFFSET}, **SD, timestep_spacing="leading"),
        of_diffusers(E, "trailing", lists_of, timestep_spacing="trailing"),
        of_diffusers(E, "Karras sigmas", {START: LINSPACE_1}, use_karras_sigmas=True),
        of_diffusers(E, "zero SNR, v, trailing", lists_of | {SNR: POWER_24}, **ZERO),
        of_diffusers(E, "final_sigmas_type sigma_min", {START: LINSPACE_1, LEFT: BY_CONFIG},
                     final_sigmas_type="sigma_min"),
    ]
    H = "HeunDiscreteScheduler"
    table[f"diffusers {version('diffusers')}: {H}"] = [
        of_diffusers(H, "default: linspace", {START: LINSPACE_1}),
        of_diffusers(H, "v", {START: LINSPACE_1}, prediction_type="v_prediction"),
        of_diffusers(H, "trailing", lists_of, timestep_spacing="trailing"),
    ]
    M = "DPMSolverMultistepScheduler"
    table[f"diffusers {version('diffusers')}: {M}"] = [
        of_diffusers(M, "default: dpmsolver++, order 2, linspace", {NOISE: UNFLIPPED, LISTS: FULL_LIST}),
        of_diffusers(M, "sde-dpmsolver++", {NOISE: UNFLIPPED, LISTS: FULL_LIST}, algorithm_type="sde-dpmsolver++"),
        of_diffusers(M, "trailing", {NOISE: UNFLIPPED} | lists_of, timestep_spacing="trailing"),
        of_diffusers(M, "Karras sigmas", {
            NOISE: UNFLIPPED,
            LISTS: "The times of the sigmas are rounded, and from N = 79 on some occur twice.",
            AGREE: "The times are rounded and the noise is not: the network gets one of the two times that it lies "
                  "between."},
            use_karras_sigmas=True),
        of_diffusers(M, "zero SNR, v, trailing", {NOISE: UNFLIPPED, SNR: POWER_24} | lists_of, **ZERO),
        of_diffusers(M, "final_sigmas_type sigma_min", {NOISE: UNFLIPPED, LISTS: FULL_LIST, LEFT: BY_CONFIG,
                                                         POINT: BY_CONFIG},
                     final_sigmas_type="sigma_min"),
        of_diffusers(M, "Karras sigmas, squaredcos_cap_v2", {
            NOISE: UNFLIPPED + " In a run, add_noise at a time that occurs twice takes the second of its two noises.",
            START: "The time of the largest sigma, 999 except for rounding, is cut to 998.",
            LISTS: "Times that are cut to integers occur twice.", AGREE: "The times are cut, and the noise is not.",
            **{law: f"IndexError ({ISSUE(12771)}): its position in the list is looked up by a time that occurs twice."
               for law in (MARGINALS, POINT, LEFT, ONE, ORDER, MIDDLE, ALONE, CLIP)}},
            use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2"),
    ]
    for library, cases_of in (("k-diffusion", _k_diffusion), ("smalldiffusion", _smalldiffusion)):
        try:
            table |= cases_of()
        except ImportError as error:
            print(f"left out: {library}, which does not import here ({error})")
    table[f"minidiff {__version__}"] = [Case(name, lambda name=name: load(f"minidiff:{name}"))
                                       for name in samplers.SAMPLERS]
    return table


def _trailing(n: int):
    return samplers.times(LINEAR, n)


def _k_diffusion() -> dict[str, list[Case]]:
    from parity.samplers_of_others import k_diffusion, of_k_diffusion
    names = ("euler", "euler_ancestral", "heun", "dpmpp_2m")
    return {f"k-diffusion {k_diffusion()[1]}, on our table and times":
            [Case(name, lambda name=name: of_k_diffusion(name, LINEAR, _trailing)) for name in names]}


def _smalldiffusion() -> dict[str, list[Case]]:
    from parity.samplers_of_others import of_smalldiffusion, smalldiffusion
    return {f"smalldiffusion {smalldiffusion()[1]}, on our table and times": [
        Case("gam 1, mu 0 (DDIM)", lambda: of_smalldiffusion(LINEAR, _trailing)),
        Case("gam 1, mu 1/2 (DDPM)", lambda: of_smalldiffusion(LINEAR, _trailing, mu=0.5)),
    ]}


HEAD = """
# Other people's schedulers under the laws

Which laws do widely used schedulers keep? `minidiff.verify.scheduler.report` checked each of them. It needs no network
and draws no random numbers: for two kinds of data the right answers are known. Runs have {steps} steps. A cell shows
the worst of them: the difference from what the row computes. After `kept` it is within the tolerance (rounding; 0.02
for law 4; a quarter for the order of law 25, since orders are integers). `n/a` is a law that does not apply. The middle
of the stride is checked for DPM-Solver++(2M) only, which extrapolates to it, and thresholding for schedulers that clip.

A broken law is not always a mistake: some are old defaults, kept for the models that were trained with them, or follow
from the configuration; the remarks say so. The laws have the numbers of `minidiff verify`. k-diffusion and
smalldiffusion get our list of noise levels, with 0 at its end; smalldiffusion's own list, `sample_sigmas`, ends at the
first noise level of its table, so that noise remains.

{versions}; {machine}, {date}. Made by

```bash
PYTHONPATH=tests python -m parity.matrix
```

One scheduler, or your own:

```bash
minidiff verify --scheduler diffusers:DDIMScheduler --scheduler-config timestep_spacing=trailing
minidiff verify --scheduler my_module:factory        # returns what minidiff/verify/scheduler/protocol.py describes
```
"""

HELD_EQUAL = """
In float64, over random T, ranges of beta, schedules, lists, prediction types, eta, shapes and samples, the following
agree with ours to 1e-9 of the largest number, or to 1e-6 where stated (`python -m pytest tests/parity`):

| theirs | ours |
|---|---|
| diffusers' linear, scaled_linear, squaredcos_cap_v2 | `linear`, `scaled_linear`, `cosine` |
| its rescale_betas_zero_snr (DDPM, DDIM) | `zero_terminal_snr` |
| its add_noise and get_velocity (DDPM, DDIM); add_noise (Euler, Heun) | `q_sample`, `v_from_x0_eps` |
| one step of DDPMScheduler, fixed_small and fixed_large | `q_posterior_mean_variance`, `beta_tilde` and `beta` |
| runs of DDPMScheduler, leading and linspace | `ddpm` |
| runs of DDIMScheduler, leading, any eta | `ddim` |
| runs of EulerDiscreteScheduler, leading | `ddim` |
| runs of DPMSolverMultistepScheduler (dpmsolver++, midpoint, order 2), any spacing | `dpm_solver_pp_2m` |
| runs of HeunDiscreteScheduler, leading | not `heun`, whose time is an angle: Karras et al. 2022, algorithm 1 |
| k-diffusion's euler, euler_ancestral, dpmpp_2m (1e-6) | `ddim`, `ddpm`, `dpm_solver_pp_2m` |
| smalldiffusion's sampler, gam 1, mu 0 and 1/2 (1e-6) | `ddim`, `ddpm` |

diffusers keeps its tables in float32; for this comparison float64 replaces float32 in its source. As installed, its
alpha_bar for T = 1000 differs from ours by at most:

| schedule | largest difference | relative |
|---|---|---|
"""

MISMATCHES = []                                             # between broken laws and remarks


# ---- the document ------------------------------------------------------------------------------------------

def section(title: str, members: list[Case]) -> list[str]:
    """A table of laws by configurations, and the reasons for broken laws."""
    columns = []
    for case in members:
        print(f"{title}: {case.title}", flush=True)
        columns.append(report(case.make()))
        wrong = {row.law for row in columns[-1] if row.verdict == "BROKEN"}
        if wrong != case.remarks.keys():
            MISMATCHES.append(f"{title}, {case.title}: no remark on {sorted(wrong - case.remarks.keys())}, "
                              f"remark on what is kept: {sorted(case.remarks.keys() - wrong)}")
    lines = ["", f"## {title}", "", "| law | " + " | ".join(case.title for case in members) + " |",
             "|---|" + "---|" * len(members)]
    for rows in zip(*columns, strict=True):
        lines.append(f"| {rows[0].law}: {rows[0].computed} | ".replace("x_t | x_0", "x_t \\| x_0")
                     + " | ".join(cell(row) for row in rows) + " |")
    remarks = {}                                            # why -> the laws, and where
    for case, rows in zip(members, columns, strict=True):
        for row in rows:
            if row.verdict == "BROKEN":
                laws, where = remarks.setdefault(case.remarks.get(row.law), ({}, {}))
                laws[row.law.replace("|", "\\|")] = where[f"- {case.title}: {row.where}"] = True
    for why, (laws, where) in remarks.items():
        lines += ["", f"**{'; '.join(laws)}**. {why}", "", *where]
    return lines


def cell(row) -> str:
    if row.verdict == "skipped":
        return "n/a"
    if row.verdict == "kept":
        return "kept" if row.error == 0 else f"kept ({row.error:.0e})"
    return f"**BROKEN** by {row.error:.3g}" if np.isfinite(row.error) else "**BROKEN**, not finite"


def agreement() -> list[str]:
    """What the parity tests compare, and the errors of float32 tables."""
    lines = ["", "## Where we agree", "", *HELD_EQUAL.strip().splitlines()]
    for title, config, ours in (
            ("linear, beta 0.0001 to 0.02", {"beta_schedule": "linear"}, LINEAR),
            ("scaled_linear, beta 0.0001 to 0.02", {"beta_schedule": "scaled_linear"},
             schedules.scaled_linear(1000, 1e-4, 0.02)),
            ("scaled_linear, beta 0.00085 to 0.012, as Stable Diffusion has it", SD,
             schedules.scaled_linear(1000, SD["beta_start"], SD["beta_end"])),
            ("squaredcos_cap_v2", {"beta_schedule": "squaredcos_cap_v2"}, schedules.cosine())):
        theirs = load("diffusers:DDIMScheduler", config).alpha_bar
        off = abs(theirs - ours.alpha_bar)
        lines.append(f"| {title} | {off.max():.1e} | {(off / ours.alpha_bar).max():.1e} |")
    return lines


def document() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "torch", "numpy"))
    lines = HEAD.strip().format(steps=", ".join(map(str, STEPS)), versions=versions, machine=platform.machine(),
                                date=datetime.date.today()).splitlines()
    lines += agreement()
    for title, members in cases().items():
        lines += section(title, members)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "schedulers.md")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")                         # deprecations within the libraries
    text = document()
    if MISMATCHES:
        raise SystemExit("\n".join(MISMATCHES))
    out.write_text(text, encoding="utf-8")
    print(out)

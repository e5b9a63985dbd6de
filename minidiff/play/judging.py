"""Schedules as tables, a curve drawn by hand as a schedule, and the laws that it keeps or breaks, one by one.

The curve is given by points (u, alpha_bar), u = 0 the clean image and u = 1 the end, and alpha_bar falls.  Between them
goes the monotone cubic of Fritsch and Butland (SciPy's PchipInterpolator; static/curve.js is the same), which falls as
well.  The schedule reads it at u = (t + 1) / T, as `from_log_snr` reads its function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minidiff.diffusion.schedules import Schedule, schedule_from
from minidiff.errors import UserError
from minidiff.play.offer import within
from minidiff.verify import KEPT, as_dicts, law_by_law
from minidiff.verify.user_schedule import notes

MOST_TIMES = 1000
MOST_POINTS = 40
POINTS_OF_A_PLOT = 201


def named(text: str, T: int) -> Schedule:
    """The schedule of a name, such as cosine or cosine:offset=0.02; it may keep signal at its end."""
    return schedule_from(text, within("T", T, 2, MOST_TIMES), allow_signal=True)


def by_hand(points: Sequence, T: int) -> Schedule:
    """The schedule through the points (u, alpha_bar); UserError where they make none."""
    T = within("T", T, 2, MOST_TIMES)
    good = 2 <= len(points) <= MOST_POINTS and all(
        isinstance(p, list) and len(p) == 2 and all(type(a) in (int, float) and 0 <= a <= 1 for a in p) for p in points)
    if not good:
        raise UserError(f"the curve takes 2 to {MOST_POINTS} points [u, alpha_bar], numbers from 0 to 1")
    u, alpha_bar = np.array(points, np.float64).T
    if u[0] != 0 or u[-1] != 1 or alpha_bar[0] != 1 or (np.diff(u) <= 0).any() or (np.diff(alpha_bar) >= 0).any():
        raise UserError("the curve must start at u = 0 with alpha_bar = 1 and end at u = 1, and fall from point to "
                        "point")
    from scipy.interpolate import PchipInterpolator
    table = PchipInterpolator(u, alpha_bar)((np.arange(T) + 1) / T).clip(0, 1)
    try:
        return Schedule(table, "drawn by hand")
    except ValueError as error:
        raise UserError(f"the curve makes no schedule: {error}") from error


def table(schedule: Schedule) -> dict:
    """What is drawn of a schedule, at up to 201 of its times: alpha_bar and log10 of the SNR."""
    t = np.unique(np.linspace(0, schedule.T - 1, min(schedule.T, POINTS_OF_A_PLOT)).round().astype(int))
    log_snr = schedule.log_snr(t) / np.log(10)
    return {"name": schedule.name, "T": schedule.T, "t": t.tolist(), "alpha_bar": schedule.abar(t).tolist(),
            "log_snr": [float(a) if np.isfinite(a) else None for a in log_snr]}


def judged(schedule: Schedule, seed: int = 0) -> Iterator[dict]:
    """The events: the table, the rows of each law as soon as they are computed, and how many were kept and broken."""
    yield {"event": "table", "table": table(schedule), "notes": notes(schedule)}
    verdicts = []
    for rows in law_by_law(schedule, seed=seed):
        verdicts += [row.verdict for row in rows]
        yield {"event": "rows", "rows": as_dicts(rows)}
    yield {"event": "judged", "kept": verdicts.count(KEPT), "of": len(verdicts)}

"""Slips in the verifier: above all those that let a wrong schedule pass."""

from .bug import Bug

ROWS, FORWARD, REVERSE, SAMPLING = "verify/rows.py", "verify/forward.py", "verify/reverse.py", "verify/sampling.py"

BUGS = [
    Bug("an error that is not a number passes", ROWS,
        "bool(self.error <= self.tolerance)",
        "not self.error > self.tolerance"),
    Bug("an infinite error passes where the tolerance is infinite", ROWS,
        "tolerance = np.clip(tolerance, 0, 1e300) ",
        "tolerance = np.clip(tolerance, 0, np.inf) "),
    Bug("an error that is not a number is passed over", ROWS,
        "i = int(np.argmax(excess))",
        "i = int(np.nanargmax(np.append(excess, -1.0)))"),
    Bug("the best case is reported, not the worst", ROWS,
        "i = int(np.argmax(excess))",
        "i = int(np.argmin(excess))"),
    Bug("what was counted as wrong is no error", ROWS,
        "return Row(law, computed, 0.0, float(wrong.sum()), float(wrong.sum()), 0.0, formula,",
        "return Row(law, computed, 0.0, float(wrong.sum()), 0.0, 0.0, formula,"),
    Bug("a law that does not apply passes", ROWS,
        "return SKIPPED if self.reason else KEPT if self.passed else BROKEN",
        "return KEPT if self.passed or self.reason else BROKEN"),
    Bug("single steps that do not damp the noise before them", FORWARD,
        "(1 - beta) * noise + beta",
        "noise + beta"),
    Bug("a schedule that ends in a picture is kept", FORWARD,
        "excess = max(0.0, abar - MOST_SIGNAL_AT_THE_END)",
        "excess = 0.0"),
    Bug("the posterior without its prior's precision", REVERSE,
        "exact = 1 / (ratio / (1 - ratio) + 1 / (1 - abar_s))",
        "exact = 1 / (ratio / (1 - ratio))"),
    Bug("DDIM's variance without the noise that it draws", SAMPLING,
        "power.append((of_eps - clean) ** 2 + (of_z - clean) ** 2)",
        "power.append((of_eps - clean) ** 2)"),
]

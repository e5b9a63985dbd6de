"""Known bugs, planted in our code one at a time, and the tests that catch them.  `python -m tests.mutants` runs all.

A bug is data: a file, a text that stands in it exactly once, and the wrong text that takes its place.

    bug.py          what a bug is
    known.py        bugs that others shipped, with where they were reported
    diffusion.py    floor III: signs, square roots, missing factors, swapped arguments, off-by-ones, clamps
    likelihood.py   bits per dimension, the variational bound, the flow's density
    networks.py     floors II and IV, and the system: layers, optimiser, UNet, text, training, evaluation
    systems.py      floor V, the parts that its systems brought, and training in stages
    engine.py       floor I: wrong values and wrong derivatives of every op
    verifier.py     `minidiff verify`: above all, letting a wrong schedule pass
    kernels.py      the CUDA kernels: barriers, bounds, masks, layouts; and what launches them
    run.py          plants them in a copy, runs the tests, writes docs/mutants.md
    witness.py      the plugin that tells, from within pytest, which test failed first
"""

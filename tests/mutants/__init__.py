"""Known bugs, planted in our code one at a time, and the tests that catch them.  `python -m tests.mutants` runs all.

A bug is data: a file, a text that occurs in it exactly once, and a wrong text that replaces it.

    bug.py          what a bug is
    known.py        bugs that others shipped, each with its report
    diffusion.py    floor III: signs, square roots, missing factors, swapped arguments, off-by-ones, clamps
    likelihood.py   bits per dimension, the variational bound, the flow's density
    networks.py     floors II and IV, and the system: layers, optimiser, UNet, text, training, evaluation
    systems.py      floor V, the parts made for its systems, and training in stages
    assembly.py     how the pieces are put together: batches, streams, a step of training, the report, the command line
    pretrained.py   other people's checkpoints: half precision, what contradicts itself, what is fetched
    engine.py       floor I: wrong values and wrong derivatives of every op
    verifier.py     `minidiff verify`: most of them let a wrong schedule pass
    kernels.py      the CUDA kernels: barriers, bounds, masks, layouts; and their launches
    run.py          plants them in a copy, runs the tests, writes docs/mutants.md
    generated.py    changes every operator and number of a floor with a mutation tester, writes docs/mutation.md
    argued.py       changes that make no difference, with the reasons
    witness.py      a pytest plugin that records the first failure
    same_examples.py    a pytest plugin that makes hypothesis draw the same examples in every run
"""

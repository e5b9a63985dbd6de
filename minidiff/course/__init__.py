"""The exercises of the course: what each asks, the laws that judge an answer, and how it is run.

    compare.py    what the laws are written with: random schedules, and a sentence where two numbers differ
    exercise.py   what an exercise is, and the list of them
    judge.py      an answer against the laws and the known wrong answers of its exercise
    learner.py    runs a learner's file, and says what is wrong with it
    process.py    does so in a process of its own, with a limit of time and of memory
    pullbacks.py  the derivative that a learner wrote, against central differences
    emulator.py   a CUDA kernel on the CPU, and what it reads
    exNN_*.py     an exercise each; exercises/exNN_*.py is what the learner completes
"""

"""Takes every system through training steps and a sample on the null GPU, and prints what was counted.

    PYTHONPATH=tests:. python -m support.null_gpu.every_system                      small systems, and the default model
    PYTHONPATH=tests:. python -m support.null_gpu.every_system imagen "default model"

A line for each step and each sample, as JSON: the system, what it did, and the counts or the error.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from support import null_gpu, small_systems, tiny

from minidiff import systems
from minidiff.systems.text_to_image import TextToImage
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import TrainConfig, Trainer

DEFAULT = "default model"                                   # text-to-image of its own size
FEW = {"steps": 2, "super_steps": 2}                        # of sampling


def work_of(name: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what it is called, a function that does it): the first step of each stage, and a sample."""
    system = small_systems.new(name).to("cuda")
    for number, stage in enumerate(system.stages(tiny.digits()), start=1):
        trainer = Trainer(stage, TrainOptions(steps=2, batch=2).for_stage(stage), number=number, device="cuda")
        yield f"step of {stage.name}", trainer.step
    options = systems.system_class(name).options()
    if options is not None:
        captions = ["a bold seven", "3"] if systems.system_class(name).reads_captions else ["", ""]
        few = {option: value for option, value in FEW.items() if option in options}
        drawing = small_systems.on_gpu(name)
        yield "sample", lambda: drawing.sample(captions, seed=3, **few)


def work_of_the_default_model() -> Iterator[tuple[str, Callable[[], object]]]:
    """What docs/gpu.md states: a later training step at batch 8, and samples of two and of three steps."""
    model = TextToImage.load().to("cuda")
    for precision in ("float32", "float16"):
        trainer = Trainer(next(model.stages(tiny.digits())), TrainConfig(batch=8, precision=precision), device="cuda")
        trainer.step()
        yield f"step in {precision}", trainer.step
        with filled_pool(trainer.step) as stream:
            yield f"captured step in {precision}", partial(captured, trainer, stream)
    yield "sample of 2 steps", lambda: model.sample(["a bold seven"], steps=2)
    yield "sample of 3 steps", lambda: model.sample(["a bold seven"], steps=3)


@contextmanager
def filled_pool(step: Callable[[], object]) -> Iterator:
    """Within it, memory comes from a pool that two steps filled, and work goes to the stream that it gives."""
    import cupy
    cupy.cuda.set_allocator(cupy.cuda.MemoryPool().malloc)
    try:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            step(), step()
            yield stream
    finally:
        cupy.cuda.set_allocator(None)


def captured(trainer: Trainer, stream) -> None:
    """A step is recorded as one CUDA graph, once its batch is on the device; then the graph is launched."""
    batch = trainer.batch()
    trainer.batch = lambda: batch
    stream.begin_capture()
    trainer.step()
    stream.end_capture().launch(stream)


def main(names: list[str]) -> None:
    null_gpu.install()
    with pytest.MonkeyPatch.context() as patch:
        small_systems.ship(patch)
        for name in names or (*systems.SYSTEMS, DEFAULT):
            said = {"system": name, "work": "is made"}
            try:
                for said["work"], work in work_of_the_default_model() if name == DEFAULT else work_of(name):
                    with null_gpu.watching() as seen:
                        work()
                    print(json.dumps({**said, "seen": seen}), flush=True)
            except Exception as error:
                ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "minidiff" in frame.filename]
                at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}: {ours[-1].line}"
                print(json.dumps({**said, "error": f"{at}: {type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

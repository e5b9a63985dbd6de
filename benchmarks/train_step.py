"""One training step, minidiff beside PyTorch, in one run.

    python benchmarks/train_step.py                      the default model, batch 128: time, ratio to PyTorch's best
    python benchmarks/train_step.py --network large      images of 32x32x3, a UNet of four times the parameters
    python benchmarks/train_step.py --batch 32
    python benchmarks/train_step.py --memory             peak memory, each contestant in a process of its own
    python benchmarks/train_step.py --all                both networks, batch 32 and 128, time and memory: one table
    python benchmarks/train_step.py --device cuda        the whole Trainer.step on a GPU: train_step_cuda.py

A step is noising, forward, backward, clipping, AdamW and the moving average of the weights. All contestants start from
the same weights and repeat the same batch. Before any timing, the losses of their first steps are compared with
minidiff's. Then they take turns. torch.compile may take minutes to start; if it fails, it is left out, with a line that
gives the reason.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from side_by_side import (
    COMPILED,
    COMPILED_LAST,
    FIRST,
    LAST,
    MINIDIFF,
    Run,
    Work,
    compiled,
    minidiff_network,
    minidiff_update,
    parser_of,
    run,
    same_batch,
    same_start,
    torch_network,
    torch_update,
)

from minidiff.engine.backend import check_device
from minidiff.engine.parallel import parallel_gradients
from minidiff.errors import UserError

MODES = ("float32", "tf32", "float16", "bfloat16")          # on a GPU


def minidiff_step(network: str, count: int) -> Run:
    model, batch = minidiff_network(network), same_batch(count, network)
    parameters = model.parameters()
    leaves, update = list(parameters.values()), minidiff_update(parameters)

    def step() -> float:
        loss, grads = parallel_gradients(lambda part: model.loss(*(a[part] for a in batch)), leaves, count)
        update(grads)
        return loss
    return step


def torch_step(network: str, count: int, *, channels_last: bool = False, compile: bool = False) -> Run:
    import torch
    model, layout = torch_network(network, channels_last)
    x_0, ids, mask, t, eps = map(torch.from_numpy, same_batch(count, network))
    x_0, eps = (a.permute(0, 3, 1, 2).contiguous(memory_format=layout) for a in (x_0, eps))
    update, loss_of = torch_update(list(model.parameters())), compiled(model) if compile else model

    def step() -> float:
        loss = loss_of(x_0, ids, mask, t, eps)
        model.zero_grad(set_to_none=True)
        loss.backward()
        update()
        return loss.item()
    return step


WORK = Work("training step", {
    MINIDIFF: minidiff_step,
    FIRST: torch_step,
    LAST: partial(torch_step, channels_last=True),
    COMPILED: partial(torch_step, compile=True),
    COMPILED_LAST: partial(torch_step, compile=True, channels_last=True),
}, batches=(32, 128), checked=3, rtol=1e-4, atol=0.0)


def main() -> None:
    parser = parser_of(__doc__, batch=128, rounds=10, turn=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (cpu)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="precisions on a GPU (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers of a GPU to this file")
    args = parser.parse_args()
    if args.device == "cpu":
        run(WORK, args)
        return
    try:
        check_device("cuda")
        if args.network != "mnist":
            raise UserError("--network is read on the CPU only: on a GPU the default network is measured")
    except UserError as error:
        print(f"benchmarks/train_step.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    import train_step_cuda
    raise SystemExit(train_step_cuda.compare(same_start(args.batch), args.modes, args.rounds, args.json))


if __name__ == "__main__":
    main()

"""Training on several ranks is training on one: the same weights to rounding, the same bits on all, one voice, one end.

The ranks are real, started by mpiexec; what each of them does stands at the end of this file, which they run.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import fake_cupy, tiny

from minidiff import checkpoint, pictures
from minidiff.cli import main as cli
from minidiff.cli import ranks as cli_ranks
from minidiff.cli import train as cli_train
from minidiff.data import mnist
from minidiff.data.dataset import load_dataset
from minidiff.engine import parallel
from minidiff.errors import UserError
from minidiff.systems.stage import Step
from minidiff.systems.text_to_image import TextToImage
from minidiff.training import loop
from minidiff.training import ranks as ranks_module
from minidiff.training import run as runs
from minidiff.training.ranks import Ranks, RanksOnGPUs, SingleProcess, ranks
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import Trainer

TESTS = Path(__file__).parents[1]
BESIDE = Path(sys.executable).parent / "mpiexec"            # where the wheel puts it
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")
with_ranks = pytest.mark.skipif(not MPIEXEC or not importlib.util.find_spec("mpi4py"),
                                reason="needs mpi4py and an mpiexec: pip install mpi4py mpich")
STEPS, BATCHES = 4, (6, 5)                                  # 5: the parts are of 2 and 3


@pytest.mark.parametrize("given, found", [
    ({}, (0, 1)), ({"PMI_RANK": "2", "PMI_SIZE": "3"}, (2, 3)),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, (1, 4)), ({"PMI_RANK": "1"}, (0, 1)),
    ({"PMI_RANK": "1", "PMI_SIZE": "many"}, (0, 1)), ({"PMI_RANK": "", "PMI_SIZE": "2"}, (0, 1))], ids=str)
def test_the_rank_is_what_mpiexec_says(given, found, monkeypatch):
    """MPICH and Intel MPI set PMI_..., Open MPI OMPI_COMM_WORLD_...; else this process is the only one."""
    for name in ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert ranks_module.rank_and_size() == found


def test_ranks_exchange_arrays_of_the_device_of_their_run(monkeypatch):
    for name in ("cpus", "gpus"):
        monkeypatch.setattr(ranks_module, f"_on_{name}", lambda name=name: name)
    for size, found in ((1, None), (2, ("cpus", "gpus"))):
        monkeypatch.setattr(ranks_module, "rank_and_size", lambda size=size: (0, size))
        ours = ranks("cpu"), ranks("cuda")
        assert ours == found or found is None and all(isinstance(one, SingleProcess) for one in ours)


def start(job: str, folder: Path, *arguments, count: int = 2) -> subprocess.Popen:
    """The job of that name, below, on `count` ranks."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return subprocess.Popen([MPIEXEC, "-n", str(count), sys.executable, __file__, job, str(folder), *arguments],
                            env=os.environ | threads | {"PYTHONPATH": path}, cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit status, what was printed, and what was said on stderr."""
    try:
        printed, said = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        kill(Path(process.args[6]))
        process.communicate()
        raise
    return process.returncode, printed, said.replace("\r", "\n")


def kill(folder: Path) -> None:
    """Kills mpiexec and all ranks of a job; a rank that waits in MPI hears no other signal."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if __file__.encode() in words and str(folder).encode() in words:
                os.kill(int(process.name), signal.SIGKILL)


def weights(trainer) -> dict[str, np.ndarray]:
    """All that the next step depends on, but how the losses were."""
    return {name: np.array(a) for name, a in trainer.state()[0].items() if name != "losses"}


def saved(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def gradient_in_float64(batch: int) -> tuple[float, np.ndarray]:
    """The loss and the gradient that Trainer.step steps with, in a model that computes in float64."""
    t, kept = tiny.trainer(batch=batch, clip=1e9), []
    for i, p in enumerate(t.parameters.values()):           # and none of them zero
        p.data = p.data + 0.1 * np.random.default_rng(i).standard_normal(p.shape)
    drawn, t.loss = t.batch(), t.stage.module.loss         # not in the run's precision, float32
    t.batch = lambda: tuple(a.astype(np.float64) if a.dtype == np.float32 else a for a in drawn)
    t.optimiser.step = lambda grads, lr: kept.append(np.concatenate([np.array(g).ravel() for g in grads]))
    return t.step(), kept[0]


OPTIONS = TrainOptions(steps=STEPS, batch=5)


def run(folder: Path, resume: bool = False, until: int = STEPS, asks: bool = True, data=None, options=OPTIONS):
    """A run that is stopped after step `until` if `asks`; None where it was stopped, else the trained system."""
    step = Trainer.step

    def stopping(self):
        was_asked = self.asked_to_stop
        self.asked_to_stop = lambda: was_asked() or asks and self.n == until - 1 and until < self.config.steps
        try:
            return step(self)
        finally:
            self.asked_to_stop = was_asked
    Trainer.step = stopping
    try:
        return runs.run(folder, TextToImage, data or tiny.digits(), options, config=tiny.CONFIG, resume=resume,
                        quiet=True).system
    except loop.Interrupted:
        return None
    finally:
        Trainer.step = step


def newest(folder: Path) -> checkpoint.Checkpoint:
    """The newest state of a run of text-to-image."""
    return checkpoint.CheckpointFolder(folder / "1-diffusion").latest()


# --- the same as one process ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two ranks' work, and of one process's runs beside it."""
    folder = tmp_path_factory.mktemp("ranks")
    assert run(folder / "from one", until=2) is None
    status, _, said = ended(start("work", folder))
    (folder / "ended").write_text(f"{status} {said}", encoding="utf-8")
    return folder


@with_ranks
def test_two_ranks_work_to_the_end(two):
    said = (two / "ended").read_text(encoding="utf-8")
    assert said.startswith("0 "), said


@pytest.mark.slow
@with_ranks
@pytest.mark.parametrize("batch", BATCHES)
def test_the_gradient_is_that_of_one_process(two, batch):
    """To the rounding of sums in float64 taken in another order.  An odd batch's parts do not weigh the same."""
    loss, gradient = gradient_in_float64(batch)
    for rank in (0, 1):
        theirs = saved(two / f"gradient-{batch}-{rank}.npz")
        assert theirs["loss"] == pytest.approx(loss, rel=1e-13)
        assert np.linalg.norm(theirs["gradient"] - gradient) < 1e-13 * np.linalg.norm(gradient)


@with_ranks
@pytest.mark.parametrize("batch", BATCHES)
def test_two_ranks_have_the_same_bits_and_those_of_one_process_to_rounding(two, batch):
    """In float32 a gradient's entry is right to about 1e-6 of the largest; AdamW divides each by its own size, so that
    a weight whose gradient all but vanishes may go elsewhere by a good part of the learning rate, 2e-3; the others
    agree to 1e-6."""
    first, second = (saved(two / f"steps-{batch}-{rank}.npz") for rank in (0, 1))
    assert first.keys() == second.keys() and all(first[k].tobytes() == second[k].tobytes() for k in first)
    t = tiny.trainer(batch=batch)
    before = {k: a for k, a in weights(t).items() if k.startswith("model.")}
    for _ in range(STEPS):
        t.step()
    after = weights(t)
    moved = np.concatenate([(after[k] - before[k]).ravel() for k in before])
    apart = np.concatenate([(first[k] - after[k]).ravel() for k in before])
    assert np.linalg.norm(apart) < 1e-3 * np.linalg.norm(moved)
    assert np.median(np.abs(apart)) < 1e-6
    np.testing.assert_allclose(saved(two / f"losses-{batch}.npz")["losses"], t.losses, rtol=1e-5)


@with_ranks
def test_each_rank_reads_its_own_part_of_the_epochs(two):
    """STEPS batches of 5: the ranks read 2 and 3 images of each, together those of the epochs' order, once.  Before the
    first step each has looked at one image, to see that the data set keeps its contract."""
    first, second = (saved(two / f"read-{rank}.npz")["indices"][1:].reshape(STEPS, -1) for rank in (0, 1))
    assert (first.shape[1], second.shape[1]) == (2, 3)
    together = np.concatenate([first, second], axis=1).ravel()
    data = tiny.digits()
    expected = np.concatenate([Step(0, 1, n, STEPS, 5).choose(data) for n in range(STEPS)])
    assert together.tolist() == expected.tolist() and len(set(together)) == min(len(data), len(together))


@with_ranks
@pytest.mark.parametrize("whose, resumed_by", [("from one", "two ranks"), ("from two", "one process")])
def test_a_run_goes_on_with_another_number_of_ranks(two, whose, resumed_by):
    run(two / f"straight {whose}")
    straight = newest(two / f"straight {whose}").tensors
    if resumed_by == "one process":
        assert newest(two / whose).meta["step"] == 3
        assert not (two / whose / "model.safetensors").exists()
        assert run(two / whose, resume=True)
    tensors = newest(two / whose).tensors
    assert (two / whose / "model.safetensors").exists() and tensors["losses"].shape == (STEPS,)
    for name, w in straight.items():
        if name.startswith("model."):
            assert np.linalg.norm(tensors[name] - w) <= 1e-3 * max(np.linalg.norm(w), 1e-2), name


@with_ranks
def test_one_rank_that_is_asked_to_stop_stops_all_after_the_same_step(two):
    assert [saved(two / f"stopped-{rank}.npz")["n"] for rank in (0, 1)] == [3, 3]


@with_ranks
def test_the_first_rank_alone_writes(two):
    assert {p.name for p in (two / "from one").rglob("*.*")} == {
        "run.json", "model.safetensors", "step-000002.safetensors", "step-000004.safetensors", "samples.png",
        "loss.png"}


@with_ranks
def test_the_ranks_of_a_machine_divide_its_cores(two):
    allowed = len(parallel.allowed_cores())
    assert [saved(two / f"cores-{rank}.npz")["n"] for rank in (0, 1)] == 2 * [max(1, allowed // 2)]


# --- one voice, one end -----------------------------------------------------------------------------------

@with_ranks
def test_a_mistake_in_an_argument_is_said_once(tmp_path):
    status, printed, said = ended(start("cli", tmp_path, "train", "--steps", "none"))
    assert status == 2 and said.count("takes a whole number") == 1 and said.startswith("minidiff: ") and not printed


@pytest.mark.slow
@with_ranks
def test_a_command_that_ranks_cannot_divide_is_refused(tmp_path):
    status, printed, said = ended(start("cli", tmp_path, "sample", "3"))
    assert status == 2 and said.count("leave out mpiexec") == said.count("\n") == 1


def beginning(tmp_path) -> list[str]:
    """The arguments of a run of the tiny model on data at hand."""
    (tmp_path / "data").mkdir()
    for file in mnist.PACKED.glob("*.gz"):
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    return ["train", "--data", "data", "--out", "run", "--batch", "4", "--images", "0", "--steps", "100000"]


@with_ranks
@pytest.mark.parametrize("rank, how, says", [
    ("1", "raise", "minidiff: rank 1 failed (KeyError: 'a mistake'), and the 2 were stopped"),
    ("1", "kill", "minidiff: the run was cut off: one of its 2 ranks was killed"),
    pytest.param("0", "raise", "minidiff: rank 0 failed in this way, and the 2 were stopped", marks=pytest.mark.slow),
    pytest.param("0", "kill", "minidiff: the run was cut off: one of its 2", marks=pytest.mark.slow),
    pytest.param("1", "user", "minidiff: rank 1 failed (no room: make some), and the 2 were stopped",
                 marks=pytest.mark.slow),
])
@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(tmp_path, rank, how, says):
    """From its last saved state."""
    process = start("dying", tmp_path, rank, how, *beginning(tmp_path))
    status, _, said = ended(process)
    assert status != 0
    ours = [line for line in said.splitlines() if line.startswith("minidiff: ") and "resume from it with" in line]
    assert len(ours) == 1 and ours[0].startswith(says), said
    assert said.count("--resume") == 1 and ("Traceback" in said) == (how == "raise")
    assert (tmp_path / "died").exists()
    step = newest(tmp_path / "run").meta["step"]
    assert step in (1, 2)                                   # the first rank may have been writing the second
    resumed = run(tmp_path / "run", resume=True, until=step + 1, data=load_dataset(tmp_path / "data"),
                  options=TrainOptions(steps=100_000, batch=4))
    assert resumed is None and newest(tmp_path / "run").meta["step"] == step + 1


@pytest.mark.slow
@with_ranks
@pytest.mark.parametrize("number, whose", [(signal.SIGINT, "mpiexec"), (signal.SIGTERM, "mpiexec"),
                                           (signal.SIGTERM, "1")])
def test_a_signal_ends_all_ranks_and_saves_once(number, whose, tmp_path):
    """A real one, to mpiexec, which hands it on, or to one rank."""
    process = start("drawing", tmp_path, *beginning(tmp_path))
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "1-diffusion" / "samples.png").exists():  # the steps have begun
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if whose == "mpiexec":
        process.send_signal(number)
    else:
        os.kill(int((tmp_path / f"rank-{whose}").read_text()), number)
    status, _, said = ended(process)
    command = "mpiexec -n 2 minidiff train --system text-to-image --resume --out run"
    assert status == 1 and said.count(command) == 1, said
    assert len(list((tmp_path / "run" / "1-diffusion").glob("step-*"))) == 1


@pytest.mark.slow
@with_ranks
def test_a_system_trains_in_stages(tmp_path):
    """The toy's batches of 6 among 4 ranks, uneven, through both stages: the weights of one process."""
    status, _, said = ended(start("toy", tmp_path, count=4))
    assert status == 0, said
    from support.toy import Toy
    alone = runs.run(tmp_path / "alone", Toy, tiny.digits(50), quiet=True).system.state_dict()
    theirs = Toy.load(tmp_path / "toy" / "model.safetensors").state_dict()
    for name, w in alone.items():
        np.testing.assert_allclose(theirs[name], w, atol=1e-5)


@pytest.mark.slow
@with_ranks
def test_a_rank_that_looks_while_the_first_has_made_the_folder_waits_for_nothing(tmp_path):
    """A rank once waited for ever: it saw the run's folder, which the first had made a moment ago to lock it."""
    command = [*beginning(tmp_path)[:-1], "1"]
    status, _, said = ended(start("late", tmp_path, *command))
    assert status == 0, said


@pytest.mark.slow
@with_ranks
def test_two_ranks_train_on_a_folder_of_pictures(tmp_path, monkeypatch):
    """The first decodes them, the other finds the cache; what is wrong with them is said once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(np.full((28, 28), 20 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"grey number {i}")
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / "nameless.png")
    command = ["train", "--data", str(folder), "--size", "28", "--steps", "3", "--batch", "5", "--images", "0",
               "--out", str(tmp_path / "out")]
    status, printed, said = ended(start("tiny", tmp_path, *command))
    assert status == 0, said
    assert (printed + said).count("12 pictures of") == 1 and said.count("nameless.png") == 1
    assert len(list((tmp_path / "cache" / "minidiff" / "pictures").iterdir())) == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


# --- what needs no mpiexec --------------------------------------------------------------------------------

class Comm(SimpleNamespace):
    """An mpi4py communicator of ranks that all hold what this one does."""

    Get_rank, Get_size = lambda self: self.rank, lambda self: self.size

    def allreduce(self, value):
        return self.size * value

    def allgather(self, value):
        return self.size * [value]


@given(size=st.integers(1, 9), more=st.integers(0, 30))
def test_the_parts_are_the_batch_and_nobodys_is_empty(size, more):
    parts = [Ranks(Comm(rank=rank, size=size)).shard(size + more) for rank in range(size)]
    assert [i for part in parts for i in range(size + more)[part]] == list(range(size + more))
    lengths = {part.stop - part.start for part in parts}
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1


def test_a_batch_of_fewer_samples_than_ranks_is_refused():
    with pytest.raises(UserError, match="a batch of 2 cannot be divided among 3 ranks: start 2 of them at most"):
        Ranks(Comm(rank=0, size=3)).shard(2)


def test_without_mpiexec_a_process_is_alone_and_never_imports_mpi4py(monkeypatch):
    for names in ranks_module._PLACES:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)        # an import of it raises
    assert type(ranks()) is SingleProcess and tiny.trainer().ranks.shard(6) == slice(0, 6)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert type(ranks()) is SingleProcess


@pytest.mark.parametrize("rank, size", ranks_module._PLACES)
def test_mpiexec_without_mpi4py_is_told_what_to_install(monkeypatch, capsys, rank, size):
    monkeypatch.setenv(rank, "0")
    monkeypatch.setenv(size, "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match="mpiexec started 2 ranks.*pip install mpi4py mpich"):
        ranks()
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.count("pip install mpi4py mpich") == 1
    monkeypatch.setenv(rank, "1")                           # the other says nothing
    assert cli_ranks.together(lambda: 0) == 2 and not capsys.readouterr().err


def test_ranks_that_do_not_begin_alike_are_refused():
    comm = Comm(rank=0, size=2)
    t, other = tiny.trainer(0), tiny.trainer(0)
    Ranks(comm).check_alike(t.fingerprint)
    assert t.fingerprint() == other.fingerprint()
    other.step()
    other.n = 0                                             # other weights
    assert t.fingerprint() != other.fingerprint()
    comm.allgather = lambda mine: [mine, other.fingerprint()]
    with pytest.raises(UserError, match="do not start alike: every machine must see the same --out"):
        Ranks(comm).check_alike(t.fingerprint)


@pytest.mark.parametrize("allowed, mine, part", [
    ([{0, 1}, {0, 1}], {0, 1}, 1), ([{0, 1}] * 3, {0, 1}, 1), ([set(range(6))] * 3, set(range(6)), 2),
    ([set(range(5))] * 2, set(range(5)), 2), ([{0, 1}, {2, 3}], {2, 3}, 2), ([{7}, {3}], {3}, 1),
    ([{0, 1}], {0, 1}, 2)])
def test_cores_are_divided_unless_each_rank_has_its_own(monkeypatch, allowed, mine, part):
    from threadpoolctl import threadpool_info, threadpool_limits
    monkeypatch.setattr(parallel, "allowed_cores", lambda: mine)
    monkeypatch.setattr(parallel, "CPU_MAX", Path("no/such/file"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(parallel, "_part", 0)
    assert parallel.cores() == len(mine)
    with threadpool_limits():                               # puts the limit of BLAS back
        parallel.divide_cores(allowed)
        assert parallel.cores() == part
        assert max(lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas") <= part
        assert list(parallel.parallel_map(abs, [-1, 2])) == [1, 2]


class Doubling:
    """NCCL's backend between two ranks that hold the same."""

    def all_reduce(self, taken, given):
        assert taken is given
        given *= 2


def test_on_gpus_the_sum_is_nccls_and_nothing_leaves_the_device(monkeypatch):
    """Not NCCL itself: what the host does around it.  Two ranks with equal parts' equal gradients have these means."""
    cupy = fake_cupy.install(monkeypatch)
    own = RanksOnGPUs(Comm(rank=0, size=2), 0, Doubling())
    grads = [cupy.asarray(np.arange(6, dtype=np.float32).reshape(2, 3)), cupy.asarray(np.ones(1, np.float32))]
    loss, means, stop = own.mean(cupy.asarray(np.float32(3)), grads, 0.5, False)
    assert not stop and [g.shape for g in means] == [(2, 3), (1,)]
    assert all(isinstance(a, cupy.ndarray) for a in (loss, *means))
    assert np.array_equal(means[0].get(), grads[0].get()) and means[1].get() == 1 and loss.get() == 3
    later, means, stop = own.mean(cupy.asarray(np.float32(7)), grads, 0.25, True)
    assert stop and later.get() == 3.5 and means[1].get() == 0.5
    assert loss.get() == 3                                  # which is fetched when the buffer holds another step's


@fake_cupy.of_the_stand_in
@pytest.mark.parametrize("others, says", [(["90", "90"], None), (["90", "80"], "sm_90, sm_90, sm_80")])
def test_the_ranks_gpus_are_of_one_kind(monkeypatch, others, says):
    """Each rank takes the GPU of its place on the machine, and tells the others which kind it is."""
    fake_cupy.install(monkeypatch, gpus=2)
    used, nccl = [], SimpleNamespace(NCCLBackend=lambda size, rank, use_mpi: (size, rank))
    monkeypatch.setattr(fake_cupy.Device, "use", lambda self: used.append(self.id), raising=False)
    monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(distributed=nccl))
    monkeypatch.setitem(sys.modules, "cupyx.distributed", nccl)
    comm = Comm(rank=1, size=3)
    comm.allgather = lambda own: [own, *others]
    monkeypatch.setattr(ranks_module, "_on_cpus", lambda: Ranks(comm, 1))
    if says is None:
        assert ranks_module._on_gpus.__wrapped__().backend == (3, 1) and used == [1]
        return
    with pytest.raises(UserError, match=f"the ranks must have GPUs of one kind, and theirs are {says}: choose equal "
                                        "ones with CUDA_VISIBLE_DEVICES$") as error:
        ranks_module._on_gpus.__wrapped__()
    fake_cupy.one_sentence(error)


def test_on_gpus_the_exchange_comes_before_the_update():
    t, stepped = tiny.trainer(batch=6), []
    t.ranks = RanksOnGPUs(Comm(rank=1, size=2), 0, Doubling())
    t.shard = t.ranks.shard(6)
    t.on_device = SimpleNamespace(scale=1.0, step=lambda grads, loss, lr, n: stepped.append((grads, loss, lr, n)))
    t.step()
    half, kept = tiny.trainer(batch=3, clip=1e9), []        # the second half of that batch, by itself
    whole = tiny.trainer(batch=6).batch()
    half.batch, half.optimiser.step = (lambda: tuple(a[3:] for a in whole)), lambda grads, lr: kept.extend(grads)
    loss = half.step()
    (grads, summed, _, n), = stepped
    assert n == 1 and summed == pytest.approx(loss, rel=1e-6)
    for g, g_half in zip(grads, kept, strict=True):
        np.testing.assert_allclose(g, g_half, rtol=1e-5, atol=1e-7)


def test_a_rank_moves_its_own_samples_to_its_device_and_no_others(monkeypatch):
    t, whole, given = tiny.trainer(batch=6), tiny.trainer(batch=6).batch(), []
    t.shard = slice(2, 5)
    monkeypatch.setattr("minidiff.training.trainer.moved_together",
                        lambda arrays, device: given.append([len(a) for a in arrays]) or list(arrays))
    mine = t.batch()
    assert given == [[3] * len(whole)]
    assert all(np.array_equal(a, b[2:5]) for a, b in zip(mine, whole, strict=True))


# --- what the ranks run -----------------------------------------------------------------------------------

def refused(path, *_, **__):
    raise AssertionError(f"rank {ranks().rank} writes {path}")


def work(folder: Path) -> None:
    """Steps, gradients and runs, whose results each rank puts into files."""
    rank = ranks().rank
    if rank > 0:                                            # which writes nothing but what the test asks it for
        checkpoint.save = pictures.save = runs.write_json = refused

    def put(name: str, **arrays):
        np.savez(folder / f"{name}-{rank}.npz", **arrays)
    put("cores", n=parallel.cores())
    for batch in BATCHES:
        loss, gradient = gradient_in_float64(batch)
        put(f"gradient-{batch}", loss=loss, gradient=gradient)
        t = tiny.trainer(batch=batch)
        for _ in range(STEPS):
            t.step()
        put(f"steps-{batch}", **weights(t))
        if rank == 0:
            np.savez(folder / f"losses-{batch}.npz", losses=t.losses)
    data, read = tiny.digits(), []
    images, data.images = data.images, lambda indices: (read.extend(indices), images(indices))[1]
    run(folder / "reading", data=data)
    put("read", indices=read)
    run(folder / "from one", resume=True)
    made, mean = [], Ranks.mean
    Ranks.mean = lambda self, *a: (made.append(1), mean(self, *a))[1]
    assert run(folder / "from two", until=3, asks=rank == 1) is None
    put("stopped", n=len(made))


def dying(folder: Path, who: str, how: str, *arguments) -> int:
    """A run of the command in which rank `who` dies in step 3; every step is saved."""
    loop.SAVE_EVERY = 0.0
    step = Trainer.step

    def deadly(self):
        if self.n == 2 and self.ranks.rank == int(who):
            (folder / "died").touch()
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("no room: make some") if how == "user" else KeyError("a mistake")
        return step(self)
    Trainer.step = deadly
    cli_ranks.GRACE = 0.2
    return tiny_command(folder, *arguments)


def tiny_command(folder: Path, *arguments) -> int:
    TextToImage.config_for = classmethod(lambda cls, shape: tiny.CONFIG)
    return cli.main(list(arguments))


def late(folder: Path, *arguments) -> int:
    """The first rank holds the lock of the run's folder for a while, and the other looks at the folder meanwhile."""
    check_folder, check = runs._check_folder, cli_train._check
    runs._check_folder = lambda path: (time.sleep(3), check_folder(path))
    cli_train._check = lambda args: (wait_for(args.out) if ranks().rank else None, check(args))[1]
    return tiny_command(folder, *arguments)


def wait_for(path: Path) -> None:
    """For 3 s at most: the first rank may itself wait for this one before it makes the folder."""
    deadline = time.monotonic() + 3
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def drawing(folder: Path, *arguments) -> int:
    """A run of the command that draws after every step."""
    loop.DRAW_EVERY = 0.0
    (folder / f"rank-{ranks().rank}").write_text(str(os.getpid()))
    return tiny_command(folder, *arguments)


def toy(folder: Path) -> None:
    from support.toy import Toy
    if ranks().rank > 0:
        checkpoint.save = pictures.save = runs.write_json = refused
    runs.run(folder / "toy", Toy, tiny.digits(50), quiet=True)


if __name__ == "__main__":
    def alike(job):
        return lambda *a: cli_ranks.together(lambda: job(*a) or 0)
    jobs = {"work": alike(work), "toy": alike(toy), "dying": dying, "drawing": drawing, "late": late,
            "tiny": tiny_command, "cli": lambda folder, *a: cli.main(list(a))}
    sys.exit(jobs[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:]))

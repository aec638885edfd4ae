"""`train(sae, batches, cfg)`: the run, its records, and how it stops and goes on.

Several SAEs make a group of runs on one stream. The stream is at one step, and the runs that are there too take its
batch. A run that is ahead (it wrote one more checkpoint before the group was killed) waits for it, and one that has
done its steps is left out: so runs of different lengths go together, and a group goes on from whatever checkpoints
there are.
"""

import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import FrameType
from typing import overload

from torch import Tensor

from mistudio.errors import MistudioError, TrainError
from mistudio.mesh import SOLO, Mesh
from mistudio.progress import Bar, progress_bar
from mistudio.sae import SAE
from mistudio.train.config import TrainConfig
from mistudio.train.member import Member, Run
from mistudio.train.memory import check_memory
from mistudio.train.objectives import Trainable
from mistudio.train.together import Batch, Reader, Resumable, update_all


class Interrupted(TrainError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and wrote a checkpoint."""

    exit_code = 130


@overload
def train(
    sae: Trainable,
    batches: Iterable[Batch],
    cfg: TrainConfig,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    mean: Tensor | None = None,
    mesh: Mesh = SOLO,
) -> Run: ...


@overload
def train(
    sae: Sequence[Trainable],
    batches: Iterable[Batch],
    cfg: TrainConfig | Sequence[TrainConfig],
    *,
    folder: str | Path | Sequence[str | Path] | None = None,
    resume: bool = False,
    mean: Tensor | Sequence[Tensor | None] | None = None,
    mesh: Mesh = SOLO,
) -> list[Run]: ...


def train(
    sae: Trainable | Sequence[Trainable],
    batches: Iterable[Batch],
    cfg: TrainConfig | Sequence[TrainConfig],
    *,
    folder: str | Path | Sequence[str | Path] | None = None,
    resume: bool = False,
    mean: Tensor | Sequence[Tensor | None] | None = None,
    mesh: Mesh = SOLO,
) -> Run | list[Run]:
    """The finished run, or for several SAEs on the same batches a list of runs; each `sae` is trained in place.

    batches: any iterable of normalised rows [batch_rows, D] with E‖x‖² = 1, on any device, enough for every step; or
        of pairs, or of mappings by site (`together.Batch`).
    cfg: for several SAEs one for all, or one each; these may differ in everything but batch_rows.
    folder: where run.json, metrics.jsonl, checkpoints and at the end the SAE in released form go; None keeps nothing.
        For several SAEs a folder each, or one in which they have 000, 001, ...
    resume: go on with the run in `folder` (bit-identical to one that never stopped), or start it where there is none.
        A `Resumable` source is put back to its place; from any other, the batches already used are skipped.
    mean: where b_dec starts with b_dec_init "mean", in normalised units; None takes the first batch's. For several SAEs
        one for all, or one each.
    mesh: the processes that share the work; `sae` has this one's features (`initial_sae(..., mesh)`) and `batches` its
        part of every batch.

    Each of several runs ends with the bits it would have alone. One that fails (its loss is not finite) says so in
    `Run.failure`, and the others go on.

    TrainError: there is too little memory, the rows are not normalised, a batch has another shape or non-finite values,
    the batches end early or cannot go on (a damaged store; after a checkpoint), the folder is in use or belongs to
    another configuration. Interrupted: Ctrl-C or SIGTERM,
    after a checkpoint (only with a folder and in the main thread; elsewhere a signal does what it always did).
    """
    saes = [sae] if isinstance(sae, SAE) else list(sae)
    cfgs = [cfg] * len(saes) if isinstance(cfg, TrainConfig) else list(cfg)
    means = [mean] * len(saes) if mean is None or isinstance(mean, Tensor) else list(mean)
    folders = _folders(folder, None if isinstance(sae, SAE) else len(saes))
    counts = [len(saes), len(cfgs), len(folders), len(means)]
    if min(counts) != max(counts) or not saes:
        raise TrainError(
            f"Found {counts[0]} SAEs, {counts[1]} configurations, {counts[2]} folders and {counts[3]} means; expected "
            "the same number of each, at least one."
        )
    check_memory(saes, cfgs)
    each = zip(saes, cfgs, folders, means, strict=True)
    runs = _train_group([Member(*its, mesh) for its in each], batches, resume, mesh)
    return runs[0] if isinstance(sae, SAE) else runs


def _folders(folder: str | Path | Sequence[str | Path] | None, count: int | None) -> list[Path | None]:
    """The folder of each of `count` runs; of the one run, where it is None."""
    if folder is None:
        return [None] * (count or 1)
    if isinstance(folder, (str, Path)):
        return [Path(folder)] if count is None else [Path(folder) / f"{i:03d}" for i in range(count)]
    if len({Path(f).resolve() for f in folder}) < len(folder):
        raise TrainError("Two of the runs have the same folder; each needs its own.")
    return [Path(f) for f in folder]


def _train_group(members: list[Member], batches: Iterable[Batch], resume: bool, mesh: Mesh) -> list[Run]:
    sizes = sorted({member.cfg.batch_rows for member in members})
    if len(sizes) > 1:
        raise TrainError(f"SAEs on one stream need the same batch_rows; found {', '.join(map(str, sizes))}.")
    go_on = [member.claim(resume) for member in members]  # all of them before anything is written
    mesh.barrier()
    for sentence in dict.fromkeys(sentence for member in members for sentence in member.warnings):
        if mesh.first:
            print(f"Warning: {sentence}", file=sys.stderr)
    for member, goes_on in zip(members, go_on, strict=True):
        if goes_on:
            member.restore()
    try:
        _run_steps(members, batches, mesh)
    finally:
        for member in members:
            member.close()
    if members[0].failure and all(member.failure for member in members):
        raise members[0].failure
    runs = [member.finish() for member in members]
    mesh.barrier()
    return runs


def _run_steps(members: list[Member], batches: Iterable[Batch], mesh: Mesh) -> None:
    step = min((member.step for member in members if member.unfinished), default=None)
    rows, last = members[0].cfg.batch_rows, max(member.cfg.steps for member in members)
    reader = Reader(members[0].cfg, mesh)
    source = iter(()) if step is None else _source(members, batches, step)
    if step == 0:
        source = _begin(members, source, reader, mesh)
    for member in members:
        member.open_records()
    what = "training" if len(members) == 1 else f"training {len(members)} SAEs"
    with (
        _stop_requests(enabled=members[0].folder is not None) as stop,
        progress_bar(what, last * rows, "tokens", start=(step or 0) * rows, shown=mesh.first) as bar,
    ):
        while step is not None and any(member.unfinished for member in members):
            here = [member for member in members if member.unfinished and member.step == step]
            try:
                batch = next(source, None)
            except MistudioError as error:
                raise _source_failed(error, members, batches, step, mesh) from error
            if batch is None:
                for member in here:
                    _save(member, batches, alone=len(members) == 1)
                raise _ended_early(last, step)
            update_all([member.state for member in here], [reader.read(batch, member.sae) for member in here])
            step += 1
            bar.advance(rows)
            stopped = mesh.any(stop.signal is not None)
            for member in here:
                _records(member, batches, bar, stopped, alone=len(members) == 1)
            if stopped and any(member.unfinished for member in members):
                raise _interrupted(members, step, stop.signal)


def _source(members: list[Member], batches: Iterable[Batch], step: int) -> Iterator[Batch]:
    """The batches from that step on: from the place in a checkpoint of it, or by passing over all before it."""
    if not isinstance(batches, Resumable):
        return islice(iter(batches), step, None)
    if step > 0:
        position = next(member.position for member in members if member.step == step)
        if position is None:
            raise TrainError(
                "The run's batches had no state() when it stopped, and now they have; pass the same source."
            )
        batches.restore(position)
    return iter(batches)


def _begin(members: list[Member], source: Iterator[Batch], reader: Reader, mesh: Mesh) -> Iterator[Batch]:
    """The same batches; the runs at step 0 have begun, after the first batch was found right for all of them."""
    new = [member for member in members if member.step == 0]
    first = next(source, None)
    if first is None:
        raise _ended_early(max(member.cfg.steps for member in members), 0)
    starts = [member.begin(reader.read(first, member.sae)) for member in new]
    for member, start in zip(new, starts, strict=True):
        member.write_start(start)
    mesh.barrier()
    return chain([first], source)


def _records(member: Member, batches: object, bar: Bar, stopped: bool, alone: bool) -> None:
    """What is due after a step: a line, a checkpoint."""
    try:
        note = member.log_if_due()
    except TrainError as error:
        return _failed(member, error, alone)
    if note is not None:
        bar.advance(0, note)
    if member.save_is_due or stopped:
        _save(member, batches, alone)


def _save(member: Member, batches: object, alone: bool) -> None:
    try:
        member.save(batches)
    except TrainError as error:
        _failed(member, error, alone)


def _failed(member: Member, error: TrainError, alone: bool) -> None:
    """One of several stops, and the others go on."""
    if alone:
        raise error
    member.fail(error)


def _ended_early(steps: int, step: int) -> TrainError:
    return TrainError(
        f"The batches ended after {step:,} of {steps:,} steps. Pass an endless source (a store's feed, or "
        "itertools.cycle over a list), or lower steps."
    )


def _source_failed(
    error: MistudioError, members: list[Member], batches: object, step: int, mesh: Mesh
) -> MistudioError:
    """What is raised where the batches cannot go on, such as from a damaged store: what to do about it, too. A
    checkpoint keeps the steps that were done, unless processes would have to agree on it."""
    if members[0].folder is None:
        return error
    alone = mesh.size == 1
    if alone:
        for member in members:
            if member.unfinished and member.step == step:
                _save(member, batches, alone=len(members) == 1)
    kept = f"a checkpoint is in {_folders_of(members)}" if alone else "its last checkpoint is kept"
    steps = max(member.cfg.steps for member in members)
    return TrainError(
        f"{error} The run stopped after step {step:,} of {steps:,}; {kept}. Put that right, then go on with the same "
        "command and --resume (resume=True)."
    )


def _folders_of(members: list[Member]) -> str:
    return f"{members[0].folder}" if len(members) == 1 else f"the {len(members)} runs' folders"


def _interrupted(members: list[Member], step: int, signal_name: str | None) -> Interrupted:
    steps = max(member.cfg.steps for member in members)
    return Interrupted(
        f"Stopped by {signal_name or 'a signal to another process'} after step {step:,} of {steps:,}; a checkpoint is "
        f"in {_folders_of(members)}. Continue with --resume (resume=True)."
    )


@dataclass
class _Stop:
    signal: str | None = None


@contextmanager
def _stop_requests(enabled: bool) -> Iterator[_Stop]:
    """`.signal` names the first SIGINT or SIGTERM of the block; a second one acts as it did before the block."""
    stop = _Stop()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, _: FrameType | None) -> None:
        stop.signal = signal.Signals(number).name
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()

"""The process that does the heavy work: `python -m reft_edge.agent.worker DAEMON_PID`, started by the supervisor.

Reads commands from stdin and writes answers to stdout (see `agent.protocol`). Stays warm between rounds, with the data
and the graphs of the last task loaded; ends when stdin closes or the daemon dies. Running out of memory is an answer
where that is possible, and otherwise a death that the supervisor explains.

What is heavy is imported when it is first needed: reading data needs no onnxruntime.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from reft_edge import logs
from reft_edge.agent.confinement import MemoryWatch, die_with_parent, step_back
from reft_edge.agent.protocol import (
    Answer,
    BlobsDamaged,
    Cancel,
    CheckModel,
    Command,
    Configure,
    DataDescribed,
    DataRefused,
    DeltaRefused,
    DescribeData,
    DeviceMeasured,
    MeasureDevice,
    MeasuringFailed,
    ModelNotTaken,
    Stopped,
    TaskFailed,
    Train,
    TrainingProgress,
    decode_command,
    encode_line,
)
from reft_edge.errors import DataError, ReftError

if TYPE_CHECKING:
    from reft_edge.agent.serving.deployment_words import Reproach
    from reft_edge.agent.task_runner import TaskRunner

PROGRESS_EVERY_S = 2.0
"""A message a step would be more traffic than the model."""

_NO_ROOM = (os.strerror(errno.ENOMEM), "std::bad_alloc", "failed to map segment from shared object")
"""How errors end that say that there is no memory: C's, C++'s, and the dynamic linker's, which goes on to say what it
is where it is something else."""

logger = logging.getLogger(__name__)


class Worker:
    """Serves commands from `commands` until it closes; `answers` is written unbuffered."""

    def __init__(self, commands: BinaryIO, answers: BinaryIO) -> None:
        self._answers = answers
        self._stream = commands
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._runner: TaskRunner | None = None
        self._watch: MemoryWatch | None = None
        self._on_excess: Callable[[str], Answer] | None = None
        """Given a reason, what to answer when the present job takes too much memory."""
        # A thread, so that a cancel, and the daemon's end, are heard in the middle of training.
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def serve(self) -> None:
        """Answer one command after another; never returns normally."""
        configure = self._commands.get()
        if not isinstance(configure, Configure):
            raise SystemExit("the first command must be 'configure'")
        logs.configure(configure.log_format, configure.log_level)
        logging.getLogger().setLevel(configure.log_level)  # the user's data function may log, too
        logs.process_is_about(logs.Subject(device=configure.device))
        step_back(configure.limits)
        while True:
            match self._commands.get():
                case Train() as command:
                    with logs.about(round=command.task.round, task=command.task.task):
                        self._train(configure, command)
                case DescribeData():
                    self._describe(configure)
                case MeasureDevice(quick=quick):
                    self._measure(configure, quick)
                case CheckModel() as command:
                    self._check(configure, command)

    def _read(self) -> None:
        for line in self._stream:
            command = decode_command(line)
            if isinstance(command, Cancel):
                self._cancelled.add(command.task)
            else:
                self._commands.put(command)
        # The daemon wants us gone, or has gone itself. Everything on disk is written atomically, so just go.
        os._exit(0)

    def _say(self, answer: Answer) -> None:
        self._answers.write(encode_line(answer))

    def _measure(self, configure: Configure, quick: bool) -> None:
        from reft_edge.agent.profiler import measure_profile

        try:
            profile = measure_profile(quick=quick, threads=configure.limits.threads, disk_path=Path(configure.spool))
        except ReftError as exc:
            self._say(MeasuringFailed(reason=str(exc)))
        else:
            self._say(DeviceMeasured(profile=profile))

    def _describe(self, configure: Configure) -> None:
        from reft_edge.agent.training import split_seed
        from reft_edge.data.describe import describe_dataset

        try:
            description = describe_dataset(
                configure.data, base_dir=Path(configure.base_dir), split_seed=split_seed(configure.device)
            )
        except DataError as exc:
            self._say(DataRefused(reason=str(exc)))
        else:
            self._say(DataDescribed(description=description))

    def _check(self, configure: Configure, command: CheckModel) -> None:
        """Check a deployment's model, and say how it ended. The daemon ends this process afterwards."""
        deploy = command.deploy

        def not_taken(kind: Reproach, reason: str, *, refused: bool) -> ModelNotTaken:
            return ModelNotTaken(
                deployment=deploy.deployment, model=deploy.model, refused=refused, kind=kind, reason=reason
            )

        try:
            from reft_edge.agent.serving.check import CheckError, DamagedError, check_model

            with self._within_memory(configure, lambda reason: not_taken("memory", reason, refused=True)):
                answer: Answer = check_model(configure, command)
        except (MemoryError, ImportError) as exc:
            if not _is_want_of_memory(exc):
                raise
            answer = not_taken("memory", f"not enough memory to begin: {exc or type(exc).__name__}", refused=True)
        except CheckError as exc:
            answer = not_taken(exc.kind, str(exc), refused=exc.refused)
        except DamagedError as exc:
            logger.warning("%s", exc)
            answer = BlobsDamaged(deployment=deploy.deployment, model=deploy.model, reason=str(exc))
        self._say(answer)

    def _train(self, configure: Configure, command: Train) -> None:
        """Train, and say how it ended. After a want of memory this process ends: what that leaves is anyone's guess."""
        try:
            enough = self._train_or_say_why_not(configure, command)
        except (MemoryError, ImportError) as exc:
            if not _is_want_of_memory(exc):
                raise
            enough = False
            reason = f"not enough memory to begin training: {exc or type(exc).__name__}"
            self._say(TaskFailed(task=command.task.task, kind="out_of_memory", reason=reason))
        if not enough:
            os._exit(0)  # the next task gets a new process

    def _train_or_say_why_not(self, configure: Configure, command: Train) -> bool:
        """False when memory ran out."""
        from reft_edge.agent.received_weights import DeltaError
        from reft_edge.agent.task_runner import TaskError, TaskRunner
        from reft_edge.agent.training import CancelledError

        task = command.task.task
        reported_at = 0.0

        def on_step(done: int, total: int, loss: float) -> None:
            nonlocal reported_at
            if task in self._cancelled:
                raise CancelledError(task)
            now = time.monotonic()
            if done in (1, total) or now - reported_at >= PROGRESS_EVERY_S:
                reported_at = now
                self._say(TrainingProgress(task=task, steps_done=done, steps_total=total, loss=loss))

        def too_much(reason: str) -> TaskFailed:
            return TaskFailed(task=task, kind="out_of_memory", reason=f"training: {reason}")

        try:
            if task in self._cancelled:
                raise CancelledError(task)
            self._runner = self._runner or TaskRunner(configure)
            with self._within_memory(configure, too_much):
                finished = self._runner.run(command, on_step)
            self._say(finished)
        except CancelledError:
            self._say(Stopped(task=task))
        except DeltaError as exc:
            self._say(DeltaRefused(task=task, reason=str(exc)))
        except TaskError as exc:
            self._say(TaskFailed(task=task, kind=exc.kind, reason=str(exc)))
            return exc.kind != "out_of_memory"
        return True

    def _within_memory(self, configure: Configure, on_excess: Callable[[str], Answer]) -> AbstractContextManager[None]:
        """Guards a job's memory. Not set up earlier: measuring the device takes more than training may have."""
        limit = configure.limits.memory_bytes
        if limit is None:
            return nullcontext()

        def excess(resident: int) -> None:
            reason = f"it took {resident / 2**20:.0f} MiB; [limits] memory_bytes grants {limit / 2**20:.0f} MiB"
            if self._on_excess is not None:
                self._say(self._on_excess(reason))
            os._exit(0)  # the main thread is deep in a computation that cannot be interrupted

        self._on_excess = on_excess
        self._watch = self._watch or MemoryWatch(limit, excess)
        return self._watch.watching()


def _is_want_of_memory(exc: MemoryError | ImportError) -> bool:
    """A library that finds no room to be mapped, or none to begin with, is an `ImportError`."""
    return isinstance(exc, MemoryError) or str(exc).endswith(_NO_ROOM)


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides what it means
    die_with_parent(int(arguments[0]))
    # Whatever else prints to stdout, for example the user's data function, goes to stderr.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    try:
        Worker(sys.stdin.buffer, answers).serve()
    except Exception:
        logger.exception("the worker failed")
        # Not through Python's own end, which aborts: the thread that reads commands holds the lock of stdin.
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])

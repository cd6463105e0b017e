"""One model in one form: pruned, compiled and planned for every board by the product's own parts.

The steps are those of `reft-edge plan` and of a coordinator's first round: `Workshop` prunes and compiles, `plan`
chooses, `predict` says what it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from reft_edge.bundle.bundle import Bundle
from reft_edge.coordinator.catalogue import Workshop, initial_model
from reft_edge.coordinator.planning import DEFAULT_RATIOS, Assignment, plan
from reft_edge.coordinator.policies import Ladder
from reft_edge.coordinator.prediction import Device, Option, Workload, predict, unfit
from reft_edge.coordinator.settings import ModelSettings, SizeLimits
from reft_edge.data_files import SharedFolder, shared_folder
from reft_edge.models.registry import ZOO
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.simulation.sizes.records import FORMS, Blob, Board, Form, SizeRun, SizeSettings, Variant
from reft_edge.simulation.sizes.wire import blobs
from reft_edge.wire.codec_names import find_codec

PROFILES: SharedFolder = "device_profiles"


def board_names() -> tuple[str, ...]:
    """The reference boards, by the names of their files."""
    return tuple(sorted(path.stem for path in shared_folder(PROFILES).glob("*.toml")))


def missing(settings: SizeSettings, runs: Sequence[SizeRun]) -> list[tuple[str, Form]]:
    """What is not measured yet, in order."""
    done = {(run.model, run.form) for run in runs}
    return [(model, form) for model in settings.models for form in FORMS if (model, form) not in done]


def run_trial(model: str, form: Form, settings: SizeSettings, *, tell: Callable[[str], None]) -> SizeRun:
    """Plan `model` for every board of the settings. `tell` hears of each step that takes time."""
    return _Trial(model, form, settings, tell).run()


class _Trial:
    def __init__(self, model: str, form: Form, settings: SizeSettings, tell: Callable[[str], None]) -> None:
        entry = ZOO[model]
        architecture = ModelSettings(name=model, input_shape=entry.input_shape, n_outputs=entry.n_outputs)
        module = initial_model(architecture, base_dir=Path(), seed=settings.seed)
        limits = SizeLimits(weight_bytes=settings.weight_bytes, macs=settings.macs) if form == "limited" else None
        self._workshop = Workshop(module, architecture, importance="magnitude", seed=settings.seed, limits=limits)
        self._model, self._form, self._settings, self._tell = model, form, settings, tell
        codec = find_codec(settings.codec)
        self._workload = Workload(
            local_epochs=settings.local_epochs,
            batch_size=settings.batch_size,
            deadline_s=settings.deadline_s,
            weights_codec=codec,
            update_codec=codec,
        )
        self._bundles: dict[float, Bundle] = {}

    def run(self) -> SizeRun:
        devices = [self._device(board) for board in self._settings.boards]
        ratios = (0.0,) if self._form == "unpruned" else self._workshop.ladder(DEFAULT_RATIOS)
        ladder = Ladder(ratios, self._price)
        if self._form == "unpruned":
            boards = tuple(self._whole(device, ladder.option(0)) for device in devices)
        else:
            boards = tuple(map(_board, plan(devices, workload=self._workload, ladder=ladder)))
        used = sorted({board.ratio for board in boards if board.ratio is not None})
        return SizeRun(
            model=self._model, form=self._form, variants=tuple(self._variant(ratio) for ratio in used), boards=boards
        )

    def _device(self, board: str) -> Device:
        profile = DeviceProfile.read(shared_folder(PROFILES) / f"{board}.toml")
        return Device(device=board, profile=profile, training_samples=self._settings.samples)

    def _price(self, ratio: float) -> Option:
        self._tell(f"{self._model}, {self._form}: pruning by {ratio:.3g} and compiling")
        self._bundles[ratio] = self._workshop.make(ratio)[0]
        return Option.of(self._bundles[ratio].manifest, ratio=ratio, workload=self._workload)

    def _whole(self, device: Device, option: Option) -> Board:
        """What the whole model would take there, possible or not."""
        expected = predict(device, option, self._workload)
        late = expected.round_s > self._workload.deadline_s
        return Board(
            board=device.device,
            ratio=option.ratio,
            round_s=expected.round_s,
            peak_memory_bytes=expected.peak_memory_bytes,
            obstacle=unfit(device, option, expected) or ("takes longer than the deadline" if late else ""),
        )

    def _variant(self, ratio: float) -> Variant:
        """Blobs are encoded where all boards have the same kind of variant: planned ones are a matter of the boards."""
        bundle = self._bundles[ratio]
        option = Option.of(bundle.manifest, ratio=ratio, workload=self._workload)
        down: tuple[Blob, ...] = ()
        up: tuple[Blob, ...] = ()
        if self._form != "planned":
            self._tell(f"{self._model}, {self._form}: training for {self._settings.steps} steps")
            down, up = blobs(bundle, self._settings)
        cost = bundle.manifest.cost
        return Variant(
            ratio=ratio,
            parameters=cost.parameters,
            weight_bytes=sum(array.nbytes for array in bundle.tensors().values()),
            forward_macs=cost.forward_macs,
            step_memory_bytes=cost.memory_bytes(self._settings.batch_size),
            graph_bytes=option.graph_bytes,
            down=down,
            up=up,
        )


def _board(assignment: Assignment) -> Board:
    option, expected = assignment.option, assignment.prediction
    if option is None or expected is None:
        return Board(board=assignment.device, obstacle=assignment.reason)
    return Board(
        board=assignment.device,
        ratio=option.ratio,
        round_s=expected.round_s,
        peak_memory_bytes=expected.peak_memory_bytes,
    )

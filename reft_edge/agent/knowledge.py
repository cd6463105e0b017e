"""What the agent knows about its device and its data, and how it comes to know it.

From the settings or from the spool where that is still true, else from the worker, which measures and counts. A restart
on an unchanged device therefore starts no worker. Nothing about single samples is kept here.
"""

from __future__ import annotations

import logging
from pathlib import Path

import reft_edge
from reft_edge.agent.jobs import Job, JobEnded
from reft_edge.agent.protocol import DataDescribed, DescribeData, DeviceMeasured, MeasureDevice
from reft_edge.agent.settings import AgentSettings, limited_profile
from reft_edge.agent.spool import Spool
from reft_edge.data.description import DataDescription, fingerprint
from reft_edge.errors import DataError, ResourceError
from reft_edge.profiling.profile import DeviceProfile
from reft_edge.wire.messages import ProfileAnnouncement

logger = logging.getLogger(__name__)


class Knowledge:
    """`profile` and `description` are None until they are known."""

    def __init__(self, settings: AgentSettings, *, base_dir: Path, spool: Spool) -> None:
        self._settings = settings
        self._base_dir = base_dir
        self._spool = spool
        self._data_key: str | None = None
        self.profile: DeviceProfile | None = None
        self.description: DataDescription | None = None

    def recall(self) -> list[Job]:
        """Read what is known; returns what the worker has to find out. Raises `ConfigError` for a profile of no use."""
        wanted = self._settings.profile
        if wanted.path:
            self._set_profile(DeviceProfile.read(self._base_dir / wanted.path))
        elif (cached := self._spool.load_profile(self._profile_key())) is not None:
            self._set_profile(cached)
        self._data_key = fingerprint(self._settings.data, base_dir=self._base_dir)
        if self._data_key is not None and (known := self._spool.load_description(self._data_key)) is not None:
            self._set_description(known)
        # Data first: what is wrong with them should be said before half a minute of measuring.
        jobs: list[Job] = []
        if self.description is None:
            jobs.append(DescribeData())
        if self.profile is None:
            logger.info("measuring this device; this takes up to %d s", 25 if wanted.quick else 60)
            jobs.append(MeasureDevice(quick=wanted.quick))
        return jobs

    def learn(self, ended: JobEnded) -> bool:
        """Take in what the worker found out; whether the job was of that kind.

        Raises `DataError` or `ResourceError` when it found that we cannot take part.
        """
        match ended.job, ended.answer:
            case MeasureDevice(), DeviceMeasured(profile=profile):
                self._spool.save_profile(self._profile_key(), profile)
                self._set_profile(profile)
                logger.info("measured: %.3g GFLOP/s in training", profile.planning_flops_per_s / 1e9)
            case DescribeData(), DataDescribed(description=description):
                if self._data_key is not None:
                    self._spool.save_description(self._data_key, description)
                self._set_description(description)
            case MeasureDevice(), answer:
                raise ResourceError(
                    f"this device cannot be measured: {_reason(answer)}; "
                    "measure it with reft-edge profile-device --output, and name the file in [profile] path"
                )
            case DescribeData(), answer:
                raise DataError(_reason(answer))
            case _:
                return False
        return True

    def announcement(self) -> ProfileAnnouncement | None:
        """What to tell the coordinator; None until all of it is known."""
        if self.profile is None or self.description is None:
            return None
        return ProfileAnnouncement(
            profile=self.profile,
            training_samples=self.description.training_samples,
            holdout_samples=self.description.holdout_samples,
            input_shape=self.description.input_shape,
            n_classes=self.description.n_classes,
        )

    def _profile_key(self) -> str:
        """A measurement holds until the version, the effort or the number of threads changes."""
        return f"{reft_edge.__version__}/{self._settings.limits.n_threads}/{self._settings.profile.quick}"

    def _set_profile(self, profile: DeviceProfile) -> None:
        self.profile = limited_profile(profile, self._settings.limits)

    def _set_description(self, description: DataDescription) -> None:
        self.description = description
        logger.info(
            "data: %d samples to train on, %d held out", description.training_samples, description.holdout_samples
        )


def _reason(answer: object) -> str:
    return str(getattr(answer, "reason", answer))

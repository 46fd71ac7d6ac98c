"""Control of a running attempt: stop requests, settings that can be changed live, and the flags all ranks share.

The agent writes requests as files into the attempt's directory. Rank 0 checks for them at each step, and `ControlSync`
makes all ranks act at the same step. Live settings (how often to log and save, how much to keep, the limits of the run)
never change what a step trains.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.distributed as dist

from trainyard.contract.events import SettingsChanged
from trainyard.contract.messages import RunSettings, read_message
from trainyard.contract.spec import JobSpec, LimitsSpec
from trainyard.worker.distributed import DistributedContext

FLOAT_SETTINGS = ("max_minutes", "target_loss")


def with_settings(spec: JobSpec, settings: RunSettings) -> JobSpec:
    """Return ``spec`` with ``settings``."""
    return spec.model_copy(
        update={
            "limits": LimitsSpec(max_minutes=settings.max_minutes, target_loss=settings.target_loss),
            "reporting": spec.reporting.model_copy(update={"log_interval": settings.log_interval}),
            "checkpoint": spec.checkpoint.model_copy(
                update={"save_interval": settings.save_interval, "keep_last": settings.keep_last}
            ),
        }
    )


def take_request(file: Path) -> bool:
    """Return whether ``file``, which is a request, exists, and delete it. Never raises."""
    # Path.exists raises a temporary error of a network file system, which would end the run.
    if not os.path.exists(file):
        return False
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return False  # the next step finds the file again
    return True


@dataclass
class LiveSettings:
    """The settings file, polled with one stat a step. ``current``: the settings that were last passed to all ranks."""

    file: Path
    current: RunSettings
    _version: tuple[int, int] | None = None

    def poll(self) -> RunSettings | None:
        """Return new settings, once; None if nothing has changed."""
        try:
            stat = self.file.stat()
        except OSError:
            return None
        version = (stat.st_mtime_ns, stat.st_ino)
        if version == self._version:
            return None
        self._version = version
        requested = read_message(RunSettings, self.file)
        # What an older service does not send stays as it is.
        requested = self.current.model_copy(update=requested.model_dump(exclude_unset=True)) if requested else None
        if requested is None or requested == self.current:
            return None
        self.current = requested
        return requested


def settings_changed_event(step: int, before: RunSettings, after: RunSettings) -> SettingsChanged:
    changes = [
        f"{name} is {_setting_text(name, value)} and was {_setting_text(name, getattr(before, name))}"
        for name, value in after.model_dump().items()
        if value != getattr(before, name)
    ]
    return SettingsChanged(step=step, message=", ".join(changes), **after.model_dump())


def _setting_text(name: str, value: float | None) -> str:
    return ("automatic" if name == "log_interval" else "none") if value is None else f"{value:,}"


@dataclass(frozen=True)
class ControlFlags:
    """Requests that any rank has seen. All ranks act on them at the same step.

    ``limit``: the next step is the last one, because a limit of the run is reached. Only rank 0 decides it.
    ``save_failed``: an asynchronous save has ended with an error that ends the run.
    """

    stop: bool = False
    save: bool = False
    spike: bool = False
    log: bool = False
    limit: bool = False
    save_failed: bool = False
    settings: RunSettings | None = None

    def to_ints(self) -> list[int]:
        """Return the flags for an all-reduce by maximum. Only rank 0 ever has settings; all others send zeros.

        A setting that is None is sent as 0, and a number that is not an integer as its bits.
        """
        values = [0] * len(RunSettings.model_fields)
        if self.settings is not None:
            values = [_to_int(name, value or 0) for name, value in self.settings.model_dump().items()]
        flags = [self.stop, self.save, self.spike, self.log, self.limit, self.save_failed]
        return [*flags, *values]

    @classmethod
    def from_ints(cls, numbers: list[int]) -> Self:
        """Return the flags that `to_ints` gave."""
        stop, save, spike, log, limit, save_failed, *values = numbers
        named = {
            name: _from_int(name, value) or None for name, value in zip(RunSettings.model_fields, values, strict=True)
        }
        settings = RunSettings.model_validate(named) if any(values) else None
        return cls(bool(stop), bool(save), bool(spike), bool(log), bool(limit), bool(save_failed), settings)


def _to_int(name: str, value: float) -> int:
    return int(np.float64(value).view(np.int64)) if name in FLOAT_SETTINGS else int(value)


def _from_int(name: str, number: int) -> float:
    return float(np.int64(number).view(np.float64)) if name in FLOAT_SETTINGS else number


class ControlSync:
    """Shares the flags of each rank with all ranks, by an all-reduce in the background that is read a step later."""

    def __init__(self, ranks: DistributedContext) -> None:
        self._ranks = ranks
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, own: ControlFlags) -> ControlFlags:
        """Send this step's flags and return those of all ranks of the step before. Every rank calls it once a step.

        A rank alone gets its own flags back at once.
        """
        if self._ranks.control is None:
            return own
        previous = self.finish()
        flags = torch.tensor(own.to_ints(), dtype=torch.int64)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True)
        assert work is not None
        self._pending = (work, flags)
        return previous

    def finish(self) -> ControlFlags:
        """Wait for the pending all-reduce, if any, and return its flags. Call it before the process group ends."""
        if self._pending is None:
            return ControlFlags()
        work, flags = self._pending
        work.wait()
        self._pending = None
        return ControlFlags.from_ints(flags.tolist())

"""The checkpoints that `watch` shows: how many there are, and whether the newest matches its record."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainyard.client.api import Client
from trainyard.client.errors import ApiError
from trainyard.contract.rundir import MODEL_FILE

POLL_EVERY = 10
"""Polls of the job for one of its checkpoints: old ones are deleted a moment after a new one was written."""


@dataclass(frozen=True)
class KeptCheckpoints:
    """``count`` checkpoints of ``bytes`` together. ``verified``: the manifest of ``step`` matches its record."""

    step: int
    count: int
    bytes: int
    verified: bool


class CheckpointPoller:
    """Reads the list of checkpoints if there is a new one, and at every `POLL_EVERY`-th poll."""

    def __init__(self, trainyard: Client, job_id: str) -> None:
        self._trainyard = trainyard
        self._job_id = job_id
        self._polls = 0
        self._step: int | None = None
        self.kept: KeptCheckpoints | None = None

    def poll(self, newest: Mapping[str, Any] | None) -> KeptCheckpoints | None:
        """Return the checkpoints, or None if they are unknown. ``newest``: the checkpoint in the job's record."""
        self._polls += 1
        if newest and (self._step != newest["step"] or self._polls % POLL_EVERY == 0):
            self._step = newest["step"]
            try:
                self.kept = self._fetch(newest)
            except ApiError:
                self.kept = None  # deleted a moment ago, or an older service without these routes
        return self.kept

    def _fetch(self, newest: Mapping[str, Any]) -> KeptCheckpoints | None:
        checkpoints = self._trainyard.checkpoints(self._job_id)
        if not checkpoints:
            return None
        step = newest["step"]
        known = self.kept is not None and self.kept.step == step and self.kept.verified
        verified = known or manifest_matches(self._trainyard.manifest(self._job_id, step), newest)
        size = sum(checkpoint.get("bytes") or 0 for checkpoint in checkpoints)
        return KeptCheckpoints(step, len(checkpoints), size, verified)


def manifest_matches(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Return whether a manifest has the sha256 of the weights in ``record``, and at most as many bytes."""
    files = manifest.get("files") or {}
    total = sum(file["bytes"] for file in files.values())
    same_weights = files.get(MODEL_FILE, {}).get("sha256") == record.get("sha256")
    return bool(files) and same_weights and total <= (record.get("bytes") or 0)

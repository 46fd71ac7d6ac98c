"""What `watch` knows of a run's checkpoints: how many are kept, and whether the newest is what was told of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainyard.client.api import Client
from trainyard.client.errors import ApiError
from trainyard.contract.rundir import MODEL_FILE

POLL_EVERY = 10
"""Looks at the job between two at its checkpoints: old ones are removed a moment after a new one came."""


@dataclass(frozen=True)
class KeptCheckpoints:
    """``count`` checkpoints with ``bytes`` of files. ``verified``: the manifest of ``step`` agrees with the record."""

    step: int
    count: int
    bytes: int
    verified: bool


class CheckpointPoller:
    """Looks at the checkpoints when there is a new one, and now and then."""

    def __init__(self, trainyard: Client, job_id: str) -> None:
        self._trainyard = trainyard
        self._job_id = job_id
        self._looks = 0
        self._asked: int | None = None
        self.kept: KeptCheckpoints | None = None

    def poll(self, newest: Mapping[str, Any] | None) -> KeptCheckpoints | None:
        """What is kept, as far as the service says so; ``newest`` is the job's own word of its newest checkpoint."""
        self._looks += 1
        if newest and (self._asked != newest["step"] or self._looks % POLL_EVERY == 0):
            self._asked = newest["step"]
            try:
                self.kept = self._ask(newest)
            except ApiError:
                self.kept = None  # Removed a moment ago, or a service that has no such answers.
        return self.kept

    def _ask(self, newest: Mapping[str, Any]) -> KeptCheckpoints | None:
        found = self._trainyard.checkpoints(self._job_id)
        if not found:
            return None
        step = newest["step"]
        known = self.kept is not None and self.kept.step == step and self.kept.verified
        verified = known or agrees(self._trainyard.manifest(self._job_id, step), newest)
        return KeptCheckpoints(step, len(found), sum(one.get("bytes") or 0 for one in found), verified)


def agrees(manifest: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether a manifest names the weights with the sha256 that was told of them, and no more bytes in all."""
    files = manifest.get("files") or {}
    total = sum(file["bytes"] for file in files.values())
    same_weights = files.get(MODEL_FILE, {}).get("sha256") == told.get("sha256")
    return bool(files) and same_weights and total <= (told.get("bytes") or 0)

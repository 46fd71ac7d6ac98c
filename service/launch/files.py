"""The files that a launcher writes into an attempt's directory and reads there, on a cluster as on this host."""

from pathlib import Path
from typing import Any

from trainyard.contract.messages import RunSettings, read_message
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir, RunDir, write_atomically, write_json
from trainyard.contract.spec import JobSpec
from trainyard.service.ids import CORPUS_ID
from trainyard.service.launch.base import AttemptRef, Launch

MAX_READERS = 10_000
"""Outboxes whose read position is kept. Beyond it the one that was read longest ago is forgotten."""


class AttemptFiles:
    """The attempt directories of one home, and how far each outbox has been read."""

    def __init__(self, home: Path, corpus_cache: Path) -> None:
        self._home = home
        self._corpus_cache = corpus_cache
        self._readers: dict[AttemptRef, OutboxReader] = {}

    def run(self, name: AttemptRef) -> RunDir:
        return RunDir(self._home / ("corpora" if CORPUS_ID.fullmatch(name.job_id) else "runs") / name.job_id)

    def attempt(self, name: AttemptRef) -> AttemptDir:
        return self.run(name).attempt(name.number)

    def write(self, launch: Launch) -> AttemptDir:
        """Write everything that the agent reads at its start. Raises OSError."""
        attempt = self.attempt(launch.name)
        attempt.logs.mkdir(parents=True, exist_ok=True)
        self._corpus_cache.mkdir(parents=True, exist_ok=True)
        if launch.resume_step is not None:
            write_atomically(attempt.resume_from, f"{launch.resume_step}\n".encode())
        if launch.task is not None:
            write_json(attempt.prepare, launch.task.model_dump(mode="json"))
        write_atomically(attempt.spec, launch.spec.model_dump_json(indent=1).encode() + b"\n")
        return attempt

    def request_stop(self, name: AttemptRef) -> None:
        """Create the stop file, which the ranks poll at each step."""
        attempt = self.attempt(name)
        if attempt.path.is_dir():
            attempt.stop.touch()

    def request_save(self, name: AttemptRef) -> None:
        """Create the save file, which rank 0 polls at each step."""
        attempt = self.attempt(name)
        if attempt.path.is_dir():
            attempt.save.touch()

    def write_settings(self, name: AttemptRef, settings: RunSettings) -> None:
        """Write the settings that rank 0 polls, if they differ from its own. Raises OSError."""
        attempt = self.attempt(name)
        has = read_message(RunSettings, attempt.settings)
        if has is None:
            spec = JobSpec.model_validate_json(attempt.spec.read_bytes())
            has = RunSettings.of(spec.model_dump())
        if has != settings:
            write_json(attempt.settings, settings.model_dump())

    def close(self, name: AttemptRef) -> None:
        """Mark the attempt as closed: an agent that starts later exits at once. Raises OSError."""
        attempt = self.attempt(name)
        attempt.path.mkdir(parents=True, exist_ok=True)
        attempt.closed.touch()

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        """Return up to ``limit`` outbox lines after ``after_seq``."""
        # The reader is kept, also if there are no new lines: it knows the byte after the last stored line. A new one
        # reads the file from its first byte, and an agent that cannot reach the service is read every few seconds.
        reader = self._readers.pop(name, None) or OutboxReader(self.attempt(name).outbox)
        self._readers[name] = reader
        if len(self._readers) > MAX_READERS:
            del self._readers[next(iter(self._readers))]
        reader.seek_after(after_seq)
        return reader.read(limit)

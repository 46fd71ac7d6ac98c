"""What a launcher writes into an attempt's directory, and reads there: the same wherever the attempt runs."""

from pathlib import Path
from typing import Any

from trainyard.contract.messages import RunSettings, read_message
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import (
    AttemptDir,
    RunDir,
    write_atomically,
    write_json,
)
from trainyard.contract.spec import JobSpec
from trainyard.service.launch.base import AttemptRef, Launch


class AttemptFiles:
    """The attempts of one home, and how far each one's outbox was read."""

    def __init__(self, home: Path, corpus_cache: Path) -> None:
        self._home = home
        self._corpus_cache = corpus_cache
        self._readers: dict[AttemptRef, OutboxReader] = {}

    def run(self, name: AttemptRef) -> RunDir:
        """The job's directory."""
        return RunDir(self._home / "runs" / name.job_id)

    def attempt(self, name: AttemptRef) -> AttemptDir:
        """The attempt's directory."""
        return self.run(name).attempt(name.number)

    def write(self, launch: Launch) -> AttemptDir:
        """All that its agent will look for. Raises OSError."""
        attempt = self.attempt(launch.name)
        attempt.logs.mkdir(parents=True, exist_ok=True)
        self._corpus_cache.mkdir(parents=True, exist_ok=True)
        if launch.resume_step is not None:
            write_atomically(attempt.resume_from, f"{launch.resume_step}\n".encode())
        write_atomically(attempt.spec, launch.spec.model_dump_json(indent=1).encode() + b"\n")
        return attempt

    def request_stop(self, name: AttemptRef) -> None:
        """Leave the wish where the ranks look for it at each step."""
        attempt = self.attempt(name)
        if attempt.path.is_dir():
            attempt.stop.touch()

    def request_save(self, name: AttemptRef) -> None:
        """Leave the wish where rank 0 looks for it at each step."""
        attempt = self.attempt(name)
        if attempt.path.is_dir():
            attempt.save.touch()

    def settle(self, name: AttemptRef, settings: RunSettings) -> None:
        """Leave the settings where rank 0 looks for them, if they are others than it has. Raises OSError."""
        attempt = self.attempt(name)
        has = read_message(RunSettings, attempt.settings)
        if has is None:
            spec = JobSpec.model_validate_json(attempt.spec.read_bytes())
            has = RunSettings.of(spec.model_dump())
        if has != settings:
            write_json(attempt.settings, settings.model_dump())

    def close(self, name: AttemptRef) -> None:
        """Leave word that the attempt is over: an agent that comes late starts nothing. Raises OSError."""
        attempt = self.attempt(name)
        attempt.path.mkdir(parents=True, exist_ok=True)
        attempt.closed.touch()

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        """Lines of the outbox that the service does not have yet."""
        reader = self._readers.setdefault(name, OutboxReader(self.attempt(name).outbox))
        reader.seek_after(after_seq)
        lines = reader.read(limit)
        if not lines:
            del self._readers[name]
        return lines

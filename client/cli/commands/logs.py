"""`trainyard logs`: the output of a rank, once or continuously."""

import shlex
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

from trainyard.client.api import Client, Job
from trainyard.client.cli.commands.show import connect
from trainyard.client.cli.console import Console
from trainyard.client.cli.find import find_job
from trainyard.client.cli.hints import end_report
from trainyard.client.cli.watch.watcher import INTERVAL, Clock, max_lost_seconds
from trainyard.client.errors import NotFound, ServiceUnreachable
from trainyard.client.exit_codes import Exit, UsageError, exit_of_job, is_idle
from trainyard.client.sse import EventStream, StreamEvent
from trainyard.client.types import LogChunk


def logs(args: SimpleNamespace, console: Console) -> int:
    """Print a log. With ``--follow`` the exit code is that of the job's final status."""
    with connect(args) as trainyard:
        job = find_job(trainyard, args.job, console)
        if args.follow:
            return follow_log(LogReader(trainyard, job, args, streams=True), args, console, Clock())
        reader = LogReader(trainyard, job, args)
        for text in reader.read_new():
            _print(text, args, console)
        if reader.is_missing:
            console.error(f"{reader.name} has printed nothing yet")
    return Exit.SUCCEEDED


def follow_log(reader: "LogReader", args: SimpleNamespace, console: Console, clock: Clock) -> int:
    """Print new text until the job is idle and its log has been read to the end."""
    deadline = None if args.timeout is None else clock.monotonic() + args.timeout
    max_lost, answered_at = max_lost_seconds(console), clock.monotonic()
    try:
        while True:
            job, complete = _poll(reader, args, console)
            code = exit_of_job(job)
            if code is not None and complete:
                for line in end_report(job, args.job):
                    console.error(line)
                return code
            if deadline is not None and clock.monotonic() >= deadline:
                how = "Job continues." if complete else "The service is lost."
                again = f"Re-attach: trainyard logs --follow {shlex.quote(args.job)}"
                console.error(f"{args.timeout:g} s passed. {how} {again}")
                return Exit.TIMED_OUT
            answered_at = clock.monotonic() if complete else answered_at
            if max_lost is not None and clock.monotonic() - answered_at >= max_lost:
                console.error(f"The service is lost. Re-attach: trainyard logs --follow {shlex.quote(args.job)}")
                return Exit.NO_SERVICE
            reader.pause(INTERVAL, clock)
    except KeyboardInterrupt:
        console.error(f"Detached. Job continues. Re-attach: trainyard logs --follow {shlex.quote(args.job)}")
        return Exit.DETACHED
    finally:
        reader.close()


def _poll(reader: "LogReader", args: SimpleNamespace, console: Console) -> tuple[Job, bool]:
    try:
        # The job first, then its log: so all that was printed before the job's end is read.
        reader.refresh()
        for text in reader.read_new():
            _print(text, args, console)
    except ServiceUnreachable as error:
        console.error(f"reconnecting: {error.cause}")
        return reader.job, False
    return reader.job, True


def _print(text: str, args: SimpleNamespace, console: Console) -> None:
    if args.json:
        console.json({"data": text})
    else:
        console.raw(text)


class LogReader:
    """Reads a log from a position that it keeps. A new attempt has a new log, which is read from its start.

    With ``streams`` the text comes from a stream, and from requests while the stream is not connected. The offsets
    show where the text of one continues that of the other.
    """

    def __init__(self, trainyard: Client, job: Job, args: SimpleNamespace, streams: bool = False) -> None:
        self.job = job
        self._trainyard = trainyard
        self._streams = streams
        self._stream: EventStream | None = None
        self._rank: int | str | None = args.rank
        self._fixed: int | None = args.attempt
        self._attempt: int | None = args.attempt or job.get("attempt")
        self._tail: int | None = args.tail
        self._offset: int | None = None if args.tail else 0
        self.is_missing = False

    @property
    def name(self) -> str:
        """Which log this is, for messages."""
        which = "the agent" if self._rank == "agent" else f"rank {self._rank or 0}"
        return f"{which} of attempt {self._attempt}" if self._attempt else which

    def close(self) -> None:
        """Stop the stream."""
        if self._stream is not None:
            self._stream.close()

    def pause(self, seconds: float, clock: Clock) -> None:
        """Wait until the stream has new text, at most ``seconds``."""
        if self._stream is not None and self._stream.healthy:
            self._stream.wait(seconds)
        else:
            clock.sleep(seconds)

    def refresh(self) -> None:
        """Read the job."""
        self.job = self._trainyard.job(self.job["id"])

    @property
    def _streamed(self) -> bool:
        return self._stream is not None and self._stream.healthy and not is_idle(self.job)

    def read_new(self) -> Iterator[str]:
        """Yield the text from the current position to the present end of the log."""
        if self._streamed:
            yield from self._read_stream()
            return
        newest = self.job.get("attempt") or 0
        if self._fixed is None and newest > (self._attempt or 0):
            if self._attempt:
                # The end of the earlier log says why its attempt ended.
                with suppress(NotFound):
                    yield from self._read_chunks()
            self._attempt, self._offset, self._tail = newest, 0, None
        yield from self._read_requests()
        if self._streams and self._stream is None and self._offset is not None and self._attempt:
            self._stream = EventStream(self._open).start()

    def _open(self, _last_event_id: str | None) -> Iterator[StreamEvent]:
        # From the current position, which is after the last event if requests have read more since.
        position = f"{self._attempt}-{self._offset}"
        return self._trainyard.log_stream(self.job["id"], attempt=self._fixed, rank=self._rank, last_event_id=position)

    def _read_stream(self) -> Iterator[str]:
        assert self._stream is not None
        for event in self._stream.drain():
            if event.kind != "log":
                continue
            chunk = event.data
            follows = chunk["attempt"] > (self._attempt or 0) or chunk["offset"] == self._offset
            if chunk["attempt"] == self._attempt and chunk["next_offset"] <= (self._offset or 0):
                continue
            if not follows:
                # It overlaps with text that was already read by requests. Read the rest by requests too.
                self._streams = False
                self.close()
                return
            self._attempt, self._offset = chunk["attempt"], chunk["next_offset"]
            yield chunk["data"]

    def _read_requests(self) -> Iterator[str]:
        try:
            yield from self._read_chunks()
        except NotFound as error:
            self._require_possible(error)
            self.is_missing = True  # no process has printed anything yet

    def _read_chunks(self) -> Iterator[str]:
        while True:
            chunk = self._read_chunk()
            self.is_missing = False
            if not chunk["data"]:
                return
            yield chunk["data"]

    def _require_possible(self, error: NotFound) -> None:
        """Raise UsageError if the log will never exist, and ``error`` if the job itself is gone."""
        if error.code == "job_not_found":
            raise error
        newest = self.job.get("attempt") or 0
        if self._fixed is not None and self._fixed > newest:
            attempts = f"its newest is attempt {newest}" if newest else "it has not been launched yet"
            raise UsageError(f"there is no attempt {self._fixed} of {self.job['id']}: {attempts}")
        resources = (self.job.get("spec") or {}).get("resources") or {}
        ranks = (resources.get("nproc_per_node") or 1) * (resources.get("nnodes") or 1)
        if isinstance(self._rank, int) and self._rank >= ranks and self._attempt == newest:
            ids = "rank 0" if ranks == 1 else f"ranks 0 to {ranks - 1}"
            raise UsageError(f"there is no {self.name} of {self.job['id']}: it has {ids}")
        if is_idle(self.job):
            why = "" if newest else f": it was never launched; `trainyard show {self.job['id']}` has the reason"
            raise UsageError(f"there is no log of {self.name} of {self.job['id']}{why}")

    def _read_chunk(self) -> LogChunk:
        start = {"tail": self._tail} if self._offset is None else {"offset": self._offset}
        chunk = self._trainyard.logs(self.job["id"], attempt=self._attempt, rank=self._rank, **start)
        self._offset = chunk["next_offset"]
        return chunk

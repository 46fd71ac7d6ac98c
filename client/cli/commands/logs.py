"""`trainyard logs`: what a rank printed, once or as it comes."""

import shlex
from collections.abc import Iterator
from types import SimpleNamespace

from trainyard.client.api import Client
from trainyard.client.cli.commands.show import connect
from trainyard.client.cli.console import Console
from trainyard.client.cli.hints import ending
from trainyard.client.cli.watch.watcher import INTERVAL, Clock, retry_policy
from trainyard.client.errors import NotFound, ServiceUnreachable
from trainyard.client.exit_codes import Exit, exit_of_job, is_idle
from trainyard.client.sse import EventStream, StreamEvent
from trainyard.client.types import Job


def logs(args: SimpleNamespace, console: Console) -> int:
    """Print a log. With ``--follow`` the end of the run decides the exit code."""
    with connect(args) as trainyard:
        job = trainyard.find(args.job)
        if args.follow:
            return follow_log(LogReader(trainyard, job, args, streams=True), args, console, Clock())
        for text in LogReader(trainyard, job, args).pieces():
            _print(text, args, console)
    return Exit.SUCCEEDED


def follow_log(reader: "LogReader", args: SimpleNamespace, console: Console, clock: Clock) -> int:
    """Print what comes until the job is at rest and its log is read to the end."""
    deadline = None if args.timeout is None else clock.monotonic() + args.timeout
    patience, answered = retry_policy(console), clock.monotonic()
    try:
        while True:
            job, complete = _turn(reader, args, console)
            code = exit_of_job(job)
            if code is not None and complete:
                for line in ending(job, args.job):
                    console.error(line)
                return code
            if deadline is not None and clock.monotonic() >= deadline:
                how = "Job continues." if complete else "The service is lost."
                again = f"Re-attach: trainyard logs --follow {shlex.quote(args.job)}"
                console.error(f"{args.timeout:g} s passed. {how} {again}")
                return Exit.TIMED_OUT
            answered = clock.monotonic() if complete else answered
            if patience is not None and clock.monotonic() - answered >= patience:
                console.error(f"The service is lost. Re-attach: trainyard logs --follow {shlex.quote(args.job)}")
                return Exit.NO_SERVICE
            reader.pause(INTERVAL, clock)
    except KeyboardInterrupt:
        console.error(f"Detached. Job continues. Re-attach: trainyard logs --follow {shlex.quote(args.job)}")
        return Exit.DETACHED
    finally:
        reader.close()


def _turn(reader: "LogReader", args: SimpleNamespace, console: Console) -> tuple[Job, bool]:
    """One look at the job, then at its log: whatever was printed before its end is read after it."""
    try:
        reader.refresh()
        for text in reader.pieces():
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
    """Where in which log we are. A new attempt is a new log, read from its beginning.

    With ``streams`` the text comes by a stream; while it does not stand it is asked for. Offsets make both fit.
    """

    def __init__(self, trainyard: Client, job: Job, args: SimpleNamespace, streams: bool = False) -> None:
        self.job = job
        self._trainyard = trainyard
        self._streams = streams
        self._feed: EventStream | None = None
        self._rank: int | str | None = args.rank
        self._fixed: int | None = args.attempt
        self._attempt: int | None = args.attempt or job.get("attempt")
        self._tail: int | None = args.tail
        self._offset: int | None = None if args.tail else 0

    def close(self) -> None:
        """Nothing more is wanted."""
        if self._feed is not None:
            self._feed.close()

    def pause(self, seconds: float, clock: Clock) -> None:
        """Wait, but not for longer than until something comes."""
        if self._feed is not None and self._feed.healthy:
            self._feed.wait(seconds)
        else:
            clock.sleep(seconds)

    def refresh(self) -> None:
        """Look at the job, and go to its new attempt's log where there is one and the stream does not lead there."""
        self.job = self._trainyard.job(self.job["id"])
        newest = self.job.get("attempt")
        if self._fixed is None and newest != self._attempt and not self._streamed:
            self._attempt, self._offset, self._tail = newest, 0, None

    @property
    def _streamed(self) -> bool:
        return self._feed is not None and self._feed.healthy and not is_idle(self.job)

    def pieces(self) -> Iterator[str]:
        """What stands behind the place we are at, up to the end as it is now."""
        if self._streamed:
            yield from self._taken()
            return
        yield from self._asked()
        if self._streams and self._feed is None and self._offset is not None and self._attempt:
            self._feed = EventStream(self._open).start()

    def _open(self, _behind: str | None) -> Iterator[StreamEvent]:
        """From where we are now, which may be behind the last event: text was asked for meanwhile."""
        place = f"{self._attempt}-{self._offset}"
        return self._trainyard.log_stream(self.job["id"], attempt=self._fixed, rank=self._rank, last_event_id=place)

    def _taken(self) -> Iterator[str]:
        assert self._feed is not None
        for event in self._feed.take():
            if event.kind != "log":
                continue
            said = event.data
            follows = said["attempt"] > (self._attempt or 0) or said["offset"] == self._offset
            if said["attempt"] == self._attempt and said["next_offset"] <= (self._offset or 0):
                continue
            if not follows:
                # It overlaps with what was asked for: ask for the rest as well.
                self._streams = False
                self.close()
                return
            self._attempt, self._offset = said["attempt"], said["next_offset"]
            yield said["data"]

    def _asked(self) -> Iterator[str]:
        while True:
            try:
                chunk = self._read()
            except NotFound:
                return  # no process has printed anything yet
            if not chunk["data"]:
                return
            yield chunk["data"]

    def _read(self) -> dict[str, str]:
        wanted = {"tail": self._tail} if self._offset is None else {"offset": self._offset}
        chunk = self._trainyard.logs(self.job["id"], attempt=self._attempt, rank=self._rank, **wanted)
        self._offset = chunk["next_offset"]
        return {"data": chunk["data"]}

"""Finding the worker processes of an attempt on this machine, and ending one of them the hard way."""

import signal
import time

from contract.processes import ProcessIdentity, marked


def ranks_of(job_id: str, attempt: int) -> dict[int, ProcessIdentity]:
    """Rank -> process. A rank's own children inherit its environment: the oldest process is the rank itself."""
    found: dict[int, ProcessIdentity] = {}
    for process in sorted(marked(f"{job_id}/{attempt}"), key=lambda process: process.start_ticks):
        rank = process.variable("RANK")
        if rank is not None and rank.isdecimal():
            found.setdefault(int(rank), process)
    return found


def kill_one(job_id: str, attempt: int, seconds: float = 5.0) -> tuple[int, int]:
    """SIGKILL the highest rank; (rank, pid). LookupError where no rank is found within ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ranks = ranks_of(job_id, attempt)
        if ranks and ranks[max(ranks)].send(signal.SIGKILL):
            return max(ranks), ranks[max(ranks)].pid
        time.sleep(0.1)
    raise LookupError(f"no rank of {job_id}, attempt {attempt}, runs on this machine")

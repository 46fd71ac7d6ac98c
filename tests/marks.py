"""Ids of jobs that no other process of tests uses: an attempt's mark is looked for in all of the host."""

import os

DIGITS = str.maketrans("0123456789", "abcdefghij")


def own_job(name: str) -> str:
    """``job_late`` as an id of this test process; the same in all of its tests."""
    return f"{name}{str(os.getpid()).translate(DIGITS)}"

"""Job ids that no other test process uses: the processes of an attempt are searched by its id on the whole host."""

import os

DIGITS = str.maketrans("0123456789", "abcdefghij")


def unique_job_id(name: str) -> str:
    """Return ``name`` made unique to this test process; the same for all of its tests."""
    return f"{name}{str(os.getpid()).translate(DIGITS)}"

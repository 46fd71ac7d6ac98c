"""Processor time per request of the mix that `training` sends: with and without tags, one request at a time."""

from collections.abc import Iterator

from benchmarks.load.clients import requests
from benchmarks.load.requests import served_jobs
from benchmarks.load.tables import Figure
from benchmarks.load.wire_bytes import Wire

REQUESTS = 600
REQUESTS_PER_POINT = 50
"""A run that logs twice a second meanwhile."""


def measure() -> Iterator[Figure]:
    """Send the same requests twice: as clients that know nothing of tags do, and as those that poll with them."""
    with served_jobs() as (service, agent, reporting, corpus):
        for polls in (False, True):
            draw = requests(agent.job_id, str(corpus), seed=1)
            with Wire(service.url, polls=polls) as wire:
                before = service.cpu_seconds
                for number in range(REQUESTS):
                    _, method, path, body = draw()
                    wire.json(method, path, body)
                    if number % REQUESTS_PER_POINT == 0:
                        agent.metric()
                        agent.upload(reporting)
                spent = service.cpu_seconds - before
            label = "polling with tags" if polls else "without tags"
            yield Figure(f"processor time: a request of the mix, {label}", 1e6 * spent / REQUESTS, "us")

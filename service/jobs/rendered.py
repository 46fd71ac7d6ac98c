"""The JSON of jobs in lists, kept while their rows are the same: few jobs of a page have changed since the last."""

from collections.abc import Mapping
from typing import Any

from trainyard.contract.status import JobStatus
from trainyard.service.jobs import presenters
from trainyard.service.jobs.queries import JobRows
from trainyard.service.schemas import Job, JobSummary

MAX_JOBS = 1000
"""Jobs whose JSON is kept, a few kilobytes each."""


class RenderedJobs:
    """Renders jobs, and remembers the rows that each was rendered from. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bool], tuple[tuple[Any, ...], bytes]] = {}

    def page(self, rows: JobRows, waiting: Mapping[str, str], summaries: bool, has_more: bool) -> bytes:
        """Return a page of jobs as JSON: ``summaries``, or complete jobs. ``waiting``: see `to_job_responses`."""
        jobs = b",".join(self._render(rows, index, waiting, summaries) for index in range(len(rows.jobs)))
        return b'{"object":"list","data":[%s],"has_more":%s}' % (jobs, b"true" if has_more else b"false")

    def _render(self, rows: JobRows, index: int, waiting: Mapping[str, str], summary: bool) -> bytes:
        row = rows.jobs[index]
        # All that a job's JSON depends on. That of a running job also depends on the time.
        checkpoint = presenters.newest_on_disk(rows.checkpoints.get(row.id, ()))
        weights = presenters.weights_path(row, checkpoint)
        inputs = (row, checkpoint, weights, rows.positions.get(row.id), waiting.get(row.id))
        known = self._known.get((row.id, summary)) if row.status != JobStatus.RUNNING else None
        if known is not None and known[0] == inputs:
            return known[1]
        alone = JobRows([row], rows.checkpoints, rows.positions, rows.placements)
        convert = presenters.to_job_summaries if summary else presenters.to_job_responses
        model = JobSummary if summary else Job
        body = bytes(model.__pydantic_serializer__.to_json(convert(alone, waiting)[0]))
        if len(self._known) >= MAX_JOBS:
            self._known.clear()
        self._known[row.id, summary] = inputs, body
        return body

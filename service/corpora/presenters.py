"""Convert a corpus's row to the API's response model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainyard.contract.corpus_report import read_report
from trainyard.contract.messages import ErrorCard
from trainyard.contract.prepared import PreparedCorpus, is_cached
from trainyard.contract.status import CorpusStatus
from trainyard.service.corpora import rules
from trainyard.service.db.models import CorpusRow
from trainyard.service.schemas import CorpusProgress, TokenizedCorpus


def to_corpus_response(row: CorpusRow, jobs: Sequence[str], is_wanted: bool, cache: Path) -> TokenizedCorpus:
    """Return the corpus as the API shows it. ``jobs``: ids of those with this corpus. Reads the cache.

    ``is_wanted``: a queued corpus waits for its preparation; without it nothing will prepare it.
    """
    status = CorpusStatus(row.status)
    prepared = PreparedCorpus.model_validate(row.prepared) if row.prepared is not None else None
    cached = prepared is not None and is_cached(cache, prepared)
    if status is CorpusStatus.QUEUED and not is_wanted:
        status = CorpusStatus.STOPPED
    return TokenizedCorpus(
        id=row.id,
        status=status,
        cached=cached,
        spec=row.spec["data"],
        launcher=row.launcher,
        attempt=row.attempt or None,
        progress=progress(row.progress) if status is not CorpusStatus.READY else None,
        reason=row.reason,
        message=row.message,
        error=ErrorCard.model_validate(row.error) if row.error is not None else None,
        jobs=list(jobs),
        report=read_report(cache, {source.name: source.key for source in prepared.sources}) if prepared else None,
        restart_at=row.restart_at,
        submitted_by=row.submitted_by,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def progress(stored: Mapping[str, Any]) -> CorpusProgress:
    """Return the stored progress as the API shows it."""
    done, total = stored.get("done"), stored.get("total")
    return CorpusProgress(
        done_bytes=done,
        total_bytes=total,
        percent=100 * done / total if done is not None and total else None,
        bytes_per_second=stored.get("bytes_per_second"),
        eta_seconds=rules.eta_seconds(stored),
    )

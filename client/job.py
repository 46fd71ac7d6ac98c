"""The fields of a job, its representation, and how it shows itself in a notebook."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from inspect import signature
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from trainyard.client.types import (
    Action,
    Checkpoint,
    CorpusProgress,
    ErrorCard,
    LimitsLeft,
    Plan,
    Progress,
    Queue,
    Score,
)


class JobFields(dict[str, Any]):
    """The fields of a pretraining run as the service last reported them: ``job["status"]`` or ``job.status``.

    A dict, so `json.dumps` works. Times are RFC 3339 strings in UTC, sizes are in bytes, durations in seconds. A newer
    service may add fields. A copy of a job is a plain dict.
    """

    object: str
    id: str
    name: str
    labels: dict[str, str]
    description: str
    group: str | None
    discarded: bool
    score: Score | None
    limits_left: LimitsLeft | None
    status: str
    desired: str
    phase: str | None
    corpus_id: str | None
    preparation: CorpusProgress | None
    reason: str | None
    message: str | None
    error: ErrorCard | None
    spec: dict[str, Any]
    plan: Plan | None
    progress: Progress | None
    attempt: int | None
    resumable: bool
    resume_blocker: str | None
    checkpoint: Checkpoint | None
    weights_path: str | None
    queue: Queue | None
    parent: dict[str, Any] | None
    owner: str
    submitted_by: str | None
    allowed_actions: list[Action]
    summary: str
    alerts: list[Any]
    restart_at: str | None
    created_at: str
    queued_at: str | None
    started_at: str | None
    finished_at: str | None
    learning_rate_before: float | None
    """Only after `resume`: the rate at the checkpoint's step. ``learning_rate_after``: at the next one."""
    learning_rate_after: float | None

    if not TYPE_CHECKING:  # a type checker knows the fields above

        def __getattr__(self, name: str) -> Any:
            try:
                return self[name]
            except KeyError:
                raise AttributeError(f"the job has no field {name!r}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __repr__(self) -> str:
        return f"<Job {self.get('id')} {self.get('name')!r} {self.get('status')}: {self.get('summary')}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the client, whose connections cannot be copied.
        return dict, (dict(self),)

    def _replace(self, fields: dict[str, Any]) -> None:
        self.clear()
        dict.update(self, fields)


P = ParamSpec("P")
T = TypeVar("T")


def of_job(method: Callable[Concatenate[Any, str, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Return a method of a client, which takes a job's id, as a method of the job."""

    @wraps(method)
    def of_this_job(self: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        return cast(T, self._adopt(method(self._client, self["id"], *args, **kwargs)))

    shown = signature(method)
    without_id = [parameter for name, parameter in shown.parameters.items() if name != "job_id"]
    of_this_job.__signature__ = shown.replace(parameters=without_id)  # type: ignore[attr-defined]
    return cast(Callable[Concatenate[Any, P], T], of_this_job)


WIDTH, HEIGHT, MARGIN = 560, 120, 8


def job_html(job: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    """Return a card of a job in HTML: name, status, sentence, and the loss curve if there is one."""
    name, status, job_id = (escape(str(job.get(field))) for field in ("name", "status", "id"))
    head = f"<strong>{name}</strong> {status} <code>{job_id}</code>"
    lines = [f"<div>{head}</div>", f"<div>{escape(str(job.get('summary') or ''))}</div>", curve_svg(points)]
    return f'<div style="max-width:{WIDTH}px">{"".join(lines)}</div>'


def curve_svg(points: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean loss by step as an inline SVG, or "" if fewer than two points have one."""
    losses = [point.get("loss_mean") for point in points]
    finite = [loss for loss in losses if loss is not None]
    if len(finite) < 2:
        return ""
    first, last = points[0]["step"], points[-1]["step"]
    low, high = min(finite), max(finite)
    path, pen = "", "M"
    for point, loss in zip(points, losses, strict=True):
        if loss is None:
            pen = "M"  # a gap
            continue
        x = MARGIN + (point["step"] - first) / max(1, last - first) * (WIDTH - 2 * MARGIN)
        y = MARGIN + (high - loss) / ((high - low) or 1.0) * (HEIGHT - 2 * MARGIN)
        path += f"{pen}{x:.1f} {y:.1f}"
        pen = "L"
    text = f"Loss from step {first:,} to {last:,}: highest {high:.4g}, lowest {low:.4g}, now {finite[-1]:.4g}"
    line = f'<path d="{path}" fill="none" stroke="#0072B2" stroke-width="1.5"/>'
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="{text}">{line}</svg>'
    return f"<figure style='margin:0'>{picture}<figcaption>{text}</figcaption></figure>"

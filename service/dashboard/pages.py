"""A plain page that lists the jobs. No script, no build step."""

from html import escape

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from service.context import ServicesNeeded
from service.jobs import listing, views
from service.shapes import Job

SHOWN = 100

GLYPHS = {
    "queued": "…",
    "starting": "▷",
    "running": "▶",
    "pausing": "◫",
    "paused": "❚❚",
    "cancelling": "◫",
    "cancelled": "■",
    "interrupted": "↯",
    "succeeded": "✓",
    "failed": "✗",
}
"""A status is never told by a colour alone."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
       color: #1F2933; background: #fff }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .4rem .8rem .4rem 0;
        border-bottom: 1px solid #ddd; vertical-align: top } a { color: #0072B2 }
pre { background: #f4f5f7; padding: .8rem; overflow-x: auto }
@media (prefers-color-scheme: dark) { body { color: #e6e8ea; background: #111418 } a { color: #56B4E9 }
       td, th { border-color: #333 } pre { background: #1c2127 } }
"""

EMPTY = """<p>No job yet. To submit one:</p>
<pre>trainyard demo
trainyard submit --data_path corpus.jsonl --watch
curl --json '{"data": {"data_path": "/data/corpus.jsonl"}}' http://127.0.0.1:8000/jobs</pre>"""

router = APIRouter(include_in_schema=False)


@router.get("/", response_class=HTMLResponse)
def index(services: ServicesNeeded) -> HTMLResponse:
    """The newest jobs."""
    wanted = listing.Wanted((), (), None, True, SHOWN, None)
    with services.database.read() as session:
        rows, _ = listing.jobs(session, wanted)
        found = views.gather(session, rows)
    return HTMLResponse(page(views.show_all(found, services.scheduler.waiting)))


def page(jobs: list[Job]) -> str:
    """The page. Pure; everything that a user wrote is escaped."""
    rows = "".join(_row(job) for job in jobs)
    head = "<tr><th scope=col>Job</th><th scope=col>Status</th><th scope=col>How it is</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if jobs else EMPTY
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><title>Trainyard</title>"
        '<meta name=viewport content="width=device-width"><meta http-equiv=refresh content=10>'
        f"<style>{STYLE}</style></head><body><h1>Trainyard</h1>"
        f'<p><a href="/docs">API</a> · <a href="/devices">Devices</a></p>{table}</body></html>'
    )


def _row(job: Job) -> str:
    name = f'<a href="/jobs/{escape(job.id)}">{escape(job.name)}</a><br><small>{escape(job.id)}</small>'
    return f"<tr><td>{name}</td><td>{GLYPHS[job.status]} {job.status}</td><td>{escape(job.summary)}</td></tr>"

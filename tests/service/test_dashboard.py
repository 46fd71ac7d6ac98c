"""The dashboard's page and files: content negotiation with the API, caching, content security policy."""

import gzip
import posixpath
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.service.dashboard.assets import LIBRARIES, STATIC, Assets, Library, library_file
from trainyard.service.dashboard.negotiation import accepts_gzip, is_page, prefers_html

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("*/*", False),
        ("", False),
        ("application/json", False),
        ("application/json, text/html", False),
        ("application/json;q=0.5, text/html", True),
        ("text/html;q=0", False),
        ("text/html;q=nonsense", False),
        ("text/csv", False),
    ],
)
def test_the_page_is_sent_only_if_accept_names_html(rig: ServiceHarness, accept: str, page: bool) -> None:
    assert prefers_html(accept) is page
    job_id = rig.submit(name="x")
    for path in ("/jobs", f"/jobs/{job_id}"):
        answer = rig.client.get(path, headers={"Accept": accept})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html" if page else "application/json")
        assert "Accept" in [word.strip() for word in answer.headers["vary"].split(",")]


def test_paths_below_a_job_are_never_the_page(rig: ServiceHarness) -> None:
    job_id = rig.submit()
    for what in ("metrics", "events", "checkpoints"):
        answer = rig.client.get(f"/jobs/{job_id}/{what}", headers={"Accept": BROWSER})
        assert answer.headers["content-type"] == "application/json"
    assert not is_page("POST", "/jobs", BROWSER)
    assert rig.client.get("/jobs/nothing/here", headers={"Accept": BROWSER}).status_code == 404


def test_get_and_head_of_the_page_have_a_strict_content_security_policy(rig: ServiceHarness) -> None:
    for method in ("GET", "HEAD"):
        answer = rig.client.request(method, "/", headers={"Accept": BROWSER})
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
    answer = rig.client.get("/")
    again = rig.client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_page_has_no_inline_script_or_style(rig: ServiceHarness) -> None:
    page = rig.client.get("/").text
    assert "<style" not in page
    assert "style=" not in page
    assert page.count("<script") == page.count('<script type="module" src=')


def test_the_page_has_the_style_elements_of_the_chart_library(rig: ServiceHarness) -> None:
    """The library creates a style element only if none has its id; the policy would block a new one."""
    library = library_file(LIBRARIES["charts"]).read_text()
    made = set(re.findall(r'document\.getElementById\("([0-9a-f]{64})"\)', library)) | {"plotly.js-style-global"}
    there = set(re.findall(r' id="([^"]+)"', rig.client.get("/").text))
    assert len(made) > 1
    assert made <= there


def test_files_are_immutable_and_gzipped(rig: ServiceHarness, tmp_path: Path) -> None:
    assets = Assets(tmp_path / "cache")
    for path in assets.paths():
        packed = rig.client.get(path, headers={"Accept-Encoding": "gzip"})
        plain = rig.client.get(path, headers={"Accept-Encoding": "identity"})
        assert packed.status_code == plain.status_code == 200, path
        assert packed.headers["content-encoding"] == "gzip"
        assert "content-encoding" not in plain.headers
        assert packed.content == plain.content
        assert "immutable" in packed.headers["cache-control"]
        assert packed.headers["vary"] == "Accept-Encoding"
    assert rig.client.get("/ui/0000000000000000/app.js").status_code == 404
    assert rig.client.get("/ui/../settings.py").status_code == 404


def test_a_url_changes_with_the_content(tmp_path: Path) -> None:
    folder = tmp_path / "static"
    folder.mkdir()
    (folder / "index.html").write_text("{{modulepreload}} {{base}} {{charts}}")
    (folder / "app.js").write_text("one")
    first = Assets(tmp_path / "cache", folder)
    same = Assets(tmp_path / "cache", folder)
    (folder / "app.js").write_text("two")
    second = Assets(tmp_path / "cache", folder)
    assert first.paths() == same.paths()
    assert first.paths()[0] != second.paths()[0]
    for name in LIBRARIES:
        assert first.library_path(name) == second.library_path(name)
    assert first.page("/").etag != second.page("/").etag


def test_a_broken_gzip_cache_of_the_library_is_written_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = Assets(cache)
    path = made.library_path("charts")
    assert made.find(path) is not None
    [kept] = cache.iterdir()
    whole = kept.read_bytes()
    for broken in (b"", whole[:1000], b"nonsense"):
        kept.write_bytes(broken)
        found = Assets(cache).find(path)
        assert found is not None
        assert gzip.decompress(found.gzipped) == library_file(LIBRARIES["charts"]).read_bytes()
        assert kept.read_bytes() == whole


MODULE_IMPORT = re.compile(r'^(?:import|export) \{ ([^}]+) \} from "(\.[^"]+)";$', re.MULTILINE)
LATER_IMPORT = re.compile(r'import\("(\.[^"]+)"\)')
EXPORT = re.compile(r"^export (?:const|let|class|function|async function) (\w+)", re.MULTILINE)
PAGES = {
    "/": "jobs",
    "/jobs": "jobs",
    "/jobs/job_x": "job",
    "/compare": "compare",
    "/data": "data",
    "/data/corpus_x": "data",
    "/system": "system",
    "/submit": "submit",
    "/docs": "docs",
}
"""Path of a page -> the module that it needs besides the entry module."""


def find_entry(rig: ServiceHarness) -> str:
    """Return the URL path of the entry module."""
    entries: list[str] = re.findall(r'<script type="module" src="([^"]+)"', rig.client.get("/").text)
    [entry] = entries
    return entry


def read_modules(rig: ServiceHarness, entries: list[str], later: bool = False) -> dict[str, str]:
    """Return the sources of the modules and of those that they import, by URL path. ``later``: also at run time."""
    modules: dict[str, str] = {}
    todo = list(entries)
    while todo:
        path = todo.pop()
        if path in modules:
            continue
        answer = rig.client.get(path)
        assert answer.status_code == 200, path
        modules[path] = answer.text
        targets = [target for _, target in MODULE_IMPORT.findall(answer.text)]
        todo += [resolve(path, target) for target in targets + (LATER_IMPORT.findall(answer.text) if later else [])]
    return modules


def resolve(path: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def test_a_page_preloads_exactly_the_modules_that_it_imports(rig: ServiceHarness) -> None:
    entry = find_entry(rig)
    base = entry.removesuffix("app.js")
    assert re.fullmatch(r"/ui/[0-9a-f]{16}/", base)
    for path, name in PAGES.items():
        html = rig.client.get(path, headers={"Accept": BROWSER}).text
        preloaded = re.findall(r'<link rel="modulepreload" href="([^"]+)"', html)
        assert len(preloaded) == len(set(preloaded)), path
        assert set(preloaded) == set(read_modules(rig, [entry, f"{base}pages/{name}.js"])), path


def test_every_script_is_imported_by_another(rig: ServiceHarness) -> None:
    modules = read_modules(rig, [find_entry(rig)], later=True)
    assert len(modules) == len(list(STATIC.rglob("*.js")))


def test_etags_of_pages_differ_with_their_preloads(tmp_path: Path) -> None:
    assets = Assets(tmp_path / "cache")
    etags = {name: assets.page(path).etag for path, name in PAGES.items()}
    assert len(set(etags.values())) == len(etags)
    assert assets.page("/nothing").html.plain.count(b"modulepreload") < assets.page("/").html.plain.count(
        b"modulepreload"
    )


def test_modules_import_only_what_others_export_and_in_no_circle(rig: ServiceHarness) -> None:
    modules = read_modules(rig, [find_entry(rig)], later=True)
    exports = {path: set(EXPORT.findall(source)) for path, source in modules.items()}
    needs: dict[str, set[str]] = {}
    for path, source in modules.items():
        lines = [line for line in source.splitlines() if re.match(r"(import|export \{|export \*)", line)]
        imports = MODULE_IMPORT.findall(source)
        assert len(imports) == len(lines), f"{path}: an import of another form"
        needs[path] = {resolve(path, target) for _, target in imports}
        for names, target in imports:
            for name in names.split(","):
                assert name.strip().partition(" as ")[0] in exports[resolve(path, target)], f"{path}: {name}"
    TopologicalSorter(needs).prepare()


def test_the_page_links_every_stylesheet(rig: ServiceHarness) -> None:
    styles = re.findall(r'<link rel="stylesheet"[^>]* href="([^"]+)"', rig.client.get("/").text)
    assert len(styles) == len(list(STATIC.rglob("*.css")))
    text = "".join(rig.client.get(style).text for style in styles)
    for selector in (".card", ".choices", ".field"):
        assert selector in text


def test_the_page_is_served_without_a_token(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, token="sesame")
    for path in ("/", "/jobs", "/jobs/job_x"):
        assert rig.client.get(path, headers={"Accept": BROWSER}).status_code == 200
        assert "sesame" not in rig.client.get(path, headers={"Accept": BROWSER}).text
    assert rig.client.get("/jobs").status_code == 401
    assert rig.client.get("/jobs/job_x/metrics", headers={"Accept": BROWSER}).status_code == 401
    rig.close()


def test_the_page_of_the_api_loads_nothing_from_elsewhere(make_rig: MakeHarness, sqlite_url: str) -> None:
    """In 0.1 its script and style came from a CDN: without internet the page was blank."""
    rig = make_rig(sqlite_url, token="sesame")
    answer = rig.client.get("/docs", headers={"Accept": BROWSER})
    assert answer.status_code == 200
    assert "content-security-policy" in answer.headers
    assert "://" not in answer.text
    for name in ("swagger-script", "swagger-style"):
        [path] = re.findall(rf'<meta name="{name}" content="([^"]+)">', answer.text)
        loaded = rig.client.get(path)
        assert loaded.status_code == 200
        assert "immutable" in loaded.headers["cache-control"]
        assert b"swagger-ui" in loaded.content
    assert rig.client.get("/openapi.json").status_code == 401, "the document needs a token"
    rig.close()


def test_a_missing_library_is_named_and_the_rest_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LIBRARIES, "swagger_script", Library("no_such_package", "a.js", "the page /docs"))
    made = Assets(tmp_path / "cache")
    assert "the page /docs will not work: the Python package no_such_package has no file a.js" in caplog.text
    assert b'<meta name="swagger-script" content="">' in made.page("/docs").html.plain
    assert made.find(made.library_path("charts")) is not None


def test_accept_encoding_weights() -> None:
    assert accepts_gzip("gzip, br")
    assert accepts_gzip("*")
    assert not accepts_gzip("gzip;q=0, *")
    assert not accepts_gzip("br")


def test_no_script_parses_html_or_evaluates_code() -> None:
    scripts = list(STATIC.rglob("*.js"))
    assert len(scripts) > 10
    for script in scripts:
        text = script.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in text, f"{script.name}: {word}"


def test_buckets_of_a_step_range_equal_those_of_the_whole_run(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running(steps=1000)
    for step in range(1, 301):
        attempt.metric(step, loss=1 / step, learning_rate=step / 1000)
    rig.ship(attempt)
    whole = rig.data(job_id, "metrics", max_points=10_000)
    part = rig.data(job_id, "metrics", max_points=10_000, after_step=99, until_step=200)
    assert part == [row for row in whole if 100 <= row["step"] <= 200]
    for row in rig.data(job_id, "metrics", max_points=20, fields="learning_rate"):
        assert row["learning_rate"] == row["step"] / 1000
    again = [rig.client.get(f"/jobs/{job_id}/metrics?max_points=50").content for _ in range(2)]
    assert again[0] == again[1]

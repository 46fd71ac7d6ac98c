"""The dashboard's page and files: who gets HTML where the API gives JSON, what is cached, what the policy allows."""

import gzip
import re
from pathlib import Path

import pytest

from service.dashboard.assets import STATIC, Assets, compiled_ahead, library_file
from service.dashboard.linking import CannotLink, linked
from service.dashboard.negotiation import accepts_gzip, is_page, prefers_html
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness

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
def test_a_page_is_for_those_who_name_html(rig: ServiceHarness, accept: str, page: bool) -> None:
    assert prefers_html(accept) is page
    job_id = rig.submit(name="x")
    for path in ("/jobs", f"/jobs/{job_id}"):
        answer = rig.client.get(path, headers={"Accept": accept})
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html" if page else "application/json")
        assert "Accept" in [word.strip() for word in answer.headers["vary"].split(",")]


def test_what_lies_below_a_job_is_never_a_page(rig: ServiceHarness) -> None:
    job_id = rig.submit()
    for what in ("metrics", "events", "checkpoints"):
        answer = rig.client.get(f"/jobs/{job_id}/{what}", headers={"Accept": BROWSER})
        assert answer.headers["content-type"] == "application/json"
    assert not is_page("POST", "/jobs", BROWSER)
    assert rig.client.get("/jobs/nothing/here", headers={"Accept": BROWSER}).status_code == 404


def test_the_page_has_a_strict_policy_and_head(rig: ServiceHarness) -> None:
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


def test_no_script_or_style_stands_in_the_page(rig: ServiceHarness) -> None:
    page = rig.client.get("/").text
    assert "<style" not in page
    assert "style=" not in page
    assert page.count("<script") == page.count('<script type="module" src=')


def test_the_library_finds_its_style_elements_there_already(rig: ServiceHarness) -> None:
    """Where an element has the id of one that it would make, it makes none; the policy would block it."""
    library = library_file().read_text()
    made = set(re.findall(r'document\.getElementById\("([0-9a-f]{64})"\)', library)) | {"plotly.js-style-global"}
    there = set(re.findall(r' id="([^"]+)"', rig.client.get("/").text))
    assert len(made) > 1
    assert made <= there


def test_files_are_immutable_and_packed(rig: ServiceHarness, tmp_path: Path) -> None:
    assets = Assets(tmp_path / "cache")
    for path in assets.addresses():
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


def test_an_address_changes_with_the_content(tmp_path: Path) -> None:
    folder = tmp_path / "static"
    folder.mkdir()
    (folder / "index.html").write_text("{{base}} {{charts}}")
    (folder / "app.js").write_text("one")
    first = Assets(tmp_path / "cache", folder)
    same = Assets(tmp_path / "cache", folder)
    (folder / "app.js").write_text("two")
    second = Assets(tmp_path / "cache", folder)
    assert first.addresses() == same.addresses()
    assert first.addresses()[0] != second.addresses()[0]
    assert first.library_path == second.library_path
    assert first.shell_tag != second.shell_tag


def test_a_broken_cache_of_the_library_is_made_anew(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = Assets(cache)
    assert made.find(made.library_path) is not None
    [kept] = cache.iterdir()
    whole = kept.read_bytes()
    for broken in (b"", whole[:1000], b"nonsense"):
        kept.write_bytes(broken)
        found = Assets(cache).find(made.library_path)
        assert found is not None
        assert gzip.decompress(found.packed) == compiled_ahead(library_file().read_bytes())
        assert kept.read_bytes() == whole


def test_the_library_is_sent_as_it_is_but_for_two_parentheses() -> None:
    library = library_file().read_bytes()
    sent = compiled_ahead(library)
    assert len(sent) == len(library) + 2
    assert sent.replace(b"this, (() => {", b"this, () => {").removesuffix(b"})));") == library.removesuffix(b"}));")
    assert compiled_ahead(b"another library") == b"another library"


def test_modules_are_linked_so_that_each_finds_what_it_needs(tmp_path: Path) -> None:
    modules = {
        "app.js": 'import { twice as two } from "./sums/sums.js";\nimport { one } from "./one.js";\nsay(two(one));',
        "sums/sums.js": 'export { one } from "../one.js";\nexport function twice(x) {\n  return 2 * x;\n}\n',
        "one.js": "export const one = 1;\n",
        "nobody.js": "broken(",
    }
    script = linked(modules, "app.js")
    names = re.findall(r"^// (.+)$", script, re.MULTILINE)
    assert names == ["one.js", "sums/sums.js", "app.js"]
    assert "const { twice: two } = module1;" in script
    assert "return { twice, one: module0.one };" in script
    for source in ('import "./one.js";', 'import * as one from "./one.js";', "export let x = 1;", "export default 1;"):
        with pytest.raises(CannotLink):
            linked({**modules, "one.js": source}, "app.js")
    with pytest.raises(CannotLink, match=re.escape("app.js > sums/sums.js > one.js > sums/sums.js")):
        linked({**modules, "one.js": 'import { twice } from "./sums/sums.js";'}, "app.js")
    with pytest.raises(CannotLink, match=re.escape("app.js > gone.js")):
        linked({"app.js": 'import { a } from "./gone.js";'}, "app.js")


def test_the_page_is_two_requests(rig: ServiceHarness) -> None:
    page = rig.client.get("/").text
    [script] = re.findall(r'src="([^"]+)"', page)
    [style] = re.findall(r'rel="stylesheet"[^>]* href="([^"]+)"', page)
    assert "import {" not in rig.client.get(script).text
    for words in (".card", ".choices", ".field"):
        assert words in rig.client.get(style).text


def test_the_page_asks_for_the_token_so_it_needs_none(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, token="sesame")
    for path in ("/", "/jobs", "/jobs/job_x"):
        assert rig.client.get(path, headers={"Accept": BROWSER}).status_code == 200
        assert "sesame" not in rig.client.get(path, headers={"Accept": BROWSER}).text
    assert rig.client.get("/jobs").status_code == 401
    assert rig.client.get("/jobs/job_x/metrics", headers={"Accept": BROWSER}).status_code == 401
    rig.close()


def test_gzip_is_weighed() -> None:
    assert accepts_gzip("gzip, br")
    assert accepts_gzip("*")
    assert not accepts_gzip("gzip;q=0, *")
    assert not accepts_gzip("br")


def test_nothing_in_the_scripts_reads_html_or_makes_code() -> None:
    scripts = list(STATIC.rglob("*.js"))
    assert len(scripts) > 10
    for script in scripts:
        text = script.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in text, f"{script.name}: {word}"


def test_buckets_of_a_stretch_are_those_of_the_whole(rig: ServiceHarness) -> None:
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

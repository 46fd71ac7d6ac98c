"""The documentation for language models: the index at /llms.txt, and each page as Markdown."""

import re
from pathlib import Path

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.test_auth import ADMIN_TOKEN

DOCS = Path(__file__).parents[2] / "docs"
ENTRY = re.compile(r"^- \[(.+?)\]\(/docs/(.+?)\.md\)(?:: (.+))?$", re.MULTILINE)


def test_the_index_lists_every_page_and_each_is_returned_without_a_token(
    make_rig: MakeHarness, sqlite_url: str
) -> None:
    rig = make_rig(sqlite_url, token=ADMIN_TOKEN)
    index = rig.client.get("/llms.txt")
    assert (index.status_code, index.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert index.text.startswith("# Trainyard\n\n> ")
    entries = {page: (title, description) for title, page, description in ENTRY.findall(index.text)}
    files = {str(file.relative_to(DOCS)).removesuffix(".md"): file for file in DOCS.rglob("*.md")}
    assert set(entries) == set(files)
    for page, file in files.items():
        answer = rig.client.get(f"/docs/{page}.md")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/markdown; charset=utf-8")
        assert answer.text == file.read_text()
        title, description = entries[page]
        assert f"# {title}" in answer.text.replace("`", "")
        assert len(description) <= 200
        assert "](" not in description
    undescribed = [page for page, (_, description) in entries.items() if not description]
    assert [page for page in undescribed if not page.startswith("decisions/")] == []
    for page in (page for page in entries if page.startswith("guides/")):
        sentence = re.split(r"\n\s*\n", files[page].read_text())[1]
        assert re.match(r"(?!```)[A-Za-z[`]", sentence), f"{page} does not begin with a sentence"
    assert not {"Decided", "Why", "Consequence"} & {description for _, description in entries.values()}
    assert rig.client.get("/jobs").status_code == 401
    rig.close()


def test_links_of_a_page_lead_to_pages_of_the_service(rig: ServiceHarness) -> None:
    page = rig.client.get("/docs/guides/agents.md")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.text)
    assert "../agents/SKILL.md" in links
    assert {rig.client.get(str(page.request.url.join(link))).status_code for link in links} == {200}


def test_only_pages_are_returned(rig: ServiceHarness) -> None:
    for path in (
        "nope",
        "../README",
        "%2e%2e/README",
        "guides/../../README",
        "guides",
        "/etc/passwd",
        "guides//agents",
    ):
        answer = rig.client.get(f"/docs/{path}.md")
        assert answer.status_code == 404, path
        assert answer.json()["code"] in ("page_not_found", "not_found"), path
    assert rig.client.head("/docs/guides/agents.md").status_code == 200
    assert rig.client.post("/docs/guides/agents.md").status_code == 405
    assert rig.client.get("/docs", headers={"accept": "text/html"}).status_code == 200, "the page of the dashboard"

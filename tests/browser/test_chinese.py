"""The dashboard in Chinese: every page's own words, both themes, a narrow window, and the way back to English."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Browser, Error, Page, Response, expect

from tests.browser.page_checks import assert_no_overflow, check_both_themes
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from trainyard.contract.status import CorpusStatus, JobStatus, Phase, Reason
from trainyard.service.dashboard.assets import STATIC

pytestmark = pytest.mark.long

TEXTS = """() => {
  const apart = 'code, pre, kbd, .command, .command-line, .mono, .unit, .group .title, textarea, script, style,'
    + 'noscript, svg, #swagger-ui, [lang="en"]';
  const found = [];
  const add = (text) => text && found.push(text.trim().replace(/\\s+/g, ' '));
  for (const node of document.querySelectorAll('body *')) {
    if (node.closest(apart) || !(node.closest('select') ?? node).checkVisibility()) continue;
    for (const part of node.childNodes) if (part.nodeType === Node.TEXT_NODE) add(part.data);
    for (const name of ['aria-label', 'title', 'placeholder', 'data-name']) add(node.getAttribute(name));
  }
  return [document.title, ...found];
}"""
"""The visible texts and those of attributes, without code and commands, the names of settings, and Swagger UI."""

LATIN = re.compile(r"(?<!\d)[A-Za-z][A-Za-z_.\-/=@\d]*")
ALSO_CHINESE = frozenset(LATIN.findall(" ".join(json.loads((STATIC / "i18n" / "zh.json").read_text()).values()))) | {
    *(
        "Trainyard",
        "JSON",
        "curl",
        "Python",
        "Hugging",
        "Face",
        "MiniMind",
        "sha256",
        "acc",
        "acc_norm",
        "bpb",
        "exp",
        "loss",
    ),
    *("x", "B", "kB", "MB", "GB", "TB", "k", "M", "T"),
}
"""Words that Chinese texts of the field have as they are, names, and units."""

MARKS = "·:,;()" + "".join(map(chr, (0xFF08, 0xFF09, 0xFF0C, 0x3002, 0xFF1A)))
"""Punctuation next to a value, also Chinese."""

WORDS = frozenset(word for names in (JobStatus, CorpusStatus, Phase, Reason) for word in names)
"""Values of the API for which the pages have words."""


def plain_text(description: str) -> str:
    """Return a description as the form shows it: without its Markdown."""
    without_guide = re.sub(r"(, see|:) \[(the )?guide\]\([^)]*\)", "", description)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", without_guide).replace("`", "")


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


class Reader:
    """Reads a page, and knows what the API has sent to it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.values: set[str] = set()
        page.on("response", self._keep)

    def _keep(self, response: Response) -> None:
        if "json" in response.headers.get("content-type", "") and "/i18n/" not in response.url:
            try:
                self.values.update(plain_text(text) for text in strings(response.json()) if text not in WORDS)
            except Error:
                return  # The page has been left, so its body is gone.

    def english(self) -> list[str]:
        """Return the page's own texts with words in Latin letters, apart from those that Chinese texts have too."""
        sentences = sorted((value for value in self.values if len(value) > 11), key=len, reverse=True)
        found = []
        for text in dict.fromkeys(self.page.evaluate(TEXTS)):
            rest = "" if text in self.values else text.replace("`", "")
            for sentence in sentences:
                for shown in (sentence, sentence[:1].upper() + sentence[1:]):
                    rest = rest.replace(shown, "")
            rest = " ".join(part for part in rest.split(" ") if part.strip(MARKS) not in self.values)
            words = [word.rstrip(".") for word in LATIN.findall(rest)]
            # A name of a setting has a dot or an underscore.
            if any(word not in ALSO_CHINESE | self.values and not re.search(r"\w[._]\w", word) for word in words):
                found.append(text)
        return found


def check(reader: Reader, heading: str | re.Pattern[str]) -> None:
    expect(reader.page.get_by_role("heading", name=heading, exact=isinstance(heading, str)).first).to_be_visible()
    expect(reader.page.locator("html")).to_have_attribute("lang", "zh-CN")
    until = time.monotonic() + 60
    while (left := reader.english()) and time.monotonic() < until:
        reader.page.wait_for_timeout(100)  # A response reaches the test after the page.
    assert left == [], reader.page.url


@pytest.fixture
def fast(service: str, rig: ServiceHarness) -> str:
    """The id of the finished job."""
    return next(str(job["id"]) for job in rig.client.get("/jobs").json()["data"] if job["name"] == "fast")


def test_the_workspace_is_chinese(service: str, page: Page) -> None:
    reader = Reader(page)
    page.goto(f"{service}/?lang=zh")
    expect(page.locator(".jobs tr")).to_have_count(4)
    assert "lang" not in page.url, "the address is the same in both languages"
    check(reader, "任务")
    expect(page.locator(".jobs .status").first).to_have_text(re.compile("排队中"))
    expect(page.get_by_role("columnheader", name="每秒 token 数")).to_be_visible()
    page.get_by_role("checkbox", name="选择 fast").check()
    expect(page.get_by_role("group", name=re.compile("训练损失.*当前"))).to_be_visible()
    check(reader, "已选 1 个任务")
    check_both_themes(page, "zh-jobs")
    page.keyboard.press("?")
    check(reader, "快捷键")


def test_a_job_and_its_dialogs_are_chinese(service: str, fast: str, page: Page) -> None:
    reader = Reader(page)
    page.goto(f"{service}/jobs/{fast}?lang=zh")
    expect(page.get_by_role("region", name="各次尝试").get_by_role("row")).to_have_count(2)
    expect(page.get_by_role("group", name=re.compile("训练损失.*当前"))).to_be_visible()
    check(reader, "fast")
    check_both_themes(page, "zh-job")
    page.get_by_role("button", name="更多操作").click()
    check(reader, "fast")
    page.get_by_role("button", name="修改后恢复").click()
    check(reader, "恢复 fast")


def test_the_tabs_of_a_job_are_chinese(service: str, fast: str, page: Page) -> None:
    reader = Reader(page)
    page.goto(f"{service}/jobs/{fast}?lang=zh")
    for name in ("指标", "日志", "检查点", "样本", "评测", "试用", "配置", "事件"):
        tab = page.get_by_role("tab", name=name, exact=True)
        tab.click()
        expect(tab).to_have_attribute("aria-selected", "true")
        expect(page.get_by_role("tabpanel")).to_have_text(re.compile(r"[\u4e00-\u9fff]"))
        check(reader, "fast")
        assert_no_overflow(page)


@pytest.mark.parametrize(
    ("path", "heading"),
    [
        ("/data", "数据"),
        ("/system", "系统"),
        ("/submit", "提交"),
        ("/submit?fork={job}", "分叉 fast"),
        ("/compare?jobs={job}", "比较"),
        ("/data/cor_none", "cor_none"),
        ("/submit?like=job_none", "提交"),
    ],
)
def test_all_other_pages_are_chinese(service: str, fast: str, page: Page, path: str, heading: str) -> None:
    reader = Reader(page)
    page.goto(f"{service}/?lang=zh")
    expect(page.get_by_role("heading", name="任务", exact=True)).to_be_visible()
    page.goto(service + path.format(job=fast))
    if "submit" not in path:
        expect(page.locator("#updated")).to_have_text(re.compile("前更新"))
    if path == "/submit":
        expect(page.get_by_placeholder("查找设置")).to_be_visible()
        page.get_by_role("button", name="规划", exact=True).click()
        expect(page.get_by_text("项设置无效")).to_be_visible()
    check(reader, heading)
    if "none" not in path:
        check_both_themes(page, "zh-" + re.sub(r"\W.*", "", path[1:]))


def test_the_browser_chooses_the_language_until_the_user_does(
    rig: ServiceHarness, browser: Browser, page: Page
) -> None:
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        expect(page.get_by_role("heading", name="No job yet")).to_be_visible()
        expect(page.locator("html")).to_have_attribute("lang", "en")
        chinese = browser.new_page(locale="zh-CN")
        chinese.goto(f"http://{host}:{port}/?search=x&lang=fr")
        expect(chinese.get_by_text("没有符合搜索和筛选条件的任务")).to_be_visible()
        assert chinese.url.endswith("/?search=x"), "a language without a translation is ignored"
        chinese.get_by_role("button", name="English").click()
        expect(chinese.get_by_text("No job matches")).to_be_visible()
        chinese.reload()
        expect(chinese.locator("html")).to_have_attribute("lang", "en")
        chinese.get_by_role("button", name="中文").click()
        expect(chinese.get_by_text("没有符合搜索和筛选条件的任务")).to_be_visible()
        chinese.goto(f"http://{host}:{port}/?lang=en")
        expect(chinese.get_by_role("heading", name="No job yet")).to_be_visible()
        chinese.close()


def test_an_english_page_fetches_no_translation_and_a_missing_one_is_no_error(rig: ServiceHarness, page: Page) -> None:
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/")
        expect(page.get_by_role("heading", name="No job yet")).to_be_visible()
        assert not [url for url in fetched if url.endswith(".json")]
        page.route("**/i18n/zh.json", lambda route: route.abort())
        page.goto(f"http://{host}:{port}/?lang=zh")
        expect(page.get_by_role("heading", name="No job yet")).to_be_visible()


def test_login_empty_page_and_lost_connection_are_chinese(tmp_path: Path, page: Page) -> None:
    rig = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path}/trainyard.db", token="sesame")
    reader = Reader(page)
    with served(rig) as (host, port):
        page.goto(f"http://{host}:{port}/?lang=zh")
        page.get_by_label("访问令牌").fill("wrong")
        page.get_by_role("button", name="进入").click()
        expect(page.get_by_text("该令牌未被接受")).to_be_visible()
        check(reader, "访问令牌")
        check_both_themes(page, "zh-login")
        page.get_by_label("访问令牌").fill("sesame")
        page.get_by_role("button", name="进入").click()
        check(reader, "还没有任务")
        page.route("**/jobs?*", lambda route: route.abort())
        expect(page.locator("#offline")).to_contain_text("无法连接服务")
        check(reader, "还没有任务")
        assert_no_overflow(page)
        page.goto(f"http://{host}:{port}/jobs/job_none")
        expect(page.locator(".sentence")).to_have_text("未找到该任务。")
        check(reader, "job_none")
    rig.close()
    rig.database.close()

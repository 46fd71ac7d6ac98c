"""Screenshots for the guide: every page of a service with a sweep, a fork, a resumed run and a failed one.

The runs are made up: their points come from a formula with a seed, so that the pictures are the same each time and need
no GPU. `TRAINYARD_SCREENSHOTS=docs/screenshots make soak PYTEST_ARGS=tests/browser/test_screenshot_tour.py` takes them.
"""

import math
import random
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import Page, Route, expect

from tests.browser.page_checks import check_both_themes
from tests.browser.test_charts import figure
from tests.browser.test_data_page import PREPARING, answer, corpus, source_report
from tests.data.texts import docstrings, write_jsonl
from tests.fakes.launcher import STARTED, FakeAttempt
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_checkpoints import write_checkpoint
from tests.service.test_evaluations import report_score
from trainyard.contract.corpus_report import CorpusReport
from trainyard.contract.messages import ErrorCard
from trainyard.contract.status import Reason
from trainyard.service.devices.inventory import Device

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

GIGABYTE = 1 << 30
STEPS = 4000
LONG = 40_000
COPIES = 100
"""Of the docstrings in the corpus, so that the plan of a run over it is one that a user may have."""

EVERY = 20
SEQUENCES, LENGTH = 96, 340
TOKENS = SEQUENCES * LENGTH
RATES = (3e-4, 1e-3, 3e-3)
FACTS: dict[str, Any] = {
    "device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "parameters": 25_829_888,
    "active_parameters": 25_829_888, "vocab_size": 6400, "tokens": 412_000_000, "samples": 1_200_000,
    "documents": 1_413_000, "global_batch": SEQUENCES, "tokens_per_step": float(TOKENS), "flops_per_token": 1.6e8,
    "bad_lines": 0,
}  # fmt: skip
PROMPTS = ("The first rule of", "def fibonacci(n):", "In the morning")
ENDINGS = {0: " the the of of and and the", 1000: " the the same way as the first one is", 2000: " a good part of it"}


@dataclass
class Tour:
    """A service with jobs by name; ``live`` reports while the pictures are taken."""

    rig: ServiceHarness
    url: str
    ids: dict[str, str]


def points(attempt: FakeAttempt, steps: range, rate: float, seed: int, floor: float = 2.35, total: int = STEPS) -> None:
    """Report the points of a made-up run: a falling loss with noise, a warm-up and a cosine."""
    chance = random.Random(seed)
    for step in steps:
        loss = floor + 0.16 * abs(math.log10(rate / 1e-3)) + 6.2 * math.exp(-step / 55) + 1.3 * math.exp(-step / 950)
        schedule = min(1.0, step / 200) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / total)))
        held_out: dict[str, Any] = {}
        if step % 200 == 0:
            sets = {"web": {"loss": loss + 0.02, "bpb": loss / 2.9}, "code": {"loss": loss - 0.4, "bpb": loss / 3.6}}
            held_out = {"eval_loss": loss + 0.03, "eval_bpb": (loss + 0.03) / 2.84, "eval": sets}
        noisy = loss + chance.gauss(0, 0.025)
        attempt.metric(
            step,
            loss=noisy,
            bpb=noisy / 2.84,
            tokens=step * TOKENS,
            epoch=step * TOKENS / FACTS["tokens"],
            learning_rate=rate * schedule,
            grad_norm=0.42 + 2.2 * math.exp(-step / 90) + abs(chance.gauss(0, 0.03)),
            tokens_per_second=118_000 + chance.gauss(0, 700),
            step_seconds=0.277,
            data_seconds=0.003,
            mfu=0.41,
            memory_bytes=31 * GIGABYTE,
            **held_out,
        )


def started(attempt: FakeAttempt, start_step: int, steps: int) -> None:
    attempt.say("started", **{**STARTED, **FACTS, "start_step": start_step, "steps": steps})


def start(rig: ServiceHarness, name: str, rate: float, seed: int, **groups: Any) -> tuple[str, FakeAttempt]:
    training = {"learning_rate": rate, "seed": seed, "max_steps": STEPS, "batch_size": SEQUENCES}
    training |= groups.pop("training", {})
    reporting = {"sample_prompts": list(PROMPTS), "eval_interval": 200}
    job_id = rig.submit(name=name, training=training, reporting=reporting, **groups)
    rig.reconcile()
    attempt = rig.launcher.of(job_id)
    started(attempt, 0, int(training["max_steps"]))
    return job_id, attempt


def save(rig: ServiceHarness, job_id: str, attempt: FakeAttempt, *steps: int) -> None:
    """Save checkpoints, with scores on two tasks and texts of each."""
    for step in steps:
        write_checkpoint(rig.checkpoint(job_id, attempt, step))
        gain = 1 - math.exp(-step / 2500)
        report_score(attempt, step, "arc", 0.25 + 0.16 * gain, acc_norm=0.25 + 0.19 * gain, bpb=2.1 - 0.6 * gain)
        report_score(
            attempt, step, "facts", 0.30 + 0.31 * gain, task_kind="continuation", acc_norm=None, bpb=1.9 - gain
        )
        for prompt in PROMPTS:
            text = prompt + ENDINGS.get(step, " the house is that you leave your shoes at the door, and so did he.")
            attempt.say("sample", step=step, prompt=prompt, text=text)


def finished(rig: ServiceHarness, name: str, rate: float, seed: int, **groups: Any) -> str:
    job_id, attempt = start(rig, name, rate, seed, **groups)
    points(attempt, range(EVERY, STEPS + 1, EVERY), rate, seed)
    save(rig, job_id, attempt, 1000, 2000, 3000, 4000)
    rig.exit(attempt, "completed", step=STEPS)
    return job_id


def fork(rig: ServiceHarness, parent: str) -> str:
    overrides = {"name": "lr1e-3-hot", "training": {"learning_rate": 2e-3}}
    made = rig.post_action(parent, "fork", {"step": 2000, "overrides": overrides}, status=201)
    rig.reconcile()
    attempt = rig.launcher.of(made["id"])
    started(attempt, 2000, STEPS)
    points(attempt, range(2000 + EVERY, STEPS + 1, EVERY), 1e-3, 7, floor=2.27)
    rig.exit(attempt, "completed", step=STEPS)
    return str(made["id"])


def resumed(rig: ServiceHarness) -> tuple[str, FakeAttempt]:
    """A long run that was paused at step 1,660 and resumed."""
    training = {"max_steps": LONG}
    limits = {"max_minutes": 600}
    text = "Baseline of March, with a longer schedule"
    job_id, attempt = start(rig, "pre-12", 1e-3, 11, training=training, limits=limits, description=text)
    points(attempt, range(EVERY, 1661, EVERY), 1e-3, 11, total=LONG)
    save(rig, job_id, attempt, 1000, 1660)
    rig.post_action(job_id, "pause")
    rig.exit(attempt, "stopped", step=1660)
    rig.post_action(job_id, "resume")
    rig.reconcile()
    again = rig.launcher.of(job_id, 2)
    started(again, 1660, LONG)
    points(again, range(1660 + EVERY, 3601, EVERY), 1e-3, 12, total=LONG)
    save(rig, job_id, again, 2000, 3000)
    rig.ship(again)
    return job_id, again


def failed(rig: ServiceHarness) -> str:
    job_id, attempt = start(rig, "wide-24", 1e-3, 13, training={"batch_size": 384})
    points(attempt, range(EVERY, 621, EVERY), 1e-3, 13)
    save(rig, job_id, attempt, 600)
    rig.ship(attempt)
    tail = [f"step {step} of 4,000, loss {2.6 + 1.3 * math.exp(-step / 950):.3f}" for step in range(480, 621, 20)]
    tail += ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.66 GiB. GPU 0 has 79.11 GiB"]
    report = attempt.end("failed", Reason.OUT_OF_MEMORY, 620, "out of memory on rank 0 in step 621 with 384 sequences")
    hint = "Set training.batch_size to 192 and training.accumulation_steps to 16: the result is the same."
    card = ErrorCard(code="out_of_memory", message=report.message, hint=hint, rank=0, log_tail=tail)
    answered = rig.report(attempt, "exit", report.model_copy(update={"error": card}).model_dump(mode="json"))
    assert answered.status_code == 200
    return job_id


class Reporter(threading.Thread):
    """Reports a step of a run each second, so that the pages do not say that no report has come."""

    def __init__(self, rig: ServiceHarness, attempt: FakeAttempt, step: int) -> None:
        super().__init__()
        self.rig, self.attempt, self.step = rig, attempt, step
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(1):
            self.step += EVERY
            points(self.attempt, range(self.step, self.step + 1), 1e-3, self.step, total=LONG)
            self.rig.ship(self.attempt, self.attempt.lines[-1:])


@pytest.fixture(scope="module")
def tour() -> Iterator[Tour]:
    # Not pytest's temporary folder: the path is visible in the screenshots.
    folder = Path(tempfile.mkdtemp(prefix="trainyard-"))
    model = "NVIDIA H100 80GB HBM3"
    used = (33 * GIGABYTE, 2 * GIGABYTE, 2 * GIGABYTE, 2 * GIGABYTE)
    devices = [
        Device(f"cuda:{i}", "cuda", model, 80 * GIGABYTE, used[i], temperature_celsius=61 - 7 * i, link="nvlink")
        for i in range(4)
    ]
    rig = ServiceHarness(folder / "home", f"sqlite:///{folder}/trainyard.db", devices=devices)
    write_jsonl(rig.corpus, docstrings() * COPIES)
    ids = {}
    for rate in RATES:
        for seed in (1, 2, 3):
            name = f"lr{rate:.0e}".replace("-0", "-") + f"-s{seed}"
            ids[name] = finished(rig, name, rate, seed, group="lr-sweep", labels={"team": "base"})
    labels = {"team": "base", "idea": "muon"}
    ids["muon"] = finished(rig, "muon-5e-3", 5e-3, 4, training={"optimizer": "muon"}, labels=labels)
    ids["fork"] = fork(rig, ids["lr1e-3-s1"])
    ids["failed"] = failed(rig)
    ids["live"], attempt = resumed(rig)
    rig.submit(name="pre-13", resources={"nproc_per_node": 4})
    rig.submit(name="pre-13-small", resources={"nproc_per_node": 4, "priority": 3})
    rig.reconcile()
    reporter = Reporter(rig, attempt, 3600)
    with served(rig) as (host, port):
        reporter.start()
        yield Tour(rig, f"http://{host}:{port}", ids)
        reporter.ended.set()
        reporter.join()
    rig.close()
    rig.database.close()
    shutil.rmtree(folder)


def drawn(page: Page, name: str = "Train loss") -> None:
    expect(figure(page, name).locator(".scatterlayer .trace").first).to_be_visible()


def with_scheduler(route: Route) -> None:
    """Answer as a service does whose scheduler runs. Here it does not, because the runs are made up."""
    response = route.fetch()
    status = response.json()
    parts = [
        {**part, "ok": True, "detail": "runs here"} if part["name"] == "scheduler" else part for part in status["parts"]
    ]
    route.fulfill(response=response, json={**status, "ready": True, "parts": parts})


def test_the_workspace(tour: Tour, page: Page) -> None:
    chosen = ",".join(tour.ids[name] for name in ("lr1e-3-s1", "muon", "fork", "live"))
    page.goto(f"{tour.url}/?jobs={chosen}")
    drawn(page)
    check_both_themes(page, "workspace")
    sweep = ",".join(tour.ids[f"lr{rate}-s{seed}"] for rate in ("1e-3", "3e-3", "3e-4") for seed in (1, 2, 3))
    page.goto(f"{tour.url}/?fold=seeds&sort=score&columns=status,score,eval_loss,loss,curve,rate,tokens&jobs={sweep}")
    drawn(page)
    check_both_themes(page, "folded")


def test_a_job(tour: Tour, page: Page) -> None:
    page.goto(f"{tour.url}/jobs/{tour.ids['live']}")
    drawn(page)
    expect(page.get_by_role("region", name="Attempts").get_by_role("row")).to_have_count(3)
    check_both_themes(page, "job")
    for tab, shown in (("samples", "fibonacci"), ("evaluations", "facts"), ("checkpoints", "3,000")):
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tabpanel")).to_contain_text(shown)
        check_both_themes(page, tab)
    page.get_by_role("button", name="Decay from here…").first.click()
    expect(page.get_by_role("dialog").locator(".rates")).to_be_visible()
    check_both_themes(page, "decay")
    page.goto(f"{tour.url}/jobs/{tour.ids['failed']}")
    expect(page.get_by_role("region", name="What went wrong")).to_be_visible()
    drawn(page)
    check_both_themes(page, "failed")


def test_compare(tour: Tour, page: Page) -> None:
    chosen = ",".join(tour.ids[name] for name in ("lr1e-3-s1", "fork", "muon"))
    page.goto(f"{tour.url}/compare?jobs={chosen}")
    drawn(page)
    expect(page.get_by_role("region", name="Differing settings")).to_contain_text("training.optimizer")
    check_both_themes(page, "compare")


def test_submit(tour: Tour, page: Page) -> None:
    page.goto(f"{tour.url}/submit?like={tour.ids['lr1e-3-s1']}")
    page.get_by_label("max_steps", exact=True).fill("")
    page.get_by_label("batch_size", exact=True).fill("2048")
    plan = page.get_by_role("region", name="Plan", exact=True)
    expect(plan.get_by_role("img", name=re.compile("Does not fit"))).to_be_visible()
    check_both_themes(page, "submit")


def test_data_and_system(tour: Tour, page: Page, tmp_path: Path) -> None:
    texts = sorted(set(docstrings()[:400]))
    reports = [source_report(tmp_path, "web", [texts[:260]]), source_report(tmp_path, "code", [texts[260:]])]
    sources = [{"name": "web", "path": "/data/web"}, {"name": "code", "path": "/data/code"}]
    spec = {"sources": sources, "tokenizer_path": "byte"}
    report = CorpusReport.of(reports).model_dump(mode="json")
    jobs = [tour.ids[name] for name in ("live", "muon", "fork")]
    answer(page, corpus("corpus_a", spec=spec, report=report, jobs=jobs), PREPARING)
    page.goto(f"{tour.url}/data")
    expect(page.get_by_role("region", name="Corpora").locator("tbody tr")).to_have_count(2)
    check_both_themes(page, "data")
    page.goto(f"{tour.url}/data/corpus_a")
    expect(page.get_by_role("heading", name="Source web")).to_be_visible()
    check_both_themes(page, "corpus")
    page.route("**/status", with_scheduler)
    page.goto(f"{tour.url}/system")
    expect(page.get_by_role("heading", name="Devices")).to_be_visible()
    expect(page.get_by_text("The service is ready.")).to_be_visible()
    check_both_themes(page, "system")

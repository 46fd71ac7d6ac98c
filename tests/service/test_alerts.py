"""The example alerts: rules that Prometheus takes, about metrics that are there, and that fire when they should."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.service.harness import ServiceHarness

ROOT = Path(__file__).parents[2]
RULES = ROOT / "docs" / "guides" / "alerts.yml"
PROMTOOL = shutil.which("promtool")

CASES = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'up{job="trainyard", instance="a"}', values: '1x5 0x10'}
      - {series: 'trainyard_database_up{instance="a"}', values: '1x5 0x10'}
      - {series: 'trainyard_scheduler_leads{instance="a"}', values: '1x5 0x10'}
      - {series: 'trainyard_scheduler_leads{instance="b"}', values: '0x15'}
      - {series: 'trainyard_disk_low{instance="a", disk="home"}', values: '0x5 1x10'}
    alert_rule_test:
      - {eval_time: 5m, alertname: TrainyardDown}
      - {eval_time: 5m, alertname: TrainyardDatabaseAway}
      - {eval_time: 5m, alertname: TrainyardNobodySchedules}
      - {eval_time: 5m, alertname: TrainyardDiskLow}
      - eval_time: 10m
        alertname: TrainyardNobodySchedules
        exp_alerts:
          - exp_labels: {severity: page}
            exp_annotations: {summary: "no service schedules: queued jobs wait, ended runs keep their devices"}
      - eval_time: 10m
        alertname: TrainyardDatabaseAway
        exp_alerts:
          - exp_labels: {severity: page, instance: a}
            exp_annotations: {summary: "a has no database"}
      - eval_time: 10m
        alertname: TrainyardDiskLow
        exp_alerts:
          - exp_labels: {severity: page, instance: a, disk: home}
            exp_annotations: {summary: "the disk of home on a is nearly full"}
"""


def test_the_alerts_are_about_metrics_that_are_there(rig: ServiceHarness) -> None:
    rig.running()
    there = set(re.findall(r"^# TYPE (\w+)", rig.client.get("/metrics").text, re.MULTILINE))
    named = set(re.findall(r"trainyard_[a-z_]+", RULES.read_text()))
    assert named
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in named} - there == set()


def test_the_guide_explains_each_alert_and_the_other_way_round() -> None:
    page = (ROOT / "docs" / "guides" / "operating.md").read_text()
    assert set(re.findall(r"`(Trainyard[A-Z]\w+)`", page)) == set(re.findall(r"alert: (\w+)", RULES.read_text()))


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_prometheus_takes_them_and_they_fire(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    shutil.copy(RULES, tmp_path)
    (tmp_path / "cases.yml").write_text(CASES)
    for what in (["check", "rules", "alerts.yml"], ["test", "rules", "cases.yml"]):
        done = subprocess.run([PROMTOOL, *what], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

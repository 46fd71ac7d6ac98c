"""Lines that a run prints."""

import pytest

from trainyard.contract.events import MetricEvent, SampleEvent, WarningEvent
from trainyard.worker.events.console import ConsoleLogger, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (45, "45 s"), (720, "12 min"), (7800, "2 h 10 min"), (273600, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_console_lines() -> None:
    console = ConsoleLogger()
    metric = MetricEvent(step=5, epoch=0, loss=None, learning_rate=1e-3, tokens=1, eval_loss=2.5)
    assert console.text(metric) == "step 5/0  loss not finite  lr 1.00e-03  eval 2.5000  not finite tok/s"
    metric = metric.model_copy(update={"eval_bpb": 0.75})
    assert "  eval 2.5000 (0.7500 bits per byte)  " in (console.text(metric) or "")
    assert console.text(SampleEvent(step=1, prompt="a", text="b\n")) == "sample at step 1: 'ab\\n'"
    assert console.text(WarningEvent(code="x", message="look")) == "warning: look"

"""Events as short lines of text, for the terminal and rank 0's log."""

from trainyard.contract.events import (
    CheckpointSaved,
    Event,
    Finished,
    MetricEvent,
    PhaseChanged,
    SampleEvent,
    SettingsChanged,
    Started,
    TaskScored,
    WarningEvent,
)


class ConsoleLogger:
    """Prints the events of rank 0."""

    def __init__(self) -> None:
        self._steps = 0

    def log_event(self, event: Event) -> None:
        """Print the event's line, if it has one."""
        text = self.text(event)
        if text is not None:
            print(text, flush=True)

    def text(self, event: Event) -> str | None:
        """Return the event's line, or None if it is not printed."""
        match event:
            case Started():
                self._steps = event.steps
                return _started(event)
            case MetricEvent():
                return _metric(event, self._steps)
            case CheckpointSaved():
                return f"saved {event.path} ({event.bytes / 1e6:.1f} MB)"
            case SampleEvent():
                return f"sample at step {event.step}: {event.prompt + event.text!r}"
            case TaskScored():
                return _task(event)
            case WarningEvent():
                return f"warning: {event.message}"
            case SettingsChanged():
                return f"from step {event.step + 1} on: {event.message}"
            # A failure is printed on stderr, with its hint, by the process that ends with it.
            case Finished(outcome="completed" | "stopped"):
                return f"{event.outcome}: {event.message}"
            case PhaseChanged(message=str(message)):
                return message
            case _:
                return None


def _started(event: Started) -> str:
    resumed = f", from {event.resumed_from}" if event.resumed_from else ""
    return (
        f"{event.parameters / 1e6:.2f} M parameters on {event.world_size} x {event.device} ({event.device_name}), "
        f"{event.dtype}; {event.samples:,} rows, {event.tokens:,} tokens; "
        f"steps {event.start_step + 1} to {event.steps}{resumed}"
    )


def _metric(event: MetricEvent, steps: int) -> str:
    parts = [f"step {event.step}/{steps}", f"loss {_format(event.loss, '.4f')}", f"lr {event.learning_rate:.2e}"]
    if event.eval_loss is not None:
        parts.append(f"eval {event.eval_loss:.4f}{_bits(event.eval_bpb)}")
    parts.append(f"{_format(event.tokens_per_second, ',.0f')} tok/s")
    if event.step_seconds is not None:
        parts.append(f"ETA {duration((steps - event.step) * event.step_seconds)}")
    return "  ".join(parts)


def _task(event: TaskScored) -> str:
    values = {"acc": event.acc, "acc_norm": event.acc_norm, "bpb": event.bpb}
    shown = [f"{name} {value:.4f}" for name, value in values.items() if value is not None]
    return f"task {event.task} at step {event.step}: {', '.join(shown) or 'not finite'} ({event.examples:,} examples)"


def _bits(bpb: float | None) -> str:
    return f" ({bpb:.4f} bits per byte)" if bpb is not None else ""


def _format(value: float | None, spec: str) -> str:
    return "not finite" if value is None else format(value, spec)


def duration(seconds: float) -> str:
    """Return text such as ``45 s``, ``12 min``, ``2 h 10 min``, ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"

"""The guard on the device decides as the host does, and a step does not wait for the device."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.worker.test_step import CPU, SHAPE, cut, rows, train_state, unseeded
from trainyard.worker.training.nonfinite import (
    DeviceNonFiniteGuard,
    NonFiniteCounters,
    Policy,
    StepDecision,
    decide_step,
)

WAITS = {"item", "tolist", "numpy", "nonzero", "cpu", "unique", "bincount", "masked_select"} | {
    f"__{name}__" for name in ("bool", "int", "float", "index", "contains")
}


@pytest.mark.parametrize("policy", ["fail", "skip", "rollback"])
def test_it_holds_what_the_gate_does_not_apply_and_all_behind_an_end(policy: Policy) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    drawn, ends = random.Random(seed), []
    for number in range(20):
        guard, counters, ended = DeviceNonFiniteGuard(policy, is_latching=True, device=CPU), NonFiniteCounters(), False
        bad_share = (0.01, 0.5, 0.95)[number % 3]
        for _ in range(200):
            finite = drawn.random() > bad_share
            norm = torch.tensor(1.0 if finite else drawn.choice([float("nan"), float("inf")]))
            held = bool(guard.found_inf(norm))
            if ended:
                assert held
                continue
            decision, counters = decide_step(finite, policy, counters, None)
            assert held == (decision is not StepDecision.APPLIED)
            ended = decision in (StepDecision.FAIL, StepDecision.ROLL_BACK)
        ends.append(ended)
    assert any(ends)


def test_released_it_goes_on_from_the_trouble_there_was() -> None:
    guard = DeviceNonFiniteGuard("skip", is_latching=True, device=CPU)
    guard.reset(NonFiniteCounters(in_a_row=10, skipped=10))
    assert bool(guard.found_inf(torch.tensor(float("nan"))))
    assert bool(guard.found_inf(torch.tensor(1.0))), "eleven in a row are an end"
    guard.reset(NonFiniteCounters())
    assert not bool(guard.found_inf(torch.tensor(1.0)))


def test_beside_a_loss_scale_it_holds_bad_steps_alone() -> None:
    guard = DeviceNonFiniteGuard("fail", is_latching=False, device=CPU)
    assert [bool(guard.found_inf(torch.tensor(norm))) for norm in (1.0, float("inf"), 1.0)] == [False, True, False]


class NoWaiting(TorchFunctionMode):
    """Refuses whatever would make the host wait for the device's numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_a_step_waits_for_nothing(use_moe: bool, optimizer: str) -> None:
    student = train_state(replace(SHAPE, use_moe=use_moe), dtype="bfloat16", optimizer=optimizer)
    micros = cut(rows(4, seed=5), 2)
    with NoWaiting():
        pending = [student.train_step.run(micros, 1e-3, unseeded) for _ in range(2)]
    with pytest.raises(AssertionError, match="tolist waits"), NoWaiting():
        pending[0].read()
    assert all(step.read().applied for step in pending)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_behind_a_bad_step_the_weights_stay_until_it_was_read(optimizer: str) -> None:
    student, batch = train_state(optimizer=optimizer), rows(4, seed=5)
    student.train_step.run(cut(batch, 4), 1e-2, unseeded)
    student.optimizer.step()
    before = [parameter.detach().clone() for parameter in student.model.parameters()]
    state = [value.clone() for each in student.optimizer.state.values() for value in each.values()]
    bad = [replace(micro, factor=float("nan")) for micro in cut(batch, 4)]
    pending = [student.train_step.run(micros, 1e-2, unseeded) for micros in (bad, cut(batch, 4))]
    assert [(step.read().applied, step.read().finite) for step in pending] == [(False, False), (False, True)]
    assert all(map(torch.equal, student.model.parameters(), before))
    after = [value for each in student.optimizer.state.values() for value in each.values()]
    assert all(map(torch.equal, after, state))
    student.train_step.guard.reset(NonFiniteCounters())
    assert student.train_step.run(cut(batch, 4), 1e-2, unseeded).read().applied
    assert not any(map(torch.equal, student.model.parameters(), before))

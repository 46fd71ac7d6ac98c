"""The plan and the rules under a simulated clock and simulated hosts. A failing seed replays by itself.

python -m pytest tests/simulation --seed-of-a-failure 123    is not needed: TRAINYARD_SIMULATION_SEED=123 does it
"""

import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta

import pytest

from tests import soak_report
from tests.simulation.simulated_cluster import SimulatedCluster
from tests.soak_report import SoakReport
from trainyard.service.jobs import lifecycle
from trainyard.service.timing import Timing

EVENTS = 200
SHORT_SEEDS = 400
LONG_SEEDS = 100_000


def simulate(seed: int) -> SimulatedCluster:
    """One world from its first event to its rest. Raises AssertionError with the seed and what led there."""
    world = SimulatedCluster(seed)
    try:
        for _ in range(EVENTS):
            world.step()
            world.check()
        world.come_to_rest()
    except AssertionError as error:
        path = " ".join(world.happened[-40:])
        raise AssertionError(f"seed {seed}, event {len(world.happened)}: {error}\n{path}") from error
    return world


def simulate_all(seeds: Iterable[int]) -> Counter[str]:
    """What happened in all of them, and how often."""
    done: Counter[str] = Counter()
    for seed in seeds:
        done.update(simulate(seed).done)
    return done


def test_some_hundred_seeds() -> None:
    given = os.environ.get("TRAINYARD_SIMULATION_SEED")
    simulate_all([int(given)] if given else range(SHORT_SEEDS))


def test_a_seed_is_the_same_world_each_time() -> None:
    one, two = simulate(5), simulate(5)
    assert one.happened == two.happened
    assert one.jobs == two.jobs
    assert one.hosts == two.hosts


def test_the_worlds_are_not_all_alike() -> None:
    """What never happens in the simulation is not tested by it."""
    worlds = [simulate(seed) for seed in range(150)]
    statuses = {job.status for world in worlds for job in world.jobs.values()}
    assert {"paused", "cancelled", "failed", "succeeded", "interrupted"} <= statuses
    assert max(len(job.attempts) for world in worlds for job in world.jobs.values()) >= 5
    assert any(process.closed for world in worlds for process in world.hosts.values())
    done = sum((world.done for world in worlds), Counter())
    for what in ("Preempt", "ended paused: preempted", "ended failed: max_restarts", "ended interrupted: agent_lost"):
        assert done[what] >= 3, what


@pytest.mark.parametrize("broken", ["two leases", "two attempts", "success of nothing"])
def test_the_checks_see_what_they_are_for(broken: str) -> None:
    world = SimulatedCluster(1)
    world.submit()
    world.schedule()
    job = next(iter(world.jobs.values()))
    world.check()
    if broken == "two leases":
        world.leases["cpu:99"] = job.id
    elif broken == "two attempts":
        name, process = next(iter(world.hosts.items()))
        world.hosts[type(name)(job.id, 2)] = process
    else:
        world.free(job, job.newest)
        job.status = type(job.status).SUCCEEDED
    with pytest.raises(AssertionError):
        world.check()


@pytest.mark.parametrize("rule", ["give up", "wait longer", "a step first", "lower priority"])
def test_a_rule_that_is_missing_is_found(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the simulation proves nothing about it."""
    match rule:
        case "give up":
            monkeypatch.setattr(lifecycle, "MAX_FRUITLESS_ATTEMPTS", 99)
        case "wait longer":
            monkeypatch.setattr(SimulatedCluster, "timing", Timing(setback_seconds=(5.0,)))
        case "a step first":
            monkeypatch.setattr(
                SimulatedCluster,
                "live",
                lambda world, job, live=SimulatedCluster.live: replace(live(world, job), moved=True),
            )
        case _:
            monkeypatch.setattr(
                SimulatedCluster,
                "live",
                lambda world, job, live=SimulatedCluster.live: replace(live(world, job), priority=-1),
            )
    with pytest.raises(AssertionError, match=MISSED[rule]):
        simulate_all(range(SHORT_SEEDS))


MISSED = {
    "give up": "gets nowhere and is started again",
    "wait longer": "restarts too soon",
    "a step first": "has made no step since",
    "lower priority": "is not more important",
}


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_hundred_thousand_seeds(account: SoakReport) -> None:
    seeds = int(soak_report.chosen("SEEDS", LONG_SEEDS))
    began = time.perf_counter()
    account.faults = simulate_all(range(seeds))
    took = time.perf_counter() - began
    account.invariants.append(f"{seeds:,} seeds of {EVENTS} events, {seeds / took:.0f} a second: no invariant broken")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_delays_no_restart_and_hides_no_lost_agent(hours: int) -> None:
    """Set back, "not heard for five seconds" would be true an hour late, and devices stay with a dead attempt."""
    world = SimulatedCluster(1)
    world.submit()
    world.schedule()
    world.agents_speak()
    (process,) = world.hosts.values()
    (job,) = world.jobs.values()
    world.hear(next(iter(world.hosts)), process)
    assert job.status == "running"
    process.agent = process.ranks = False
    world.now += timedelta(hours=hours)
    world.schedule()
    assert job.status == "interrupted"
    world.now += timedelta(hours=hours)
    world.schedule()
    assert job.status == "queued"
    world.schedule()
    assert job.status == "starting"


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_declares_nothing_dead(hours: int) -> None:
    world = SimulatedCluster(2)
    world.submit()
    world.schedule()
    (name,) = world.hosts
    world.hear(name, world.hosts[name])
    world.now += timedelta(hours=hours)
    for _ in range(5):
        world.schedule()
        world.now += timedelta(seconds=1)
    assert world.hosts[name].lives
    assert world.jobs[name.job_id].status == "running"

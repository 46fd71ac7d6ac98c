"""A nursery of services, and homes whose invariants are checked when the test is over, whatever it was about."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import invariants
from tests.faults.invariants import Sampler
from tests.faults.service_home import Home, Nursery

MakeHome = Callable[..., Home]


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def make_home(nursery: Nursery, tmp_path: Path) -> Iterator[MakeHome]:
    """Homes with the process table watched; afterwards every invariant is checked and nothing is left."""
    made: list[tuple[Home, Sampler]] = []

    def make(name: str = "home", **wanted: Any) -> Home:
        home = Home(nursery, tmp_path / name, **{"scale": 0.1, **wanted})
        made.append((home, Sampler(home)))
        made[-1][1].__enter__()
        return home

    yield make
    try:
        for home, sampler in made:
            sampler.__exit__()
            invariants.check(home, sampler, home.damage)
    finally:
        for home, _ in made:
            home.end_all()


@pytest.fixture
def home(make_home: MakeHome) -> Home:
    """A home whose service runs."""
    made = make_home()
    made.start()
    return made

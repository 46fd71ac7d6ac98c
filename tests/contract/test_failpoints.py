"""Failpoints: functions are found by area, and an armed action runs at its point only."""

import pytest

from trainyard.contract.failpoints import arm, armed, disarm, failpoint, hit, marked_code


@failpoint("test_area.first")
def first() -> None:
    pass


@failpoint("test_area.second", "test_other")
def second() -> None:
    pass


def test_marked_code_is_that_of_an_area() -> None:
    assert marked_code("test_area") == {first.__code__, second.__code__}
    assert marked_code("test_area.first") == {first.__code__}
    assert marked_code("test_area.first", "test_other") == {first.__code__, second.__code__}


@pytest.mark.parametrize("area", ["nowhere", "test", "test_area.fir"])
def test_an_area_without_marks_is_an_error(area: str) -> None:
    with pytest.raises(LookupError, match=area):
        marked_code("test_area", area)


def test_only_functions_are_marked() -> None:
    with pytest.raises(AssertionError, match="below @property"):
        failpoint("test_wrong")(property(lambda _: None))  # type: ignore[type-var]


def test_an_armed_action_runs_until_it_is_disarmed() -> None:
    reached: list[str] = []
    hit("test_point")
    arm("test_point", reached.append)
    hit("test_point", "armed")
    hit("test_point_of_another_name")
    disarm("test_point")
    hit("test_point")
    with pytest.raises(ZeroDivisionError), armed("test_point", lambda: reached.append(str(1 / 0))):
        hit("test_point")
    hit("test_point")
    assert reached == ["armed"]

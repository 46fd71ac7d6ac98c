"""What every test may use, and which modules come first."""

import pytest

from tests.soak_report import account, pytest_configure, pytest_report_header, pytest_terminal_summary

__all__ = ["account", "pytest_configure", "pytest_report_header", "pytest_terminal_summary"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with real runs first: a long one that comes last would keep one process busy and the others idle."""
    long = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in long)

"""What every test may use."""

from tests.soak import account, pytest_configure, pytest_report_header, pytest_terminal_summary

__all__ = ["account", "pytest_configure", "pytest_report_header", "pytest_terminal_summary"]

"""Standard streams of the commands.

The reader of the output may have exited, the disk may be full, a stream may be closed, and the terminal's encoding may
lack a character. Without this module each of them ends a command with a traceback.
"""

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

EXIT_OUTPUT_FAILED = 1
EXIT_INTERRUPTED = 130


class ReaderGone(Exception):
    """The reader of stdout has exited, as `head` does. This is not an OSError, which a command handles as its own."""


class OutputFailed(Exception):
    """The output cannot be written, for example because the disk is full."""


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run ``command`` with safe standard streams and return the exit code. ``name`` begins the error messages."""
    before = sys.stdin, sys.stdout, sys.stderr
    _open_missing()
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - open until the process ends
    sys.stdout, sys.stderr = _guarded(sys.stdout, _OutputFile(1)), _guarded(sys.stderr, _ErrorFile(2))
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except ReaderGone:
        _discard_output()
        return EXIT_INTERRUPTED
    except OutputFailed as error:
        _discard_output()
        print(f"{name}: the output cannot be written: {error}", file=sys.stderr, flush=True)
        return EXIT_OUTPUT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        with suppress(ReaderGone, OutputFailed):
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def ignore_output_errors() -> None:
    """Make stdout and stderr drop what they cannot print, without an error: a full disk must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.flush()
    _open_missing()
    sys.stdout, sys.stderr = (
        _guarded(stream, _ErrorFile(descriptor), line_buffering=True)
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2))
    )


class _OutputFile(io.FileIO):
    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise ReaderGone from None
        except OSError as error:
            raise OutputFailed(error.strerror) from error


class _ErrorFile(_OutputFile):
    def write(self, data: "ReadableBuffer", /) -> int:
        # A message that cannot be written must not hide the exit code.
        try:
            return super().write(data)
        except (ReaderGone, OutputFailed):
            return memoryview(data).nbytes


def _guarded(stream: TextIO | None, file: io.FileIO, *, line_buffering: bool | None = None) -> TextIO:
    encoding = stream.encoding if stream is not None else "utf-8"
    # A name may have characters that the terminal's encoding lacks; they are written as \u4e2d.
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=file.isatty() if line_buffering is None else line_buffering,
    )


def _open_missing() -> None:
    # If a stream is closed (`>&-`), the next file that is opened gets its number, and the output would go into it.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number


def _discard_output() -> None:
    # What is still buffered goes to the null device when the interpreter flushes stdout at exit.
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.close(descriptor)

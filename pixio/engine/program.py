"""The edges of every program: output that outlives its reader, and one line for a user's mistake."""

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def program(name: str, extra: str, failures: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Run the body of a program: a mistake or a failure ends it with one line and exit status 1, Ctrl-C with
    130 where the body does not handle it.

    Args:
        name: of the program, in messages.
        extra: of the package, which brings the libraries the program needs.
        failures: exceptions, beside the common ones, whose message is all a user needs.
    """
    expected: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, *failures)
    with lasting_output():
        try:
            yield
        except expected as error:
            raise SystemExit(f"{name}: error: {explain(error, extra)}") from error
        except KeyboardInterrupt:  # where nothing is saved yet
            print(f"{name}: interrupted", file=sys.stderr)
            raise SystemExit(130) from None


def explain(error: Exception, extra: str = "all") -> str:
    """The message of `error`: of a library that is not installed with the extra that brings it, and of a file
    that the system refused with its whole path.
    """
    if isinstance(error, ModuleNotFoundError) and error.name:
        library = error.name.partition(".")[0]
        return f"{library} is not installed: pip install 'pixio[{extra}]' brings it"
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str | os.PathLike):
        return f"{Path(error.filename).absolute()}: {error.strerror}"
    return str(error)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keep the program going when stdout or stderr cannot be written to, and show a warning as one line.

    A reader that goes away (`| head`) gets no more, a full disk gets nothing until there is space again, and
    characters that the terminal does not know are escaped.
    """
    shown = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of code
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with redirect_stdout(_Lasting(sys.stdout)), redirect_stderr(_Lasting(sys.stderr)):
        try:
            yield
        finally:
            warnings.formatwarning = shown
            sys.stdout.flush()


class _Lasting:
    """A text stream whose failures end nobody."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._forget(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._forget(error)

    def _forget(self, error: OSError) -> None:
        if error.errno == errno.EPIPE:  # what is still in buffers must find a taker too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

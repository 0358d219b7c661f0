"""The library `datasets`, for what is read from the Hugging Face Hub or was saved by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from softprompt_registry.errors import DataError


@contextmanager
def datasets_library(doing: str, expected: str = "a dataset that this machine can reach") -> Iterator[Any]:
    """The library, which comes with the extra `hub`.

    Args:
        doing: what is being read, for the error messages.
        expected: what the library needs to find there.

    Raises:
        DataError: the library is not installed, or fails in the block.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{doing}: the package 'datasets' is not installed; expected it for data on the Hub and saved copies of it. "
            "Run `pip install 'softprompt-registry[hub]'`, or use local files."
        ) from error
    try:
        yield datasets
    except DataError:
        raise
    except Exception as error:  # what goes wrong between here and the Hub comes from a dozen libraries
        unreached = " cannot reach the Hugging Face Hub" if isinstance(error, ConnectionError) else " failed"
        message = str(error).strip().partition("\n")[0][:200]
        raise DataError(
            f"{doing}: `datasets`{unreached} ({type(error).__name__}: {message}); expected {expected}. Check the name and "
            "the network, or use local files."
        ) from error

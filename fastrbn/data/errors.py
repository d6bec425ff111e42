"""Errors of data on disk or on the network.

Each class also derives from the built-in exception that callers expect, so `except FileNotFoundError` works without
this module.
"""

__all__ = ["BadDataError", "DataError", "DataNotFoundError", "DownloadError"]


class DataError(Exception):
    """Base class of all data set errors."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A folder, a file or a named data set does not exist."""


class BadDataError(DataError, ValueError):
    """Data exists but is invalid: truncated, unreadable, an empty class, images of different sizes."""


class DownloadError(DataError, OSError):
    """A download failed: no network, or a damaged file. No partial files are left behind."""

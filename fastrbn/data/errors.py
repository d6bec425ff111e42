"""What can go wrong with data on disk or on the network.

Every class also derives from the built-in exception a caller would think of, so `except FileNotFoundError` works
without knowing this module.
"""

__all__ = ["BadDataError", "DataError", "DataNotFoundError", "DownloadError"]


class DataError(Exception):
    """Root of all data set errors; catch it to catch any of them."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A folder, a file or a named data set is not there."""


class BadDataError(DataError, ValueError):
    """Something is there, but its content breaks a rule: truncated, unreadable, an empty class, differing sizes."""


class DownloadError(DataError, OSError):
    """A download failed: no network, or a file that arrived damaged. Nothing half finished is left behind."""

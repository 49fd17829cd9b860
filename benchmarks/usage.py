"""The error of a wrong request on the command line."""


class UsageError(ValueError):
    """A wrong argument; shown as one line, exit code 2."""

"""The errors a user can cause. The command line prints each as one line on stderr."""

from __future__ import annotations


class KogcError(Exception):
    """A request that cannot be met: one line that names the file, key or flag at fault."""

    exit_status: int = 1


class UsageError(KogcError):
    """A command line that makes no sense as it stands."""

    exit_status: int = 2

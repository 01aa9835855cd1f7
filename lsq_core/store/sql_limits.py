"""Messages about queries beyond their limits, for both processes of :mod:`lsq_core.store.sql`."""


def timeout_message(seconds: float) -> str:
    """Return the message for a query that takes too long."""
    return (
        f"The query took longer than {seconds:g} s and was stopped; narrow it with WHERE, or count "
        "instead of listing rows."
    )


def memory_message(max_bytes: int) -> str:
    """Return the message for a query that needs too much memory."""
    return (
        f"The query needs more memory than its limit of {max_bytes >> 20} MiB; narrow it with "
        "WHERE, or count rows instead of listing them."
    )

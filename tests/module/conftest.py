from tests.pool import ranks  # noqa: F401  the session's rank processes

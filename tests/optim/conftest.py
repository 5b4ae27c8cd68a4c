from tests.pool import ranks  # noqa: F401

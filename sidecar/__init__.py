"""pgsidecar: a PostgreSQL connection pool that can say what happens inside it."""

__version__ = "0.1.0"

"""What the sidecar costs, next to PgBouncer and to no pooler at all: ``python -m bench``.

Measures: ``throughput``, ``recording``, ``scrape``, ``memory``, one module each, run by
``__main__`` on a ``rig`` (PostgreSQL and a private folder). ``poolers`` starts what is measured,
``pgbench`` loads it, ``results`` keeps the values, ``tables`` and ``render`` show them.
"""

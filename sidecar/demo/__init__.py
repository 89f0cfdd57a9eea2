"""``pgsidecar demo``: an embedded PostgreSQL, a lively workload through the sidecar, and a live view.

``run`` starts and stops the parts: ``install`` and ``postgres`` (also the tests' server), ``workload``
(a process of its own), ``figures`` and ``view``. Nothing is imported here: the workload does without
the sidecar's modules.
"""

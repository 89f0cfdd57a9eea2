"""Builds the hot modules with mypyc where PGSIDECAR_COMPILE=1 asks for it; plain Python otherwise.

Compiled, the sidecar's own share of a transaction is about half. It needs a C compiler and mypy,
so it is an option: ``make compiled``, or ``PGSIDECAR_COMPILE=1 pip install --no-build-isolation .``
where mypy and the dependencies are installed. Everything else is in pyproject.toml.
"""

import os

from setuptools import setup

# What runs for every message or transaction. Not: exceptions (class attributes are overridden),
# classes that need weak references, anything that runs once a connection.
HOT_MODULES = [
    "sidecar/work.py",
    "sidecar/events.py",
    "sidecar/sql.py",
    "sidecar/fingerprint.py",
    "sidecar/protocol/messages.py",
    "sidecar/pool/state.py",
    "sidecar/pool/server.py",
    "sidecar/pool/pool.py",
    "sidecar/proxy/expect.py",
    "sidecar/proxy/pins.py",
    "sidecar/proxy/policy.py",
    "sidecar/proxy/rewriter.py",
    "sidecar/proxy/texts.py",
    "sidecar/proxy/tags.py",
    "sidecar/proxy/statements.py",
    "sidecar/proxy/requests.py",
    "sidecar/proxy/replies.py",
    "sidecar/proxy/unleased.py",
    "sidecar/proxy/carrier.py",
    "sidecar/proxy/tables.py",
    "sidecar/proxy/errands.py",
    "sidecar/proxy/relay.py",
    "sidecar/observe/sketch.py",
    "sidecar/observe/statements.py",
    "sidecar/observe/histogram.py",
    "sidecar/observe/recorder.py",
]

if os.environ.get("PGSIDECAR_COMPILE") == "1":
    from mypyc.build import mypycify

    # one group: calls from module to module are calls in C
    setup(ext_modules=mypycify(HOT_MODULES, opt_level="3", group_name="pgsidecar"))
else:
    setup()

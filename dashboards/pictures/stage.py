"""Something to take pictures of: the demo's load, an application that forgets to commit, a Prometheus.

Owns: when the trouble begins, and when the pictures are taken. Does not own: the processes, which are
``deploy.observe``'s. All rules are as shipped, so the trouble lasts long enough for a page.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from dashboards.pictures.prometheus import PictureError
from deploy.observe.processes import CannotObserve
from deploy.observe.stack import running
from deploy.observe.trouble import forget

_FORGOTTEN: Final = 23  # transactions, of 25 connections
_TROUBLE: Final = 100.0  # seconds before the end; the page comes after one minute
_WAITING: Final = 'min_over_time(pgsidecar_pool_pending_requests{pool="main"}[2s])'
_BURST: Final = 60.0  # seconds within which the load has a burst, and clients wait


@contextmanager
def stage(seconds: float) -> Iterator[str]:
    """The URL of a Prometheus that has watched for so long, at a time at which clients wait."""
    try:
        with running(factor=1) as stack, ExitStack() as held:
            _wait(seconds - _TROUBLE)
            forget(stack.dsn, _FORGOTTEN, held)
            _wait(_TROUBLE)
            until = time.monotonic() + _BURST
            while not stack.prometheus.value(_WAITING) and time.monotonic() < until:
                _wait(0.5)
            yield stack.prometheus.url
    except CannotObserve as exc:
        raise PictureError(str(exc)) from exc


def _wait(seconds: float) -> None:
    time.sleep(max(0.0, seconds))

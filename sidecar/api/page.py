"""The page at ``/``, for people who open the address in a browser. Self-contained; loads nothing."""

from collections.abc import Callable, Iterable
from html import escape

from sidecar import __version__
from sidecar.events import PoolSnapshot

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>pgsidecar</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 48rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; width: 100%; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3rem .6rem; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
</head>
<body>
<h1>pgsidecar {version}</h1>
<table>
<tr><th>pool</th><th>server</th><th>used</th><th>idle</th><th>waiting</th><th>max</th>
<th>verdict</th></tr>
{rows}
</table>
<p><a href="metrics">metrics</a> · <a href="livez">live</a> · <a href="readyz">ready</a> ·
API: <a href="api/v1/why">why</a> · <a href="api/v1/pools">pools</a> · <a href="api/v1/waits">waits</a> ·
<a href="api/v1/holders">holders</a> · <a href="api/v1/statements">statements</a> ·
<a href="api/v1/incidents">incidents</a> · <a href="api/v1/openapi.json">all of it</a></p>
</body>
</html>
"""

_ROW = (
    "<tr><td>{name}</td><td>{state}</td><td>{used}</td><td>{idle}</td>"
    "<td>{waiting}</td><td>{max_size}</td><td>{verdict}</td></tr>"
)


def index_page(pools: Iterable[PoolSnapshot], verdict: Callable[[str], str]) -> str:
    """``verdict`` is what is wrong with a pool, in a word: everybody sees the page, and the sentence names
    applications."""
    rows = (
        _ROW.format(
            name=escape(pool.name),
            state="up" if pool.is_up else "down",
            used=pool.used,
            idle=pool.idle,
            waiting=pool.pending,
            max_size=pool.max_size,
            verdict=escape(verdict(pool.name).replace("_", " ")),
        )
        for pool in pools
    )
    return _PAGE.format(version=escape(__version__), rows="\n".join(rows))

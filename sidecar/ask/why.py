"""``pgsidecar why``: what is wrong with each pool right now, in ten lines.

Exit codes: 0 nothing is wrong, 1 something is, 2 the sidecar could not be asked.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Final, TextIO

from sidecar.ask.answers import Entry
from sidecar.ask.asker import Asker, CannotAsk

HEALTHY: Final = "healthy"
LINES: Final = 10
"""For all pools together, as long as each that has something wrong gets two."""

_PATH: Final = "/api/v1/why"
_DEADLINE: Final = 5.0  # s
_MOST: Final = 1000  # pools


def verdicts(answer: Entry) -> list[tuple[str, Entry]]:
    """Pool and verdict. Raises CannotAsk where there are none: no sidecar is without a pool."""
    found = [(item.text("pool"), item.entry("verdict")) for item in answer.entries("items")]
    if not found or not all(verdict.text("kind") for _, verdict in found):
        raise CannotAsk("the answer has no verdicts: is it a pgsidecar of this version?")
    return found


def is_healthy(verdict: Entry) -> bool:
    return verdict.text("kind") == HEALTHY


def headline(pool: str, verdict: Entry) -> str:
    """With the name of the pool, once."""
    told = verdict.text("headline") or verdict.text("kind").replace("_", " ")
    return told if f"pool {pool} ".lower() in told.lower() else f"{pool}: {told}"


def lines(found: Sequence[tuple[str, Entry]], most: int = LINES) -> list[str]:
    """What is wrong first, pool by pool; the healthy ones in one line."""
    wrong = [each for each in found if not is_healthy(each[1])]
    well = [pool for pool, verdict in found if is_healthy(verdict)]
    room = most - bool(well)
    told: list[str] = []
    for number, (pool, verdict) in enumerate(wrong):
        told += _of_one(pool, verdict, max(2, (room - len(told)) // (len(wrong) - number)))
    return told + ([f"{HEALTHY}: {', '.join(well)}"] if well else [])


def _of_one(pool: str, verdict: Entry, most: int) -> list[str]:
    """Headline, evidence, what to do next; of the evidence what there is room for, and of the steps
    one at least."""
    evidence = [f"  {each}" for each in verdict.texts("evidence")]
    steps = [f"  next: {each}" for each in verdict.texts("next_steps")]
    room = most - 1
    shown = evidence[: max(room - len(steps), room - 2, min(room, 1))]
    return [headline(pool, verdict), *shown, *steps[: room - len(shown)]]


async def run_why(asker: Asker, pool: str, as_json: bool, out: TextIO) -> int:
    """Returns the exit code; raises CannotAsk."""
    parameters: dict[str, str | int] = {"limit": _MOST} | ({"pool": pool} if pool else {})
    deadline = asyncio.get_running_loop().time() + _DEADLINE
    answer = await asker.get(_PATH, deadline, **parameters)
    found = verdicts(answer)
    if as_json:
        print(json.dumps(answer.value, indent=2), file=out)
    else:
        print("\n".join(lines(found)), file=out)
    return 0 if all(is_healthy(verdict) for _, verdict in found) else 1

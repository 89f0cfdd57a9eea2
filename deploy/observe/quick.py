"""The project's rules and routes on a faster clock: every duration divided, every threshold as it is.

A page that takes a minute to arrive, since a rule says ``for: 1m``, arrives in seconds. What is tried so
is the shipped files: expressions, labels, texts, routes and inhibitions are not touched.

Pure.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = r"(\d+)(ms|s|m|h|d)"
_IN_RULES: Final = re.compile(rf"(\[|^ *(?:keep_firing_)?for: ){_DURATION}(?=\]|$)", re.MULTILINE)
_AGE: Final = re.compile(r"(process_start_time_seconds > )(\d+)")
_OF_ROUTES: Final = ("group_wait", "group_interval", "repeat_interval")


def quick_rules(text: str, factor: float) -> str:
    """The text of a rule file: ranges, ``for``, ``keep_firing_for`` and the age of the process."""

    def shorter(match: re.Match[str]) -> str:
        return match[1] + _divided(match[2] + match[3], factor)

    text = _IN_RULES.sub(shorter, text)
    return _AGE.sub(lambda match: f"{match[1]}{int(match[2]) / factor:g}", text)


def quick_routes(text: str, factor: float, receivers: Mapping[str, str]) -> str:
    """The text of an Alertmanager configuration, with a webhook in place of each receiver.

    ``receivers`` has the webhook's URL by the receiver's name. Raises ValueError if these are others.
    """
    config: dict[str, Any] = yaml.safe_load(text)
    names = {receiver["name"] for receiver in config["receivers"]}
    if names != receivers.keys():
        raise ValueError(f"the receivers are {sorted(names)}, not {sorted(receivers)}")
    config["receivers"] = [
        {"name": name, "webhook_configs": [{"url": url, "send_resolved": True}]}
        for name, url in receivers.items()
    ]
    _quicken(config["route"], factor)
    return yaml.safe_dump(config, sort_keys=False)


def _quicken(route: dict[str, Any], factor: float) -> None:
    for key in _OF_ROUTES:
        if key in route:
            route[key] = _divided(route[key], factor)
    for child in route.get("routes", ()):
        _quicken(child, factor)


def _divided(duration: str, factor: float) -> str:
    match = re.fullmatch(_DURATION, duration)
    if match is None:
        raise ValueError(f"{duration!r} is not one number with one unit")
    return f"{max(1, round(int(match[1]) * _UNITS[match[2]] * 1000 / factor))}ms"

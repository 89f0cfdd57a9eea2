"""The HTTP API of a Prometheus, as far as pictures need it."""

import math
import re
import urllib.error
import urllib.parse
import urllib.request
from typing import Final

from pydantic import BaseModel

_TIMEOUT: Final = 30.0
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class PictureError(Exception):
    """No picture can be made, and why."""


class Series(BaseModel):
    """One of an answer's. Values stay text, as NaN and Inf have no form in JSON."""

    metric: dict[str, str]
    value: tuple[float, str] | None = None
    values: list[tuple[float, str]] | None = None

    def samples(self) -> list[tuple[float, str]]:
        if self.values is not None:
            return self.values
        return [] if self.value is None else [self.value]


class Exemplar(BaseModel):
    value: float
    timestamp: float


class _Result(BaseModel):
    result: list[Series]


class _Answer(BaseModel):
    data: _Result


class _SeriesExemplars(BaseModel):
    exemplars: list[Exemplar]


class _ExemplarAnswer(BaseModel):
    data: list[_SeriesExemplars]


class _ScrapeTarget(BaseModel):
    scrapeInterval: str


class _ScrapeTargets(BaseModel):
    activeTargets: list[_ScrapeTarget]


class _TargetsAnswer(BaseModel):
    data: _ScrapeTargets


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def scrape_interval(self) -> float:
        answer = _TargetsAnswer.model_validate_json(self._get("targets", state="active"))
        if not answer.data.activeTargets:
            raise PictureError(f"{self._url} scrapes nothing")
        return min(seconds(target.scrapeInterval) for target in answer.data.activeTargets)

    def instant(self, query: str, time: float) -> list[Series]:
        text = self._get("query", query=query, time=str(time))
        return _Answer.model_validate_json(text).data.result

    def range(self, query: str, start: float, end: float, step: float) -> list[Series]:
        aligned = math.floor(start / step) * step  # as Grafana does: the same points each time
        times = {"start": str(aligned), "end": str(end), "step": str(step)}
        text = self._get("query_range", query=query, **times)
        return _Answer.model_validate_json(text).data.result

    def exemplars(self, query: str, start: float, end: float) -> list[Exemplar]:
        text = self._get("query_exemplars", query=query, start=str(start), end=str(end))
        found = _ExemplarAnswer.model_validate_json(text).data
        return [exemplar for series in found for exemplar in series.exemplars]

    def _get(self, endpoint: str, **parameters: str) -> bytes:
        url = f"{self._url}/api/v1/{endpoint}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
                body: bytes = answer.read()
        except urllib.error.HTTPError as exc:
            said = exc.read().decode(errors="replace")
            raise PictureError(f"{endpoint} {parameters}: {exc.code} {said}") from exc
        except OSError as exc:
            raise PictureError(f"{self._url}: {exc}") from exc
        return body


def seconds(duration: str) -> float:
    """Of Prometheus' or Grafana's text for a duration, such as 1m30s or >10s."""
    found = re.findall(r"([\d.]+)(ms|[smhd])", duration)
    return sum(float(number) * _UNITS[unit] for number, unit in found)

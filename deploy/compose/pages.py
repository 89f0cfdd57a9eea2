"""What would page somebody, printed: a webhook receiver for Alertmanager.

    python pages.py PORT

Owns: the text. Each POST becomes a few lines on standard output, an alert each; the path names the
receiver. It runs in the sidecar's image but uses nothing of it, so this file is all there is.
"""

import json
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypedDict

EXAMPLE = "https://grafana.example.com"  # what the rules have in place of Grafana's address
LARGEST = 4 * 1024 * 1024  # bytes of a notification; one of 100 alerts has about 100 kB
SHOWN = ("pool", "instance")


class Alert(TypedDict):
    """An alert, as far as it is printed, as in Alertmanager's webhook of version 4."""

    status: str
    labels: dict[str, str]
    annotations: dict[str, str]


def told(receiver: str, alerts: list[Alert], grafana: str) -> Iterator[str]:
    """The lines for one notification."""
    for alert in alerts:
        labels, notes = alert["labels"], alert["annotations"]
        where = " ".join(f"{name}={labels[name]}" for name in SHOWN if name in labels)
        severity = labels.get("severity", "-")
        yield f"{receiver}: {alert['status'].upper()} {severity} {labels['alertname']} {where}"
        if alert["status"] == "firing":
            for name in ("description", "dashboard_url", "runbook_url"):
                if name in notes:
                    yield f"    {notes[name].strip().replace(EXAMPLE, grafana)}"


class Receiver(BaseHTTPRequestHandler):
    """POST prints, GET is for the health check."""

    timeout = 10

    def do_GET(self) -> None:
        self._answer(200)

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 <= length <= LARGEST:
                self._answer(413)
                return
            alerts = json.loads(self.rfile.read(length))["alerts"]
            lines = list(told(self.path.strip("/"), alerts, os.environ.get("GRAFANA_URL", EXAMPLE)))
        except (ValueError, KeyError, TypeError, AttributeError):
            self._answer(400)
            return
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
        self._answer(200)

    def _answer(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: only pages are printed."""


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(sys.argv[1])), Receiver).serve_forever()

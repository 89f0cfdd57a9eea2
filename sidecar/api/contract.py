"""The contract of the API, as the package has it: ``openapi.yaml``.

Read once, by whoever asks first: that takes 50 ms, so it belongs in a thread.
"""

import json
from functools import cache
from importlib.resources import files

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there


@cache
def contract() -> bytes:
    """As JSON."""
    text = files("sidecar.api").joinpath("openapi.yaml").read_bytes()
    return json.dumps(yaml.load(text, _LOADER), ensure_ascii=False).encode()

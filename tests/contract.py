"""The contract of the JSON API, as the file in the package has it, and answers held against it."""

from functools import cache
from importlib.resources import files
from typing import Any

import jsonschema_rs
import yaml

Json = dict[str, Any]

METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")


@cache
def contract() -> Json:
    text = files("sidecar.api").joinpath("openapi.yaml").read_text()
    document: Json = yaml.safe_load(text)
    return document


def found(reference: str) -> Json:
    """What ``#/components/...`` means."""
    here = contract()
    assert reference.startswith("#/"), reference
    for step in reference[2:].split("/"):
        here = here[step.replace("~1", "/").replace("~0", "~")]
    return here


def operation(path: str) -> Json:
    """GET of a documented path."""
    get: Json = contract()["paths"][path]["get"]
    return get


@cache
def response(path: str, status: int) -> Json:
    """What is documented of one answer."""
    responses = operation(path)["responses"]
    assert str(status) in responses, f"{path} has no answer {status}"
    one: Json = responses[str(status)]
    return found(one["$ref"]) if "$ref" in one else one


def validator(schema: Json) -> jsonschema_rs.Validator:
    """Of a schema that refers to the contract's components."""
    whole = {**schema, "components": contract()["components"]}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)


@cache
def _answers(path: str, status: int, content_type: str) -> jsonschema_rs.Validator:
    content = response(path, status)["content"]
    assert content_type in content, f"{path} {status}: {content_type}"
    return validator(content[content_type]["schema"])


def check(path: str, status: int, content_type: str, body: object) -> None:
    """The answer is one that the contract has."""
    errors = [
        f"{'/'.join(map(str, error.instance_path))}: {error.message}"
        for error in _answers(path, status, content_type).iter_errors(body)
    ]
    assert not errors, f"{path} {status}:\n" + "\n".join(errors[:10])


def is_a(schema: str, value: object) -> None:
    """The value is what the schema of this name says."""
    validator({"$ref": f"#/components/schemas/{schema}"}).validate(value)

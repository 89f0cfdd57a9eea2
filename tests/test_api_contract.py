"""The OpenAPI file itself: it is whole, follows its own rules, and is in the package."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract import METHODS, contract, found, validator

PATHS = contract()["paths"]


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """All objects of the document."""
    if isinstance(node, dict):
        yield node
        for each in node.values():
            yield from walk(each)
    elif isinstance(node, list):
        for each in node:
            yield from walk(each)


def test_every_reference_leads_somewhere():
    references = {node["$ref"] for node in walk(contract()) if isinstance(node.get("$ref"), str)}
    assert references
    for reference in references:
        found(reference)


def test_every_component_is_used():
    references = {node["$ref"] for node in walk(contract()) if isinstance(node.get("$ref"), str)}
    for kind in ("schemas", "parameters", "responses"):
        for name in contract()["components"][kind]:
            assert f"#/components/{kind}/{name}" in references


@pytest.mark.parametrize("name", contract()["components"]["schemas"])
def test_examples_are_what_the_schema_says(name: str):
    schema = contract()["components"]["schemas"][name]
    for example in schema.get("examples", []):
        validator({"$ref": f"#/components/schemas/{name}"}).validate(example)


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_read_only_and_tell_how_they_fail(path: str):
    """Who asks needs to know of the token, of parameters and of methods everywhere."""
    assert [method for method in METHODS if method in PATHS[path]] == ["get"]
    assert {"200", "400", "401", "403", "405"} <= PATHS[path]["get"]["responses"].keys()


def test_fields_have_their_unit_in_their_name():
    """A number that is a duration says seconds, one that only grows says total."""
    for name, schema in contract()["components"]["schemas"].items():
        for field, its in schema.get("properties", {}).items():
            if its.get("type") == "array":
                continue
            kind = its.get("$ref", "").rpartition("/")[2]
            is_time = kind in ("Seconds", "MaybeSeconds")
            assert is_time == ("seconds" in field.split("_")), f"{name}.{field}"
            assert (kind in ("Instant", "MaybeInstant")) == (
                field == "at" or field[-3:] == "_at"
            ), f"{name}.{field}"


def test_objects_say_which_fields_are_always_there():
    """A field is there or null; it does not come and go."""
    for name, schema in contract()["components"]["schemas"].items():
        if schema.get("additionalProperties") is False and name != "Problem":
            assert set(schema["required"]) == schema["properties"].keys(), name


def test_the_file_is_shipped():
    """An installed sidecar reads it from its package; setuptools packs only what is named."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["sidecar.api"] == ["openapi.yaml"]

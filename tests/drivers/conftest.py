"""The places where each driver is tried: PostgreSQL 16 and 18, transaction and session mode.

A test that asks for ``place`` runs in all four. Each test process has one server and one sidecar a
version, which all tests share.
"""

from collections.abc import Generator, Iterator

import pytest

pytest.register_assert_rewrite("tests.drivers.places")

from tests.drivers.places import MODES, Place, Stage  # noqa: E402  # after the line above

_stage = pytest.StashKey[Stage]()


@pytest.fixture(scope="session", params=[16, 18], ids=lambda version: f"pg{version}")
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    with Stage(request.param, tmp_path_factory.mktemp("stage")) as made:
        yield made


@pytest.fixture(params=MODES)
def place(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Place]:
    request.node.stash[_stage] = stage
    stage.check_neighbours()
    yield stage.place(request.param)
    stage.check_neighbours()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach what the sidecar has logged."""
    report = yield
    if report.failed and (stage := item.stash.get(_stage, None)) is not None:
        report.sections.append(("the sidecar's log", stage.log[-10_000:]))
    return report

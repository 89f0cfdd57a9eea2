"""docs/compatibility.md has a row for each driver that is tried here, and no other."""

import importlib
import re
from pathlib import Path

FOLDER = Path(__file__).parent
DOCUMENT = FOLDER.parent.parent / "docs" / "compatibility.md"
ROW = re.compile(r"^\| ([^|]+) \| ([\w., ]+) \| (.+) \|$", re.MULTILINE)


def tried() -> dict[str, tuple[str, str]]:
    """Version and features by driver, as the modules of this folder name them."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(FOLDER.glob("test_*.py")):
        if path != Path(__file__):
            module = importlib.import_module(f"tests.drivers.{path.stem}")
            found[module.DRIVER] = (module.VERSION, module.TRIED)
    return found


def documented() -> dict[str, tuple[str, str]]:
    section = DOCUMENT.read_text().split("## What was tried")[1].split("\n## ")[0]
    rows = ROW.findall(section)
    return {driver: (version, features) for driver, version, features in rows if driver != "Driver"}


def test_table_has_the_drivers_that_are_tried():
    assert documented().keys() == tried().keys()


def test_table_tells_what_is_tried():
    """Features to the letter; of the version what compatibility hangs on: the first number."""
    for driver, (version, features) in documented().items():
        real, real_features = tried()[driver]
        assert features == real_features, driver
        assert version.split(".")[0] == real.split(".")[0], f"{driver}: {version}, here {real}"

"""The wheel holds both packages and what they read at run time; pins and declared dependencies fit each other."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from chains import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_wheel_holds_both_packages_with_templates_and_the_command(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "clha", "flows", "pyproject.toml", "README.md", "LICENSE"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, tracked):  # setuptools leaves build/ and egg-info beside what it builds
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."],
        cwd=source,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"clha/losses.py", "flows/cli.py", "clha/stages/train.py"} <= names
    for data in (*(ROOT / "clha").rglob("*.jinja"), *(ROOT / "clha").rglob("*.css")):
        assert str(data.relative_to(ROOT)) in names
    entry = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "clha = flows.cli:main" in entry


def test_every_declared_dependency_is_pinned_and_has_its_reason():
    pins = (ROOT / "requirements" / "cpu.lock").read_text() + (ROOT / "requirements" / "models.lock").read_text()
    pinned = {line.split("==")[0].lower() for line in pins.splitlines() if "==" in line}
    reasons = (ROOT / "docs" / "dependencies.md").read_text().lower()
    extras = PROJECT["optional-dependencies"]
    for requirement in PROJECT["dependencies"] + extras["cpu"] + extras["demo"]:
        name = re.split(r"[=<>\[]", requirement)[0].lower()
        assert name in pinned, f"{name} is not pinned"
        assert name in reasons, f"{name} has no reason in docs/dependencies.md"


def test_the_volume_of_the_container_is_mounted_on_a_folder_that_its_user_owns():
    text = (ROOT / "Dockerfile").read_text()
    (mounted,) = re.findall(r"-v clha-home:(\S+)", text)
    as_root = text.split("\nUSER ")[0]
    assert re.search(rf"install -d -o clha -g clha [^\n]*{re.escape(mounted)}\n", as_root)

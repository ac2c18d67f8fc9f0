"""The command line, the Makefile and the README agree with each other."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import megagen
from megagen.cli.main import COMMANDS, main
from megagen.core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def megagen_command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megagen", *args], capture_output=True, text=True, timeout=60
    )


def test_help_lists_every_command_quickly() -> None:
    megagen_command("--help")  # byte-compiled now
    start = time.perf_counter()
    done = megagen_command("--help")
    assert time.perf_counter() - start < 5  # 0.1 s on a quiet machine; torch alone takes longer
    assert done.returncode == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"^\s+{name}\s+{re.escape(command.summary[:20])}", done.stdout, re.M)


def test_version() -> None:
    assert megagen_command("--version").stdout.strip() == megagen.__version__


def test_a_misspelt_command_is_refused() -> None:
    done = megagen_command("trian")
    assert done.returncode == 2
    assert "train" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str) -> None:
    done = megagen_command(name, "--help")
    assert done.returncode == 0, done.stderr


def test_doctor_names_what_is_there() -> None:
    done = megagen_command("doctor")
    assert done.returncode == 0, done.stderr
    for name in ("python", "torch", "megatron-core", "kernels: cpu", "kernels: reference"):
        assert re.search(rf"^{name} +\S", done.stdout, re.M), done.stdout


def test_user_errors_are_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise ConfigError("found 3.", remedy="Give 2.", where="training.x")

    monkeypatch.setattr("megagen.cli.doctor.doctor", fails)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "megagen: error: training.x: found 3. Give 2.\n"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


def test_what_the_readme_says_to_type_exists() -> None:
    blocks = re.findall(
        r"```(?:bash|sh|console)?\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    typed = "\n".join(blocks)
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z]+)", typed, re.M)) <= make_targets()
    assert set(re.findall(r"\bmegagen ([a-z]+)\b", typed)) <= set(COMMANDS)
    for path in re.findall(r"--config (\S+\.yaml)", typed):
        assert (ROOT / path).exists() or path == "run.yaml", path


def test_documents_link_to_what_exists() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_configuration_page_is_current() -> None:
    specification = importlib.util.spec_from_file_location(
        "config_reference", ROOT / "docs" / "config_reference.py"
    )
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert (ROOT / "docs" / "config.md").read_text() == module.page(), "run: make docs"


def test_constraints_satisfy_the_package() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert pins["torch"] == "2.13.0"

"""Files for forges, containers and citations parse, and say what the rest of the repository says."""

import json
import re
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from rlif_lightning.version import __version__

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_citation():
    """The fields that the Citation File Format asks for; the version is the package's."""
    found = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert (found["version"], found["license"]) == (__version__, "Apache-2.0")
    for work in (found, *found["references"]):
        assert work["title"] and work["authors"]
        assert all("name" in a or {"family-names", "given-names"} <= set(a) for a in work["authors"])
    papers = {i["value"].removeprefix("arXiv:") for r in found["references"] for i in r["identifiers"]}
    assert all(paper in README for paper in papers)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow(path):
    found = yaml.safe_load(path.read_text())
    assert found[True]  # YAML 1.1 reads the key `on` so
    assert "secrets." not in path.read_text()
    for job in found["jobs"].values():
        assert job["runs-on"] and all(("uses" in step) != ("run" in step) for step in job["steps"])
    runs = [step.get("run") for job in found["jobs"].values() for step in job["steps"]]
    if path.name == "checks.yml":
        assert ".ci/run" in runs
    if path.name == "publish.yml":
        assert found["jobs"]["publish"]["permissions"] == {"id-token": "write"}


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_issue_form(path):
    found = yaml.safe_load(path.read_text())
    if path.name != "config.yml":
        assert found["name"] and found["description"]
        assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in found["body"])


def test_container_runs_the_readmes_commands():
    lines = [x.split(" ", 1) for x in read(".devcontainer/Dockerfile").splitlines() if x and not x.startswith("#")]
    words = [word for word, _ in lines]
    assert words[:2] == ["ARG", "FROM"] and lines[1][1] == "${BASE}" and words[-1] == "CMD"
    assert set(words) <= {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "CMD"}
    commands = [text for word, text in lines if word == "RUN"] + [" ".join(json.loads(lines[-1][1]))]
    assert commands and all(command in README for command in commands)
    development = json.loads(read(".devcontainer/devcontainer.json"))
    assert (ROOT / ".devcontainer" / development["build"]["dockerfile"]).is_file()


def test_metadata():
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    metadata = settings["metadata"]
    assert metadata["author"] and metadata["keywords"] and metadata["license"] == "Apache-2.0"
    least = settings["options"]["python_requires"].removeprefix(">=")
    assert f"Programming Language :: Python :: {least}" in metadata["classifiers"]
    assert tomllib.loads(read("pyproject.toml"))["tool"]["ruff"]["target-version"] == "py" + least.replace(".", "")


def test_every_page_is_in_the_site():
    shown = re.findall(r": (\S+\.md)$", read("docs/mkdocs.yml"), re.MULTILINE)
    assert {path for path in shown if path.startswith("docs/")} == {
        f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")
    }
    assert all((ROOT / path).is_file() for path in shown)

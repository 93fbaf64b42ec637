"""The documentation is held against the code: keys, codes, columns, flags, commands, links and the map of the package."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from imgbatch import cli, errors, rejects, schema
from imgbatch.config.reading import load
from imgbatch.config.sections import IMAGE_SUFFIXES, Config, describe
from imgbatch.config.training import Training
from imgbatch.orchestration.metrics import METRICS
from imgbatch.sources import split_words
from tests import generated_pages

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}
PAGES |= {f"docs/{name}": text for name, text in DOCS.items()}
KEYS = {key for kind in (Config, Training) for key, _, _ in describe(kind)}


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 180


def test_the_page_about_the_configuration_is_that_of_the_code() -> None:
    assert DOCS["configuration.md"] == generated_pages.page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES)
def test_every_key_that_a_page_names_exists(page: str) -> None:
    sections = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))
    named = set(re.findall(rf"`((?:{sections})\.[a-z0-9_]+)(?=[`=.])", PAGES[page]))
    files = {name for name in named if name.rpartition(".")[2] in ("py", "json", "yaml", "parquet", "safetensors")}
    assert named - files <= KEYS


def test_every_module_that_the_architecture_names_exists() -> None:
    prose = DOCS["architecture.md"].partition("## Map")[0]
    named = set(re.findall(r"`((?:\w+/)+\w*(?:\.py)?)`", prose)) - {"jobs/", "runtimes/"}
    assert len(named) > 30
    for name in named - {path for path in named if path.startswith(("imgbatch/", "labels/", "rejects/", "runs/"))}:
        assert (ROOT / "imgbatch" / name).exists(), name


def test_the_map_is_that_of_the_package() -> None:
    assert DOCS["architecture.md"] == generated_pages.architecture(), "run `make docs`"


def test_every_column_and_reason_is_documented() -> None:
    tables = DOCS["outputs.md"]
    for name in {*schema.LABELS.names, *schema.REJECTS.names}:
        assert re.search(rf"\b{name}\b", tables), name
    reasons = re.search(r"The reasons are: ([\w,\s]+)\.", tables)
    assert reasons and set(re.findall(r"\w+", reasons[1])) == set(rejects.REASONS)


def test_every_known_suffix_is_documented() -> None:
    known = re.search(r"Known are ([\w,\s]+)\.", DOCS["inputs.md"])
    assert known and set(re.findall(r"\w+", known[1])) == set(IMAGE_SUFFIXES)


@pytest.mark.parametrize("page", [README, DOCS["outputs.md"]], ids=["README.md", "outputs.md"])
def test_every_exit_code_is_in_pages_and_help(page: str) -> None:
    table = re.findall(r"^\| ([\d, ]+) \|[^|]*\|([^|\n]*)\|", page, re.MULTILINE)
    rows = {int(code): retry.strip() for codes, retry in table for code in codes.split(",")}
    assert rows.keys() == {entry.code for entry in errors.EXIT_CODES}
    for entry in errors.EXIT_CODES:
        assert rows[entry.code] == ("yes" if entry.retry else "no" if entry.code else "")
        assert re.search(rf"^  {entry.code:<3}  {re.escape(entry.meaning[:20])}", cli.EXIT_CODES, re.MULTILINE)


def test_the_page_about_outputs_has_the_table_of_exit_codes() -> None:
    for entry in errors.EXIT_CODES:
        retry = "yes" if entry.retry else "no" if entry.code else ""
        row = f"| {entry.code} | {entry.meaning} | {retry} | {entry.action} |".replace("|  |", "| |").replace(
            "|  |", "| |"
        )
        assert row in DOCS["outputs.md"]


@cache
def help_of(job: str) -> str:
    """Return what `--help` of a job prints."""
    done = subprocess.run([sys.executable, f"jobs/{job}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags_of(job: str) -> set[str]:
    """Return the flags of a job, --help apart."""
    return set(re.findall(r"^  (--[a-z-]+)", help_of(job), re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "own"), [("classify", {"--limit", "--dry-run"}), ("evaluate", {"--against", "--labels", "--split"})]
)
def test_the_command_line_is_frozen_since_new_knobs_go_into_the_config(name: str, own: set[str]) -> None:
    assert flags_of(name) == {
        "--config",
        "--set",
        "--quiet",
        "--log-format",
        "--version",
        "--input",
        "--output",
        "--model",
        "--date",
        *own,
    }
    assert all(key in help_of(name) for key, _, _ in describe() if "." in key)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command that runs a job and stands in a block of code."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if match := re.match(r"    (?:\.venv/bin/)?python jobs/(.*)", line):
            yield shlex.split(match[1], comments=True)


COMMANDS = [(page, " ".join(words), words) for page, text in PAGES.items() for words in commands(text)]


@pytest.mark.parametrize(("page", "line", "words"), COMMANDS, ids=[f"{page}: {line}" for page, line, _ in COMMANDS])
def test_every_command_has_a_job_and_flags_that_exist(page: str, line: str, words: list[str]) -> None:
    job, *rest = words
    assert (ROOT / "jobs" / job).exists()
    assert {word for word in rest if word.startswith("--")} <= flags_of(job.removesuffix(".py"))
    settings = [after for flag, after in pairwise(rest) if flag == "--set"]
    assert {setting.partition("=")[0] for setting in settings} <= KEYS


def test_pages_have_commands() -> None:
    assert len([page for page, _, _ in COMMANDS if page == "README.md"]) >= 4
    assert len(COMMANDS) > 15


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_every_page_is_linked_from_the_readme() -> None:
    assert {f"docs/{name}" for name in DOCS} <= set(re.findall(r"\]\((docs/[\w.-]+)", README))


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "runs").glob("*.toml")), ids=lambda path: path.name)
def test_every_named_run_is_a_valid_config(path: Path) -> None:
    assert load(str(path)).input


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert targets and set(re.findall(r"^  make ([\w-]+)", shown, re.MULTILINE)) == set(targets[1].split())


def test_dependencies_are_pinned_by_plain_lines() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", line) for line in lines)
    pinned = {line.partition("==")[0].lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in ("demo", "test", "check") for name in project["optional-dependencies"][extra]),
        *(ROOT / "tests" / "clients" / "requirements.txt").read_text().split(),
        *(ROOT / "tests" / "stores" / "requirements.txt").read_text().split(),
    ]
    assert {re.match(r"[A-Za-z0-9-]+", name)[0].lower() for name in wanted} <= pinned  # type: ignore[index]


def test_the_sums_on_the_page_about_clusters_are_right() -> None:
    done = doctest.testfile(str(ROOT / "docs" / "cluster.md"), module_relative=False)
    assert done.attempted and not done.failed


@pytest.mark.parametrize("page", ["guarantees.md", "reliability.md", "security.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    tests: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests[path.name] = tests.get(path.name, "") + path.read_text()  # two folders may have one of a name
    named = re.findall(r"`(test_\w+\.py|…)(?:::(\w+))?`", DOCS[page])
    assert len(named) > 10
    file = ""
    for found, function in named:
        file = file if found == "…" else found
        assert file in tests and f"def {function}" in tests[file], f"{file}::{function}"


def test_every_metric_is_described_as_in_the_code() -> None:
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        kind = "counter" if metric.counter else "gauge"
        assert f"| `{metric.exported_name}` | {kind} | {labels} | {metric.help} |\n" in DOCS["monitoring.md"]


def test_the_page_about_labels_and_splits_names_what_there_is() -> None:
    page = DOCS["labels-and-splits.md"]
    ours = {"labels", "label_column", "label_depth", "splits", "split_column", "uri_template"}
    assert {f"source.{name}" for name in ours} <= set(re.findall(r"source\.[a-z_]+", page))
    words = re.search(r"Split words are (.*?)\.", page, re.S)
    assert words is not None and set(re.findall(r"[a-z]+", words[1])) - {"and"} == set(split_words.WORDS)

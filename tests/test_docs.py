"""What README and docs point at is there: files, headings, verbs of the command, programs of the clone."""

import ast
import re
from pathlib import Path

import pytest

from elvsm_nerfstudio import cli
from elvsm_nerfstudio.cli import data

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("assets/*.md")])
BEFORE = re.compile(r"^\| `python scripts/.*$", re.MULTILINE)
"""Rows of the changelog that say what programs were called before."""


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.resolve().parent != ROOT / "assets":  # which sections a card has depends on what was scored
            assert anchor in headings(path), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_that_are_named_exist(page):
    text = BEFORE.sub("", page.read_text())
    for verb, second in re.findall(r"(?:^|[`\s])elvsm ([a-z]+)(?: ([a-z-]+))?", text, re.MULTILINE):
        assert verb in cli.VERBS, f"{page.name}: elvsm {verb}"
        if verb == "data" and second:
            assert second in data.VERBS, f"{page.name}: elvsm data {second}"
    for module in re.findall(r"python -m (scripts\.[a-z0-9_.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{page.name}: {module}"
    for script in re.findall(r"(scripts/[a-z0-9_/]+\.(?:py|sh))", text):
        assert (ROOT / script).is_file(), f"{page.name}: {script}"


def test_every_verb_is_told_of_in_the_readme_or_the_docs():
    text = "".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    missing = [verb for verb in cli.VERBS if f"elvsm {verb}" not in text]
    assert not missing


def commands() -> list[tuple[str, str]]:
    """Calls of `elvsm` on pages and in texts of the package, and where they are."""
    texts = [(page.name, BEFORE.sub("", page.read_text())) for page in PAGES]
    for file in sorted((ROOT / "elvsm_nerfstudio").rglob("*.py")):
        strings = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
        texts += [(file.name, text) for text in strings if isinstance(text, str)]
    call = re.compile(r"(?:^|[`\s])elvsm ([a-z]+)( (?:(?!elvsm )[^`|#\n]|\\\n)* --(?:(?!elvsm )[^`|#\n]|\\\n)*)")
    return [(f"{place}: elvsm {verb}{rest}", verb, rest) for place, text in texts for verb, rest in call.findall(text)]


def test_options_of_commands_that_are_named_exist(capsys):
    known: dict[str, set[str]] = {}
    for place, verb, rest in commands():
        rest = re.split(r" (?:colmap|nerfstudio-data)\b|; ", rest)[0]  # a dataparser's, or another sentence
        name = " ".join([verb, *rest.split()[:1]]) if verb in ("data", "fetch") else verb
        if name not in known:
            with pytest.raises(SystemExit):
                cli.main([*name.split(), "--help"])
            known[name] = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
        unknown = set(re.findall(r"--[a-z][a-z0-9-]*", rest)) - known[name]
        assert not unknown, place
    assert len(known) > 8

"""What README and docs point at is there: files, headings, verbs, programs; what they copy of results agrees."""

import ast
import json
import re
import subprocess
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


CARD = "assets/efficient-lvsm-plus-tiny.md"


def captioned() -> str:
    """What README says of the picture that it opens with, in one line."""
    caption = re.search(r"^\*(Every fifth .*?)\*$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return caption[1].replace("\n", " ")


def test_numbers_of_the_readme_s_picture_are_those_of_the_comparison():
    objects = json.loads((ROOT / "docs/results/against_splatfacto.json").read_text())["objects"]
    sentence = (
        r"`splatfacto-lvsm` is (\S+), (\S+) and (\S+) dB ahead of `splatfacto-sparse` from 2, 4 and 8 photos, and "
        r"ahead of the network alone at each; the network, which needs no fit, is (\S+) dB ahead from 2\."
    )
    *both, network = re.search(sentence, captioned()).groups()

    def ahead(method: str, views: str) -> str:
        psnr = {name: found[views]["psnr"] for name, found in objects["methods"].items()}
        return f"{psnr[method] - psnr['splatfacto-sparse']:.1f}"

    assert network == ahead("efficient-lvsm-plus-tiny", "2")
    for gain, views in zip(both, ("2", "4", "8"), strict=True):
        assert gain == ahead("splatfacto-lvsm", views)
        assert float(gain) > float(ahead("efficient-lvsm-plus-tiny", views))


def test_numbers_of_the_readme_s_picture_are_those_of_the_card():
    card = (ROOT / CARD).read_text()
    found = re.search(r"of (\d+) objects.*?(\S+) M parameters, (\d+) px, (\d+) hours on one CPU core", captioned())
    objects, parameters, size, hours = found.groups()
    assert f", {parameters} M parameters |" in card and f"| size | {size} x {size} px" in card
    stages = re.search(r"^\| training time \| (.*) hours on one CPU core \|$", card, re.MULTILINE)[1]
    assert hours == f"{sum(map(float, stages.split(' + '))):.0f}"
    assert objects == re.search(r"^(\d+) objects, ", card, re.MULTILINE)[1]


def table_of(text: str) -> list[list[str]]:
    """The cells of the first table of a text, without deviations and without the line below the headings."""
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.split(" +- ")[0] for cell in row.strip("| ").split(" | ")] for row in rows if "---" not in row]


def scores_at(commit: str) -> dict[str, dict[str, str]]:
    """What a commit's card says of held-out objects, reduced to 64 px where they are larger: by views and metric."""
    shown = subprocess.run(["git", "show", f"{commit}:{CARD}"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        pytest.skip(f"{commit} is not in this clone")
    sections = dict(part.split("\n", 1) for part in shown.stdout.split("\n## ")[1:])
    head, *rows = table_of(sections.get("The same, reduced to 64 x 64") or sections["Held-out objects"])
    return {row[0]: dict(zip(head, row)) for row in rows}


@pytest.mark.parametrize("title", ["A last stage with a perceptual loss", "At 128 px", "Borders of patches"])
def test_tables_of_earlier_weights_are_those_of_their_cards(title):
    page = (ROOT / "docs/experiments.md").read_text()
    head, *rows = table_of(page.split(f"\n## {title}\n")[1])
    metric, compared = "", 0
    for column, name in enumerate(head[1:], 1):
        metric, commit = re.fullmatch(r"(?:(.+) )?at ([0-9a-f]{7})", name).groups(default=metric)
        scores = scores_at(commit)
        for row in rows:
            assert row[column] == scores[row[0]][metric], f"{metric} from {row[0]} views at {commit}"
            compared += 1
    assert compared == 30

"""scripts/benchmarks/attention_cpu.py: a table of ratios, written into a page."""

import re

from scripts.benchmarks.attention_cpu import table
from scripts.benchmarks.pages import write_part


def test_a_row_for_each_shape_and_what_machine_it_is_of(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- attention-cpu -->\n<!-- /attention-cpu -->\nEnd.\n")
    write_part(page, "attention-cpu", table({"small": (2, 3, 5, 7), "other": (1, 1, 4, 4)}, turns=4))
    lines = page.read_text().splitlines()
    ratio = r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)"
    assert re.fullmatch(rf"\| small \| {ratio} \| {ratio} \|", lines[6]) and lines[7].startswith("| other |")
    middle, low, high = (float(x) for x in re.findall(r"\d+\.\d\d", lines[6])[:3])
    assert 0 < low <= middle <= high
    assert re.search(r"AMX, torch \S+, 1 thread, 4 turns$", lines[9]) and lines[-1] == "End."

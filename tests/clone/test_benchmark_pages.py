"""scripts/benchmarks/pages.py: parts of pages."""

import pytest

from scripts.benchmarks import pages


@pytest.mark.parametrize("has_amx", [False, True])
def test_processors_with_amx_have_parts_of_their_own_where_a_page_tells_them_apart(tmp_path, monkeypatch, has_amx):
    monkeypatch.setattr(pages, "HAS_AMX", has_amx)
    page = tmp_path / "page.md"
    page.write_text("<!-- one -->\n<!-- /one -->\n<!-- two -->\n<!-- /two -->\n<!-- two-amx -->\n<!-- /two-amx -->\n")
    for name in ("one", "two"):
        pages.write_part(page, pages.part_of_this_processor(page, name), f"of {name}")
    two = "two-amx" if has_amx else "two"
    assert "<!-- one -->\n\nof one\n\n<!-- /one -->\n" in page.read_text()
    assert f"<!-- {two} -->\n\nof two\n\n<!-- /{two} -->\n" in page.read_text()
    assert page.read_text().count("of ") == 2


def test_a_page_without_the_part_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("<!-- one -->\n")
    with pytest.raises(ValueError, match="page.md: expected the lines <!-- one --> and <!-- /one -->"):
        pages.write_part(tmp_path / "page.md", "one", "text")

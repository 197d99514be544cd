"""scripts/benchmarks/rendered_views.py: rows are kept for the weights that they are of."""

import json

from scripts.benchmarks.rendered_views import rows_of


def test_rows_of_other_weights_or_steps_are_not_kept(tmp_path):
    file, of, rows = tmp_path / "rows.json", {"weights": "one", "fingerprint": "abc", "steps": 5}, [{"scene": "cup"}]
    file.write_text(json.dumps({**of, "rows": rows}))
    assert rows_of(file, of) == rows
    for changed in ({"fingerprint": "def"}, {"steps": 6}):
        assert rows_of(file, {**of, **changed}) == []
    assert rows_of(tmp_path / "none.json", of) == []
    file.write_text(json.dumps({"weights": "one", "steps": 5, "rows": rows}))  # of before fingerprints were kept
    assert rows_of(file, of) == []

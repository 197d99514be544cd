"""The benchmark that sets Gaussians with and without rendered views beside the network."""

import json

import pytest
import torch
from PIL import Image

from elvsm_nerfstudio.compare.layout import Job, Layout, MethodSpec
from elvsm_nerfstudio.compare.runs import jobs_of
from elvsm_nerfstudio.compare.scoring import frame_file
from elvsm_nerfstudio.evaluation.report import write_image
from scripts.benchmarks.against_splatfacto import Args, comparisons, kept, main, pictures, plot, with_other_rows
from scripts.benchmarks.pages import write_part
from scripts.benchmarks.splatfacto_tables import summary, tables
from scripts.benchmarks.turning import CAPTION, GAP, PANEL, turn, write_animation


def result(*methods: tuple[str, str, float]) -> dict:
    """A comparison on one scene from 2 and 4 views; all methods fail on the fourth number."""
    listed, records = [], []
    for name, kind, psnr in methods:
        metrics = {"psnr": psnr, "psnr_std": 1.0, "lpips_vgg": 0.25, "lpips_vgg_std": 0.01}
        done = {
            "num_done": 1,
            "num_failed": 0,
            "metrics": metrics,
            "scenes": {"cup": metrics},
            "render_ms": {"median": 3},
        }
        summaries = {"2": done, "4": {"num_failed": 1}}
        listed.append({"name": name, "kind": kind, "method": name, "note": None, "summaries": summaries})
        facts = {"fit": {"rendered_views": {"steps": 150}}} if name == "splatfacto-lvsm" else {}
        records.append({"method": name, "scene": "cup", "context_views": 2, "status": "done", "facts": facts})
    about = dict.fromkeys(("machine", "code", "versions", "beside", "image_size"))
    scenes = [{"name": "cup", "targets": [3, 5]}]
    return {**about, "context_views": [2, 4], "metrics": ["psnr", "lpips_vgg"], "scenes": scenes, "methods": listed,
            "records": records}  # fmt: skip


def test_tables_json_and_pictures(tmp_path):
    found = {"objects": result(("splatfacto-lvsm", "gaussians", 21.5), ("copy-nearest", "baseline", 14.0))}
    content = json.loads(json.dumps(kept(found["objects"])))
    text = tables({"objects": content})
    assert text.startswith("**objects**: 1 scene(s), 2 images.\n\n| method | PSNR from 2 views | 4 |")
    assert "| splatfacto-lvsm | 21.50 +- 1.00 | failed | 0.250 +- 0.010 | failed |" in text
    views = content["methods"]["splatfacto-lvsm"]["2"]
    assert (
        views["psnr"] == 21.5 and views["render_ms"] == 3 and views["scenes"]["cup"]["rendered_views"]["steps"] == 150
    )
    assert "rendered_views" not in content["methods"]["copy-nearest"]["2"]["scenes"]["cup"]

    args = Args(output=tmp_path, results=tmp_path / "result.json", pictures=tmp_path / "result")
    layout, spec = Layout(tmp_path / "objects"), MethodSpec("splatfacto-lvsm", "gaussians", "splatfacto-lvsm")
    for folder in (layout.images("cup", "target"), layout.pictures(spec, 2, "cup", "target")):
        write_image(folder / frame_file(3), torch.rand(8, 8, 3))
    pictures(tmp_path / "pictures.png", args, found)
    plot(tmp_path / "plot.png", {"objects": content})
    assert (tmp_path / "pictures.png").is_file() and (tmp_path / "plot.png").stat().st_size > 1000


def test_rows_of_before_stay_where_the_views_are_the_same():
    def content(code: str, *methods: tuple[str, str, float]) -> dict:
        return json.loads(json.dumps(kept(result(*methods) | {"code": code})))

    before = content("a", ("slow", "network", 20.0), ("splatfacto-lvsm", "gaussians", 21.0))
    now = content("b", ("splatfacto-lvsm", "gaussians", 23.0), ("new", "network", 19.0))
    both = with_other_rows(now, before)
    assert list(both["methods"]) == list(both["notes"]) == ["slow", "splatfacto-lvsm", "new"]
    assert [rows["2"]["psnr"] for rows in both["methods"].values()] == [20.0, 23.0, 19.0]
    assert both["code"] == "b" and both["kept"] == {"slow": "a"}
    again = with_other_rows(content("c", ("new", "network", 18.0)), both)
    assert again["kept"] == {"slow": "a", "splatfacto-lvsm": "b"} and again["methods"]["new"]["2"]["psnr"] == 18.0
    elsewhere = {**before, "scenes": [{"name": "cup", "targets": [3, 6]}]}
    assert with_other_rows(now, elsewhere) == with_other_rows(now, {}) == now


def scores(*psnr_and_lpips: tuple[float, float]) -> dict:
    """As the JSON has them, from 2, 4 and 8 views."""
    return {count: {"psnr": psnr, "lpips_vgg": lpips} for count, (psnr, lpips) in zip("248", psnr_and_lpips)}


def stored(**methods) -> dict:
    about = {"context_views": [2, 4, 8], "scenes": [{"targets": [3, 5]}]}
    return {**about, "methods": {name.replace("_", "-"): found for name, found in methods.items()}}


OBJECTS = stored(
    splatfacto_sparse=scores((12.0, 0.4), (20.0, 0.2), (25.5, 0.1101)),
    efficient_lvsm_plus_tiny=scores((17.0, 0.3), (19.0, 0.25), (21.0, 0.2)),
    splatfacto_lvsm=scores((16.996, 0.25), (24.6, 0.2), (25.5, 0.1104)),
)
SUMMARY = """\
| `splatfacto-sparse` | 12.00, 0.400 | 20.00, **0.200** | **25.50**, **0.110** |
| `efficient-lvsm-plus-tiny`, the network alone | **17.00**, 0.300 | 19.00, 0.250 | 21.00, 0.200 |
| `splatfacto-lvsm` | **17.00**, **0.250** | **24.60**, **0.200** | **25.50**, **0.110** |
| goal | 20, below both | 24.5, below both | 25.5, 0.111 |
| outcome | missed by 3.00 dB, met | met, missed | met, met |
"""


def test_the_summary_marks_the_best_and_says_which_goals_were_met():
    fox = stored(splatfacto_sparse=scores((10.0, 0.5), (9.002, 0.5)), splatfacto_lvsm=scores((9.5, 0.5), (9, 0.5)))
    text = summary({"objects": OBJECTS, "fox": fox})
    assert SUMMARY in text
    assert text.endswith("\n| objects | +5.00 | +4.60 | +0.00 |\n| fox | -0.50 | +0.00 | failed |")
    with pytest.raises(ValueError, match="expected scores of splatfacto-sparse on objects from 2 views"):
        summary({"fox": fox})


def test_pages_are_written_anew_from_the_json_alone(tmp_path, monkeypatch):
    for name, part in (("numbers", "against-splatfacto"), ("gains", "what-it-brings")):
        (tmp_path / name).write_text(f"<!-- {part} -->\nold\n<!-- /{part} -->\n")
    results, page, gains = (str(tmp_path / name) for name in ("results.json", "numbers", "gains"))
    monkeypatch.setattr("sys.argv", ["program", "--results", results, "--page", page, "--summary-page", gains])
    with pytest.raises(SystemExit, match="nothing to compare on: expected --objects, --captures with one of mary_rose"):
        main()
    content = json.loads(json.dumps(OBJECTS))
    for views in content["methods"].values():
        for row in views.values():
            row.update(psnr_std=1.0, lpips_vgg_std=0.5)
    (tmp_path / "results.json").write_text(json.dumps({"objects": content}))
    main()
    assert "| splatfacto-sparse | 12.00 +- 1.00 | 20.00 +- 1.00 | 25.50" in (tmp_path / "numbers").read_text()
    assert SUMMARY in (tmp_path / "gains").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gains", "numbers", "results.json"]


def test_tables_go_between_two_lines_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- numbers -->\nold\n<!-- /numbers -->\nEnd.\n")
    for text in ("| 1 |", "| 2 |\n"):
        write_part(page, "numbers", text)
    assert page.read_text() == "# Title\n\n<!-- numbers -->\n\n| 2 |\n\n<!-- /numbers -->\nEnd.\n"
    with pytest.raises(ValueError, match="page.md: expected the lines <!-- others --> and <!-- /others -->"):
        write_part(page, "others", "| 3 |")


def test_every_fifth_object_and_the_captures_that_are_there(collection, tmp_path):
    (tmp_path / "fox").mkdir()
    args = Args(tmp_path / "out", tmp_path / "result.json", tmp_path / "result", objects=collection, captures=tmp_path)
    found = comparisons(args)
    assert list(found) == ["objects", "fox"] and found["objects"].scenes == ("scene_5",)
    assert found["fox"].output == tmp_path / "out" / "fox" and found["fox"].context_views == (2, 4, 8)
    videos = [Job(2, "scene_5", 0), Job(4, "scene_5", 24, (128, 128)), Job(8, "scene_5", 0)]
    assert jobs_of(found["objects"], [{"name": "scene_5"}]) == videos
    assert [job.path_frames for job in jobs_of(found["fox"], [{"name": "fox"}])] == [0, 0, 0]


def test_the_animation_shows_the_photos_given_and_every_method_s_frames(tmp_path):
    found = result(("splatfacto-lvsm", "gaussians", 21.5), ("copy-nearest", "baseline", 14.0))
    found["scenes"] = [{"name": name, "context": [7, 2, 5], "targets": [3]} for name in ("cup", "pot", "jug")]
    layout, spec = Layout(tmp_path), MethodSpec("splatfacto-lvsm", "gaussians", "splatfacto-lvsm")
    for scene in ("cup", "pot", "jug"):
        for frame, value in ((7, 0.2), (2, 0.6)):
            write_image(layout.images(scene, "context") / frame_file(frame), torch.full((8, 8, 3), value))
        for frame in range(3 if scene != "jug" else 0):
            picture = torch.full((8, 8, 3), 0.1 * frame)
            write_image(layout.pictures(spec, 2, scene, "path") / frame_file(frame), picture)
    frames = turn(tmp_path, found, context_views=2, frames=3)
    write_animation(tmp_path / "turning.webp", frames)
    with Image.open(tmp_path / "turning.webp") as animation:
        assert animation.n_frames == 3 and animation.size == frames[0].size
    first, last = frames[0], frames[2]
    row = CAPTION + PANEL // 4
    photos = [first.getpixel((x, row))[0] for x in (PANEL // 4, 3 * PANEL // 4)]
    assert photos == [51, 153], "the two photos given, not the third"
    assert [frame.getpixel((PANEL + GAP + 9, row))[0] for frame in (first, last)] == [0, 51]
    failed = row + PANEL + GAP
    assert last.getpixel((9, failed))[0] == 51 and last.getpixel((PANEL + GAP + 9, failed)) == (255, 255, 255)

"""Named protocols: what they fix, and what ns-eval's results say about it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, write_collection
from einops import rearrange
from PIL import Image

from elvsm_nerfstudio import __version__
from elvsm_nerfstudio.data.evaluation_views import ViewRule
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.evaluation.baselines import copy_nearest
from elvsm_nerfstudio.evaluation.evaluator import Evaluator
from elvsm_nerfstudio.evaluation.metrics import psnr
from elvsm_nerfstudio.evaluation.protocols import PROTOCOLS, find_protocol
from elvsm_nerfstudio.evaluation.results import Fingerprint, averages, code_version
from elvsm_nerfstudio.evaluation.scored_network import ScoredNetwork
from elvsm_nerfstudio.geometry import CanonicalFrame


def evaluator(data, name: str, **changes) -> Evaluator:
    pipeline = tiny_pipeline(data)
    return Evaluator(ScoredNetwork(pipeline.model), pipeline.datamanager, replace(find_protocol(name), **changes))


@pytest.fixture(scope="module")
def many_views(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("many"), "train val test test", num_frames=22)


def test_unknown_names_are_refused_before_anything_is_opened_and_the_nearest_is_named(collection):
    with pytest.raises(ValueError, match="protocol wide-rage: no such protocol; did you mean wide-range"):
        find_protocol("wide-rage")
    with pytest.raises(ValueError, match="did you mean re10k-2view-256"):
        tiny_pipeline(collection, protocol="re10k-2view")


def test_protocols_say_what_the_field_does():
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
    re10k, other = PROTOCOLS["re10k-2view-256"], PROTOCOLS["re10k-2view-256-context-frame"]
    assert re10k.canonical_frame == "context+target" and other.canonical_frame == "context"
    assert re10k.images((64, 64)).resized((360, 640)) == (256, 456)
    of_re10k = {key: getattr(re10k, key) for key in ("name", "description", "canonical_frame")}
    assert replace(other, **of_re10k) == re10k
    assert PROTOCOLS["objects-4view"].images((64, 64)).background == "white"
    assert PROTOCOLS["objects-4view-black"].images((64, 64)).background == "black"
    assert PROTOCOLS["objects-1-to-16"].context_views == (1, 2, 4, 8, 16)
    assert PROTOCOLS["wide-range"].context_views == (2, 4, 8, 12)
    assert PROTOCOLS["wide-range"].views.num_frames == 100 and not PROTOCOLS["wide-range"].views.targets_may_be_context


def test_re10k_scores_every_scene_of_the_index_from_chunks(chunks, tmp_path):
    pipeline = tiny_pipeline(chunks, protocol="re10k-2view-256")
    averages = pipeline.get_average_eval_image_metrics(output_path=tmp_path, get_std=True)
    assert averages["num_scenes"] == 2 and averages["num_images"] == 6
    report = json.loads((tmp_path / "metrics.images.json").read_text())
    record = report["record"]
    assert record["protocol"]["name"] == "re10k-2view-256" and record["protocol"]["image_size"] == [256, 256]
    assert record["protocol"]["canonical_frame"] == "context+target"
    assert record["data"]["null_entries_of_the_index"] == 1 and record["data"]["targets_that_are_context"] == 1
    assert {"psnr", "ssim", "psnr_copy_nearest", "flip"} <= set(record["protocol"]["metrics"])
    (copied,) = [row for row in report["images"] if (row["scene"], row["image"]) == (f"{20:016x}", "000004")]
    assert copied["psnr_copy_nearest"] == 100.0  # this target is the second context view
    # The tiny model was made for 16 px; the protocol's pictures are its own size all the same.
    assert Image.open(tmp_path / "predictions" / f"{20:016x}" / "000001.png").size == (256, 256)


def test_re10k_with_more_views_takes_them_between_the_listed_ones(chunks):
    walk = evaluator(chunks, "re10k-4view-256")
    assert walk.scene(walk.datamanager.eval_entries[0]).context_names == ("000000", "000001", "000003", "000004")
    with pytest.raises(ValueError, match="there are not 8 frames from 0 to 4"):
        evaluator(chunks, "re10k-8view-256").run(None, get_std=False)


def test_videos_are_validated_as_they_are_trained_on(chunks, scene):
    options = {"view_sampler": "bounded-gap", "frame_gap": (3, 5)}
    manager = tiny_pipeline(chunks, "val", **options).datamanager
    assert manager.evaluation_scene(manager.eval_entries[0]).context_names == ("000001", "000005")
    assert tiny_pipeline(scene, **options).datamanager.evaluation_views.frame_gap is None


def test_re10k_needs_an_index(collection, tmp_path):
    pipeline = tiny_pipeline(collection, protocol="re10k-2view-256")
    pipeline.datamanager.evaluation_index = None
    with pytest.raises(ValueError, match="scene_5 has no views in an evaluation index; name one with"):
        pipeline.get_average_eval_image_metrics()


def test_canonical_frame_is_the_protocols(chunks):
    for name in ("re10k-2view-256", "re10k-2view-256-context-frame"):
        walk = evaluator(chunks, name)
        views = walk.scene(walk.datamanager.eval_entries[0]).views
        centres = [views.context.camera_to_world[:, :, :3, 3]]
        if name == "re10k-2view-256":
            centres.append(views.target.camera_to_world[:, :, :3, 3])
        ((_, memory, _),) = walk.method.memories(views, walk.protocol)
        assert torch.allclose(memory.frame.centre, torch.cat(centres, dim=1).mean(dim=1), atol=1e-6)


def test_wide_range_has_nested_context_and_the_same_targets_for_every_number_of_views(many_views, tmp_path):
    pipeline = tiny_pipeline(many_views, protocol="wide-range")
    results = pipeline.get_average_eval_image_metrics(output_path=tmp_path, get_std=True)["by_context_views"]
    assert list(results) == [2, 4, 8, 12] and all(r["num_images"] == 16 for r in results.values())
    rows = json.loads((tmp_path / "metrics.images.json").read_text())["images"]
    shown = {n: [r["image"] for r in rows if r["scene"] == "scene_2" and r["context_views"] == n] for n in results}
    assert len(shown[2]) == 8 and all(images == shown[2] for images in shown.values())
    assert results[12]["psnr"] != results[2]["psnr"]
    assert results[12]["psnr_copy_nearest"] > results[2]["psnr_copy_nearest"]
    assert Image.open(tmp_path / "metrics.png").size == (660, 440)
    sheet = Image.open(tmp_path / "scene_2.png")
    assert sheet.size == (12 * 20 - 4, 6 * 20 - 4)  # context, targets, four rows of predictions
    assert (tmp_path / "predictions_4_views/scene_2" / f"{shown[2][0]}.png").exists()


def test_wide_range_refuses_scenes_with_too_few_views(collection):
    walk = evaluator(collection, "wide-range")
    with pytest.raises(ValueError, match="scene_5 has 8 frames for context and 0 others for targets; .*at least 13"):
        walk.run(None, get_std=False)


def test_incremental_memory_equals_encoding_the_same_views_at_once(many_views):
    walk = evaluator(many_views, "incremental")
    scene = walk.scene(walk.datamanager.eval_entries[0])
    memories = list(walk.method.memories(scene.views, walk.protocol))
    assert [count for count, _, _ in memories] == list(range(1, 9))
    frame = CanonicalFrame.estimate(scene.views.context.camera_to_world)
    with torch.no_grad():
        for count, memory, _ in memories:
            at_once = walk.method.model.network.encode(scene.views.context.select(range(count)), frame)
            rendered, expected = (
                walk.method.model.network.decode(m, scene.views.target.select([0])) for m in (memory, at_once)
            )
            assert torch.allclose(rendered, expected, atol=1e-5)
    timing = walk.run(None, get_std=False).timing
    assert timing["encode_ms"] == "of one appended view" and list(timing["by_context_views"]) == list("12345678")


def test_objects_on_black_are_black(collection):
    white, black = (evaluator(collection, name, views=replace(find_protocol(name).views, num_context_views=2))
                    for name in ("objects-4view", "objects-4view-black"))  # fmt: skip
    entry = white.datamanager.eval_entries[0]
    assert white.scene(entry).views.context.rgb[0, 0, 0, 0].tolist() == [1, 1, 1]
    assert black.scene(entry).views.context.rgb[0, 0, 0, 0].tolist() == [0, 0, 0]


def test_protocols_do_not_touch_training_and_its_evaluations(collection):
    pipeline = tiny_pipeline(collection, "val", protocol="wide-range")
    assert pipeline.get_average_eval_image_metrics()["num_scenes"] == 1
    views, _ = pipeline.datamanager.next_train(0)
    assert views.context.num_views == 2 and views.context.height == 16


# Results


def test_averages_are_over_images_and_over_scenes():
    rows = [{"scene": s, "psnr": p} for s, p in (("a", 10.0), ("a", 20.0), ("b", 30.0))]
    result = averages(rows, ["psnr"], get_std=True)
    assert result == {
        "psnr": 20.0, "psnr_std": pytest.approx(np.std([10, 20, 30])), "psnr_per_scene": 22.5,
        "num_images": 3.0, "num_scenes": 2.0,
    }  # fmt: skip
    assert "psnr_std" not in averages(rows, ["psnr"], get_std=False)


def test_fingerprint_sees_names_pixels_and_cameras(collection):
    walk = evaluator(
        collection, "objects-4view", views=replace(find_protocol("objects-4view").views, num_context_views=2)
    )
    views = walk.scene(walk.datamanager.eval_entries[0]).views

    def digest(scene="a", names=("1", "2"), views=views) -> str:
        fingerprint = Fingerprint()
        fingerprint.add(scene, names, views)
        return fingerprint.hexdigest()

    moved, painted = views.target.camera_to_world.clone(), views.context.rgb.clone()
    moved[0, 0, 0, 3] += 1e-3
    painted[0, 0, 3, 3, 0] = 1 - painted[0, 0, 3, 3, 0].round()
    others = [
        digest(scene="b"),
        digest(names=("12", "")),
        digest(views=replace(views, target=replace(views.target, camera_to_world=moved))),
        digest(views=replace(views, context=replace(views.context, rgb=painted))),
    ]
    assert digest() == digest() and len({digest(), *others}) == 5


def test_code_version_names_this_checkout():
    version = code_version()
    assert version["version"] == __version__ and (version["commit"] is None or len(version["commit"]) >= 12)


def test_larger_renders_are_scored_after_reducing_them(many_views):
    small = evaluator(
        many_views, "objects-1-to-16-scored-at-64", image_size=(24, 24), scored_size=(12, 12), context_views=(1, 2),
        views=ViewRule(num_context_views=2, num_target_views=3, source="spread"),
    )  # fmt: skip
    evaluation = small.run(None, get_std=False)
    assert evaluation.record["protocol"]["scored_size"] == (12, 12)
    scene = small.scene(small.datamanager.eval_entries[0])
    result, row = small.score(scene)[0], evaluation.rows[0]
    assert result.image == row["image"] and result.rgb.shape == (24, 24, 3)
    truth = scene.views.target.rgb[0, 0]
    means = [rearrange(x, "(h a) (w b) c -> h w c a b", a=2, b=2).mean(dim=(-2, -1)) for x in (result.rgb, truth)]
    assert row["psnr"] == pytest.approx(float(psnr(*means)), abs=1e-4)
    assert row["psnr"] != pytest.approx(float(psnr(result.rgb, truth)), abs=1e-2)
    nearest = copy_nearest(scene.views.context.select([0]), scene.views.target)[0, 0]
    reduced = rearrange(nearest, "(h a) (w b) c -> h w c a b", a=2, b=2).mean(dim=(-2, -1))
    assert row["psnr_copy_nearest"] == pytest.approx(float(psnr(reduced, means[1])), abs=1e-4)

    with pytest.raises(DataError, match="found images of 16 x 16 pixels; expected 64 x 64 or more"):
        evaluator(many_views, "objects-1-to-16-scored-at-64")

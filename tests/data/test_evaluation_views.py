"""Which views evaluation takes, and from where."""

import json

import pytest
from conftest import write_collection
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from elvsm_nerfstudio.data.evaluation_views import EvaluationIndex, ViewRule, choose_evaluation_views
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.data.scene import Scene
from elvsm_nerfstudio.data.scenes import SceneCollection
from elvsm_nerfstudio.data.view_samplers import FrameChoice


def opened(path) -> SceneCollection:
    return SceneCollection.open(path, NerfstudioDataParserConfig())


def first_scene(path, split: str = "test") -> Scene:
    scenes = opened(path)
    return scenes.load(scenes.split(split)[0])


def index_of(tmp_path, **scenes) -> EvaluationIndex:
    (tmp_path / "index.json").write_text(json.dumps(scenes))
    return EvaluationIndex.read(tmp_path / "index.json")


def test_evaluation_views_come_from_the_index_or_are_spread(collection):
    index = EvaluationIndex.read(collection / "evaluation_index.json")
    test, val = first_scene(collection), first_scene(collection, "val")
    assert choose_evaluation_views(test, index, ViewRule(7, 4)) == FrameChoice((0, 2), (1, 5, 6))
    choice = choose_evaluation_views(val, index, ViewRule(3, 4))
    assert len(choice.context) == 3 and len(choice.target) == 4 and not set(choice.context) & set(choice.target)
    assert choose_evaluation_views(val, index, ViewRule(3, 4)) == choice
    every = choose_evaluation_views(val, index, ViewRule(3))
    assert every.context == choice.context and len(every.target) == 5


def test_evaluation_targets_of_a_single_scene_are_never_context(scene):
    loaded = first_scene(scene)
    choice = choose_evaluation_views(loaded, None, ViewRule(4, 8))
    assert set(choice.target) == set(loaded.eval_frames) and set(choice.context) <= set(loaded.train_frames)


@pytest.mark.parametrize("entry, message", [({"context": [0]}, "KeyError: 'target'"), (None, "has views for no scene")])
def test_bad_indices_are_refused(tmp_path, entry, message):
    with pytest.raises(DataError, match=message):
        index_of(tmp_path, scene_5=entry)


@pytest.mark.parametrize(
    "context, target, message",
    [([0, 1], [1, 2], r"scene scene_5: frames \[1\] are context and target"), ([0], [], "no context or no target")],
)
def test_index_entries_that_leak_or_lack_views_are_refused(tmp_path, collection, context, target, message):
    index = index_of(tmp_path, scene_5={"context": context, "target": target})
    with pytest.raises(DataError, match=message):
        choose_evaluation_views(first_scene(collection), index, ViewRule(2))


def test_a_protocol_may_say_that_targets_are_context(tmp_path, collection):
    index = index_of(tmp_path, scene_5={"context": [0, 4], "target": [4, 2]})
    rule = ViewRule(2, source="index", targets_may_be_context=True)
    assert choose_evaluation_views(first_scene(collection), index, rule) == FrameChoice((0, 4), (4, 2))
    with pytest.raises(DataError, match="scene scene_4 has no views in an evaluation index; name one with"):
        choose_evaluation_views(first_scene(collection, "val"), index, rule)


def test_more_context_than_listed_is_spread_between_the_listed_frames(tmp_path, collection):
    index, scene = index_of(tmp_path, scene_5={"context": [7, 1], "target": [3]}), first_scene(collection)
    assert index.choose(scene, 2).context == (7, 1) and index.choose(scene, 1).context == (7,)
    assert index.choose(scene, 4).context == (1, 3, 5, 7)
    assert index.choose(scene, 5).context == (1, 2, 4, 6, 7)  # 2.5 and 5.5 to even
    with pytest.raises(DataError, match="there are not 8 frames from 1 to 7"):
        index.choose(scene, 8)


def test_objects_take_the_index_or_their_first_frames(tmp_path, collection):
    rule, scene = ViewRule(4, source="index or first"), first_scene(collection)
    assert choose_evaluation_views(scene, None, rule) == FrameChoice((0, 1, 2, 3), (4, 5, 6, 7))
    index = index_of(tmp_path, scene_5={"context": [0, 3], "target": [1]})
    with pytest.raises(DataError, match="scene scene_5: 2 context frames; expected 4"):
        choose_evaluation_views(scene, index, rule)


def test_frames_to_choose_from_are_sampled_uniformly(tmp_path):
    write_collection(tmp_path, "train val test", num_frames=11)
    rule = ViewRule(2, 3, source="spread", num_frames=6)
    choice = choose_evaluation_views(first_scene(tmp_path), None, rule)
    assert {*choice.context, *choice.target} <= {0, 2, 4, 6, 8, 10} and len(choice.target) == 3


def test_a_stretch_has_context_from_end_to_end_and_targets_between(tmp_path):
    write_collection(tmp_path, "train val test", num_frames=11)
    scene = first_scene(tmp_path)
    assert choose_evaluation_views(scene, None, ViewRule(2, frame_gap=4)) == FrameChoice((3, 7), (4, 5, 6))
    assert choose_evaluation_views(scene, None, ViewRule(3, 1, frame_gap=99)) == FrameChoice((0, 5, 10), (1,))
    with pytest.raises(DataError, match="scene_2 has 3 frames for context and 0 others"):
        choose_evaluation_views(scene, None, ViewRule(3, frame_gap=2))


def test_context_of_a_capture_can_be_given_frame_by_frame(scene):
    loaded = first_scene(scene)
    given = tuple(frame for frame in range(loaded.num_frames) if frame not in loaded.eval_frames)[:2]
    choice = choose_evaluation_views(loaded, None, ViewRule(2, context_frames=given))
    assert choice.context == given and set(choice.target) == set(loaded.eval_frames)
    with pytest.raises(DataError, match=r"context-frames 12 -1: scene spheres has frames 0..11"):
        choose_evaluation_views(loaded, None, ViewRule(3, context_frames=(12, 0, -1)))


def test_index_with_unknown_scene_or_frame_is_refused_and_null_entries_are_counted(tmp_path, collection):
    entry = {"context": [0], "target": [8]}
    index, scenes = index_of(tmp_path, scene_5=entry, scene_9=entry, scene_6=None), opened(collection)
    assert index.num_null == 1
    with pytest.raises(DataError, match="names 1 scenes that are not in the evaluated split of the data: scene_9"):
        index.listed(scenes.split("test"))
    with pytest.raises(DataError, match="scene scene_5: frame 8; the scene has frames 0..7"):
        choose_evaluation_views(first_scene(collection), index, ViewRule(2, 4))


def test_too_few_frames_for_evaluation_are_refused(tmp_path):
    write_collection(tmp_path, "train val test", num_frames=3)
    with pytest.raises(
        DataError, match="scene_2 has 3 frames for context and 0 others for targets; expected at least 4"
    ):
        choose_evaluation_views(first_scene(tmp_path), None, ViewRule(3, 1))

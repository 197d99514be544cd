"""The viewer's controls, in process: a context that is edited, frames that always come, attention to views."""

import html
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import make_views, tiny_pipeline, write_collection
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.viewer.render_state_machine import RenderStateMachine
from nerfstudio.viewer.utils import CameraState
from nerfstudio.viewer.viewer import Viewer
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException, SetTrace

from elvsm_nerfstudio import model as model_module
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.method_configs import efficient_lvsm_tiny
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnly, LVSMDecoderOnlyConfig
from elvsm_nerfstudio.nn.memory import load_memory
from elvsm_nerfstudio.nn.named_weights import trained_image_size
from elvsm_nerfstudio.nn.weights import RUN_PREFIX, load_network, save_weights
from elvsm_nerfstudio.viewer import panel as viewer_module
from elvsm_nerfstudio.viewer.attention_maps import attention_to_views, decode_with_attention, evenness
from elvsm_nerfstudio.viewer.context_pool import ContextPool
from elvsm_nerfstudio.viewer.frustums import UNUSED, USED
from elvsm_nerfstudio.views import ViewSet


@pytest.fixture
def pipeline(scene):
    return tiny_pipeline(scene)


def pool_of(pipeline) -> ContextPool:
    return ContextPool.of_shown_scene(pipeline.datamanager)


def camera_of(pipeline, height: int = 24, width: int = 32) -> Cameras:
    pose = pipeline.datamanager.eval_dataset.cameras.camera_to_worlds[:1]
    return Cameras(pose, fx=1.2 * width, fy=1.2 * width, cx=width / 2, cy=height / 2, height=height, width=width)


def render(pipeline, **size) -> torch.Tensor:
    return pipeline.model.get_outputs_for_camera(camera_of(pipeline, **size))["rgb"]


def count_encoded_views(pipeline, monkeypatch) -> list[int]:
    """Fills up with the number of views of every pass through the encoder."""
    network, counts = pipeline.model.network, []
    encode = network._encode
    monkeypatch.setattr(
        network, "_encode", lambda views, *rest: (counts.append(views.num_views), encode(views, *rest))[1]
    )
    return counts


# The model's context


def test_edited_context_is_that_context_in_the_first_frame(pipeline, monkeypatch):
    model, pool = pipeline.model, pool_of(pipeline)
    monkeypatch.setattr(model.config, "render_size", "native")
    frame, first = model._context.frame, model.context_ids
    new = [frame for frame in pool.frames if frame not in first][:2]
    model.memory()
    model.edit_context(pool.read(new[0]), [new[0]], drop=[first[0]])
    model.edit_context(pool.read(new[1]), [new[1]])
    assert model.context_ids == (first[1], *new) and model._context.frame is frame
    edited = render(pipeline)
    views = pool.read(first[1])
    for id in new:
        views = model_module.joined(views, pool.read(id))
    expected = model.network.encode(views, frame)
    assert torch.allclose(edited, model.render(expected, camera_of(pipeline))["rgb"], atol=1e-6)
    assert set(model.context_images()) == set(model.context_ids)


def test_only_changed_views_are_encoded_and_dropped_ones_are_remembered(pipeline, monkeypatch):
    model, pool = pipeline.model, pool_of(pipeline)
    encoded = count_encoded_views(pipeline, monkeypatch)
    before = render(pipeline)
    first = model.context_ids
    new = next(frame for frame in pool.frames if frame not in first)
    model.edit_context(pool.read(new), [new])
    with_new = render(pipeline)
    model.edit_context(drop=[new])
    assert torch.allclose(render(pipeline), before, atol=1e-6) and not torch.allclose(with_new, before, atol=1e-4)
    model.edit_context(pool.read(new), [new])
    assert torch.allclose(render(pipeline), with_new, atol=1e-6)
    assert encoded == [2, 1]
    monkeypatch.setattr(model_module, "REMEMBERED_BYTES", 0)
    model.edit_context(drop=[new])
    others = [frame for frame in pool.frames if frame not in (*first, new)][:2]
    model.edit_context(pool.read(others[0]), [others[0]])
    model.memory()
    model.edit_context(pool.read(others[1]), [others[1]], drop=model.context_ids)
    model.memory()
    assert model._memory[0].ids == (others[1],)
    model.edit_context(pool.read(new), [new])
    model.memory()
    assert encoded == [2, 1, 1, 1, 1]


def test_all_views_are_encoded_again_for_other_weights_and_precision(pipeline, monkeypatch):
    model, pool = pipeline.model, pool_of(pipeline)
    model.edit_context(pool.read(pool.frames[-1]), [pool.frames[-1]])
    encoded = count_encoded_views(pipeline, monkeypatch)
    fp32 = render(pipeline)
    model.set_precision("bf16")
    assert model.memory().dtype == torch.bfloat16 and (render(pipeline) - fp32).abs().max() > 0
    model.set_precision("fp32")
    assert torch.equal(render(pipeline), fp32)
    with torch.no_grad():
        model.network.head.weight.mul_(2)
    assert not torch.equal(render(pipeline), fp32)
    assert encoded == [3, 3, 3, 3] and model.memory().ids == model.context_ids


@pytest.mark.parametrize(
    "ids, drop", [([0], []), ([1, 1], []), ([], "all"), ([], [99])], ids=["taken", "twice", "none left", "unknown"]
)
def test_edits_that_make_no_sense_are_refused(pipeline, ids, drop):
    model, pool = pipeline.model, pool_of(pipeline)
    model.edit_context(pool.read(pool.frames[0]), [0]) if 0 not in model.context_ids else None
    context = model._context
    add = pool.read(pool.frames[0]).select([0] * len(ids)) if ids else None
    with pytest.raises(ValueError, match="edit_context: cannot|different ones"):
        model.edit_context(add, ids, drop=model.context_ids if drop == "all" else drop)
    assert model._context is context


# Candidates


def test_candidates_of_a_capture_are_its_train_frames(pipeline):
    pool, datamanager = pool_of(pipeline), pipeline.datamanager
    scene = datamanager.collection.load(datamanager.shown)
    assert pool.frames == scene.train_frames and set(pool.context) <= set(pool.frames)
    assert pool.names == tuple(f"{frame:03d}" for frame in pool.frames)
    context = datamanager.shown_scene().views.context
    for position, frame in enumerate(pool.context):
        assert torch.equal(pool.read(frame).rgb[:, 0], context.rgb[:, position])
        assert torch.equal(pool.read(frame).directions[:, 0], context.directions[:, position])


def test_candidates_of_a_held_out_scene_are_all_frames_but_listed_targets(collection, chunks, tmp_path):
    assert pool_of(tiny_pipeline(collection)).frames == (0, 2, 3, 4, 7)  # 1, 5 and 6 are targets
    assert pool_of(tiny_pipeline(write_collection(tmp_path, "train val test"))).frames == tuple(range(8))
    assert pool_of(tiny_pipeline(chunks)).frames == (0, 3, 4, 5, 6, 7)  # 4 is context and target


# Attention


def network_and_memory(num_views: int):
    torch.manual_seed(0)
    network = EfficientLVSM(EfficientLVSMConfig(width=32, num_layers=2, head_dim=16, init_std=0.2)).eval()
    context, target = make_views(2, num_views, 16, 24, seed=1), make_views(2, 3, 24, 16, seed=2)
    return network, network.encode(context), target


@torch.no_grad()
def test_attention_to_views_is_the_softmax_summed_over_each_view():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(2, 3, n, 8, generator=generator) for n in (300, 11))
    shares = attention_to_views(queries, keys, [4, 5, 2])
    plain = (queries @ keys.transpose(-1, -2) / 8**0.5).softmax(dim=-1).mean(dim=1)
    expected = torch.stack([part.sum(dim=-1) for part in plain.split([4, 5, 2], dim=-1)], dim=-1)
    assert torch.allclose(shares, expected, atol=1e-6)
    assert torch.allclose(evenness(torch.full((1, 4), 0.25)), torch.ones(1))
    assert evenness(torch.tensor([[0.0, 1.0]])) == 0


@torch.no_grad()
def test_decoding_with_attention_renders_the_same_and_follows_the_ids():
    network, memory, target = network_and_memory(4)
    rgb, shares = decode_with_attention(network, memory, target)
    assert torch.equal(rgb, network.decode(memory, target))
    assert shares.shape == (2, 3, 3, 2, 4) and torch.allclose(shares.sum(dim=-1), torch.ones(2, 3, 3, 2), atol=1e-5)
    assert shares.std() > 1e-3
    turned = decode_with_attention(network, memory.select([2, 0, 3, 1]), target)[1]
    assert torch.allclose(turned, shares[..., [2, 0, 3, 1]], atol=1e-6)
    _, some = decode_with_attention(network, memory.select([3, 1]), target)
    assert some.shape[-1] == 2


@torch.no_grad()
def test_all_attention_goes_to_a_single_view():
    network, memory, target = network_and_memory(1)
    shares = decode_with_attention(network, memory, target)[1]
    assert torch.equal(shares, torch.ones_like(shares)) and not evenness(shares).any()


# The viewer

BELOW = ["Render size", "Precision", "Weights", "Load weights", "Memory", "Save memory", "Load memory", ""]
"""Elements below those that choose views; the last one is the status."""


class Session:
    """A viewer without a browser."""

    def __init__(self, pipeline, folder, **config):
        self.pipeline, self.model = pipeline, pipeline.model
        config = ViewerConfig(websocket_port_default=7107, **config)
        datamanager = pipeline.datamanager
        self.viewer = Viewer(config, folder / "viewer.log", datamanager.get_datapath(), pipeline)
        self.viewer.init_scene(datamanager.train_dataset, "completed", datamanager.eval_dataset)
        self.viewer.control_panel._max_res.value = 100
        self.elements = {
            element.name: element
            for path, element in self.viewer.viewer_elements
            if path.startswith("Custom Elements/Context views/")
        }
        (self.status,) = [e for _, e in self.viewer.viewer_elements if isinstance(e, viewer_module.ViewerMarkdown)]
        self.pool = pool_of(pipeline)

    def render(self, state: str = "high") -> dict[str, torch.Tensor]:
        machine = RenderStateMachine(self.viewer, 1.0, client=None)
        machine.state = state
        pose = self.pipeline.datamanager.eval_dataset.cameras.camera_to_worlds[0]
        return machine._render_img(CameraState(fov=0.9, aspect=1.37, c2w=pose, camera_type=CameraType.PERSPECTIVE))

    def set(self, name: str, value=None) -> None:
        """As a browser would: the element's callbacks run in another thread."""
        handle = self.elements[name].gui_handle
        handle.value = value if value is not None else True
        time.sleep(0.1)


@pytest.fixture
def session(pipeline, tmp_path):
    session = Session(pipeline, tmp_path, default_composite_depth=False)
    yield session
    lock = session.viewer.viser_server._websock_server._atomic_lock
    if lock.locked():  # stop would wait for it forever
        lock.release()
    session.viewer.viser_server.stop()


@pytest.mark.parametrize("composite_depth", [True, False])
def test_viewer_renders_in_every_state_at_odd_sizes(pipeline, tmp_path, composite_depth):
    session = Session(pipeline, tmp_path, default_composite_depth=composite_depth)
    try:
        sizes = set()
        for state in ("low_move", "low_static", "high"):
            outputs = session.render(state)
            assert outputs["rgb"].isfinite().all() and outputs["rgb"].std() > 1e-3
            assert ("gl_z_buf_depth" in outputs) == composite_depth
            sizes.add(outputs["rgb"].shape)
        assert (72, 100, 3) in sizes
    finally:
        session.viewer.viser_server.stop()


def test_controls_are_found_in_their_order_and_the_first_picture_is_that_of_other_programs(session, scene):
    boxes = [f"View {name}" for name in session.pool.names]
    assert list(session.elements) == ["Choice", "Number", *boxes, *BELOW]
    session.set("Render size", 1024)
    rgb = session.render()["rgb"]
    camera = camera_of(session.pipeline, 72, 100)
    focal = 36 / torch.tan(torch.tensor(0.45))
    camera = Cameras(camera.camera_to_worlds, focal, focal, 50.0, 36.0, 100, 72)
    other = tiny_pipeline(scene)
    other.model.config.render_size = "native"
    assert torch.allclose(rgb, other.model.get_outputs_for_camera(camera)["rgb"], atol=1e-5)
    assert other.model.render_for_viewer is None


def test_boxes_add_and_drop_views(session):
    before = session.render()["rgb"]
    first = session.model.context_ids
    new = next(frame for frame in session.pool.frames if frame not in first)
    session.set(f"View {new:03d}", True)
    added = session.render()["rgb"]
    assert session.model.context_ids == (*first, new) and not torch.allclose(added, before, atol=1e-4)
    assert "3 of" in session.status.gui_handle.content and f"{new:03d}" in session.status.gui_handle.content
    session.set(f"View {new:03d}", False)
    assert torch.allclose(session.render()["rgb"], before, atol=1e-5)
    for frame in first:
        session.set(f"View {frame:03d}", False)
    assert session.elements[f"View {first[1]:03d}"].value, "the last view cannot be dropped"
    session.render()
    assert session.model.context_ids == first[1:]


def test_views_are_spread_over_the_scene_or_chosen_for_the_camera(session):
    session.set("Choice", "farthest point")
    session.set("Number", 5)
    session.render()
    spread = set(session.model.context_ids)
    assert len(spread) == 5
    ticked = {frame for frame in session.pool.frames if session.elements[f"View {frame:03d}"].value}
    assert ticked == spread
    session.set("Number", 3)
    session.render()
    assert set(session.model.context_ids) < spread
    session.set("Choice", "nearest to camera")
    session.render()
    pose = session.pipeline.datamanager.eval_dataset.cameras.camera_to_worlds[0]
    nearest = viewer_module.nearest_views(session.pool.poses, pose[None], 3)[0].tolist()
    assert set(session.model.context_ids) == {session.pool.frames[position] for position in nearest}
    session.set("Choice", "manual")
    session.render()
    assert len(session.model.context_ids) == 3 and session.elements["Number"].gui_handle.disabled


def test_many_candidates_are_a_list(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(viewer_module, "MAX_BOXES", 4)
    session = Session(tiny_pipeline(collection), tmp_path, default_composite_depth=False)
    try:
        assert list(session.elements) == ["Scene", "Choice", "Number", "View", "Add view", "Drop view", *BELOW]
        first = session.model.context_ids
        session.set("View", "007")
        session.set("Add view")
        session.render()
        assert session.model.context_ids == (*first, 7)
        session.set("Drop view")
        session.render()
        assert session.model.context_ids == first
    finally:
        session.viewer.viser_server.stop()


def test_views_are_added_a_few_at_a_time(session, monkeypatch):
    session.render()
    rerenders = []
    monkeypatch.setattr(viewer_module, "ADDING_SECONDS", 2.5)
    monkeypatch.setattr(session.viewer, "_trigger_rerender", lambda: rerenders.append(1))
    monkeypatch.setattr(viewer_module, "time", SimpleNamespace(perf_counter=count().__next__))
    plan = viewer_module.Plan("manual", session.pool.frames)
    session.model.render_for_viewer.__self__._plan = plan
    sizes = []
    while not sizes or rerenders:
        rerenders.clear()
        session.render()
        sizes.append(len(session.model.context_ids))
    assert sizes == sorted(sizes) and len(sizes) > 2 and sizes[-1] == len(session.pool.frames)


def test_frames_are_computed_at_the_size_the_network_was_made_for(session, monkeypatch):
    tokens = []
    tokenizer = session.model.network.target_tokenizer
    tokenizer.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[2]))
    assert session.render("high")["rgb"].shape == (72, 100, 3)
    # Its images are 16 pixels high with a focal length of 25; the camera's is 74.5 for 72 pixels: 24 x 34 suffice.
    assert tokens == [3 * 5]
    session.set("Render size", 64)
    session.render("high")
    session.render("low_move")
    assert tokens[1] == 9 * 13 and tokens[2] < tokens[1]


def test_precision_is_the_viewers_but_not_while_training(session):
    session.set("Precision", "bf16")
    session.render()
    assert session.model.memory().dtype == torch.bfloat16 and "bfloat16" in session.status.gui_handle.content
    session.viewer.trainer = object()
    session.set("Precision", "fp32")
    session.render()
    assert session.model.network.autocast_dtype == torch.bfloat16


def test_attention_is_shown_where_asked_for(session, monkeypatch):
    plain = session.render()
    assert list(plain) == ["rgb", "attention_view", "attention_evenness"] and not plain["attention_view"].any()
    session.viewer.control_panel._output_render.set_options(list(plain))
    session.viewer.control_panel._output_render.value = "attention_view"
    watched = session.render()
    assert torch.equal(watched["rgb"], plain["rgb"])
    position = {frame: i for i, frame in enumerate(session.pool.frames)}
    palette = {viewer_module.view_colour(position[frame]) for frame in session.model.context_ids}
    found = {tuple((255 * colour).round().int().tolist()) for colour in watched["attention_view"].flatten(0, 1)}
    assert found <= palette
    even = watched["attention_evenness"]
    assert even.shape == (72, 100, 1) and 0 < even.min() and even.max() <= 1


def test_browsers_have_frames_and_nearest_views_of_their_own(session, monkeypatch):
    poses = session.pool.poses
    session.set("Choice", "nearest to camera")
    machine = RenderStateMachine(session.viewer, 1.0, client=None)

    def frame(at: int):
        camera = CameraState(fov=0.9, aspect=1.37, c2w=poses[at], camera_type=CameraType.PERSPECTIVE)
        return machine._render_img(camera)["rgb"]

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        positions = {one: 0, other: int((poses[:, :, 3] - poses[0, :, 3]).norm(dim=-1).argmax())}
        frames = {browser: browser.submit(frame, at).result() for browser, at in positions.items()}
        encoded = count_encoded_views(session.pipeline, monkeypatch)
        edits = count_calls(session.model, "edit_context", monkeypatch)
        for browser, at in positions.items():
            assert torch.allclose(browser.submit(frame, at).result(), frames[browser], atol=1e-6)
        assert encoded == [] and edits == []
        nearest = viewer_module.nearest_views(poses, poses[list(positions.values())], 2)
        assert set(session.model.context_ids) == {session.pool.frames[i] for i in nearest.flatten().tolist()}

        def fail(*args):
            raise torch.OutOfMemoryError("no room for this")

        monkeypatch.setattr(session.model, "render", fail)
        for browser, at in positions.items():
            assert torch.equal(browser.submit(frame, at).result(), frames[browser])


def count_calls(owner, name: str, monkeypatch) -> list:
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: (calls.append(1), function(*args, **options))[1])
    return calls


def test_names_and_errors_are_no_markup(session, monkeypatch):
    name, error = "000{document.title='x'}.png", "<img src=x onerror=alert(1)> **bold** [a](b)\nexport const x = 1"
    controls = session.model.render_for_viewer.__self__
    monkeypatch.setattr(controls, "_pool", replace(controls._pool, names=(name, *controls._pool.names[1:])))
    controls._unusable[3] = error
    session.set("Choice", "nearest to camera")
    session.set("Number", 11)
    session.render()
    shown = session.status.gui_handle.content
    for text in (name, error):
        assert viewer_module.plain(text) in shown and html.unescape(viewer_module.plain(text)) == text.replace(
            "\n", " "
        )
    assert not set("{}<>`[]") & set(shown) and shown.count("*") == 4

    def fail(*args):
        raise ValueError(error)

    monkeypatch.setattr(session.model, "render", fail)
    session.render()
    assert not set("{}<>`[]") & set(session.status.gui_handle.content)


def test_another_scene_of_a_collection_is_shown(collection, tmp_path, monkeypatch):
    session = Session(tiny_pipeline(collection), tmp_path, default_composite_depth=False)
    try:
        first, names = session.render()["rgb"], [entry.name for entry in session.pipeline.datamanager.eval_entries]
        assert session.elements["Scene"].gui_handle.options == tuple(names) == ("scene_5", "scene_6")
        session.set("Scene", "scene_6")
        second = session.render()["rgb"]
        alone = tiny_pipeline(collection, scene="scene_6")
        assert session.pipeline.datamanager.shown.name == "scene_6" and not torch.equal(first, second)
        for views in ("context", "target"):
            mine, theirs = (getattr(p.datamanager.shown_scene().views, views) for p in (session.pipeline, alone))
            assert torch.equal(mine.rgb, theirs.rgb)
        assert torch.equal(session.model._context.views.rgb, alone.model._context.views.rgb)
        assert len(session.viewer.camera_handles) == len(pool_of(alone).frames)
        monkeypatch.setattr(session.pipeline.datamanager.collection, "load", broken(DataError("{gone}")))
        session.set("Scene", "scene_5")
        session.render()
        assert session.elements["Scene"].value == "scene_6" == session.pipeline.datamanager.shown.name
        assert viewer_module.plain("Scene scene_5 cannot be shown: {gone}") in session.status.gui_handle.content
    finally:
        session.viewer.viser_server.stop()


@pytest.fixture
def others(tmp_path) -> dict[str, Path]:
    """Files of weights: of another network, and of a run that has images of another size."""
    torch.manual_seed(5)
    lvsm = LVSMDecoderOnlyConfig(width=32, num_layers=2, head_dim=16, init_std=0.1)
    save_weights(tmp_path / "lvsm.safetensors", lvsm.build().state_dict(), lvsm)
    larger = EfficientLVSMConfig(width=48, num_layers=2, head_dim=16, init_std=0.1)
    run = tmp_path / "run"
    (run / "nerfstudio_models").mkdir(parents=True)
    checkpoint = {"pipeline": {f"{RUN_PREFIX}{name}": x for name, x in larger.build().state_dict().items()}}
    torch.save(checkpoint, run / "nerfstudio_models/step-000000001.ckpt")
    config = deepcopy(efficient_lvsm_tiny.config)
    config.pipeline.model.network, config.pipeline.datamanager.image_size = larger, (24, 32)
    (run / "config.yml").write_text(yaml.dump(config))
    return {"lvsm": tmp_path / "lvsm.safetensors", "run": run / "nerfstudio_models/step-000000001.ckpt"}


def load(session, weights) -> str:
    """Loads weights as a browser would, and returns what the panel says after the next frame."""
    session.set("Weights", str(weights))
    session.set("Load weights")
    session.render()
    return html.unescape(session.status.gui_handle.content)


def test_other_weights_render_the_views_in_use(session, others, scene):
    before = session.render()
    first = session.model.context_ids
    new = next(frame for frame in session.pool.frames if frame not in first)
    session.set(f"View {new:03d}", True)
    session.render()
    load(session, others["run"])
    shown = session.render()
    assert session.model.context_ids == (*first, new) and session.elements["Render size"].value == 24
    assert session.pipeline.datamanager.config.image_size == (24, 32)
    assert len(session.viewer.camera_handles) == len(session.pool.frames)

    alone = tiny_pipeline(scene, image_size=(24, 32))
    network = load_network(others["run"], session.model.config.network)
    alone.model.use_network(network)
    alone.model.edit_context(pool_of(alone).read(new), [new])
    camera = camera_of(session.pipeline)
    session.model.render_for_viewer = None
    ours, expected = (model.get_outputs_for_camera(camera)["rgb"] for model in (session.model, alone.model))
    assert torch.allclose(ours, expected, atol=1e-5) and shown["rgb"].shape == before["rgb"].shape


def test_weights_of_a_network_without_attention_maps(session, others):
    assert "attention_view" in session.render()
    load(session, others["lvsm"])
    rendered = session.render()
    assert list(rendered) == ["rgb"] and rendered["rgb"].std() > 1e-3
    assert isinstance(session.model.network, LVSMDecoderOnly)
    assert session.pipeline.datamanager.config.image_size == (16, 16), "the file does not say, so it stays"
    load(session, "pretrained")
    assert list(session.render())[1:] == ["attention_view", "attention_evenness"]
    assert session.pipeline.datamanager.config.image_size == trained_image_size("pretrained")


def test_weights_that_cannot_be_used_leave_those_before(session, others, tmp_path, monkeypatch):
    before, network = session.render()["rgb"], session.model.network
    (tmp_path / "no.safetensors").write_bytes(b"none")
    for weights, reason in {
        "efficient-lvsm-257": "did you mean efficient-lvsm-256",
        tmp_path / "gone.pt": "gone.pt does not exist; expected a file of weights",
        tmp_path / "no.safetensors": "no.safetensors: damaged",
    }.items():
        said = load(session, weights)
        assert f"Weights {weights} cannot be used:" in said and reason in said
        assert session.elements["Weights"].value == str(weights)

    def fail(*args):
        raise torch.OutOfMemoryError("no room for this")

    with monkeypatch.context() as small:
        small.setattr(LVSMDecoderOnly, "_encode", fail)
        assert "cannot be used: no room for this" in load(session, others["lvsm"])
    assert session.model.network is network and torch.equal(session.render()["rgb"], before)
    assert session.pipeline.datamanager.config.image_size == (16, 16)
    load(session, others["lvsm"])
    assert "cannot be used" not in session.status.gui_handle.content


def test_weights_are_not_exchanged_while_training(pipeline, tmp_path):
    session = Session(pipeline, tmp_path, default_composite_depth=False)
    try:
        assert not session.elements["Load weights"].gui_handle.disabled
        controls = session.model.render_for_viewer.__self__
        session.viewer.trainer = object()
        controls._start(session.viewer)
        assert session.elements["Load weights"].gui_handle.disabled and session.elements["Weights"].gui_handle.disabled
    finally:
        session.viewer.viser_server.stop()


def with_memory(session, action: str, file) -> str:
    session.set("Memory", str(file))
    session.set(action)
    session.render()
    return html.unescape(session.status.gui_handle.content)


def test_a_memory_is_saved_and_loaded_without_encoding(session, tmp_path, monkeypatch):
    file, first = tmp_path / "scene.safetensors", session.model.context_ids
    new = [frame for frame in session.pool.frames if frame not in first][:2]
    for frame in new:
        session.set(f"View {frame:03d}", True)
    before = session.render()["rgb"]
    assert f"Memory of 4 views saved as {file}" in with_memory(session, "Save memory", file)
    assert load_memory(file, session.model.network).ids == (*first, *new)
    for frame in new:
        session.set(f"View {frame:03d}", False)
    session.render()
    session.model._memory = (session.model.memory(),) * 2  # as if the views had never been encoded
    encoded = count_encoded_views(session.pipeline, monkeypatch)
    assert "Memory of 4 views read" in with_memory(session, "Load memory", file)
    assert session.model.context_ids == (*first, *new) and encoded == []
    assert torch.allclose(session.render()["rgb"], before, atol=1e-6)
    assert session.elements[f"View {new[0]:03d}"].value


def test_memories_that_cannot_be_saved_or_used(session, others, tmp_path):
    before, file = session.render()["rgb"], tmp_path / "scene.safetensors"
    written = others["lvsm"].read_bytes()
    assert "lvsm.safetensors exists already" in with_memory(session, "Save memory", others["lvsm"])
    assert others["lvsm"].read_bytes() == written
    assert "scene.txt does not end in .safetensors" in with_memory(session, "Save memory", tmp_path / "scene.txt")
    assert "cannot be used: " in with_memory(session, "Load memory", tmp_path / "gone.safetensors")
    assert "cannot be used: " in with_memory(session, "Load memory", others["lvsm"])
    network, views = session.model.network, session.model._context.views
    network.encode(views, ids=[7, 99]).save(file)
    assert "it is of other frames (99) than this scene has" in with_memory(session, "Load memory", file)
    moved = replace(views, camera_to_world=views.camera_to_world + 1)
    network.encode(moved, ids=session.model.context_ids).save(file)
    assert "made of other cameras" in with_memory(session, "Load memory", file)
    assert torch.equal(session.render()["rgb"], before)


def broken(error: Exception):
    def fail(*args, **options):
        raise error

    return fail


def test_no_more_frustums_than_nerfstudio_shall_draw(pipeline, tmp_path):
    session = Session(pipeline, tmp_path, default_composite_depth=False, max_num_display_images=4)
    try:
        session.render()
        numbers = [session.pool.frames.index(frame) for frame in session.pool.context]
        assert len(session.viewer.camera_handles) == 4 and len(session.pool.frames) > 6
        new = [frame for frame in session.pool.frames if frame not in session.pool.context][-3:]
        for frame in new:
            session.set(f"View {frame:03d}", True)
        session.render()
        assert len(session.viewer.camera_handles) == 4 and len(session.model.context_ids) == len(numbers) + 3
    finally:
        session.viewer.viser_server.stop()


def test_frustums_show_what_is_in_use(session, monkeypatch):
    drawn = {}
    scene = session.viewer.viser_server.scene
    add = scene.add_camera_frustum

    def record(name, color, image, **rest):
        drawn[name] = color, image is not None
        return add(name=name, color=color, image=image, **rest)

    monkeypatch.setattr(scene, "add_camera_frustum", record)
    session.render()
    assert [drawn[f"/cameras/camera_{i:05d}"] for i in range(3)] == [(USED, True), (USED, True), (UNUSED, False)]
    assert len(drawn) == len(session.pool.frames) == len(session.viewer.camera_handles)
    drawn.clear()
    session.set(f"View {session.model.context_ids[0]:03d}", False)
    session.render()
    assert drawn == {"/cameras/camera_00000": (UNUSED, False)}


def test_a_frame_that_cannot_be_rendered_is_the_last_one_and_the_reason_is_shown(session, monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("no room for this")

    with monkeypatch.context() as broken:
        broken.setattr(session.model, "render", fail)
        assert (session.render()["rgb"] == 0.5).all()
    good = session.render()
    with monkeypatch.context() as broken:
        broken.setattr(session.model, "render", fail)
        failed = [session.render(), session.render("low_move")]
    assert torch.equal(failed[0]["rgb"], good["rgb"]) and list(failed[0]) == list(good)
    assert failed[1]["rgb"].shape != good["rgb"].shape
    assert "OutOfMemoryError: no room for this" in html.unescape(session.status.gui_handle.content)
    assert capsys.readouterr().out.count("OutOfMemoryError: no room for this") == 2, "once for each row of failures"
    session.render()
    assert "could not" not in session.status.gui_handle.content


def test_without_a_viewer_errors_are_raised(pipeline):
    with pytest.raises(ValueError, match="focal lengths"):
        pipeline.model.get_outputs_for_camera(Cameras(torch.eye(4)[None, :3], 0.0, 0.0, 8.0, 8.0, 16, 16))


def test_a_view_that_cannot_be_read_is_left_out(pipeline, tmp_path, monkeypatch):
    session = Session(pipeline, tmp_path, default_composite_depth=False)
    try:
        new = next(frame for frame in session.pool.frames if frame not in session.model.context_ids)
        scene = pipeline.datamanager.collection.load(pipeline.datamanager.shown)
        files = [
            file if frame != new else tmp_path / "gone.png" for frame, file in enumerate(scene.outputs.image_filenames)
        ]
        monkeypatch.setattr(scene.outputs, "image_filenames", files)
        session.set(f"View {new:03d}", True)
        assert session.render()["rgb"].std() > 1e-3
        assert f"View {new} left out" in session.status.gui_handle.content
    finally:
        session.viewer.viser_server.stop()


def test_interrupts_at_any_line_leave_a_context_that_renders(session):
    """The viewer raises in the middle of a render when the camera moves."""
    session.render()
    controls = session.model.render_for_viewer.__self__
    first, every = session.model.context_ids, session.pool.frames
    camera = camera_of(session.pipeline)
    lines = 0

    def count_lines(frame, event, arg):
        nonlocal lines
        lines += event == "line"
        return count_lines

    plans = [viewer_module.Plan("manual", frames) for frames in (every[:4], every[3:8], first)]
    for plan in plans:
        controls._plan = plan
        with SetTrace(count_lines):
            session.model.get_outputs_for_camera(camera)
    interrupted = 0
    for at in range(7, lines // 2, lines // 120):
        for plan in plans:
            left = at

            def interrupt(frame, event, arg):
                nonlocal left
                left -= event == "line"
                # Not in nerfstudio's own SetTrace, on the way out.
                if event == "line" and left <= 0 and "viewer_utils" not in frame.f_code.co_filename:
                    raise IOChangeException
                return interrupt

            controls._plan = plan
            try:
                with SetTrace(interrupt):
                    session.model.get_outputs_for_camera(camera)
            except IOChangeException:
                interrupted += 1
        assert sys.gettrace() is None
    assert interrupted > 60
    lock = session.viewer.viser_server._websock_server._atomic_lock
    assert lock.acquire(blocking=False), "viser would send nothing any more"
    lock.release()
    controls._plan = plans[-1]
    with_history = session.model.get_outputs_for_camera(camera)["rgb"]
    context, frame = session.model._context.views, session.model._context.frame
    assert set(session.model.context_ids) == set(first)
    session.model.set_context(ViewSet(context, context), session.model.context_ids)
    session.model._context = model_module.Context(context, session.model.context_ids, frame)
    assert torch.allclose(session.model.get_outputs_for_camera(camera)["rgb"], with_history, atol=1e-5)

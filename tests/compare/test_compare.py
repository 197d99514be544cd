"""`elvsm compare`: one comparison on tiny scenes from end to end, its parts, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import make_views, tiny_pipeline, write_collection
from PIL import Image

from elvsm_nerfstudio.compare.scoring import frame_file, read_picture
from elvsm_nerfstudio.data.images import DataError
from elvsm_nerfstudio.evaluation.baselines import copy_nearest, mean_of_context
from elvsm_nerfstudio.evaluation.metrics import image_metrics, psnr

HERE = Path(__file__).parent


def write_run(folder: Path, data: Path, method: str = "efficient_lvsm_tiny", scale: float = 20.0) -> Path:
    """The folder of a run with an untrained network whose colours are strong, or NaN."""
    from elvsm_nerfstudio import method_configs

    pipeline = tiny_pipeline(data, method=method)
    with torch.no_grad():
        pipeline.model.network.head.weight.mul_(scale)
    config = replace(deepcopy(getattr(method_configs, method).config), pipeline=pipeline.config, output_dir=folder)
    config.experiment_name, config.timestamp, config.data = "tiny", "run", data
    config.get_checkpoint_dir().mkdir(parents=True)
    torch.save({"step": 0, "pipeline": pipeline.state_dict()}, config.get_checkpoint_dir() / "step-000000000.ckpt")
    path = config.get_base_dir() / "config.yml"
    path.write_text(yaml.dump(config))
    return path.parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A collection without an index; read only."""
    return write_collection(tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, plain) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), plain)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, plain, run):
    """A comparison in which one method fails: its options, and what came out."""
    from elvsm_nerfstudio.compare.comparison import compare
    from elvsm_nerfstudio.compare.options import CompareOptions

    broken = write_run(tmp_path_factory.mktemp("broken"), plain, scale=math.nan)
    args = CompareOptions(
        data=plain, methods=("efficient-lvsm-tiny", "broken", "copy-nearest"),
        runs=(f"efficient-lvsm-tiny={run}", f"broken={broken}"), output=tmp_path_factory.mktemp("comparison") / "out",
        context_views=(1, 2), num_target_views=3, video_frames=6, video_image_size=(24, 32), beside="tests",
    )  # fmt: skip
    return args, compare(args)


def settings_of(data: Path, scenes: tuple[str, ...] = ()):
    """What a comparison at 16 x 16 pixels hands to its methods."""
    from elvsm_nerfstudio.compare.layout import Settings

    return Settings(str(data), (16, 16), "white", None, 3, scenes)


def rows_of(result: dict, method: str, count: int) -> list[dict]:
    found = [r for r in result["records"] if (r["method"], r["context_views"]) == (method, count)]
    return [row for record in found for row in record["images"]]


def test_all_methods_get_the_same_frames_and_photos(compared, plain):
    args, result = compared
    split = json.loads((args.output / "split.json").read_text())
    first = json.loads((args.output / "splits/1_views.json").read_text())
    assert set(split) == {"scene_5", "scene_6"} and result["image_size"] == [16, 16]
    for scene, frames in split.items():
        assert len(frames["context"]) == 2 and len(frames["target"]) == 3
        assert not set(frames["context"]) & set(frames["target"])
        assert first[scene] == {"context": frames["context"][:1], "target": frames["target"]}
    datamanager = tiny_pipeline(plain, evaluation_index=args.output / "split.json").datamanager
    scene = datamanager.evaluation_scene(datamanager.eval_entries[0])
    for frame, rgb in zip(split["scene_5"]["target"], scene.views.target.rgb[0]):
        assert torch.equal(read_picture(args.output / "images/scene_5/target" / frame_file(frame)), rgb)


def test_scores_are_those_of_the_saved_pictures(compared, plain):
    args, result = compared
    datamanager = tiny_pipeline(plain, evaluation_index=args.output / "splits/2_views.json").datamanager
    expected = []
    for entry in datamanager.eval_entries:
        views = datamanager.evaluation_scene(entry).views
        copies = copy_nearest(views.context, views.target)[0]
        expected += [image_metrics(copy, truth) for copy, truth in zip(copies, views.target.rgb[0])]
    rows = rows_of(result, "copy-nearest", 2)
    assert [row["psnr"] for row in rows] == pytest.approx([row["psnr"] for row in expected])
    assert [row["flip"] for row in rows] == pytest.approx([row["flip"] for row in expected], abs=1e-5)
    summary = result["methods"][2]["summaries"]["2"]
    assert summary["metrics"]["psnr"] == pytest.approx(sum(row["psnr"] for row in expected) / 6)
    assert summary["scenes"]["scene_5"]["num_images"] == 3


def test_a_run_is_rendered_as_its_own_pipeline_renders(compared, plain, run):
    args, _ = compared
    pipeline = tiny_pipeline(plain, evaluation_index=args.output / "splits/2_views.json")
    with torch.no_grad():
        pipeline.model.network.head.weight.mul_(20)
    datamanager = pipeline.datamanager
    scene = datamanager.evaluation_scene(datamanager.eval_entries[1])
    pipeline.model.set_context(scene.views)
    folder = args.output / "methods/efficient-lvsm-tiny/2_views/scene_6/target"
    for i, frame in enumerate(datamanager.evaluation_index.choices["scene_6"].target):
        rgb = pipeline.model.get_outputs_for_camera(scene.cameras[i : i + 1])["rgb"]
        assert rgb.std() > 0.05
        torch.testing.assert_close(read_picture(folder / frame_file(frame)), rgb.clamp(0, 1), atol=0.003, rtol=0)


def test_costs_are_recorded(compared):
    _, result = compared
    records = [record for record in result["records"] if record["method"] == "efficient-lvsm-tiny"]
    assert {record["frames_per_call"] for record in result["records"] if record["status"] == "done"} == {1}
    parameters = sum(p.numel() for p in tiny_pipeline(Path(result["data"])).model.network.parameters())
    for record in records:
        assert len(record["render_ms"]) == 3 and min(record["render_ms"]) > 0
        assert record["first_picture_seconds"] > record["prepare_seconds"] > 0
        assert record["disk_bytes"] == 4 * parameters and record["peak_bytes"] > 50 * 2**20
    assert result["machine"]["device"] and result["beside"] == "tests" and "torch" in result["versions"]


def test_a_failing_method_is_shown_as_failed_and_the_rest_goes_on(compared):
    args, result = compared
    broken = [record for record in result["records"] if record["method"] == "broken"]
    assert [record["status"] for record in broken] == ["failed"] * 4
    assert "not finite" in broken[0]["error"]
    table = (args.output / "table.md").read_text()
    assert "broken (2 of 2 scenes failed) | failed" in table and "| copy-nearest |" in table
    frames = sorted(args.output.glob("methods/*/2_views/scene_5/path/*.png"))
    sizes = {file.parents[3].name: Image.open(file).size for file in frames}
    assert sizes == {"efficient-lvsm-tiny": (32, 24), "copy-nearest": (16, 16)} and len(frames) == 2 * 6
    for name in ("index.html", "results.json", "quality_views_dark.png", "quality_time_light.png", "path_scene_5.mp4"):
        assert (args.output / name).stat().st_size > 1000, name


def test_metrics_that_cannot_be_had_are_left_out_with_a_note(compared):
    from elvsm_nerfstudio.compare.runs import measured_metrics

    _, result = compared
    assert result["metrics"] == ["psnr", "ssim", "flip"]
    assert "LPIPS is left out: found images of 16 x 16" in result["notes"][0]
    # The reason does not depend on what this process has warned of before.
    assert measured_metrics((16, 16)) == (result["metrics"], result["notes"][:1])


def test_going_on_keeps_what_was_done(compared):
    from elvsm_nerfstudio.compare.comparison import compare
    from elvsm_nerfstudio.compare.data import find_scenes, keep_settings, keep_split
    from elvsm_nerfstudio.compare.layout import Layout, Settings, dataparser_config
    from elvsm_nerfstudio.data.scenes import SceneCollection

    args, before = compared
    again = replace(args, methods=("efficient-lvsm-tiny", "mean-of-context"), runs=args.runs[:1])
    record = args.output / "methods/efficient-lvsm-tiny/2_views/scene_5.json"
    time = record.stat().st_mtime_ns
    result = compare(again)
    assert record.stat().st_mtime_ns == time
    assert [method["name"] for method in result["methods"]] == ["efficient-lvsm-tiny", "mean-of-context"]
    assert rows_of(result, "efficient-lvsm-tiny", 2) == rows_of(before, "efficient-lvsm-tiny", 2)

    settings = Settings(**json.loads((args.output / "comparison.json").read_text())["settings"])
    with pytest.raises(ValueError, match="holds a comparison with num_target_views 3; expected the same, found 4"):
        keep_settings(Layout(args.output), replace(settings, num_target_views=4))
    scenes = find_scenes(args, SceneCollection.open(args.data, dataparser_config(None)))
    with pytest.raises(DataError, match="2 context frames; expected the 3 of --context-views"):
        keep_split(replace(args, context_views=(3,)), Layout(args.output), scenes)


def test_a_process_that_dies_fails_on_its_scene_alone(tmp_path, monkeypatch):
    from elvsm_nerfstudio.compare import runs as compare_runs
    from elvsm_nerfstudio.compare.layout import Job, Layout, MethodSpec, Settings

    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys, pathlib\n"
        "content = json.load(open(sys.argv[1]))\n"
        "for job in content['jobs']:\n"
        "    if job['scene'] == 'b':\n"
        "        print('out of memory', flush=True), os._exit(9)\n"
        "    path = pathlib.Path(content['root'], 'methods/m/4_views', job['scene'] + '.json')\n"
        "    path.parent.mkdir(exist_ok=True)\n"
        '    path.write_text(\'{"status": "done"}\')\n'
    )
    monkeypatch.setattr(compare_runs, "WORKER", (str(worker),))
    layout, spec = Layout(tmp_path / "out"), MethodSpec("m", "baseline", "copy-nearest")
    settings = Settings("data", (16, 16), "white", None, 3, ("a", "b", "c"))
    jobs = [Job(4, scene, 0) for scene in "abc"]
    assert [job.scene for job in compare_runs.run_method(layout, settings, spec, jobs)] == ["a", "b", "c"]
    records = [json.loads(layout.record(spec, 4, scene).read_text()) for scene in "abc"]
    assert [record["status"] for record in records] == ["done", "failed", "done"]
    assert "status 9" in records[1]["error"] and "out of memory" in records[1]["error"]


def test_finetuning_fits_the_context_and_starts_anew_on_each_scene(tmp_path, plain, run, monkeypatch):
    from elvsm_nerfstudio.compare import methods
    from elvsm_nerfstudio.compare.methods import Network, SceneContext
    from elvsm_nerfstudio.compare.rows import find_methods

    name = "efficient-lvsm-tiny"
    spec = find_methods(options(plain, name, run=run, finetune=(name,), finetune_minutes=0.1), whole_scenes=True)[1]
    assert spec.name == "efficient-lvsm-tiny (fine-tuned)" and spec.folder == "efficient-lvsm-tiny-fine-tuned"
    datamanager = tiny_pipeline(plain).datamanager
    scene = datamanager.evaluation_scene(datamanager.eval_entries[0])
    context, count = scene.views.context, scene.views.context.num_views
    cameras = datamanager.train_dataset.cameras

    # A clock that a tenth of a second passes on whenever it is looked at: so many steps on any machine.
    monkeypatch.setattr(methods, "time", SimpleNamespace(perf_counter=itertools.count(0, 0.1).__next__))

    def fit(minutes: float | None) -> float:
        network = Network(replace(spec, finetune_minutes=minutes), settings_of(plain), torch.device("cpu"))
        before = {name: tensor.clone() for name, tensor in network.model.network.state_dict().items()}
        prepared = network.prepare(SceneContext(scene.name, context, tmp_path, count))
        assert minutes is None or 55 <= prepared.facts["finetuning_steps"] <= 60
        assert all(torch.equal(network._weights[name], before[name]) for name in before)
        renders = torch.stack([render for render, _ in prepared.render(cameras[:count])])
        return float(psnr(renders.detach(), context.rgb[0]))

    assert fit(0.1) > fit(None) + 1


def test_a_network_that_was_trained_at_a_larger_size_renders_at_it(tmp_path, plain, run, monkeypatch):
    from elvsm_nerfstudio.cameras import in_pixels
    from elvsm_nerfstudio.compare.layout import Settings
    from elvsm_nerfstudio.compare.methods import Network, SceneContext
    from elvsm_nerfstudio.compare.rows import find_methods

    (spec,) = find_methods(options(plain, "efficient-lvsm-tiny", run=run), whole_scenes=True)
    assert spec.image_size == (16, 16)
    larger = replace(spec, image_size=(32, 32))
    assert larger.key() != spec.key() and "image_size" not in replace(spec, image_size=None).key()
    scenes = {}
    for size in (16, 32):
        datamanager = tiny_pipeline(plain, image_size=(size, size)).datamanager
        scenes[size] = datamanager.evaluation_scene(datamanager.eval_entries[0])
    small, large = scenes[16], scenes[32]
    index = tmp_path / "index.json"
    frames = {"context": list(small.context_names), "target": list(small.target_names)}
    index.write_text(json.dumps({small.name: frames}))

    opened, open_data = [], Settings.datamanager
    monkeypatch.setattr(Settings, "datamanager", lambda *given: opened.append(given) or open_data(*given))
    network = Network(larger, settings_of(plain, scenes=(small.name,)), torch.device("cpu"))
    count = small.views.context.num_views
    for _ in range(2):
        prepared = network.prepare(SceneContext(small.name, small.views.context, index, count))
    assert len(opened) == 1  # and not anew for each scene
    (picture, _), *_ = prepared.render(small.cameras[:1])
    assert picture.shape == (16, 16, 3) and prepared.facts["rendered_size"] == [32, 32]
    memory = network.model.network.encode(large.views.context)
    expected = network.model.render(memory, in_pixels(small.cameras[:1], 32, 32))["rgb"]
    torch.testing.assert_close(picture, expected.unflatten(0, (16, 2)).unflatten(2, (16, 2)).mean(dim=(1, 3)))

    as_compared = Network(spec, settings_of(plain), torch.device("cpu"))
    prepared = as_compared.prepare(SceneContext(small.name, small.views.context, index, count))
    assert "rendered_size" not in prepared.facts
    (other, _), *_ = prepared.render(small.cameras[:1])
    assert not torch.allclose(other, picture, atol=1e-2)


def test_mean_of_context():
    views = make_views(2, 3, 8, 8)
    mean = mean_of_context(views, views.select([0, 1]))
    assert mean.shape == (2, 2, 8, 8, 3)
    torch.testing.assert_close(mean[1, 1], (views.rgb[1, 0] + views.rgb[1, 1] + views.rgb[1, 2]) / 3)


def test_evaluation_reports_both_baselines(plain):
    from elvsm_nerfstudio.evaluation.evaluator import Evaluator, configured_protocol
    from elvsm_nerfstudio.evaluation.scored_network import ScoredNetwork

    pipeline = tiny_pipeline(plain)
    evaluator = Evaluator(
        ScoredNetwork(pipeline.model), pipeline.datamanager, configured_protocol(pipeline.datamanager)
    )
    scene = evaluator.scene(pipeline.datamanager.eval_entries[0], max_targets=1)
    (result,) = evaluator.score(scene)
    context, truth = scene.views.context, scene.views.target.rgb[0, 0]
    assert result.metrics["psnr_mean_of_context"] == pytest.approx(float(psnr(context.rgb[0].mean(dim=0), truth)))
    copied = copy_nearest(context, scene.views.target)[0, 0]
    assert result.metrics["psnr_copy_nearest"] == pytest.approx(float(psnr(copied, truth)))


def test_the_path_passes_through_the_context_cameras():
    from elvsm_nerfstudio.cameras import views_from_cameras
    from elvsm_nerfstudio.compare.path import path_through

    context = make_views(1, 4, 12, 16)
    path = views_from_cameras(path_through(context, 40), patch_size=1)
    centres = path.camera_to_world[0, :, :3, 3]
    for pose in context.camera_to_world[0]:
        distance = (centres - pose[:3, 3]).norm(dim=-1)
        nearest = int(distance.argmin())
        assert distance[nearest] < 1e-4
        torch.testing.assert_close(path.camera_to_world[0, nearest, :3, 2], pose[:3, 2], atol=1e-4, rtol=0)
    radii = centres.norm(dim=-1)
    assert radii.min() > 0.9 * context.camera_to_world[0, :, :3, 3].norm(dim=-1).min()  # it never cuts through
    torch.testing.assert_close(path.intrinsics[0, 0, :2], context.intrinsics[0, 0, :2])


# What is refused


def options(data: Path, *methods: str, run: Path | None = None, **more):
    from elvsm_nerfstudio.compare.options import CompareOptions

    runs = () if run is None else (f"{methods[0]}={run}",)
    return CompareOptions(**{"data": data, "methods": methods, "output": Path("unused"), "runs": runs, **more})


@pytest.mark.parametrize(
    "methods, more, message",
    [
        (["efficient-lvsm-tin"], {}, "did you mean efficient-lvsm-tiny"),
        (["copy-neerest"], {}, "did you mean copy-nearest"),
        (["efficient-lvsm-tiny"], {}, "needs weights; give --runs efficient-lvsm-tiny=RUN"),
        (["copy-nearest"], {"runs": ("copy-nearest=.",)}, "takes no run"),
        (["efficient-lvsm-plus-tiny"], {"finetune": ("copy-nearest",)}, "which are: efficient-lvsm-plus-tiny"),
        (
            ["efficient-lvsm-plus-tiny"],
            {"finetune": ("efficient-lvsm-plus-tiny",), "context_views": (4, 1)},
            "at least 2 context views",
        ),
        (["copy-nearest"], {"runs": ("mine=.",)}, "not among --methods, which are copy-nearest"),
        (["mine"], {"runs": ("mine",)}, "expected NAME=PATH"),
        (["mine"], {"runs": ("mine=nowhere",)}, "mine=nowhere: found neither weights of that name nor a file"),
        (["mine"], {"runs": (f"mine={HERE}",)}, "found no config.yml in it"),
        (["mine"], {"runs": (f"mine={__file__}",)}, "a file of weights needs the name of a method"),
    ],
)
def test_bad_methods_are_refused(plain, methods, more, message):
    from elvsm_nerfstudio.compare.rows import find_methods

    with pytest.raises(ValueError, match=message):
        find_methods(options(plain, *methods, **more), whole_scenes=True)


def test_runs_of_other_methods_are_refused_and_of_other_data_noted(plain, run, collection):
    from elvsm_nerfstudio.compare.rows import find_methods, image_size

    with pytest.raises(ValueError, match="found a run of efficient-lvsm-tiny; give that row another name"):
        find_methods(options(plain, "lvsm-decoder-only-tiny", run=run), whole_scenes=True)
    (spec,) = find_methods(options(plain, "mine", run=run), whole_scenes=True)
    assert spec.method == "efficient-lvsm-tiny" and spec.note == "trained on other scenes of these data"
    (other,) = find_methods(options(collection, "mine", run=run / "config.yml"), whole_scenes=True)
    assert other.note == f"trained on other data than compared on here: {plain.name}"
    assert image_size(options(plain, "mine", run=run), [spec]) == (16, 16)
    with pytest.raises(ValueError, match="expected multiples of 8, the patches of mine"):
        image_size(options(plain, "mine", run=run, image_size=(20, 16)), [spec])


def test_a_checkpoint_that_does_not_say_its_network_is_of_the_method_named(tmp_path):
    """Its tensors would be those of a network without relative camera encoding too."""
    from elvsm_nerfstudio import method_configs
    from elvsm_nerfstudio.compare.methods import MethodSpec, network_config

    network = method_configs.efficient_lvsm_plus_tiny.config.pipeline.model.network
    state = {f"_model.network.{name}": x for name, x in network.build().state_dict().items()}
    torch.save({"step": 7, "pipeline": state}, tmp_path / "step-000000007.ckpt")
    name = "efficient-lvsm-plus-tiny"
    spec = MethodSpec(name, "network", name, weights=str(tmp_path / "step-000000007.ckpt"))
    assert network_config(spec).pipeline.model.network == network and network.camera_encoding == "prope"


def test_the_weights_of_the_package_need_no_run(plain):
    from elvsm_nerfstudio.compare.rows import find_methods, image_size
    from elvsm_nerfstudio.nn.named_weights import PRETRAINED, PRETRAINED_METHOD, weights_path

    (spec,) = find_methods(options(plain, PRETRAINED_METHOD), whole_scenes=True)
    assert Path(spec.weights) == weights_path(Path(PRETRAINED)) and spec.config is None
    assert image_size(options(plain, PRETRAINED_METHOD), [spec]) == (64, 64)
    (other,) = find_methods(options(plain, PRETRAINED_METHOD, run=Path("pretrained")), whole_scenes=True)
    assert other == spec


def test_gaussians_that_are_fitted_to_renders_too_name_their_weights(plain, tmp_path):
    from elvsm_nerfstudio.compare.gaussians import Gaussians
    from elvsm_nerfstudio.compare.layout import Settings
    from elvsm_nerfstudio.compare.methods import SceneContext
    from elvsm_nerfstudio.compare.rows import find_methods
    from elvsm_nerfstudio.nn.named_weights import weights_path

    (spec,) = find_methods(options(plain, "splatfacto-lvsm"), whole_scenes=True)
    assert (spec.kind, spec.method, spec.weights) == ("gaussians", "splatfacto-lvsm", "pretrained")
    file = tmp_path / "own.safetensors"
    file.write_bytes(weights_path("pretrained").read_bytes())
    (own,) = find_methods(options(plain, "splatfacto-lvsm", run=file), whole_scenes=True)
    assert own.weights == str(file) and own.key() != spec.key()
    settings = Settings(str(plain), (32, 32), "white", None, 2, ("scene_1",))
    command = Gaussians(own, settings, tmp_path, torch.device("cpu"))._command(
        SceneContext("scene_1", None, tmp_path / "index.json", 2), "scene_1-2_views"
    )
    assert command[1] == "splatfacto-lvsm" and command[command.index("--pipeline.datamanager.weights") + 1] == str(file)
    with pytest.raises(ValueError, match="--runs splatfacto-lvsm=.*missing.* does not exist"):
        find_methods(options(plain, "splatfacto-lvsm", run=tmp_path / "missing.pt"), whole_scenes=True)


def test_gsplat_without_a_gpu_is_refused(plain, monkeypatch):
    from elvsm_nerfstudio.compare import rows as compare_rows

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--backend gsplat: found no GPU"):
        compare_rows._gaussians(options(plain, backend="gsplat"))


def test_splatfacto_without_a_gpu_is_refused(plain, monkeypatch):
    from elvsm_nerfstudio.compare.rows import find_methods

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--methods splatfacto: .* found no GPU .*; take splatfacto-sparse"):
        find_methods(options(plain, "splatfacto"), whole_scenes=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (spec,) = find_methods(options(plain, "splatfacto"), whole_scenes=True)
    assert (spec.kind, spec.method, spec.iterations) == ("splatfacto", "splatfacto", 30000)


def test_splatfacto_gets_the_same_photos_and_cameras(plain, tmp_path):
    """As nerfstudio itself reads the options and the capture; it trains on machines with CUDA alone."""
    import tyro
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

    from elvsm_nerfstudio.cameras import views_from_cameras
    from elvsm_nerfstudio.compare.gaussians import Splatfacto
    from elvsm_nerfstudio.compare.layout import MethodSpec, Settings
    from elvsm_nerfstudio.compare.methods import SceneContext

    datamanager = tiny_pipeline(plain).datamanager
    context = datamanager.evaluation_scene(datamanager.eval_entries[0]).views.context
    settings = Settings("data", (16, 16), "black", None, 3, ("a",))
    method = Splatfacto(MethodSpec("splatfacto", "splatfacto", "splatfacto", iterations=7), settings, tmp_path, None)
    command = method._command(SceneContext("a", context, tmp_path, 2), "a-2_views")
    assert Path(command[0]).name == "ns-train"
    config = tyro.cli(AnnotatedBaseConfigUnion, args=command[1:])
    assert config.method_name == "splatfacto" and config.max_num_iterations == 7
    assert config.pipeline.model.background_color == "black" and config.pipeline.model.num_downscales == 0
    parser = config.pipeline.datamanager.dataparser
    parser.data = config.data
    outputs = parser.setup().get_dataparser_outputs("train")
    read = views_from_cameras(outputs.cameras, patch_size=1)
    torch.testing.assert_close(read.camera_to_world, context.camera_to_world)
    torch.testing.assert_close(read.directions, context.directions, atol=1e-5, rtol=0)
    for file, rgb in zip(outputs.image_filenames, context.rgb[0]):
        assert torch.equal(read_picture(file), rgb)

    bent = replace(context, directions=context.directions.flip(-2))
    with pytest.raises(ValueError, match="splatfacto renders pinhole cameras alone"):
        method._command(SceneContext("a", bent, tmp_path, 2), "a-2_views")


def test_checkpoints_with_numpys_numbers_are_read(tmp_path):
    """As nerfstudio's own schedules leave them."""
    import numpy as np

    from elvsm_nerfstudio.compare.gaussians import NUMPY_SCALARS

    torch.save({"lr": np.float64(0.1)}, tmp_path / "step.ckpt")
    with torch.serialization.safe_globals(NUMPY_SCALARS):
        assert torch.load(tmp_path / "step.ckpt", weights_only=True) == {"lr": 0.1}


def test_bad_splits_are_refused(tmp_path, plain):
    from elvsm_nerfstudio.compare.layout import dataparser_config
    from elvsm_nerfstudio.compare.split import choose_split, read_split
    from elvsm_nerfstudio.data.scenes import SceneCollection

    collection = SceneCollection.open(plain, dataparser_config(None))
    scenes = [collection.load(entry) for entry in collection.split("test")]

    def read(count: int, **scene_5) -> None:
        good = {"context": [0, 1], "target": [5]}
        (tmp_path / "split.json").write_text(json.dumps({"scene_5": {**good, **scene_5}, "scene_6": good}))
        read_split(tmp_path / "split.json", scenes, count)

    read(2)
    with pytest.raises(DataError, match=r"frames \[1\] are context and target"):
        read(2, target=[1, 5])
    with pytest.raises(DataError, match="scene scene_5: 1 context frames; expected the 2"):
        read(2, context=[0])
    with pytest.raises(DataError, match="frame 99; the scene has frames 0..7"):
        read(2, target=[99])
    assert list(read_split(tmp_path / "split.json", scenes[1:], 2)) == ["scene_6"]
    (tmp_path / "one.json").write_text(json.dumps({"scene_5": {"context": [0], "target": [1]}}))
    with pytest.raises(DataError, match="has no frames for scene_6; expected some for every compared scene"):
        read_split(tmp_path / "one.json", scenes, 1)
    with pytest.raises(DataError, match="--context-views 8: scene scene_5 has 8 frames"):
        choose_split(scenes, 8, 3)

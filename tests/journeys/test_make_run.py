"""From weights to evaluation and pictures without training, through nerfstudio's own programs."""

import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_NETWORK, run_cli, tiny_pipeline
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from PIL import Image

from elvsm_nerfstudio import method_configs
from elvsm_nerfstudio.cli.options import parse
from elvsm_nerfstudio.compare.layout import MethodSpec
from elvsm_nerfstudio.compare.methods import network_config
from elvsm_nerfstudio.method_configs import splatfacto_sparse
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig
from elvsm_nerfstudio.nn.published_weights import to_published
from elvsm_nerfstudio.nn.weights import read_weights, save_weights
from elvsm_nerfstudio.runs import RunOptions, export_weights, make_run, model_card
from elvsm_nerfstudio.viewer.streaming import StreamOptions, load_run

CONFIG = EfficientLVSMConfig(width=32, num_layers=2, head_dim=16)


@pytest.fixture
def published(tmp_path) -> Path:
    """Weights in the authors' layout."""
    torch.manual_seed(0)
    path = tmp_path / "published.pt"
    torch.save({"model": to_published(CONFIG.build().state_dict())}, path)
    return path


def setup(config_path: Path):
    from nerfstudio.utils.eval_utils import eval_setup

    return eval_setup(config_path)


def test_published_weights_are_evaluated_and_rendered_on_a_capture_at_once(tmp_path, published, scene):
    made = run_cli("elvsm", "run", "--weights", str(published), "--data", str(scene),
                   "--method", "efficient-lvsm-tiny", "--num-context-views", "3", cwd=tmp_path)  # fmt: skip
    config = made.stdout.split()[-1]
    assert config == str(tmp_path / "outputs/published-spheres/efficient-lvsm-tiny/run/config.yml")
    moved = json.loads((Path(config).parent / "dataparser_transforms.json").read_text())
    assert set(moved) == {"transform", "scale"}
    published.unlink()  # the run has its own
    run_cli("ns-eval", "--load-config", config, "--output-path", "zero.json", cwd=tmp_path)
    results = json.loads((tmp_path / "zero.json").read_text())["results"]
    assert results["num_scenes"] == 1 and results["num_images"] >= 1 and 3 < results["psnr"] < 40
    run_cli("ns-render", "interpolate", "--load-config", config, "--output-path", "path.mp4", "--pose-source", "train",
            "--interpolation-steps", "2", "--output-format", "images", "--image-format", "png",
            cwd=tmp_path)  # fmt: skip
    frames = [np.array(Image.open(path)) for path in sorted((tmp_path / "path").glob("*.png"))]
    assert len(frames) >= 2 and frames[0].std() > 0


def test_the_made_run_has_the_weights_and_sizes_of_the_file(tmp_path, published, scene):
    path = make_run(RunOptions(weights=published, data=scene, method="efficient-lvsm", output_dir=tmp_path / "out"))
    config, pipeline, _, step = setup(path)
    assert step == 0 and config.pipeline.model.network == CONFIG and config.pipeline.model.checkpoint is None
    assert config.pipeline.datamanager.image_size == (256, 256)
    expected = read_weights(published).state
    for name, tensor in pipeline.model.network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_method_is_that_of_the_network(tmp_path, scene):
    network = LVSMDecoderOnlyConfig(width=256, num_layers=8, mlp_ratio=5).build()
    save_weights(tmp_path / "w.safetensors", network.state_dict(), network.config, torch.bfloat16)
    path = make_run(RunOptions(weights=tmp_path / "w.safetensors", data=scene, output_dir=tmp_path / "out"))
    assert yaml.load(path.read_text(), Loader=yaml.Loader).method_name == "lvsm-decoder-only-tiny"


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "of no registered method's network .*width 32.*--method .*efficient-lvsm-512"),
        ({"method": "lvsm-decoder-only"}, "found weights for EfficientLVSMConfig, expected LVSMDecoderOnlyConfig"),
        ({"method": "splatfacto"}, "--method splatfacto is unknown; expected one of efficient-lvsm, "),
        ({"method": "efficient-lvsm", "data": None}, "--weights needs --data"),
        ({"method": "efficient-lvsm", "dataparser": BlenderDataParserConfig()}, "transforms_train.json"),
        (
            {"method": "efficient-lvsm", "dataparser": BlenderDataParserConfig(), "train_split_fraction": 0.5},
            "--train-split-fraction 0.5: BlenderDataParserConfig chooses training frames by itself",
        ),
        ({"method": "efficient-lvsm", "train_split_fraction": 1.5}, "1.5: expected more than 0 and at most 1"),
        (
            {"method": "efficient-lvsm", "image_size": (20, 16)},
            "image-size 20 16: expected multiples of the patch",
        ),
        ({"method": "efficient-lvsm", "context_frames": (3, 99)}, "99"),
        (
            {"method": "efficient-lvsm", "context_frames": (0, 1), "num_context_views": 2},
            "--num-context-views 2: --context-frames says what the context of each scene is",
        ),
        (
            {"method": "efficient-lvsm", "protocol": "incremental", "num_context_views": 2},
            "--num-context-views 2: --protocol incremental says",
        ),
        ({"method": "efficient-lvsm", "scene": "attic"}, "has no such scene"),
        ({"method": "efficient-lvsm", "data": Path("nowhere")}, "nowhere does not exist"),
        ({"weights": None}, "give either --weights WEIGHTS --data DATA or --from-run CONFIG"),
        ({"weights": Path("none.pt")}, "none.pt does not exist; expected a file of weights"),
        ({"weights": None, "from_run": Path("c.yml"), "method": "x"}, "--method x is for --weights"),
    ],
)
def test_what_cannot_be_made_is_explained_and_leaves_nothing(tmp_path, published, scene, options, message):
    args = RunOptions(**{"weights": published, "data": scene, "output_dir": tmp_path / "out", **options})
    with pytest.raises(ValueError, match=message):
        make_run(args)
    assert not (tmp_path / "out").exists()


def test_a_number_of_context_views_beside_an_evaluation_index_is_refused(tmp_path, published, collection):
    data = shutil.copytree(collection, tmp_path / "data")
    names = [scene["name"] for scene in json.loads((data / "scenes.json").read_text())["scenes"]]
    index = {name: {"context": [0, 1], "target": [2]} for name in names[-1:]}
    (data / "evaluation_index.json").write_text(json.dumps(index))
    args = RunOptions(
        weights=published,
        data=data,
        method="efficient-lvsm",
        index_may_miss_scenes=True,
        num_context_views=3,
        output_dir=tmp_path / "out",
    )
    with pytest.raises(ValueError, match=r"-views 3: the evaluation index .*index\.json says what the context"):
        make_run(args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["from-run", "load-config", "runs"])
def test_a_run_of_gaussians_is_refused_where_a_network_is_needed(tmp_path, option):
    config = deepcopy(splatfacto_sparse.config)
    path = tmp_path / "config.yml"
    path.write_text(yaml.dump(config))
    refused = rf"--{option} .*config.yml: found a run of splatfacto-sparse.*expected a run of a network.*ns-render"
    if option == "from-run":
        with pytest.raises(ValueError, match=refused):
            make_run(RunOptions(from_run=path, output_dir=tmp_path / "out"))
        return
    if option == "runs":
        spec = MethodSpec("mine", "network", "splatfacto-sparse", config=str(path))
        with pytest.raises(ValueError, match=refused.replace("runs ", "runs mine=")):
            network_config(spec)
        return
    for use in (
        lambda: export_weights(path, tmp_path / "out.safetensors"),
        lambda: model_card(path, "me/mine", tmp_path / "out.safetensors"),
        lambda: load_run(StreamOptions(path, tmp_path / "out.mp4")),
    ):
        with pytest.raises(ValueError, match=refused):
            use()


def test_a_scene_that_cannot_be_encoded_leaves_nothing(tmp_path, published, scene):
    broken = shutil.copytree(scene, tmp_path / "broken")
    for image in (broken / "images").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(ValueError, match="images"):
        make_run(RunOptions(published, method="efficient-lvsm-tiny", data=broken, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_memory_that_cannot_be_made_leaves_nothing(tmp_path, published, scene, monkeypatch):
    def memory(model):
        raise ValueError("does not fit")

    monkeypatch.setattr("elvsm_nerfstudio.model.EfficientLVSMModel.memory", memory)
    options = RunOptions(published, method="efficient-lvsm-tiny", data=scene, output_dir=tmp_path / "outputs")
    with pytest.raises(ValueError, match="does not fit"):
        make_run(options)
    assert not (tmp_path / "outputs").exists()


def test_options_of_data_arrive_in_the_run(tmp_path, published, scene, monkeypatch):
    """With the dataparser in ns-train's own form; relative paths work from every folder."""
    monkeypatch.chdir(scene.parent)
    given = ["--weights", str(published), "--method", "efficient-lvsm-tiny", "--data", scene.name, "--output-dir",
             str(tmp_path / "out"), "--image-size", "16", "24", "--train-split-fraction", "0.5",
             "--shifted-grids", "4",
             "nerfstudio-data", "--scale-factor", "2.5", "--auto-scale-poses", "False"]  # fmt: skip
    path = make_run(parse(RunOptions, "run", "", given))
    data = yaml.load(path.read_text(), Loader=yaml.Loader).pipeline.datamanager
    assert (data.data, data.image_size) == (scene, (16, 24))
    parser = data.dataparser
    assert (parser.scale_factor, parser.auto_scale_poses, parser.train_split_fraction) == (2.5, False, 0.5)
    assert parser.eval_mode == "fraction"
    assert json.loads((path.parent / "dataparser_transforms.json").read_text())["scale"] == 2.5
    monkeypatch.chdir(tmp_path)
    _, pipeline, _, _ = setup(path)
    assert pipeline.model.config.shifted_grids == 4
    assert len(pipeline.datamanager.collection.load(pipeline.datamanager.shown).train_frames) == 6

    chosen = RunOptions(published, method="efficient-lvsm-tiny", data=scene, output_dir=tmp_path, name="chosen",
                        context_frames=(2, 7, 4))  # fmt: skip
    _, pipeline, _, _ = setup(make_run(chosen))
    assert pipeline.datamanager.train_dataset.image_filenames == [scene / f"images/{i:03d}.png" for i in (2, 7, 4)]
    colmap = parse(RunOptions, "run", "", ["--data", "x", "colmap", "--colmap-path", "sparse/7"]).dataparser
    assert isinstance(colmap, ColmapDataParserConfig) and colmap.colmap_path == Path("sparse/7")
    assert parse(RunOptions, "run", "", ["--data", "x"]).dataparser is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory, collection) -> Path:
    """A run that started from weights, with averaged ones; the weights are gone by now."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(1)
    save_weights(folder / "start.safetensors", CONFIG.build().state_dict(), CONFIG)
    run_cli("ns-train", "efficient-lvsm-tiny", *TINY_NETWORK, "--data", str(collection), "--machine.device-type", "cpu",
            "--vis", "tensorboard", "--max-num-iterations", "2", "--output-dir", "outputs",
            "--experiment-name", "tuned", "--timestamp", "run", "--ema-decay", "0.9",
            "--pipeline.model.network.init-std", "0.02", "--pipeline.model.checkpoint", "start.safetensors",
            "--optimizers.network.optimizer.lr", "1e-6",
            cwd=folder)  # fmt: skip
    (folder / "start.safetensors").rename(folder / "moved.safetensors")
    return folder / "outputs/tuned/efficient-lvsm-tiny/run/config.yml"


def test_training_starts_from_weights_and_evaluation_does_without_them(trained, monkeypatch):
    folder = trained.parents[4]
    monkeypatch.chdir(folder)
    _, pipeline, _, _ = setup(trained.relative_to(folder))
    start = read_weights(folder / "moved.safetensors").state
    for name, tensor in pipeline.model.network.state_dict().items():
        assert torch.allclose(tensor, start[name], atol=1e-5), name
    assert not torch.equal(pipeline.model.network.head.weight, start["head.weight"])


def test_exported_weights_are_those_that_the_run_renders_with(trained, tmp_path, monkeypatch, scene):
    monkeypatch.chdir(trained.parents[4])
    export_weights(trained, tmp_path / "w.safetensors")
    weights = read_weights(tmp_path / "w.safetensors")
    checkpoint = torch.load(trained.parent / "nerfstudio_models/step-000000001.ckpt", weights_only=True)
    assert weights.complete and weights.config.init_std == 0.02
    for name, tensor in weights.state.items():
        assert torch.equal(tensor, checkpoint["pipeline"][f"_model.network.{name}"])
    assert not torch.equal(weights.state["head.weight"], checkpoint["average"]["trained"]["head.weight"])

    export_weights(trained, tmp_path / "half.safetensors", "fp16")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "w.safetensors").stat().st_size
    for name, tensor in read_weights(tmp_path / "half.safetensors").state.items():
        assert torch.equal(tensor, weights.state[name].half()), name
    with pytest.raises(ValueError, match="w.pt: expected a name that ends in .safetensors"):
        export_weights(trained, tmp_path / "w.pt")

    made = make_run(RunOptions(from_run=trained, data=scene, output_dir=tmp_path / "out"))
    _, pipeline, _, _ = setup(made)
    assert torch.equal(pipeline.model.network.head.weight, weights.state["head.weight"])
    last = trained.parent / "nerfstudio_models/step-000000001.ckpt"
    with pytest.raises(ValueError, match=f"belongs to a run.*give --from-run {trained}"):
        make_run(RunOptions(weights=last, data=scene, output_dir=tmp_path / "out"))


def test_a_checkpoint_without_its_run_needs_its_method(tmp_path, scene):
    """Its tensors are those of efficient-lvsm-tiny too, which renders other pictures with them."""
    network = method_configs.efficient_lvsm_plus_tiny.config.pipeline.model.network
    state = {f"_model.network.{name}": x for name, x in network.build().state_dict().items()}
    torch.save({"step": 7, "pipeline": state}, tmp_path / "step-000000007.ckpt")
    args = RunOptions(weights=tmp_path / "step-000000007.ckpt", data=scene, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="not its camera encoding; say with --method .*efficient-lvsm-plus-tiny"):
        make_run(args)
    with pytest.raises(ValueError, match="width 256.*expected .*width 768"):
        make_run(replace(args, method="efficient-lvsm-plus"))
    made = make_run(replace(args, method="efficient-lvsm-plus-tiny"))
    _, pipeline, _, _ = setup(made)
    assert pipeline.model.config.network == network
    head = pipeline.model.network.head.weight
    assert torch.equal(head, state["_model.network.head.weight"])


def test_a_wrong_checkpoint_is_an_error_of_its_option(collection, tmp_path, trained):
    pipeline = tiny_pipeline(collection)
    config = pipeline.model.config
    wide = EfficientLVSMConfig(64, 2, 16).build()
    save_weights(tmp_path / "wide.safetensors", wide.state_dict(), wide.config)
    for checkpoint, message in (
        (tmp_path / "wide.safetensors", "found weights of .*width 64.*expected .*width 32"),
        (tmp_path / "nowhere.pt", "does not exist"),
        (trained.parent / "nerfstudio_models/step-000000001.ckpt", "found weights of .*expected .*prope"),
    ):
        config.checkpoint = checkpoint
        config.network.camera_encoding = "prope" if "prope" in message else "none"
        with pytest.raises(ValueError, match=f"--pipeline.model.checkpoint {re.escape(str(checkpoint))}.*{message}"):
            config.setup(scene_box=None, num_train_data=1)


def test_the_second_stage_asks_for_weights(tmp_path):
    result = run_cli("ns-train", "efficient-lvsm-512", "--data", "x", cwd=tmp_path, check=False)
    assert result.returncode != 0 and "--pipeline.model.checkpoint" in result.stdout + result.stderr
    assert "equired" in result.stdout + result.stderr


def test_recipes_of_the_variants():
    large, objects = (getattr(method_configs, f"efficient_lvsm_{name}").config for name in ("512", "object"))
    optimizer, scheduler = (large.optimizers["network"][part] for part in ("optimizer", "scheduler"))
    assert (optimizer.lr, scheduler.warmup_steps, scheduler.factor(10**6)) == (1e-4, 1000, 1.0)
    assert large.pipeline.datamanager.image_size == (512, 512) and large.max_num_iterations == 20000
    data = objects.pipeline.datamanager
    assert (data.num_context_views, data.num_target_views, data.background) == (4, 8, "white")
    assert data.view_sampler == "angular-groups" and not data.targets_include_context

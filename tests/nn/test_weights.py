"""Every kind of file that weights come in, through the one reader."""

import json
import pickle
from dataclasses import fields, replace

import pytest
import torch
from conftest import make_views
from safetensors import safe_open
from safetensors.torch import save_file

from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.published_weights import to_published
from elvsm_nerfstudio.nn.weights import load_network, load_weights, network_metadata, read_weights, save_weights

SIZES = dict(width=32, num_layers=2, head_dim=16)
CONFIG = EfficientLVSMConfig(**SIZES)


def made(seed: int, config=CONFIG):
    torch.manual_seed(seed)
    return config.build()


def write_ours(path, network):
    save_weights(path, network.state_dict(), network.config)


def write_run(path, network):
    state = {f"_model.module.network.{name}": x for name, x in network.state_dict().items()}
    others = {"_model.device_indicator_param": torch.empty(0), "_model.module.projector.weight": torch.zeros(3, 3)}
    torch.save({"step": 7, "pipeline": {**state, **others}, "optimizers": {"network": {"state": {}}}}, path)


def write_published(path, network):
    extra = {"loss_computer.vgg.0.weight": torch.zeros(1)}
    torch.save({"model": {**to_published(network.state_dict()), **extra}, "epoch": 3}, path)


def write_published_in_the_old_format(path, network):
    torch.save(to_published(network.state_dict()), path, _use_new_zipfile_serialization=False)


def write_published_safetensors(path, network):
    save_file(to_published(network.state_dict()), path)


FILES = {
    "ours.safetensors": write_ours,
    "step-000000007.ckpt": write_run,
    "published.pt": write_published,
    "old.pt": write_published_in_the_old_format,
    "published.safetensors": write_published_safetensors,
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_weights(tmp_path, name):
    source, target = made(0), made(1)
    FILES[name](tmp_path / name, source)
    weights = read_weights(tmp_path / name)
    assert weights.config == CONFIG and weights.complete == (not name.endswith(".ckpt"))
    load_weights(target, tmp_path / name)
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    "config",
    [LVSMDecoderOnlyConfig(**SIZES, mlp_ratio=3), LVSMEncoderDecoderConfig(**SIZES, num_latents=5, patch_size=4)],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.parametrize("name", FILES)
def test_architecture_and_sizes_are_told_from_the_file(tmp_path, name, config):
    FILES[name](tmp_path / name, made(0, config))
    assert read_weights(tmp_path / name).config == config


def test_our_file_says_what_shapes_do_not_and_may_be_in_bf16(tmp_path):
    config = EfficientLVSMConfig(**SIZES, camera_encoding="prope", init_std=0.03)
    source, path = config.build(), tmp_path / "w.safetensors"
    save_weights(path, source.state_dict(), config, torch.bfloat16)
    assert read_weights(path).config == config
    target = config.build()
    load_weights(target, path)
    assert torch.equal(target.head.weight, source.head.weight.bfloat16().float())
    with pytest.raises(ValueError, match=r"w.safetensors: found weights of .*prope\), expected EfficientLVSM .*patch"):
        load_weights(made(0), path)
    assert not list(tmp_path.glob(".*"))


def test_renders_from_half_precision_weights_are_nearly_those_of_the_full_ones(tmp_path):
    """Colours are in [0, 1]; a step of 8 bits is 4e-3. The network computes in fp32 either way."""
    config = EfficientLVSMConfig(width=64, num_layers=4, head_dim=32, camera_encoding="prope")
    network, views = made(0, config), make_views(2, 3, 16, 16)
    context, target = views.select([0, 1]), views.select([2])
    frame = CanonicalFrame.estimate(context.camera_to_world)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # or everything is grey
        expected = network(context, target, frame)
        assert expected.std() > 0.02
        error = {}
        for dtype in (torch.float16, torch.bfloat16):
            rounded = config.build()
            save_weights(tmp_path / "w.safetensors", network.state_dict(), config, dtype)
            load_weights(rounded, tmp_path / "w.safetensors")
            assert {x.dtype for x in rounded.state_dict().values()} == {torch.float32}
            error[dtype] = float((rounded(context, target, frame) - expected).abs().max())
    assert 0 < error[torch.float16] < 1e-3 and error[torch.float16] < error[torch.bfloat16] < 1e-2


def test_weights_that_a_dtype_cannot_hold_are_not_written(tmp_path):
    state = made(0).state_dict()
    state["head.weight"] = state["head.weight"] * 0 + 1e5
    with pytest.raises(ValueError, match="w.safetensors: head.weight reaches 100000; expected .* up to 65504"):
        save_weights(tmp_path / "w.safetensors", state, CONFIG, torch.float16)
    assert not list(tmp_path.iterdir())
    save_weights(tmp_path / "w.safetensors", state, CONFIG, torch.bfloat16)


YOUNGER = ("camera_encoding",)
"""Options that the first files of ours do not know."""


def test_files_from_before_an_option_are_as_without_it(tmp_path):
    path = tmp_path / "w.safetensors"
    write_ours(path, made(0))
    with safe_open(path, "pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    config = json.loads(metadata["config"])
    metadata["config"] = json.dumps({name: value for name, value in config.items() if name not in YOUNGER})
    save_file(state, path, metadata)
    assert read_weights(path).config == CONFIG
    load_weights(made(1), path)


def test_what_the_authors_layout_has_no_place_for_is_named():
    with pytest.raises(ValueError, match="layout has no place for registers$"):
        to_published({**made(0).state_dict(), "registers": torch.zeros(2, 32)})


def altered(**changes):
    state = to_published(made(0).state_dict())
    for name, tensor in changes.items():
        state[name] = tensor
    return {"model": {name: x for name, x in state.items() if x is not None}}


@pytest.mark.parametrize(
    "config, content, message",
    [
        (
            EfficientLVSMConfig(width=64, num_layers=2, head_dim=16),
            altered(),
            r"w.pt: found weights of EfficientLVSM \(width 32, 2 layers.*expected EfficientLVSM \(width 64, 2 layers",
        ),
        (
            LVSMDecoderOnlyConfig(**SIZES),
            altered(),
            r"found weights of EfficientLVSM \(.*expected LVSMDecoderOnly \(",
        ),
        (CONFIG, altered(**{"input_self_attn_blocks.1.attn.fc.weight": None}), "w.pt: .*\n  missing context_blocks.1"),
        (
            CONFIG,
            altered(**{"rgbp_tokenizer.1.weight": torch.zeros(32, 9)}),
            r"found shape \(32, 9\), expected \(32, 576",
        ),
        (CONFIG, altered(**{"surprise.weight": torch.zeros(1)}), "w.pt: .*unexpected entries: surprise.weight"),
        (CONFIG, {"model": "not weights"}, "w.pt: expected a state dict"),
        (
            CONFIG,
            {"model": {"conv1.weight": torch.zeros(1)}},
            "w.pt: not weights of Efficient-LVSM or LVSM; found conv1",
        ),
        (CONFIG, {"pipeline": {"_model.field.weight": torch.zeros(1)}}, "w.pt: a checkpoint of another method"),
    ],
    ids=["size", "architecture", "missing", "shape", "unexpected", "no state", "other network", "other method"],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path, config, content, message):
    torch.save(content, tmp_path / "w.pt")
    network = config.build()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(network, tmp_path / "w.pt")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(tmp_path, name):
    FILES[name](tmp_path / name, made(0))
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no weights"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: damaged, or no"):
            read_weights(tmp_path / name)


def test_no_code_is_executed_and_other_things_are_refused(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": print}))
    with pytest.raises(ValueError, match="evil.pt: damaged, or no file of tensors alone$"):  # no advice to execute it
        read_weights(tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="nowhere.pt does not exist; expected a file of weights"):
        read_weights(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="is a folder; expected a file"):
        read_weights(tmp_path)


def test_a_file_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, made(0).state_dict(), CONFIG)
    with safe_open(path, "pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), "lens": "fisheye"})
    save_file(state, path, metadata)
    with pytest.raises(ValueError, match="w.safetensors: written by another version .*lens"):
        read_weights(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, made(0).state_dict(), CONFIG)
    old = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, made(1).state_dict(), CONFIG)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("config", [CONFIG, LVSMDecoderOnlyConfig(**SIZES), LVSMEncoderDecoderConfig(**SIZES)])
def test_every_field_but_those_of_initialisation_makes_another_network(config):
    for field in fields(config):
        value = getattr(config, field.name)
        other = replace(config, **{field.name: value + "-other" if isinstance(value, str) else 3 * value})
        initialises = field.name in ("init_std", "context_init")
        assert other.is_same_as(config) == initialises, field.name
        assert (other.describe() == config.describe()) == initialises, field.name


def test_tensors_that_fit_but_were_made_for_another_encoding(tmp_path):
    prope = replace(CONFIG, camera_encoding="prope")
    for name in ("ours.safetensors", "published.pt", "published.safetensors"):
        FILES[name](tmp_path / name, made(0))
        network = made(1, prope)
        before = network.head.weight.clone()
        message = (
            f"{name}: found weights of .*, expected .*prope.* The tensors fit, but were trained with other options"
        )
        with pytest.raises(ValueError, match=message):
            load_weights(network, tmp_path / name)
        assert torch.equal(network.head.weight, before)


def test_a_checkpoint_says_its_network_and_an_old_one_is_said_not_to(tmp_path):
    path, prope = tmp_path / "step-000000007.ckpt", replace(CONFIG, camera_encoding="prope")
    write_run(path, made(0, prope))
    with pytest.warns(UserWarning, match=f"{path.name} does not say which camera encoding.*taken as .*prope"):
        load_weights(made(1, prope), path)
    with pytest.raises(ValueError, match="expected EfficientLVSM .*patch 8, mlp 4\\). The tensors fit"):
        load_weights(made(1), path, prope)
    with pytest.raises(ValueError, match=f"{path.name} tells its sizes .*, but not its camera encoding"):
        load_network(path)
    assert load_network(path, prope).config == prope
    torch.save({**torch.load(path), "network": network_metadata(prope)}, path)
    assert read_weights(path).config == prope and load_network(path).config == prope
    with pytest.raises(ValueError, match="expected EfficientLVSM .*mlp 4\\). The tensors fit"):
        load_weights(made(1), path)


def test_a_network_by_its_file_renders_as_the_one_that_was_written(tmp_path):
    source = made(0, replace(CONFIG, camera_encoding="prope"))
    write_ours(tmp_path / "w.safetensors", source)
    views = make_views(1, 3, 16, 16)
    network = load_network(str(tmp_path / "w.safetensors"))
    rendered = network(views.select([0, 1]), views.select([2]))
    assert not network.training and not rendered.requires_grad
    assert torch.equal(rendered, source(views.select([0, 1]), views.select([2])))


def test_a_config_that_contradicts_its_tensors_is_refused(tmp_path):
    for wrong in (replace(CONFIG, head_dim=8), LVSMDecoderOnlyConfig(**SIZES)):
        save_weights(tmp_path / "w.safetensors", made(0).state_dict(), wrong)
        with pytest.raises(ValueError, match="w.safetensors: damaged: its config says .*, its tensors are of Effic"):
            read_weights(tmp_path / "w.safetensors")

"""The weights that come with the package: found by name wherever it is installed, and used without any file to get."""

import errno
import io
import re
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
import yaml
from conftest import need_shared, run_cli, tiny_pipeline
from PIL import Image
from safetensors import safe_open

from elvsm_nerfstudio import cli, method_configs
from elvsm_nerfstudio.data.names import natural_order
from elvsm_nerfstudio.nn import named_weights
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig
from elvsm_nerfstudio.nn.published_weights import load_published, to_published
from elvsm_nerfstudio.nn.weights import RUN_PREFIX, load_network, load_weights, read_weights
from elvsm_nerfstudio.training.checkpoints import write_checkpoint
from elvsm_nerfstudio.training.run_config import read_run_config

NAME = Path("pretrained")


def test_other_paths_are_themselves():
    for path in (Path("weights.pt"), Path("folder/pretrained"), Path("/pretrained")):
        assert named_weights.weights_path(path) == path


def test_the_shipped_weights_are_small_and_those_of_the_method():
    path = named_weights.weights_path(NAME)
    assert path.name == "efficient-lvsm-plus-tiny.safetensors" and path.stat().st_size <= 20e6
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float16, torch.bfloat16}
    network = method_configs.efficient_lvsm_plus_tiny.config.pipeline.model.network.build()
    load_weights(network, NAME)
    weights = read_weights(NAME)
    assert weights.complete
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weights.state[name].float()), name


def test_training_starts_from_them_and_another_method_says_what_does_not_fit(collection):
    config = method_configs.efficient_lvsm_plus_tiny.config.pipeline.model
    config = type(config)(network=config.network, checkpoint=NAME)
    model = config.setup(scene_box=None, num_train_data=1)
    assert torch.equal(model.network.head.weight, read_weights(NAME).state["head.weight"].float())
    other = tiny_pipeline(collection).model.config
    other.checkpoint = NAME
    with pytest.raises(ValueError, match="--pipeline.model.checkpoint pretrained: found weights of .*prope.*expected"):
        other.setup(scene_box=None, num_train_data=1)


def test_the_image_size_of_weights_with_a_name_is_known():
    assert named_weights.trained_image_size("pretrained") == (128, 128)
    assert named_weights.trained_image_size("lvsm-decoder-only-512") == (512, 512)
    assert named_weights.trained_image_size("mine.safetensors") is None


def test_without_them_the_message_says_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(named_weights, "_FOLDERS", (tmp_path / "one", tmp_path / "two"))
    with pytest.raises(ValueError, match="^pretrained: found no .*-plus-tiny.safetensors in .*one or .*two"):
        read_weights(NAME)


def test_a_run_of_them_on_a_capture(tmp_path, scene):
    made = run_cli("elvsm", "run", "--weights", "pretrained", "--data", str(scene),
                   cwd=tmp_path)  # fmt: skip
    config = made.stdout.split()[-1]
    assert Path(config) == tmp_path / "outputs/pretrained-spheres/efficient-lvsm-plus-tiny/run/config.yml"
    network = yaml.load((tmp_path / config).read_text(), Loader=yaml.Loader).pipeline.model.network
    assert network.camera_encoding == "prope"


# Weights on the Hugging Face Hub, through the real client against a server on the loopback address

SIZES = dict(width=32, num_layers=2, head_dim=16)
NAMED = "efficient-lvsm-256"
SOURCE = named_weights.PUBLISHED[NAMED].source


def published_file(seed: int = 0, config=None) -> bytes:
    """Weights in the authors' layout, with what only their training uses."""
    torch.manual_seed(seed)
    network = (config or EfficientLVSMConfig(**SIZES)).build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # or all pictures are grey
    extra = {"loss_computer.vgg.0.weight": torch.zeros(1)}
    file = io.BytesIO()
    torch.save({"model": {**to_published(network.state_dict()), **extra}}, file)
    return file.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and a client of it that is imported anew: it reads its environment then."""
    with hub_server.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # the server has no such storage
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        _forget_client()
        server.files[SOURCE.repository] = {SOURCE.file: published_file(), "README.md": b"# weights"}
        yield server
    _forget_client()


def _forget_client() -> None:
    named_weights._downloaded.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def gets(hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("GET")]


def in_cache(tmp_path) -> list[Path]:
    """Files that would be read; some versions of the client keep others to go on with."""
    files = (path for path in (tmp_path / "hf").rglob("*") if path.is_file() and "blobs" in path.parts)
    return [path for path in files if path.suffix != ".incomplete"]


def test_published_weights_by_name_are_downloaded_once(hub, tmp_path, capsys, monkeypatch):
    weights = read_weights(NAMED)
    assert weights.complete and weights.config == EfficientLVSMConfig(**SIZES)
    assert gets(hub) == [f"GET /{SOURCE.repository}/resolve/main/{SOURCE.file}"]
    assert load_network(NAMED).config == weights.config
    said = capsys.readouterr().err
    assert said.count("CC BY-NC-SA 4.0") == 1 and said.count(f"hf://{SOURCE.repository}/{SOURCE.file}") == 1
    assert named_weights.PUBLISHED[NAMED].source.cached() == named_weights.weights_path(NAMED)
    # In another process: from the cache, after a question whether it is still the same, and without one.
    count = len(gets(hub))
    named_weights._downloaded.cache_clear()
    read_weights(NAMED)
    assert len(gets(hub)) == count
    _forget_client()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(hub.requests)
    read_weights(NAMED)
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    "address", ["hf://me/mine/deep/w.pt", Path("hf://me/mine/deep/w.pt"), "hf://me/mine/deep/w.pt@v1"]
)
def test_any_file_of_the_hub_by_its_address(hub, address):
    config = LVSMDecoderOnlyConfig(**SIZES)
    hub.files["me/mine"] = {"deep/w.pt": published_file(config=config)}
    assert read_weights(address).config == config
    assert any("/resolve/v1/" in request for request in hub.requests) == str(address).endswith("@v1")
    assert named_weights.short_name(address) == "w"


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "efficient-lvsm-265",
            "did you mean efficient-lvsm-256. Expected pretrained, efficient-lvsm-256.*elvsm weights",
        ),
        ("Pretrained", "did you mean pretrained"),
        ("zzz", "found neither weights of that name nor a file. Expected pretrained"),
        ("hf://me/w.pt", "expected hf://OWNER/REPO/FILE"),
        ("hf://me/mine/../../w.pt", "expected hf://OWNER/REPO/FILE"),
        ("hf://me/mine/w.pt@", "expected hf://OWNER/REPO/FILE"),
        ("weights.pt", " does not exist; expected a file of weights"),
    ],
)
def test_wrong_names_are_told_before_anything_is_asked(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*{message}"):
        read_weights(name)


def test_a_file_that_moved_is_told_with_what_is_there(hub):
    hub.files[SOURCE.repository] = {"README.md": b"", "new/efficient_lvsm_256.pt": published_file()}
    message = (
        f"holds no file {SOURCE.file} .any more.. It holds README.md, new/efficient_lvsm_256.pt; name one as hf://"
    )
    with pytest.raises(ValueError, match=f"{message}{SOURCE.repository}/new/efficient_lvsm_256.pt"):
        read_weights(NAMED)


@pytest.mark.parametrize(
    "address, message",
    [
        ("hf://nobody/nothing/w.pt", "no repository http://127.0.0.1:[0-9]+/nobody/nothing, or it is private.*hf auth"),
        (f"hf://{SOURCE.repository}/{SOURCE.file}@v9", "has no revision v9"),
    ],
)
def test_what_is_not_on_the_hub(hub, address, message):
    with pytest.raises(ValueError, match=message):
        read_weights(address)


def test_gated_repositories_say_where_to_ask(hub):
    hub.error = 403, "GatedRepo"
    message = f"^{NAMED}: http.*/{SOURCE.repository} is gated. Accept its terms there, then log in with `hf auth login`"
    with pytest.raises(ValueError, match=message):
        read_weights(NAMED)


@pytest.fixture
def impatient(monkeypatch):
    """The client tries again at once."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_hub_that_fails_is_told_with_its_answer(hub, impatient):
    hub.error = 500, ""
    with pytest.raises(ValueError, match=f"answered with status 500.*download {SOURCE.file} from .* by other means"):
        read_weights(NAMED)


def test_without_a_network_what_helps_is_told(hub, impatient, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="http://127.0.0.1:9 cannot be reached.*Check the network.*give its path"):
        read_weights(NAMED)


def test_offline_what_is_not_in_the_cache_is_told(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="not in the cache, .*hf/hub, and HF_HUB_OFFLINE is set"):
        read_weights(NAMED)
    assert not hub.requests


def test_a_spoilt_download_is_not_used_and_not_kept(hub, tmp_path):
    hub.spoilt = True
    with pytest.raises(ValueError, match=f"{NAMED}: the checksum of the downloaded file is not [0-9a-f]{{64}}.*anew"):
        read_weights(NAMED)
    assert not in_cache(tmp_path) and SOURCE.cached() is None
    hub.spoilt = False
    assert read_weights(NAMED).config == EfficientLVSMConfig(**SIZES)


def test_a_file_that_was_spoilt_in_the_cache_is_not_used(hub, tmp_path):
    read_weights(NAMED)
    (stored,) = in_cache(tmp_path)
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    named_weights._downloaded.cache_clear()
    with pytest.raises(ValueError, match="the checksum of the downloaded file is not"):
        read_weights(NAMED)


def test_a_download_that_breaks_off_leaves_nothing_to_be_read(hub, tmp_path, impatient):
    hub.cut = True
    with pytest.raises(ValueError, match="broke off .*Nothing half-downloaded is used"):
        read_weights(NAMED)
    assert not in_cache(tmp_path) and SOURCE.cached() is None
    hub.cut = False
    assert read_weights(NAMED).config == EfficientLVSMConfig(**SIZES)


def test_a_full_disk_is_told_with_the_cache(hub, tmp_path, monkeypatch):
    from huggingface_hub import file_download

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(ValueError, match="the disk of the cache, .*hf/hub, is full. Make room, or set HF_HOME"):
        read_weights(NAMED)
    assert not in_cache(tmp_path)


def test_the_list_says_what_is_here(hub, capsys, tmp_path):
    cli.main(["weights"])
    listed = dict(row.split("\n", 1) for row in capsys.readouterr().out.strip().split("\n\n"))
    assert list(listed) == ["pretrained", *named_weights.PUBLISHED]
    size = named_weights.weights_path("pretrained").stat().st_size
    assert f"{size / 1e6:,.0f} MB, " in listed["pretrained"]
    assert "hf://coast01/LVSM/scene_decoder_only_256.pt" in listed["lvsm-decoder-only-256"]
    assert all("CC BY-NC-SA 4.0" in listed[name] for name in named_weights.PUBLISHED)
    assert all("not downloaded yet" in listed[name] for name in named_weights.PUBLISHED) and not hub.requests
    path = named_weights.weights_path(NAMED)
    cli.main(["weights"])
    listed = dict(row.split("\n", 1) for row in capsys.readouterr().out.strip().split("\n\n"))
    assert f"MB, {path}" in listed[NAMED] and str(tmp_path) in str(path)


@pytest.mark.parametrize("data", ["spheres", "mary_rose"])
def test_from_a_name_to_a_picture(hub, tmp_path, scene, data):
    """`elvsm run`, then ns-render: the picture is that of the network made by hand."""
    scene = scene if data == scene.name else need_shared(f"data/{data}")
    made = run_cli("elvsm", "run", "--weights", NAMED, "--data", str(scene), cwd=tmp_path)
    assert "CC BY-NC-SA 4.0" in made.stderr
    config_path = tmp_path / made.stdout.split()[-1]
    assert config_path == tmp_path / f"outputs/{NAMED}-{data}/efficient-lvsm/run/config.yml"
    config = read_run_config(config_path)
    assert config.pipeline.datamanager.image_size == (256, 256)
    run_cli("ns-render", "dataset", "--load-config", config_path, "--output-path", "renders", "--image-format", "png",
            "--split", "test", cwd=tmp_path)  # fmt: skip
    network = EfficientLVSMConfig(**SIZES).build()
    load_published(network, torch.load(io.BytesIO(hub.files[SOURCE.repository][SOURCE.file]))["model"])
    data = replace(config.pipeline.datamanager, num_workers=0).setup(device="cpu", test_mode="test")
    views = data.shown_scene().views
    with torch.no_grad():
        expected = network(views.context, views.target)[0]
    assert expected.std() > 0.02
    pictures = sorted((tmp_path / "renders/test/rgb").iterdir(), key=natural_order)
    rendered = torch.stack([torch.from_numpy(np.array(Image.open(picture))) / 255 for picture in pictures])
    assert rendered.shape == expected.shape and (rendered - expected).abs().max() < 2 / 255


@pytest.fixture
def run(tmp_path) -> Path:
    """The config.yml of a run of two steps, as far as exporting reads it."""
    config = deepcopy(method_configs.efficient_lvsm_tiny.config)
    config.pipeline.model.network = EfficientLVSMConfig(**SIZES)
    config.pipeline.datamanager.data = tmp_path / "secret folder/objects"
    network = config.pipeline.model.network.build()
    state = {f"{RUN_PREFIX}{name}": x for name, x in network.state_dict().items()}
    write_checkpoint(tmp_path / "run/nerfstudio_models/step-000000001.ckpt", {"step": 1, "pipeline": state})
    (tmp_path / "run/config.yml").write_text(yaml.dump(config))
    return tmp_path / "run/config.yml"


def test_exported_weights_are_pushed_and_taken_from_there(hub, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    output = tmp_path / "w.safetensors"
    cli.main(["export", "--load-config", str(run), "--output", str(output), "--push", "me/mine", "--private"])
    assert capsys.readouterr().out.split() == [str(output), f"{hub.url}/me/mine"]
    pushed = hub.files["me/mine"]
    assert set(pushed) == {"w.safetensors", "README.md"} and pushed["w.safetensors"] == output.read_bytes()
    assert hub.private["me/mine"] is True
    card = pushed["README.md"].decode()
    assert card.startswith("---\nlibrary_name: nerfstudio") and "2 iterations on `objects`" in card
    assert "elvsm run --weights hf://me/mine/w.safetensors --data" in card and "width 32, 2 layers" in card
    assert "secret" not in card
    network = load_network("hf://me/mine/w.safetensors")
    assert torch.equal(network.head.weight, load_network(output).head.weight)
    # A card that somebody wrote stays.
    pushed["README.md"] = b"mine"
    cli.main(["export", "--load-config", str(run), "--output", str(output), "--dtype", "fp16", "--push", "me/mine"])
    assert pushed["README.md"] == b"mine" and pushed["w.safetensors"] == output.read_bytes()


@pytest.mark.parametrize(
    "error, repository, message",
    [
        ((401, ""), "me/mine", "me/mine: may not be written to. Log in with `hf auth login`"),
        ((403, ""), "me/mine", "me/mine: may not be written to. Log in with `hf auth login`"),
        ((500, ""), "me/mine", "me/mine: http://127.0.0.1:[0-9]+ answered with status 500"),
        (None, "mine", "mine: expected OWNER/NAME"),
    ],
)
def test_where_pushing_fails_the_file_is_there_and_the_reason_is_told(hub, run, tmp_path, impatient, monkeypatch,
                                                                     error, repository, message):  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.error, output = error, tmp_path / "w.safetensors"
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        cli.main(["export", "--load-config", str(run), "--output", str(output), "--push", repository])
    assert read_weights(output).config == EfficientLVSMConfig(**SIZES) and "me/mine" not in hub.files

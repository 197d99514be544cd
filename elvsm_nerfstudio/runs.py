"""Runs on disk: their configs and checkpoints, and run directories made from weights without training."""

from __future__ import annotations

import os
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, Union

import torch
import tyro
import yaml
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipeline
from nerfstudio.plugins.types import MethodSpecification

from elvsm_nerfstudio import __version__, method_configs
from elvsm_nerfstudio.data.datamanager import ViewSetDataManager
from elvsm_nerfstudio.evaluation.protocols import find_protocol
from elvsm_nerfstudio.files import whole
from elvsm_nerfstudio.nn.named_weights import PUBLISHED, short_name, trained_image_size
from elvsm_nerfstudio.nn.network import NetworkConfig, SceneNetwork
from elvsm_nerfstudio.nn.weights import RUN_PREFIX, load_weights, network_metadata, read_weights, save_weights
from elvsm_nerfstudio.training.checkpoints import list_checkpoints, step_of, write_checkpoint
from elvsm_nerfstudio.training.run_config import read_run_config, require_network

DType = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class RunOptions:
    """Options."""

    weights: Optional[Union[str, Path]] = None
    """'pretrained', the weights that come with this package; a name that `elvsm weights` lists; hf://OWNER/REPO/FILE or
    hf://OWNER/REPO/FILE@REVISION; a file of `elvsm export`, one in the authors' layout (.pt, .safetensors), or a
    step-*.ckpt that is not in its run's folder any more. Their network is that of the new run."""
    from_run: Optional[Path] = None
    """Instead of --weights: config.yml of the run whose weights and options are taken."""
    method: Optional[str] = None
    """With --weights: the method whose options are taken, e.g. image size and background; the first one of the
    weights' network if absent (for Efficient-LVSM of the paper's size: efficient-lvsm). Weights that `elvsm weights`
    lists bring their image size."""
    data: Optional[Path] = None
    """Anything that ns-train takes; needed with --weights. Read as --from-run says, or in nerfstudio's own format,
    unless a dataparser is named behind all options, with its own options behind it."""
    protocol: Optional[str] = None
    """How ns-eval scores; by the run's own options if absent."""
    evaluation_index: Optional[Path] = None
    """JSON with the context and target frames of each evaluated scene."""
    index_may_miss_scenes: bool = False
    """Evaluates the scenes of the index that the data have, where they are a part of a data set."""
    context_frames: Optional[tuple[int, ...]] = None
    """Frames of a single capture that are its context, numbered in order of the file names; chosen by the cameras if
    absent."""
    num_context_views: Optional[int] = None
    """Context views of each scene, where no evaluation index, no --protocol and no --context-frames says which they
    are."""
    image_size: Optional[tuple[int, int]] = None
    """Height and width to which images are resized and centre-cropped; that of the method or run if absent."""
    shifted_grids: Optional[Literal[1, 4]] = None
    """4 renders each picture on four grids of patches and averages them: patches show less, and it takes four times as
    long. For weights that were trained through many lenses, as `pretrained` was; the run's own if absent."""
    train_split_fraction: Optional[float] = None
    """Share of a capture's frames that context views are chosen from, the others are held out; the dataparser's own
    if absent."""
    scene: Optional[str] = None
    """Scene that the viewer and ns-render show."""
    output_dir: Path = Path("outputs")
    """Folder of the new run's experiment."""
    name: Optional[str] = None
    """Name of the new run's experiment; that of the weights, the data and the protocol if absent."""
    dataparser: Optional[tyro.conf.FlagConversionOff[AnnotatedDataParserUnion]] = None
    """How --data is read."""


def make_run(options: RunOptions) -> Path:
    """Writes the run and returns its config.yml: see ``make_and_open_run``."""
    return make_and_open_run(options)[0]


def make_and_open_run(options: RunOptions) -> tuple[Path, VanillaPipeline]:
    """Writes the run and returns its config.yml, and the run as nerfstudio's programs open it; the scene that it shows
    has been encoded by then.

    Raises:
        ValueError: for weights, options and data that cannot be used; nothing is written then.
    """
    if (options.weights is None) == (options.from_run is None):
        raise ValueError("give either --weights WEIGHTS --data DATA or --from-run CONFIG")
    if options.weights is None:
        if options.method is not None:
            raise ValueError(f"--method {options.method} is for --weights; --from-run brings its own method")
        config, source = read_network_config(options.from_run, "--from-run"), last_checkpoint(options.from_run)
    else:
        config, source = config_for_weights(options.weights, options.method), None
        config.experiment_name = short_name(options.weights)
    config.pipeline.model.checkpoint = None  # the run has the weights itself
    _take(options, config)
    folder = config.get_base_dir()
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another --name or delete it")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = deepcopy(config.pipeline).setup(device=device, test_mode="inference", world_size=1, local_rank=0)
    pipeline.eval()
    if options.num_context_views is not None:
        _check_that_number_counts(options, pipeline.datamanager)
    load_weights(pipeline.model.network, source or options.weights, config.pipeline.model.network)
    with torch.no_grad():
        pipeline.model.memory()  # encodes the scene that is shown
    with whole(folder) as partial:
        (partial / "nerfstudio_models").mkdir(parents=True)
        if source is not None:
            _link_or_copy(source, partial / "nerfstudio_models" / source.name)
        else:
            _write_checkpoint(partial / "nerfstudio_models" / "step-000000000.ckpt", pipeline.model.network)
        outputs = pipeline.datamanager.train_dataparser_outputs
        outputs.save_dataparser_transform(partial / "dataparser_transforms.json")
        (partial / "config.yml").write_text(yaml.dump(config))
    return folder / "config.yml", pipeline


def _take(options: RunOptions, config: TrainerConfig) -> None:
    """Changes a config as the options say. Paths become absolute: the run works from every folder."""
    datamanager = config.pipeline.datamanager
    config.pipeline.protocol = options.protocol and find_protocol(options.protocol).name
    data = options.data
    if options.dataparser is not None:
        datamanager.dataparser = deepcopy(options.dataparser)
        if data is None and options.dataparser.data != Path():
            data = options.dataparser.data
    if options.weights is not None and data is None:
        raise ValueError("--weights needs --data: what the weights are to be used on")
    if data is None:
        datamanager.find_data(options.from_run)
    else:
        datamanager.data, datamanager.evaluation_index, datamanager.scene = data, None, None
        datamanager.context_frames = None
    if options.num_context_views is not None:
        datamanager.context_frames = None
    datamanager.data = config.data = Path(datamanager.data).resolve()
    for name in ("evaluation_index", "context_frames", "num_context_views", "image_size", "scene"):
        if getattr(options, name) is not None:
            setattr(datamanager, name, getattr(options, name))
    if options.shifted_grids is not None:
        config.pipeline.model.shifted_grids = options.shifted_grids
    if datamanager.evaluation_index is not None:
        datamanager.evaluation_index = datamanager.evaluation_index.resolve()
    datamanager.index_may_miss_scenes |= options.index_may_miss_scenes
    if options.train_split_fraction is not None:
        _hold_out(datamanager.dataparser, options.train_split_fraction)
    parts = [config.experiment_name, data and data.resolve().stem, options.protocol]
    config.experiment_name = options.name or "-".join(part for part in parts if part)
    config.output_dir, config.timestamp = options.output_dir.resolve(), "run"


def _check_that_number_counts(options: RunOptions, datamanager: ViewSetDataManager) -> None:
    """Raises ValueError where something else than --num-context-views says what the context is."""
    for given, what in (
        (options.protocol, f"--protocol {options.protocol}"),
        (datamanager.config.context_frames, "--context-frames"),
        (datamanager.evaluation_index, f"the evaluation index {getattr(datamanager.evaluation_index, 'path', '')}"),
    ):
        if given is not None:
            raise ValueError(
                f"--num-context-views {options.num_context_views}: {what} says what the context of each scene is; "
                "leave one of them out, or name other frames with --evaluation-index FILE"
            )


def _hold_out(dataparser: DataParserConfig, train_split_fraction: float) -> None:
    if not hasattr(dataparser, "train_split_fraction"):
        raise ValueError(
            f"--train-split-fraction {train_split_fraction}: {type(dataparser).__name__} chooses training frames by "
            "itself; leave the option out"
        )
    if not 0 < train_split_fraction <= 1:
        raise ValueError(f"--train-split-fraction {train_split_fraction}: expected more than 0 and at most 1")
    dataparser.train_split_fraction = train_split_fraction
    if hasattr(dataparser, "eval_mode"):
        dataparser.eval_mode = "fraction"


def read_config(path: Path, option: str) -> TrainerConfig:
    """The config of a run of this package.

    Raises:
        ValueError: naming the option, where it is none.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path} does not exist; expected the config.yml of a run")
    config = read_run_config(path)
    if not isinstance(config, TrainerConfig) or not hasattr(config.pipeline, "protocol"):
        raise ValueError(f"{option} {path} is no config of a method of this package")
    return config


def read_network_config(path: Path, option: str) -> TrainerConfig:
    """The config of a run of a network.

    Raises:
        ValueError: naming the option, where it is none; of Gaussians too, which have no network.
    """
    config = read_config(path, option)
    require_network(config, f"{option} {path}")
    return config


def last_checkpoint(config: Path) -> Path:
    """A run's last checkpoint.

    Raises:
        ValueError: where it has none.
    """
    checkpoints = list_checkpoints(config.parent / "nerfstudio_models")
    if not checkpoints:
        raise ValueError(f"{config.parent}/nerfstudio_models holds no checkpoint; train the run first")
    return checkpoints[-1]


def export_weights(run: Path, output: Path, dtype: DType = "fp32") -> None:
    """Writes the weights of a run's last checkpoint alone.

    Args:
        run: its config.yml.
        output: .safetensors file to write.
        dtype: of the weights in the file.

    Raises:
        ValueError: for a run without weights, weights that the dtype cannot hold, and an output that is not called
            .safetensors.
        OSError: where it cannot be written.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"--output {output}: expected a name that ends in .safetensors")
    config = read_network_config(run, "--load-config").pipeline.model.network
    network = config.build()
    load_weights(network, last_checkpoint(run), config)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_weights(output, network.state_dict(), config, DTYPES[dtype])


def model_card(run: Path, repository: str, weights: Path) -> str:
    """The README.md of a repository on the Hugging Face Hub, with what a run's config tells of exported weights.

    Args:
        run: its config.yml.
        repository: OWNER/NAME
        weights: the exported file.
    """
    config = read_network_config(run, "--load-config")
    data, network = config.pipeline.datamanager, config.pipeline.model.network
    address = f"hf://{repository}/{weights.name}"
    return f"""---
library_name: nerfstudio
tags: [novel-view-synthesis, nerfstudio, {config.method_name}]
---
# {repository.split("/")[-1]}

Weights of `{config.method_name}` of elvsm-nerfstudio {__version__}: new views of a scene from a few posed photos, in
one forward pass.

| | |
|---|---|
| network | {type(network).__name__.removesuffix("Config")}: {network.describe()} |
| trained for | {step_of(last_checkpoint(run)) + 1} iterations on `{Path(data.data).name}` |
| images | {data.image_size[0]} x {data.image_size[1]} pixels, {data.background} behind transparent ones |
| views | {data.num_context_views} context, {data.num_target_views} target |

```bash
elvsm run --weights {address} --data YOUR_CAPTURE
ns-train {config.method_name} --pipeline.model.checkpoint {address} --data YOUR_DATA
```
"""


def config_for_weights(weights: Path | str, method: Optional[str]) -> TrainerConfig:
    """A method's config with the network that the weights are of."""
    weights = str(weights)
    run = Path(weights).parent.parent / "config.yml"
    if weights.endswith(".ckpt") and run.is_file():
        raise ValueError(f"--weights {weights} belongs to a run, which knows more of it; give --from-run {run}")
    try:
        read = read_weights(weights)
    except ValueError as error:
        raise ValueError(f"--weights {error}") from None
    network, methods, published = read.config, network_methods(), PUBLISHED.get(weights)
    image_size = trained_image_size(weights)
    if not read.complete:
        if method is None:
            raise ValueError(
                f"--weights {weights} tells its sizes, but not its camera encoding; say with --method what it "
                f"was trained as ({', '.join(methods)}), or put it back into its run's folder and give --from-run"
            )
        return deepcopy(_find(methods, method, "--method"))
    if method is None:
        fitting = [name for name, config in methods.items() if config.pipeline.model.network.is_same_as(network)]
        fitting = fitting if published is None else [published.method]
        if not fitting:
            raise ValueError(
                f"--weights {weights} is of no registered method's network ({network.describe()}); say with "
                f"--method whose other options to take: {', '.join(methods)}"
            )
        method = fitting[0]
    config = with_network(_find(methods, method, "--method"), network, f"--weights {weights}")
    if image_size is not None:
        config.pipeline.datamanager.image_size = image_size
    return config


def network_methods() -> dict[str, TrainerConfig]:
    """The configs of this package's methods that condition on views, by name."""
    specifications = (getattr(method_configs, name) for name in method_configs.__all__)
    configs = (spec.config for spec in specifications if isinstance(spec, MethodSpecification))
    return {config.method_name: config for config in configs if hasattr(config.pipeline.model, "network")}


def with_network(method: TrainerConfig, network: NetworkConfig, source: str) -> TrainerConfig:
    """A method's options with the network that some weights are of.

    Args:
        source: of the weights, for the message.

    Raises:
        ValueError: where the method has another kind of network.
    """
    config = deepcopy(method)
    expected = type(config.pipeline.model.network)
    if type(network) is not expected:
        raise ValueError(
            f"{source}: found weights for {type(network).__name__}, expected {expected.__name__}, the network of "
            f"{method.method_name}"
        )
    config.pipeline.model.network = network
    return config


def _find(known: dict, name: str, option: str):
    if name not in known:
        raise ValueError(f"{option} {name} is unknown; expected one of {', '.join(known)}")
    return known[name]


def _write_checkpoint(path: Path, network: SceneNetwork) -> None:
    """What nerfstudio reads of a run's checkpoint to evaluate it."""
    state = {f"{RUN_PREFIX}{name}": x.cpu() for name, x in network.state_dict().items()}
    state["_model.device_indicator_param"] = torch.empty(0)  # nerfstudio's Model has it
    write_checkpoint(path, {"step": 0, "network": network_metadata(network.config), "pipeline": state})


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)

"""Reading a run's config.yml as data: nothing that it names is called, and nothing but configs is made.

nerfstudio writes config.yml with PyYAML's Python tags and reads it with the loader that executes them, so that whoever
passes on a run passes on code. Here the tags that our runs have are read by what they stand for; others are errors.
"""

from __future__ import annotations

import enum
import importlib
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Optional

import tyro
import yaml

from elvsm_nerfstudio.nn.network import NetworkConfig

_TAG = "tag:yaml.org,2002:python/"
_CLASS = re.compile(r"(?:(?:elvsm_)?nerfstudio(?:\.[a-z]\w*)+|torch\.optim(?:\.[a-z]\w*)*)\.[A-Z]\w*")
"""Classes that a config may name: of this package, of nerfstudio and PyTorch's optimisers."""
_FUNCTIONS = ("nerfstudio.data.utils.nerfstudio_collate.nerfstudio_collate",)
"""Functions that a config may name: the default of nerfstudio's data managers."""
_PATHS = re.compile(r"pathlib\.(?:_local\.)?(?:Pure)?(?:Posix|Windows)?Path")


def read_run_config(path: Path) -> Any:
    """What a config.yml holds, as nerfstudio's loader would give it.

    Raises:
        ValueError: naming the file and the line, where it is no YAML, or names anything but configs.
    """
    return _read(path, ())


def require_network(config: Any, what: str) -> None:
    """Raises ValueError for the config of a run of Gaussians, which have no network.

    Args:
        what: the option and the file that the config is of, for the message.
    """
    if not hasattr(config.pipeline.model, "network"):
        raise ValueError(
            f"{what}: found a run of {config.method_name}, whose Gaussians are of one scene; expected a run of a "
            "network. nerfstudio's programs take this one: ns-eval, ns-render, ns-viewer, ns-export gaussian-splat"
        )


def network_of_run(path: Path) -> Optional[NetworkConfig]:
    """The network of a run by its config.yml; None where there is no file, or the run is of a method without.

    The rest of the file is not looked at: it may name classes that are not installed.

    Raises:
        ValueError: as ``read_run_config``.
    """
    network = _read(path, ("pipeline", "model", "network")) if path.is_file() else None
    return network if isinstance(network, NetworkConfig) else None


def network_of_checkpoint(path: Path | str) -> Optional[NetworkConfig]:
    """The network of the run in whose folder a checkpoint lies; None for other files."""
    run = _run_of(path)
    return None if run is None else network_of_run(run)


def image_size_of_checkpoint(path: Path | str) -> Optional[tuple[int, int]]:
    """(height, width) of the images of the run in whose folder a checkpoint lies; None for other files.

    Raises:
        ValueError: as ``read_run_config``.
    """
    run = _run_of(path)
    return None if run is None or not run.is_file() else _read(run, ("pipeline", "datamanager", "image_size"))


def _run_of(checkpoint: Path | str) -> Optional[Path]:
    path = Path(checkpoint)
    return path.parent.parent / "config.yml" if path.suffix == ".ckpt" else None


class _Loader(yaml.SafeLoader):
    def object(self, name: str, node: Any) -> Any:
        """A config: its fields, without a call of its constructor."""
        if name == "tyro._singleton.PropagatingMissingType":  # a required option that was not given
            return tyro.MISSING
        cls = self._named(name, node)
        if not isinstance(cls, type) or not is_dataclass(cls):
            raise _error(node, f"{name} is no config")
        state = self.construct_mapping(node, deep=True)
        for field in fields(cls):
            if field.name == "_target" and "_target" in state and field.default_factory is not MISSING:
                expected, found = field.default_factory(), state["_target"]
                if not (isinstance(found, type) and issubclass(found, expected)):
                    raise _error(node, f"{name} is of {found}, expected {expected}")
        made = object.__new__(cls)
        getattr(made, "__setstate__", vars(made).update)(state)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return made

    def name(self, name: str, node: yaml.Node) -> Any:
        return self._named(name, node, _FUNCTIONS)

    def call(self, name: str, node: yaml.Node) -> Any:
        """A path, or a value of an enumeration: all else that is written as a call is refused."""
        if not isinstance(node, yaml.SequenceNode):
            raise _error(node, f"a call of {name}")
        arguments = self.construct_sequence(node, deep=True)
        if _PATHS.fullmatch(name) and all(isinstance(part, str) for part in arguments):
            return Path(*arguments)
        cls = self._named(name, node)
        if not issubclass(cls, enum.Enum) or arguments not in [[member.value] for member in cls]:
            raise _error(node, f"a call of {name}")
        return cls(*arguments)

    def tuple(self, node: Any) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))

    def _named(self, name: str, node: yaml.Node, others: tuple[str, ...] = ()) -> Any:
        module, _, attribute = name.rpartition(".")
        if not _CLASS.fullmatch(name) and name not in others:
            raise _error(node, f"{name}, which is no config of this package or nerfstudio")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise _error(node, f"{name}, which the installed versions do not have ({error})") from None
        if not isinstance(found, type) and name not in others:
            raise _error(node, f"{name}, which is no class")
        return found


_Loader.add_multi_constructor(_TAG + "object:", _Loader.object)
_Loader.add_multi_constructor(_TAG + "object/apply:", _Loader.call)
_Loader.add_multi_constructor(_TAG + "name:", _Loader.name)
_Loader.add_constructor(_TAG + "tuple", _Loader.tuple)


def _read(path: Path, keys: tuple[str, ...]) -> Any:
    """The object under nested keys of a YAML file, None if there is none; only that is constructed."""
    try:
        loader = _Loader(path.read_text("utf8"))
        node = loader.get_single_node()
        for key in keys:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            node = next((value for name, value in pairs if name.value == key), None)
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the config.yml of a run that can be read ({error})") from None


def _error(node: yaml.Node, found: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=f"found {found}", problem_mark=node.start_mark)

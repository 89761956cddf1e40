"""Configuration files, which are checked before any work starts."""

import dataclasses
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from unet_caching.errors import UserError, one_line

T = TypeVar("T")
_FAULTS = (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError)


def read_yaml(path: Path, schema: type[T]) -> T:
    """Read a YAML file into the dataclass `schema`, nested ones included.

    Raises UserError that names the file and the key which is unknown, missing or of the wrong type.
    """
    return _fitted(load_yaml(path), schema, str(path))


def read_yaml_dict(path: Path, schema: type[T]) -> dict[str, T]:
    """Read a YAML file whose every entry is a dataclass `schema`. Raises UserError as `read_yaml`."""
    return {name: _fitted(entry, schema, f"{path}, {name}")
            for name, entry in ((str(key), entry) for key, entry in load_yaml(path).items())}


def load_yaml(path: Path) -> DictConfig:
    """The keys and values of a YAML file. Raises UserError where it is missing, no YAML, or holds no keys."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}")
    try:
        content = OmegaConf.load(path)
    except (*_FAULTS, RecursionError) as error:
        raise UserError(f"{path}: {_reason(error)}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: it holds a list, and should hold keys with values, like name: ...")
    return content


def _fitted(content: object, schema: type[T], where: str) -> T:
    """The values of a file as a dataclass."""
    if not isinstance(content, DictConfig):
        raise UserError(f"{where}: {content!r:.60} should be keys with values: "
                        f"{', '.join(one.name for one in dataclasses.fields(schema))}")      # type: ignore[arg-type]
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), content)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{where}: missing key {', '.join(missing)}")
        found = OmegaConf.to_object(config)
        assert isinstance(found, schema)
        return found
    except _FAULTS as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{where}: {f'key {key}: ' if key else ''}{_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return one_line(getattr(error, "msg", None) or error).split(" full_key:")[0][:300]

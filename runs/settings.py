"""Configuration files, which are checked before any work starts."""

from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runs.errors import UserError, one_line

T = TypeVar("T")


def read_yaml(path: Path, schema: type[T]) -> T:
    """Read a YAML file into the dataclass `schema`, nested ones included.

    Raises UserError that names the file and the key which is unknown, missing or of the wrong type.
    """
    if not Path(path).is_file():
        raise UserError(f"no config file {path}")
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{path}: missing key {', '.join(missing)}")
        found = OmegaConf.to_object(config)
        assert isinstance(found, schema)
        return found
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        key = getattr(error, "full_key", None)
        reason = one_line(getattr(error, "msg", None) or error).split(" full_key:")[0]
        raise UserError(f"{path}: {f'key {key}: ' if key else ''}{reason}") from None

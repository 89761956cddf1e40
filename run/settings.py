"""Read YAML files into dataclasses, which are their schemas (unet_caching/files/schema.py)."""

from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from unet_caching.errors import UserError, as_user_error, one_line
from unet_caching.files.schema import build, fault

T = TypeVar("T")


def read_yaml(path: Path, schema: type[T]) -> T:
    """Read a YAML file into the dataclass `schema`, which may contain others.

    Raises UserError, naming the file and the key, for a key that is unknown, missing or of the wrong type.
    """
    return _built(load_yaml(path), schema, str(path))


def read_yaml_dict(path: Path, schema: type[T]) -> dict[str, T]:
    """Read a YAML file with a dataclass `schema` under each key. Raises UserError as `read_yaml` does."""
    return {name: _built(entry, schema, f"{path}, {name}") for name, entry in load_yaml(path).items()}


def load_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises UserError if it is missing, is not YAML, or has no keys."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if isinstance(content, dict):
            return {str(key): value for key, value in content.items()}
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        reason = one_line(getattr(error, "msg", None) or error).split(" full_key:")[0][:300]
        raise UserError(f"{path}: {reason}") from None
    raise UserError(f"{path} holds a list: write keys with values, like name: ...")


def _built(content: object, schema: type[T], where: str) -> T:
    wrong = fault(content, schema)
    if wrong is not None:
        raise UserError(f"{where}: {wrong}")
    with as_user_error(f"{where}: "):
        return build(content, schema)

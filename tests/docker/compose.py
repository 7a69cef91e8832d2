"""The compose files as Compose reads them: parsed, merged, interpolated."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

DOCKER = Path(__file__).parents[2] / "docker"
APPENDED = {"ports", "volumes"}  # lists of a service that a second file adds to; it replaces any other


def load(name: str) -> dict[str, Any]:
    """One of the files, as it stands."""
    return YAML(typ="safe").load(DOCKER / name)


def merged(name: str) -> dict[str, Any]:
    """compose.yaml with another of the files over it."""
    return _merge(load("compose.yaml"), load(name))


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """With every `${NAME:?…}` replaced. There is no other kind, and KeyError where a variable is not given."""
    if isinstance(value, dict):
        return {key: interpolate(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, variables) for item in value]
    return re.sub(r"\$\{(\w+):\?[^}]+\}", lambda found: variables[found[1]], value) if isinstance(value, str) else value


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict):
            result[key] = _merge(result.get(key) or {}, value)
        elif key in APPENDED:
            result[key] = [*result.get(key, []), *value]
        else:
            result[key] = value
    return result

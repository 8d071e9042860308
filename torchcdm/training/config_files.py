"""Where settings come from, weakest first: their defaults, a preset, a YAML file, flags."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from torchcdm.errors import UserError, nearest
from torchcdm.runtime.reading import read_bytes
from torchcdm.runtime.validation import encode, join, read_as, shown
from torchcdm.training.settings import Config, TrainConfig

_PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def preset_fields(name: str) -> dict[str, Any]:
    """What a preset sets, with what it extends; UserError where there is none of that name."""
    if name not in preset_names():
        raise UserError(f"unknown preset {shown(name)}; {nearest(name, preset_names())}")
    fields = yaml.load((_PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), _Loader)
    own = {key: value for key, value in fields.items() if key not in ("about", "extends")}
    return _on(fields.get("extends"), own | {"preset": name})


def preset_about(name: str) -> dict[str, str]:
    """Its ``description``, what it ``reaches``, and the ``source`` of that: ``measured`` or ``published``."""
    return yaml.load((_PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), _Loader)["about"]


def _on(parent: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields laid on those of a preset, if any."""
    return fields if parent is None else merge(preset_fields(parent), fields)


def file_fields(path: str | Path, alone: bool = False) -> dict[str, Any]:
    """What a YAML file sets, ``alone`` or on the preset that its key ``extends`` names, or ``preset`` where it does
    not set the whole training, as that of a run does."""
    content = read_bytes(Path(path))
    try:
        fields = yaml.load(content.decode("utf-8-sig"), _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        place = "" if mark is None else f", line {mark.line + 1}"
        raise UserError(f"{path}{place}: not valid YAML ({' '.join(str(problem).split())})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: a configuration holds fields with values, such as 'train: {{steps: 1000}}'")
    train, extends = fields.get("train"), fields.pop("extends", None)
    complete = isinstance(train, dict) and TrainConfig.__dataclass_fields__.keys() <= train.keys()
    return fields if alone else _on(extends or (None if complete else fields.get("preset")), fields)


def flag_fields(flags: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Flags ``section.field`` with a text as nested fields: the text itself where it fits, else its value in YAML."""
    fields: dict[str, Any] = {}
    for path, text in flags:
        value: Any = text
        try:
            make_config(_nested(path, text))
        except UserError:
            try:
                value = yaml.load(text, _Loader)
            except (ValueError, RecursionError, yaml.YAMLError):
                raise UserError(f"--{path}: '{text}' is not a YAML value") from None
        fields = merge(fields, _nested(path, value))
    return fields


def _nested(path: str, value: Any) -> dict[str, Any]:
    """The field at a dotted path alone."""
    first, _, rest = path.partition(".")
    return {first: _nested(rest, value) if rest else value}


def make_config(*layers: Mapping[str, Any]) -> Config:
    """The configuration of these fields, the last strongest; UserError names a dotted path."""
    fields: dict[str, Any] = encode(Config())
    for layer in layers:
        fields = merge(fields, layer)
    return read_as(Config, fields)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``; a part whose ``name`` changes starts anew, a text in its place is its name."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, Mapping):
            old = {"name": old}
        if isinstance(old, Mapping):
            value = {"name": value} if isinstance(value, str) and "name" in old else value
            if isinstance(value, Mapping) and value.get("name", old.get("name")) == old.get("name"):
                value = merge(old, value)
        merged[key] = value
    return merged


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted paths at which two nested dicts differ, with both values; None where one lacks the key."""
    ours, theirs = dict(paths(one)), dict(paths(other))
    pairs = [(path, ours.get(path), theirs.get(path)) for path in ours | theirs]
    return [(path, a, b) for path, a, b in pairs if a != b and not (isinstance(a, Mapping) and isinstance(b, Mapping))]


def paths(fields: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """All that nested fields hold, by dotted path, from the outside in."""
    for key, value in fields.items():
        yield join(path, key), value
        if isinstance(value, Mapping):
            yield from paths(value, join(path, key))


def to_yaml(config: Config) -> str:
    """The text that :func:`file_fields` reads."""
    return yaml.dump(encode(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Puts texts in quotes that :class:`_Loader` would take for numbers."""


class _Loader(yaml.SafeLoader):
    """Plain values alone: no tags, no aliases, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags and aliases are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


# To PyYAML 010 is eight, 1:30 and 1:30.0 are ninety, and 1e-4 is a text.
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"[-+]?((\d[\d_]*\.\d*|\.\d+)(e[-+]?\d+)?|\d+e[-+]?\d+|\.inf|\.nan)$", re.IGNORECASE)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, {"int": _INT, "float": _FLOAT}.get(tag.rpartition(":")[2], form)) for tag, form in known]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("+-.0123456789"))

"""Values checked by their annotations: the arguments of constructors, and the settings that are derived from them."""

import functools
import inspect
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_type_hints

import pydantic
from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, PydanticCustomError, to_jsonable_python
from typing_extensions import dataclass_transform

from torchcdm.errors import UserError, nearest


def _whole(value: Any) -> Any:
    """NumPy's whole numbers, and 1e4, as an int."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _real(value: Any) -> Any:
    """NumPy's numbers as a float; ints stay."""
    return float(value) if isinstance(value, Real) and not isinstance(value, (bool, Integral)) else value


Int = Annotated[int, Strict(), BeforeValidator(_whole)]
Float = Annotated[float, Strict(), AllowInfNan(False), BeforeValidator(_real)]
Count = Annotated[Int, Ge(1), Le(10**9)]  # something that there is one of at least
CountOrZero = Annotated[Int, Ge(0), Le(10**9)]
Width = Annotated[Int, Ge(1), Le(2**14)]  # width of a layer, or number of layers
Widths = Annotated[tuple[Width, ...], Len(1, 32)]
Sides = tuple[Width, ...]  # sides of images, in pixels; none where there are no such images
Levels = Annotated[Int, Ge(2), Le(100_000)]  # number of noise levels T
Positive = Annotated[Float, Gt(0)]
NotNegative = Annotated[Float, Ge(0)]
Rate = Annotated[Float, Ge(0), Lt(1)]  # share that must leave something: of dropout, of decay
Share = Annotated[Float, Ge(0), Le(1)]
Seed = Annotated[Int, Ge(0), Lt(2**63)]
WidthPair = Annotated[tuple[Width, ...], Len(2, 2)]
RatePair = Annotated[tuple[Rate, ...], Len(2, 2)]
ProperShare = Annotated[Float, Gt(0), Lt(1)]  # share that is neither none nor all
SharePair = Annotated[tuple[Share, ...], Len(2, 2)]

CHECKS = ConfigDict(allow_inf_nan=False, extra="forbid")

encode = to_jsonable_python  # settings and dataclasses as dicts, tuples as lists: what YAML and JSON can hold

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass_transform(frozen_default=True)
def validated(kind: type[T]) -> type[T]:
    """Makes ``kind`` a frozen dataclass whose names, types and ranges are checked; a wrong one is a UserError. As part
    of a larger one it is checked by pydantic alone, which knows the path to the field."""

    def known(cls: type, value: Any) -> Any:
        given = value.kwargs or {} if isinstance(value, ArgsKwargs) else value
        for key in given if isinstance(given, Mapping) else ():
            if key not in cls.__dataclass_fields__:
                facts = {"key": str(key), "hint": nearest(key, cls.__dataclass_fields__)}
                raise PydanticCustomError("unknown_field", "unknown field", facts)
        return value

    kind._known_names = pydantic.model_validator(mode="before")(classmethod(known))
    checked: Any = dataclass(frozen=True, config=CHECKS)(kind)
    init = checked.__init__

    @functools.wraps(init)
    def initialise(self: Any, *args: Any, **fields: Any) -> None:
        # By name, which a message then has; what is one too many, or given twice, is refused.
        named = dict(zip(checked.__dataclass_fields__, args, strict=False))
        try:
            init(self, *args[len(named) :], **named, **fields)
        except ValidationError as error:
            raise UserError(mistake(error, named | fields)) from None

    checked.__init__ = initialise
    return checked


def read_as(kind: type[T], value: Any, path: str = "") -> T:
    """Plain values, as :func:`encode` gives them, as ``kind``; UserError names where a mistake is below ``path``."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(mistake(error, value, path)) from None


def named(*kinds: type) -> Any:
    """Annotation of a part that is one of several kinds, by its field ``name``; a text alone is the name."""
    by_name = BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    return Annotated[Union[kinds], pydantic.Field(discriminator="name"), by_name]  # noqa: UP007


def settings_of(kind: type, name: str | None, left_out: Collection[str], module: str) -> type:
    """Settings with the defaults and ranges of a constructor's arguments, but those without a default or ``left_out``,
    as a class of ``module``; their field ``name`` tells the parts of :func:`named` apart."""
    hints = get_type_hints(kind.__init__, include_extras=True)
    defaults = {} if name is None else {"name": name}
    hints["name"] = Literal[name]
    for key, parameter in inspect.signature(kind).parameters.items():
        if parameter.default is not parameter.empty and key not in left_out:
            defaults[key] = parameter.default
    text = f":class:`{kind.__module__}.{kind.__qualname__}`"
    types = {"__annotations__": {key: hints[key] for key in defaults}}
    return validated(type(f"{kind.__name__}Config", (), defaults | types | {"__module__": module, "__doc__": text}))


def arguments_for(kind: type, settings: Any) -> dict[str, Any]:
    """Those of the settings that the constructor of ``kind`` takes."""
    parameters = inspect.signature(kind).parameters
    return {key: getattr(settings, key) for key in settings.__dataclass_fields__ if key in parameters}


def checked(function: Function) -> Function:
    """A constructor or function whose numbers, texts and lists are checked by their annotations, or UserError."""
    signature = inspect.signature(function)

    @functools.cache
    def arguments() -> type[BaseModel]:
        hints = get_type_hints(function, include_extras=True)
        fields = {key: (hint, None) for key, hint in hints.items() if key != "return" and _is_plain(hint)}
        return pydantic.create_model("Arguments", __config__=CHECKS, **fields)

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = {key: bound.arguments[key] for key in arguments().model_fields.keys() & bound.arguments.keys()}
        try:
            valid = arguments().model_validate(given)
        except ValidationError as error:
            name = type(args[0]).__name__ if "self" in signature.parameters else function.__name__
            raise UserError(f"{name}: {mistake(error, given)}") from None
        bound.arguments.update({key: getattr(valid, key) for key in given})
        return function(*bound.args, **bound.kwargs)

    return checking


_PLAIN = (int, float, bool, str, type(None))


def _is_plain(hint: Any) -> bool:
    """Whether an annotation holds numbers, texts, truths and lists alone."""
    return all(map(_is_plain, get_args(hint))) if get_args(hint) else not isinstance(hint, type) or hint in _PLAIN


# Ours for words of pydantic's messages.
_WORDS = {
    "Input should": "it must", "Tuple should": "it must", "Value should": "it must", " after validation": "",
    "tuple": "list such as [1, 2]", "a valid boolean": "true or false", "greater than or equal to": "at least",
    "less than or equal to": "at most",
}  # fmt: skip

_NAMES, _SHOWN = re.compile(r"'([^']*)'"), reprlib.Repr()
_SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlevel, _SHOWN.maxdict = 80, 80, 2, 3


def mistake(error: ValidationError, value: Any, path: str = "") -> str:
    """A line that names the first mistake in ``value``, which lies at the dotted ``path``."""
    first, *others = error.errors(include_url=False)
    kind, facts, found = first["type"], first.get("ctx", {}), first["input"]
    for part in first["loc"]:
        try:
            value = value[part]
        except (LookupError, TypeError):
            if kind != "missing":  # a part of several kinds adds the name of its kind to the place
                continue
        path = f"{path}[{part}]" if isinstance(part, int) else join(path, part)
    here = path or "configuration"
    match kind:
        case "unknown_field":
            return f"unknown field '{join(path, facts['key'])}'; {facts['hint']}"
        case "union_tag_invalid":
            needed = nearest(facts["tag"], _NAMES.findall(facts["expected_tags"]))
            return f"{join(path, 'name')} is {shown(facts['tag'])}; {needed}"
        case "missing":
            return f"{here} is missing"
        case "value_error":
            return f"{here}: {facts['error']}"
        case "literal_error":
            needed = nearest(str(found), _NAMES.findall(facts["expected"]))
        case _:
            needed = first["msg"]
            for theirs, ours in _WORDS.items():
                needed = needed.replace(theirs, ours)
            same = (other for other in others if other["loc"][:-1] == first["loc"][:-1] and other["input"] is found)
            needed += "".join(f", or {other['ctx']['expected']}" for other in same if other["type"] == "literal_error")
    return f"{here} is {shown(found)}; {needed}"


def shown(value: Any) -> str:
    """A value for a message, at most about a line of it."""
    return "a number of many digits" if isinstance(value, int) and abs(value) > 10**80 else _SHOWN.repr(value)


def join(path: str, key: Any) -> str:
    """A dotted path and one more part."""
    return f"{path}.{key}" if path else str(key)

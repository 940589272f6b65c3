"""A program's configuration: a frozen dataclass, filled from defaults, then YAML, then the command line.

@dataclass(frozen=True)
class TrainConfig:
    '''Train something.'''
    lr: float = option(1e-3, "peak learning rate", gt=0)
    head: Literal["linear", "dpt"] = option("dpt", "what is trained", aliases=("decoder",))
    config: str | None = option(None, "YAML file with any of these")

config = parse(TrainConfig)
"""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import json
import math
import operator
import os
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from pixio.engine.program import explain
from pixio.files import write_text

Config = TypeVar("Config")
_HOLDS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
_MAX_YAML, _MAX_ALIASES, _MAX_DEPTH = 1 << 16, 16, 16  # bytes; references to earlier values; nesting
_LIMITS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}


def option(
    default: Any = MISSING,
    help: str = "",
    aliases: Sequence[str] = (),
    *,
    choices: str = "",
    metavar: str | tuple[str, ...] | None = None,
    positional: bool = False,
    negatable: bool = True,
    **bounds: float,
) -> Any:
    """A dataclass field with the text `--help` shows for it and the values it may have.

    Args:
        default: without one the option is required.
        help: what it does, with its unit; "{choices}" stands for the list of them.
        aliases: further names, on the command line and in YAML.
        choices: "module:TABLE", whose keys are the texts allowed; imported when the command line is read.
        metavar: what `--help` shows for the value.
        positional: an argument without a flag.
        negatable: of a switch, whether `--help` shows `--no_flag` too.
        bounds: gt, ge, lt, le: what every number of the option must be greater than, at least, less than,
            at most.
    """
    assert bounds.keys() <= _HOLDS.keys(), f"no such bound: {bounds}"
    metadata = {
        "help": help,
        "aliases": tuple(aliases),
        "choices": choices,
        "metavar": metavar,
        "positional": positional,
        "negatable": negatable,
        "bounds": bounds,
    }
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    cls: type[Config],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    epilog: str | None = None,
) -> Config:
    """Make a `cls` from the command line and from the YAML file that its field `config`, if any, names.

    Fields may be int, float, str, Path, bool (`--flag`, `--no_flag`, `--flag=false`), Literal, tuples of
    those (of tuples: a flag that may be given several times), and `| None` of any ("none" on the command
    line). A leading ~ in text is the home folder. A mistake ends the program with one line, exit status 2.

    Args:
        cls: a dataclass; its docstring is the description in `--help`, and a ValueError from its
            `__post_init__` is a user's mistake too.
        argv: arguments, or None for the program's own.
        prog: name of the program in messages.
        epilog: what `--help` ends with.
    """
    parser = _Parser(
        prog=prog,
        description=inspect.cleandoc(cls.__doc__ or ""),
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(cls)
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(cls)  # type: ignore[arg-type]
    options = {field.name: _Option(field, hints[field.name]) for field in fields if field.init}
    for each in options.values():
        each.add_to(parser)
    words = [_plain_switch(parser, word) for word in (sys.argv[1:] if argv is None else argv)]
    given, unknown = parser.parse_known_args(words)
    if unknown:
        word = unknown[0].partition("=")[0]
        kind = "flag" if word.startswith("-") else "argument"
        parser.error(f"unknown {kind} {word}{_nearest(word, parser._option_string_actions)}")

    try:
        values = {name: options[name].convert(text) for name, text in vars(given).items()}
        if values.get("config"):
            values = _read_yaml(values["config"], options) | values
        missing = [each.label for name, each in options.items() if name not in values and each.required]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        return cls(**values)
    except (ValueError, OSError) as error:
        parser.error(" ".join(explain(error).split()))


def parse_command(
    commands: Mapping[str, Any], argv: Sequence[str] | None = None, prog: str = "", description: str = ""
) -> Any:
    """Parse `prog COMMAND …`: make the dataclass of the command named first; see `parse`.

    Args:
        commands: name -> dataclass; an attribute `example` of it ends its `--help`.
        argv: arguments, or None for the program's own.
        prog: name of the program in messages.
        description: what its `--help` begins with.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    listed = parser.add_subparsers(required=True, metavar="command")
    for name, cls in commands.items():
        listed.add_parser(name, help=(cls.__doc__ or "").split("\n")[0], add_help=False)
    parser.parse_args(words[:1])
    name, *rest = words
    return parse(commands[name], rest, f"{prog} {name}", f"example: {prog} {name} {commands[name].example}")


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write the resolved values of `config` as JSON, which `parse` reads back through `--config`.

    Args:
        config: an instance of a configuration dataclass.
        path: the file to make or replace.
    """
    values = dataclasses.asdict(config)
    values.pop("config", None)  # its content is in the other values already
    write_text(path, json.dumps(values, indent=2, default=str, allow_nan=False) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class _Switch(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def _plain_switch(parser: _Parser, word: str) -> str:
    """`--flag=true` and `--flag=false` as `--flag` and `--no_flag`; any other word as it is."""
    flag, equals, value = word.partition("=")
    if not equals or not isinstance(parser._option_string_actions.get(flag), _Switch):
        return word
    if value not in ("true", "false"):
        parser.error(f"{flag} must be true or false, found {value}")
    if value == "true":
        return flag
    return f"--{flag[5:]}" if flag.startswith("--no_") else f"--no_{flag[2:]}"


class _Option:
    """A field of a configuration: its place on the command line, and the conversion of its values."""

    def __init__(self, field: dataclasses.Field, hint: Any):
        self.name, self.default, self.hint = field.name, field.default, hint
        self.help, self.metavar = field.metadata["help"], field.metadata["metavar"]
        self.positional, self.negatable = field.metadata["positional"], field.metadata["negatable"]
        self.names: tuple[str, ...] = (field.name, *field.metadata["aliases"])
        self.bounds: dict[str, float] = field.metadata["bounds"]
        self.required = field.default is MISSING
        self.label = field.name if self.positional else f"--{field.name}"
        module, _, table = field.metadata["choices"].partition(":")
        self.choices = list(getattr(importlib.import_module(module), table)) if module else []

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        default = " (required)" if self.required else f" (default: {_show(self.default)})"
        text = self.help.replace("{choices}", ", ".join(self.choices))
        text += "" if self.required and self.positional else default
        settings: dict[str, Any] = {"help": text.strip().replace("%", "%%")}
        kind, arguments = _kind(self.hint)
        if kind is bool:
            settings |= {"dest": self.name, "action": _Switch, "nargs": 0}
            on, off = [f"--{name}" for name in self.names], [f"--no_{name}" for name in self.names]
            parser.add_argument(*on, *(off if self.negatable else ()), **settings)
            if not self.negatable:
                parser.add_argument(*off, **settings | {"help": argparse.SUPPRESS})
            return
        if kind is tuple and _kind(arguments[0])[0] is tuple:
            settings["action"] = "append"
            kind, arguments = _kind(arguments[0])
        if kind is tuple:
            some = "+" if self.positional and self.required else "*"
            settings["nargs"] = some if arguments[-1] is Ellipsis else len(arguments)
            kind, arguments = _kind(arguments[0])
        choices = self.allowed(kind, arguments)
        shown = "{" + ",".join(map(str, choices)) + "}" if choices else kind.__name__.upper()
        if self.positional:
            parser.add_argument(self.name, metavar=self.metavar or self.name, **settings)
        else:
            flags = [f"--{name}" for name in self.names]
            parser.add_argument(*flags, dest=self.name, metavar=self.metavar or shown, **settings)

    def convert(self, value: Any, label: str = "", hint: Any = None) -> Any:
        """`value`, text from the command line or anything from YAML, as the type of this option.

        Raises:
            ValueError: it is not of that type or not in its range; the message names `label` (the flag, if
                empty), the value, and what it must be.
        """
        hint, label = hint or self.hint, label or self.label
        kind, arguments = _kind(hint)
        wrong = ValueError(f"{label} must be {self.describe(hint)}, found {_show(value):.200}")
        if _optional(hint) and (value is None or (label == self.label and value in ("none", ["none"]))):
            return None
        if kind is tuple:
            if not isinstance(value, list):
                raise wrong
            inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
            if len(value) != len(inner):
                raise wrong
            return tuple(self.convert(*part) for part in zip(value, [label] * len(value), inner, strict=True))
        if choices := self.allowed(kind, arguments):
            found = [choice for choice in choices if value == choice or value == str(choice)]
            if not found:
                raise wrong
            return found[0]
        if kind is bool and isinstance(value, bool):
            return value
        if kind in (str, Path) and isinstance(value, (str, Path)):
            return kind(os.path.expanduser(value))
        # Text passes for a number also from YAML, where 1e-4 without a dot is text.
        numbers = {int: (int, str), float: (int, float, str)}.get(kind, ())
        if isinstance(value, bool) or not isinstance(value, numbers):
            raise wrong
        try:
            number = kind(value)
            holds = all(_HOLDS[bound](number, limit) for bound, limit in self.bounds.items())
            if math.isfinite(number) and holds:
                return number
        except (ValueError, OverflowError):
            pass
        raise wrong

    def allowed(self, kind: Any, arguments: tuple[Any, ...]) -> Sequence[Any]:
        """The only values of a type that has few of them."""
        return arguments if kind is Literal else self.choices

    def describe(self, hint: Any) -> str:
        """What a value of type `hint` must be."""
        kind, arguments = _kind(hint)
        if kind is tuple and arguments[-1] is Ellipsis:
            text = f"a list of {self.describe(arguments[0])}"
        elif kind is tuple:
            text = f"{len(arguments)} values: " + ", ".join(map(self.describe, arguments))
        elif choices := self.allowed(kind, arguments):
            text = "one of " + ", ".join(map(str, choices))
        elif kind in (int, float):
            text = _describe_number("integer" if kind is int else "number", self.bounds)
        else:
            text = {bool: "true or false", str: "text", Path: "a path"}[kind]
        return f"{text} or none" if _optional(hint) else text


def _describe_number(noun: str, bounds: dict[str, float]) -> str:
    if bounds == {"gt": 0} or (noun == "integer" and bounds == {"ge": 1}):
        return f"a positive {noun}"
    if bounds == {"ge": 0}:
        return f"a non-negative {noun}"
    limits = " and ".join(f"{_LIMITS[bound]} {limit:g}" for bound, limit in bounds.items())
    text = "an integer" if noun == "integer" else "a number" if limits else "a finite number"
    return f"{text} {limits}".strip()


def _read_yaml(path: str | os.PathLike, options: dict[str, _Option]) -> dict[str, Any]:
    """Values of a YAML file by field name, checked also where the command line will win."""
    import yaml  # needed only where a file is named

    if (size := os.stat(path).st_size) > _MAX_YAML:
        raise ValueError(f"{path} has {size:,} bytes, a configuration at most {_MAX_YAML:,}")
    try:
        text = Path(path).read_text(encoding="utf-8")
        aliases = depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if aliases > _MAX_ALIASES or depth > _MAX_DEPTH:  # aliases can double what the others unfold to
                raise ValueError(f"more than {_MAX_ALIASES} aliases or {_MAX_DEPTH} lists in one another")
        content = yaml.safe_load(text)
    except OSError:
        raise
    except Exception as error:  # beside its own errors, those of whatever a value was taken for (a date, say)
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, found {_show(content):.200}")
    known = {name: each for name, each in options.items() if name != "config"}
    known |= {alias: each for each in options.values() for alias in each.names[1:]}
    values = {}
    for key, value in content.items():
        if key not in known:
            raise ValueError(f"unknown key {key!s:.200} in {path}{_nearest(str(key), known)}")
        if known[key].name in values:
            raise ValueError(f"{key} in {path} is given twice, under two names")
        values[known[key].name] = known[key].convert(value, f"{key} in {path}")
    return values


def _kind(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type that decides how `hint` is read, without `| None`, and its arguments."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    kind = typing.get_origin(hint) or hint
    assert kind in (int, float, str, bool, Path, Literal, tuple), f"no such option type: {hint}"
    return kind, typing.get_args(hint)


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_show, value)) or "nothing"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f": did you mean {match[0]}?" if match else ""

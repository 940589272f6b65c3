"""A program's configuration: a frozen dataclass, filled from defaults, then YAML, then the command line.

@dataclass(frozen=True)
class TrainConfig:
    '''Train something.'''
    lr: float = option(1e-3, "peak learning rate")
    head: Literal["linear", "dpt"] = option("dpt", "what is trained", aliases=("decoder",))
    config: str | None = option(None, "YAML file with any of these")

config = parse(TrainConfig)
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from pixio.files import write_atomic

Config = TypeVar("Config")


def option(default: Any = MISSING, help: str = "", aliases: Sequence[str] = ()) -> Any:
    """A dataclass field with the text `--help` shows for it.

    Args:
        default: without one the option is required.
        help: what it does, with its unit.
        aliases: further names, on the command line and in YAML.
    """
    metadata = {"help": help, "aliases": tuple(aliases)}
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    cls: type[Config],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> Config:
    """Make a `cls` from the command line and from the YAML file that its field `config`, if any, names.

    Fields may be int, float, str, Path, bool (`--flag`, `--no_flag`), Literal, tuples of those, and `| None`
    of any ("none" on the command line). A mistake ends the program with one line, exit status 2.

    Args:
        cls: a dataclass; a ValueError from its `__post_init__` is a user's mistake too.
        argv: arguments, or None for the program's own.
        prog: name of the program in messages.
        description: what `--help` begins with; None takes the docstring of `cls`.
    """
    parser = _Parser(
        prog=prog,
        description=description or cls.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    for name, field in fields.items():
        _add_flag(parser, field, hints[name])
    given, unknown = parser.parse_known_args(argv)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    if unknown:
        word = unknown[0].partition("=")[0]
        kind = "flag" if word.startswith("-") else "argument"
        parser.error(f"unknown {kind} {word}{_nearest(word, flags)}")

    try:
        values = {name: _convert(f"--{name}", value, hints[name]) for name, value in vars(given).items()}
        if values.get("config"):
            values = _read_yaml(values["config"], fields, hints) | values
        missing = [f"--{name}" for name, field in fields.items() if name not in values and _required(field)]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        return cls(**values)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write the resolved values of `config` as JSON, which `parse` reads back through `--config`.

    Args:
        config: an instance of a configuration dataclass.
        path: the file to make or replace.
    """
    values = dataclasses.asdict(config)
    values.pop("config", None)  # its content is in the other values already
    text = json.dumps(values, indent=2, default=str, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


class _Switch(argparse.Action):
    """`--flag` and `--no_flag`: the second half of the option strings says no."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        yes = self.option_strings[: len(self.option_strings) // 2]
        setattr(namespace, self.dest, option_string in yes)


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    names = [field.name, *field.metadata.get("aliases", ())]
    text = field.metadata.get("help", "")
    if not _required(field):
        text = f"{text} (default: {_show(field.default)})"
    else:
        text = f"{text} (required)"
    text = text.strip().replace("%", "%%")
    kind, arguments = _kind(hint)
    flags = [f"--{name}" for name in names]
    if kind is bool:
        flags += [f"--no_{name}" for name in names]
        parser.add_argument(*flags, dest=field.name, action=_Switch, nargs=0, help=text)
        return
    count = None
    if kind is tuple:
        count = "*" if arguments[-1] is Ellipsis else len(arguments)
        kind, arguments = _kind(arguments[0])
    metavar = "{" + ",".join(map(str, arguments)) + "}" if kind is Literal else kind.__name__.upper()
    parser.add_argument(*flags, dest=field.name, nargs=count, metavar=metavar, help=text)


def _required(field: dataclasses.Field) -> bool:
    return field.default is MISSING


def _read_yaml(
    path: str | os.PathLike, fields: dict[str, dataclasses.Field], hints: dict[str, Any]
) -> dict[str, Any]:
    """Values of a YAML file by field name, checked also where the command line will win."""
    import yaml  # needed only where a file is named

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, found {_show(content)}")
    known = {name: name for name in fields if name != "config"}
    for name, field in fields.items():
        known |= dict.fromkeys(field.metadata.get("aliases", ()), name)
    values = {}
    for key, value in content.items():
        if key not in known:
            raise ValueError(f"unknown key {key} in {path}{_nearest(str(key), known)}")
        if known[key] in values:
            raise ValueError(f"{key} in {path} is given twice, under two names")
        values[known[key]] = _convert(f"{key} in {path}", value, hints[known[key]])
    return values


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value`, text from the command line or anything from YAML, as the type `hint`.

    Raises:
        ValueError: it is not of that type; the message names `name`, the value and the type.
    """
    kind, arguments = _kind(hint)
    wrong = ValueError(f"{name} must be {_describe(hint)}, found {_show(value)}")
    if _optional(hint) and (value is None or (name.startswith("--") and value in ("none", ["none"]))):
        return None
    if kind is Literal:
        for choice in arguments:
            if value == choice or value == str(choice):
                return choice
        raise wrong
    if kind is tuple:
        if not isinstance(value, list):
            raise wrong
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            raise wrong
        return tuple(_convert(name, part, inner) for part, inner in zip(value, arguments, strict=True))
    if kind is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if kind in (str, Path):
        if not isinstance(value, (str, Path)):
            raise wrong
        return kind(value)
    # Text passes for a number also from YAML, where 1e-4 without a dot is text.
    if isinstance(value, bool) or not isinstance(value, (int, str) if kind is int else (int, float, str)):
        raise wrong
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number):
        raise wrong
    return number


def _kind(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type that decides how `hint` is read, without `| None`, and its arguments."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    kind = typing.get_origin(hint) or hint
    assert kind in (int, float, str, bool, Path, Literal, tuple), f"no such option type: {hint}"
    return kind, typing.get_args(hint)


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _describe(hint: Any) -> str:
    kind, arguments = _kind(hint)
    if kind is Literal:
        text = "one of " + ", ".join(map(str, arguments))
    elif kind is tuple and arguments[-1] is Ellipsis:
        text = f"a list of {_describe(arguments[0])}"
    elif kind is tuple:
        text = f"{len(arguments)} values: " + ", ".join(map(_describe, arguments))
    else:
        text = {
            int: "a whole number",
            float: "a finite number",
            bool: "true or false",
            str: "text",
            Path: "a path",
        }[kind]
    return f"{text} or none" if _optional(hint) else text


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_show, value)) or "nothing"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f": did you mean {match[0]}?" if match else ""

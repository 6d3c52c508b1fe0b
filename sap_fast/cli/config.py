"""Options from a file: `--config run.yaml` for every command, and `--print-config` to write one."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
import yaml

from sap_fast.cli.console import UserError
from sap_fast.cli.settings import GONE, declare, flag

_PANEL = "Configuration"


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `--config` and `--print-config`.

    Options on the command line win over those of the file, and those over the defaults.

    Args:
        command: a function whose parameters are all options, as `with_settings` leaves it.
    """
    types_of = {
        name: hint for name, hint in get_type_hints(command).items() if name not in ("return",)
    }

    def read(context: typer.Context, value: Path | None) -> Path | None:
        if value is not None:
            context.default_map = read_config(value, types_of)
        return value

    @functools.wraps(command)
    def run(config: Path | None, print_config: bool, **options: Any) -> None:
        if print_config:
            sys.stdout.write(written(options))
            return
        command(**options)

    own = list(inspect.signature(command, eval_str=True).parameters.values())
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(
            "config",
            kind,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(
                    help="A .yaml or .json file of options by name, such as batch_size: 8; or the "
                    "run.json of a run. Options given here win.",
                    is_eager=True,
                    callback=read,
                    rich_help_panel=_PANEL,
                ),
            ],
        ),
        inspect.Parameter(
            "print_config",
            kind,
            default=False,
            annotation=Annotated[
                bool,
                typer.Option(
                    "--print-config",
                    help="Write all options as they would be used, as YAML, and stop.",
                    rich_help_panel=_PANEL,
                ),
            ],
        ),
    ]
    parameters = [*(parameter.replace(kind=kind) for parameter in own), *added]
    declare(run, parameters)
    return run


def written(options: Mapping[str, Any]) -> str:
    """Returns options as a YAML file that `read_config` reads."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def read_config(path: Path, types_of: Mapping[str, Any]) -> dict[str, Any]:
    """Reads options from a file.

    Args:
        path: YAML or JSON: an object with values by the names of options; or a `run.json`, whose
            `settings` these are. `null` leaves an option at its default. A list of names becomes
            one text with commas.
        types_of: the type of every option, by its name with underscores.

    Returns:
        The values by name.

    Raises:
        UserError: naming the file, and the key where there is one.
    """
    values = _parsed(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: got {_told(values)}; expected options by name: batch_size: 8")
    if isinstance(values.get("settings"), dict):
        values = values["settings"]
    options = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in types_of:
            raise UserError(f"{path}: {_unknown(key, types_of)}")
        if name in options:
            raise UserError(f"{path}: the key {key!r} is there twice; expected it once")
        if value is not None:
            options[name] = _converted(path, key, value, types_of[name])
    return options


def _unknown(key: Any, types_of: Mapping[str, Any]) -> str:
    option = flag(str(key))
    if option in GONE:
        return f"the key {key!r} is gone: {GONE[option]}"
    near = difflib.get_close_matches(str(key).replace("-", "_"), types_of, n=1)
    expected = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(types_of)}"
    return f"unknown key {key!r}; {expected}"


def _converted(path: Path, key: Any, value: Any, hint: Any) -> Any:
    """Returns a value as the command line would have it."""
    kind = _kind(hint)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and not isinstance(value, bool):
        try:
            # YAML reads 1e-4 as text. A whole number may be written as 4.0, and no other.
            number = float(value)
            if kind is float or number == int(number):
                return kind(value) if not isinstance(value, str) else kind(number)
        except (TypeError, ValueError, OverflowError):
            pass
    if kind in (str, Path):
        items = value if isinstance(value, list) else [value]
        if items and all(isinstance(each, str | int | float) for each in items):
            if not any(isinstance(each, bool) for each in items):
                return ",".join(map(str, items))
    expected = {bool: "true or false", int: "a whole number", float: "a number"}
    raise UserError(f"{path}: {key}: got {_told(value)}; expected {expected.get(kind, 'text')}")


def _kind(hint: Any) -> Any:
    """Returns the plain type in an annotation such as `Annotated[int | None, …]`."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    return hint


def _told(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Loader(yaml.SafeLoader):
    """Reads plain values only, and no key twice."""


def _without_doubles(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} is there twice", problem_mark=node.start_mark
            )
    return loader.construct_mapping(node)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _without_doubles)


def _parsed(path: Path) -> Any:
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise UserError(f"--config {path}: expected a .yaml or .json file")
    try:
        # JSON is YAML, but for some escapes of its text.
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            return json.loads(text)
        return yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; expected a readable file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: got bytes that are not UTF-8; expected text") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: got invalid YAML ({error.problem})") from error
    # Other characters that YAML does not take; nesting without end; an odd date or number.
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError) as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
        raise UserError(f"{path}: got invalid {kind} ({error})") from error

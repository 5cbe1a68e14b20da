"""From a recipe file and the command line to a Config, and from a Config to JSON and back.

A recipe is a Python file with `def config() -> Config`, or the JSON that `freeze` wrote. Whatever its source, a Config
has been checked field by field for names and types when it leaves this file; what fields mean together is in check.py.
"""

import difflib
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from megamm.config.schema import Config
from megamm.errors import ConfigError, MegammError

USAGE = "python -m megamm.train RECIPE.py [--dry-run] [--parallel.tp 2 ...]; RECIPE.py --help lists every option"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says beside the configuration."""

    recipe: str
    """Path of the recipe."""
    dry_run: bool = False
    """Print units per stage, parameters, a memory estimate and samples per step, and exit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _CommandLine:
    """Train a multimodal language model."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print units per stage, parameters, a memory estimate and samples per step, and exit."""


def parse(argv: Sequence[str]) -> tuple[Config, Options]:
    """Read a command line `RECIPE.py [--parallel.tp 2 ...] [--dry-run]`; the recipe's values are the defaults.

    A wrong option is printed with the nearest names and ends the process with status 2, as `--help` does with 0. Only
    rank 0 prints.
    """
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            sys.stdout.write(f"usage: {USAGE}\n")
            raise SystemExit(0)
        raise MegammError(f"the recipe comes first: {USAGE}")
    found = tyro.cli(
        _CommandLine,
        prog=f"python -m megamm.train {argv[0]}",
        args=list(argv[1:]),
        default=_CommandLine(config=load_recipe(argv[0])),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
    return found.config, Options(recipe=argv[0], dry_run=found.dry_run)


def load_recipe(path: str | Path) -> Config:
    """The Config that a recipe file describes. Raises ConfigError that names the file, and the line of a .py."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"recipe {path}: there is no such file; {USAGE}"])
    if path.suffix == ".json":
        return thaw(path.read_text(encoding="utf-8-sig"), source=str(path))
    if path.suffix != ".py":
        raise ConfigError([f"recipe {path}: a recipe is a .py file, or the recipe.json of an earlier run"])
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None and spec.loader is not None  # always so for a .py file
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.config()
    except Exception as error:
        raise ConfigError([_explain(path, error)]) from error
    if not isinstance(config, Config):
        raise ConfigError([f"recipe {path}: config() must return a megamm.config.Config, not {type(config).__name__}"])
    return _read(asdict(config), f"recipe {path}")


def freeze(config: Config) -> str:
    """The configuration as JSON text; `thaw`, and a run given the file as its recipe, read it back."""
    return json.dumps(asdict(config), indent=2) + "\n"


def thaw(text: str, source: str = "recipe.json") -> Config:
    """The Config that `freeze` wrote. Raises ConfigError with every unknown, missing or mistyped field of `source`."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{source}, line {error.lineno}, is not JSON: {error.msg}"]) from error
    return _read(data, source)


def _read(data: Any, source: str) -> Config:
    problems: list[str] = []
    config = _typed(data, Config, "", problems)
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    return config


def _typed(value: Any, hint: Any, name: str, problems: list[str]) -> Any:
    """`value` as the type `hint` of the schema; what does not fit is added to `problems` under the field's name."""
    if is_dataclass(hint):
        return _section(value, hint, name, problems)
    if get_origin(hint) is UnionType:
        (inner,) = (option for option in get_args(hint) if option is not NoneType)
        return None if value is None else _typed(value, inner, name, problems)
    if get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_typed(item, get_args(hint)[0], name, problems) for item in value)
        problems.append(f'{name} must be a list such as ("vision",), not {value!r}')
    elif get_origin(hint) is Literal:
        if value not in get_args(hint):
            problems.append(f"{name} must be one of {', '.join(get_args(hint))}, not {value!r}")
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is not hint:  # bool is an int, but not here
        problems.append(f"{name} must be {_NOUNS[hint]}, not {value!r}")
    return value


_NOUNS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _section(value: Any, section: Any, name: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{name or 'the configuration'} must be a group of fields, not {value!r}")
        return None
    before = len(problems)
    prefix = f"{name}." if name else ""
    hints = get_type_hints(section)
    problems += [f"{prefix}{key} does not exist{_nearest(str(key), hints)}" for key in value if key not in hints]
    required = (f.name for f in fields(section) if f.default is MISSING and f.default_factory is MISSING)
    problems += [f"{prefix}{key} is missing" for key in required if key not in value]
    known = {key: _typed(value[key], hint, f"{prefix}{key}", problems) for key, hint in hints.items() if key in value}
    return section(**known) if len(problems) == before else None


def _nearest(name: str, names: Sequence[str] | dict[str, Any]) -> str:
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(names)}"


def _explain(path: Path, error: Exception) -> str:
    """One message for whatever a recipe raised: the recipe's own line, the error, and the field that was meant."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) == path.absolute():
            line = frame.lineno
    place = f"recipe {path}" + (f", line {line}" if line else "")
    if isinstance(error, AttributeError) and error.name == "config" and line is None:
        return f"{place}: it must define config() -> megamm.config.Config"
    message = f"{place}: {type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
    if misspelt := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
        sections = {hint.__name__: hint for hint in get_type_hints(Config).values()} | {"Config": Config}
        if section := sections.get(misspelt[1]):
            message += _nearest(misspelt[2], get_type_hints(section))
    return message

"""The command line of an experiment, made from its frozen `Config` dataclass.

    @dataclass(frozen=True)
    class Config:
        ppo: ppo.Config = ppo.Config()
        seed: int = 0
        \"\"\"Root of every random number.\"\"\"

        def validate(self) -> None:
            if self.seed < 0:
                raise ValueError(f"seed is {self.seed}; it must be at least 0")

    if __name__ == "__main__":
        cli.main(main, Config)

Every field has a default, docstrings are the help, and a nested configuration is
`--ppo.clip-epsilon 0.1`. A class may define `validate`, which raises a `ValueError` that starts
with the name of the field; the command line turns that name into its flag. What the user got wrong
ends the program with one line on stderr and exit code 2; what we got wrong keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

ConfigT = TypeVar("ConfigT")

_OWN_PACKAGES = ("jaxrl_llm", "experiments", "benchmarks", "__main__")
_WORDS = {int: "an integer", float: "a number", str: "a text", Path: "a path", type(None): "None"}


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """The configuration that a command line asks for, validated.

    Args:
      config_class: a frozen dataclass whose fields all have defaults.
      argv: the arguments without the program's name; those of this process by default.

    Raises:
      SystemExit: with code 2, after one line on stderr, if an argument is wrong; with code 0
        after `--help`.
    """
    import tyro

    arguments = _with_latest(sys.argv[1:] if argv is None else argv)
    # tyro explains errors in a box of many lines; ours are one line, so its output is held back.
    held_back = io.StringIO()
    try:
        with contextlib.redirect_stderr(held_back):
            config = tyro.cli(config_class, args=arguments, prog=_program())
    except SystemExit as stop:
        if stop.code == 0:
            raise
        _fail(_explain(config_class, arguments))
    try:
        validate(config)
    except ValueError as error:
        _fail(str(error))
    return config


def main(run: Callable[[ConfigT], Any], config_class: type[ConfigT]) -> None:
    """Runs `run(parse(config_class))` as a program.

    A one-line `ValueError` raised by this library or an experiment, and an `OSError` about a named
    file, are the user's to mend: `error: ...` on stderr, exit code 2. An interrupt exits with 130.
    """
    config = parse(config_class)
    try:
        run(config)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint written is kept: resume from it", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        if not _is_ours(error):
            raise
        _fail(str(error))
    except OSError as error:
        if error.filename is not None:
            _fail(f"{error.filename}: {(error.strerror or str(error)).lower()}")
        if isinstance(error, FileNotFoundError) and _is_ours(error):
            _fail(str(error))
        raise


def validate(config: Any, prefix: str = "") -> None:
    """Calls `validate` of a configuration and of every configuration nested in it.

    Args:
      config: a dataclass.
      prefix: where it is nested, `ppo.` for the fields of `--ppo.*`.

    Raises:
      ValueError: of the first that refuses, its leading field name rewritten as the flag.
    """
    names = [field.name for field in dataclasses.fields(config)]
    for name in names:
        if dataclasses.is_dataclass(nested := getattr(config, name)):
            validate(nested, f"{prefix}{name}.")
    if not hasattr(config, "validate"):
        return
    try:
        config.validate()
    except ValueError as error:
        message = str(error)
        field = re.match(r"[A-Za-z_]\w*", message)
        if field is None or field.group() not in names:
            where = f"{_flag(prefix[:-1])}: " if prefix else ""
            raise ValueError(where + message) from None
        raise ValueError(_flag(prefix + field.group()) + message[field.end() :]) from None


def _with_latest(arguments: Sequence[str]) -> list[str]:
    """`--resume` may stand alone: it means the latest run."""
    complete: list[str] = []
    for index, argument in enumerate(arguments):
        complete.append(argument)
        following = arguments[index + 1 : index + 2]
        if argument == "--resume" and (not following or following[0].startswith("--")):
            complete.append("latest")
    return complete


def _explain(config_class: type, arguments: Sequence[str]) -> str:
    """One line about the first argument that is wrong."""
    hints = dict(_options(config_class))
    groups: list[list[str]] = []
    for token in arguments:
        if token.startswith("--") and len(token) > 2:
            groups.append(token.split("=", 1))
        elif groups and not re.match(r"-[A-Za-z]", token):
            groups[-1].append(token)
        else:
            return f"{token} is not an option; {_suggestion('-' + token, hints)}"
    for written, *values in groups:
        flag = written.replace("_", "-")
        positive = re.sub(r"(^--|\.)no-", r"\1", flag)
        if flag in hints:
            hint = hints[flag]
        elif hints.get(positive) is bool:
            flag, hint = positive, bool
        else:
            return f"{written} is not an option; {_suggestion(flag, hints)}"
        if _parses(config_class, [written, *values]):
            continue
        if hint is bool:
            negative = re.sub(r"([^.]+)$", r"no-\1", flag[2:])
            return f"{written} is {' '.join(values)}; write {flag} or --{negative} without a value"
        if not values:
            return f"{written} has no value; it must be {_words(hint)}"
        return f"{written} is {' '.join(values)}; it must be {_words(hint)}"
    return "the command line is not understood; see --help"


def _parses(config_class: type, arguments: list[str]) -> bool:
    import tyro

    with contextlib.redirect_stderr(io.StringIO()):
        try:
            tyro.cli(config_class, args=arguments)
        except SystemExit:
            return False
    return True


def _options(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every flag of a configuration with the type of its value."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _options(hint, f"{prefix}{field.name}.")
        else:
            yield _flag(prefix + field.name), hint


def _suggestion(flag: str, known: typing.Iterable[str]) -> str:
    closest = difflib.get_close_matches(flag, known, n=1)
    return f"did you mean {closest[0]}?" if closest else "see --help for all options"


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is tuple:
        each = dict.fromkeys(_words(argument) for argument in arguments if argument is not ...)
        count = "values" if ... in arguments else f"{len(arguments)} values"
        return f"{count} separated by spaces, each {' or '.join(each)}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")


def _program() -> str | None:
    """`python -m experiments.name` when started so; otherwise the default, the script's path."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def _is_ours(error: Exception) -> bool:
    """Whether this library raised `error` itself, as one line, to tell the user something."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or "\n" in str(error):
        return False
    module = traceback.tb_frame.f_globals.get("__name__", "")
    return module.split(".")[0] in _OWN_PACKAGES


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

"""The command line: `mistudio VERB …`, a skin over the table of verbs.

Results go to standard output, progress and warnings to standard error. Exit codes: 0 done, 1 done in part (a set of
downloads with failures), 2 a mistake that the message says how to put right, 130 interrupted.
"""

import argparse
import dataclasses
import difflib
import errno
import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

import tyro
from rich.console import Console

from mistudio import __version__
from mistudio.config import from_dict, read_plain, to_dict
from mistudio.errors import ConfigError, MistudioError
from mistudio.studio import VERBS, Verb, load_verb

PIPED_WIDTH = 120
"""Columns of the tables where standard output is no terminal."""

OF_THE_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)
"""Errors of the system that the user can put right, wherever they come up."""


def main(argv: list[str] | None = None) -> None:
    """Runs one verb and exits."""
    arguments = sys.argv[1:] if argv is None else argv
    _log_to_stderr()
    try:
        _run(arguments)
    except MistudioError as error:
        print(f"mistudio: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        print(
            f"mistudio: {error.filename or 'A file'} cannot be read or written: {error.strerror}. Put that right (the "
            "path, room on the disk, permissions), then run this again; what takes long goes on with --resume.",
            file=sys.stderr,
        )
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_too_little_memory(error):
            raise
        print(
            f"mistudio: There is too little memory: {_first_line(error)}. Ask for less at a time (rows, context, "
            "width, buffer).",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt as stop:  # Ctrl-C has no words; what was being written may say how far it came
        print(f"mistudio: {str(stop) or 'interrupted.'}", file=sys.stderr)
        sys.exit(130)


def _is_too_little_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether it is Python's, numpy's or torch's; on a CPU torch's has no class of its own."""
    named = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return named or isinstance(error, MemoryError)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if (group := _group(arguments[0])) and arguments[1:] in (["-h"], ["--help"]):
        print(_listed(group))
        return
    if arguments[0] == "--version":
        print(f"mistudio {__version__}")
        return
    name, rest = _verb_name(arguments)
    verb = load_verb(name)
    config, as_json = parse(verb, rest)
    result = verb.run(config)
    if (
        os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ
    ):  # of torchrun's processes the first one speaks
        return
    if as_json:
        print(json.dumps(to_dict(result), indent=2, allow_nan=False))
    else:
        width = None if sys.stdout.isatty() else PIPED_WIDTH
        Console(width=width).print(verb.show(result), highlight=False)
    if verb.failed and verb.failed(result):
        sys.exit(1)


def _verb_name(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and what comes after it. ConfigError: there is none of that name."""
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in VERBS:
            return name, arguments[words:]
    group = _group(arguments[0])
    typed = " ".join(arguments[:2]) if group and len(arguments) > 1 else arguments[0]
    near = difflib.get_close_matches(typed, group or VERBS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"There is no verb {typed!r}.{hint} The verbs are {', '.join(group or VERBS)}.")


def _group(word: str) -> list[str]:
    """The verbs of two words that begin with this one."""
    return [verb for verb in VERBS if verb.startswith(f"{word} ")]


def _listed(verbs: Iterable[str]) -> str:
    return "\n".join(f"  {name:<14} {VERBS[name]}" for name in verbs)


def _log_to_stderr() -> None:
    """What mistudio chose or noticed, a line each; other packages' loggers stay as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("mistudio: %(message)s"))
    logger = logging.getLogger("mistudio")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _overview() -> str:
    return (
        f"mistudio {__version__}: sparse autoencoders for language models, from activations to steering\n\n"
        f"usage: mistudio VERB [flags]\n\n{_listed(VERBS)}\n\n"
        "Every verb: --help says what each flag means, --config FILE.yaml gives settings that flags override,\n"
        "--json prints the result for machines. Start with: mistudio demo"
    )


def parse(verb: Verb, arguments: list[str]) -> tuple[Any, bool]:
    """The verb's config: its defaults, under the file of --config, under the flags; and whether --json was given.

    ConfigError: the file is missing, does not parse or has an unknown key; there is no such --recipe; a refused value.
    SystemExit with code 2, after a message: an unknown flag, a missing one, or a value of another type.
    """
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--config", type=Path)
    common.add_argument("--json", action="store_true")
    if verb.default:
        common.add_argument("--recipe")
    known, rest = common.parse_known_args(arguments)
    start = verb.default(known.recipe) if verb.default and known.recipe else {}
    given = read_plain(known.config) if known.config else {}
    if not isinstance(given, dict):
        raise ConfigError(f"{known.config} must hold a mapping of settings, not {given!r}.")
    config = tyro.cli(
        verb.config,
        prog=f"mistudio {verb.name}",
        description=f"{VERBS[verb.name][0].upper()}{VERBS[verb.name][1:]}.",
        args=rest,
        default=_defaults(verb.config, start, given, str(known.config)),
    )
    return config, known.json


def _defaults(cls: type, start: dict[str, Any], given: dict[str, Any], source: str) -> Any:
    """An instance with `given` over `start` over the class's defaults, and tyro.MISSING where there is nothing.

    It is not checked, because it may be incomplete; the instance that tyro makes from it and the flags is.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - set(fields)):
        raise ConfigError(f"{source}: unknown key {', '.join(unknown)}; the choices are {', '.join(fields)}")
    hints = get_type_hints(cls)
    instance: Any = object.__new__(cls)
    for name, field in fields.items():
        value = start.get(name, _field_default(field))
        if value is tyro.MISSING and dataclasses.is_dataclass(hints[name]):
            value = _defaults(hints[name], {}, {}, source)
        if name in given:
            over = given[name]
            merged = {**to_dict(value), **over} if isinstance(over, dict) and dataclasses.is_dataclass(value) else over
            value = from_dict(hints[name], merged, source=f"{source}: {name}")
        object.__setattr__(instance, name, value)
    return instance


def _field_default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return tyro.MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()


if __name__ == "__main__":
    main()

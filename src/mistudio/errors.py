"""The exception tree. Whatever a user can cause is a `MistudioError`; the command line prints it and ends with its
`exit_code`.

    MistudioError
    ├── ConfigError     a recipe, a flag or a configuration file is wrong
    ├── TextError       the text cannot be read: file, folder, column, data set
    ├── ModelError      the language model, its family or a site of it
    ├── EditError       an edit of the forward pass raised, or never fired
    ├── StoreError      an activation store is missing, unfinished, damaged or holds non-finite rows
    ├── SAEError        an SAE's files, shapes or units
    ├── HubError        a released SAE: its name, its download, its file
    └── TrainError      a training run cannot start, go on or be resumed

A message says what was found, what was expected, and what to type.
"""

from typing import ClassVar


class MistudioError(Exception):
    """Something the user can put right; the message says how."""

    exit_code: ClassVar[int] = 2
    """What the command line ends with."""


class ConfigError(MistudioError):
    """A recipe, a flag or a configuration file is wrong."""


class TextError(MistudioError):
    """The text cannot be read: a file, folder, column or data set."""


class ModelError(MistudioError):
    """The language model, its family or a site of it cannot be used."""


class EditError(MistudioError):
    """An edit of the forward pass raised, or never fired."""


class StoreError(MistudioError):
    """An activation store is missing, unfinished, damaged, or holds non-finite rows."""


class SAEError(MistudioError):
    """An SAE's files, shapes or units are not what they must be."""


class TrainError(MistudioError):
    """A training run cannot start, go on or be resumed."""


class HubError(MistudioError):
    """A released SAE cannot be named, fetched or trusted: no such name, no access, or not the file it should be."""

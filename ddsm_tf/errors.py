"""Errors that a user can mend, each one line long."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The message names the argument, its value, the rule and the remedy."""


class ForeseenFailure(RuntimeError):
    """Something outside failed, not the input. The message is whole: what happened, the remedy."""


class MissingExtraError(ImportError):
    """An optional dependency is absent. The message names the pip command that brings it."""


# The extra that brings a library, for those whose absence a command meets where it imports them.
EXTRAS = {
    "ai_edge_litert": "export",
    "ai_edge_quantizer": "export",
    "jinja2": "train",
    "keras": "train",
    "keras_tuner": "train",
    "matplotlib": "train",
    "pymoo": "train",
    "tensorflow": "train",
    "tqdm": "train",
}


def invalid(argument: str, value: object, rule: str) -> InputError:
    """Build an `InputError` that reads "`argument` (=value) rule".

    Args:
        argument: name of the argument, field or file entry at fault.
        value: what was given; long values are shortened.
        rule: what must hold and, where it helps, how to get there.
    """
    shown = repr(value)
    if len(shown) > 120:
        shown = f"{shown[:100]}… {len(shown)} characters"
    return InputError(f"`{argument}` (={shown}) {rule}")


def missing_extra(module: str, extra: str) -> MissingExtraError:
    """Build the error for a module that only an extra installs."""
    return MissingExtraError(f"{module} is not installed; run: pip install 'ddsm_tf[{extra}]'")

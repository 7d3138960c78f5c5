"""The `ddsm` command: exit codes and one-line errors around `ddsm_tf.commands`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ddsm_tf.console import BAD_INPUT, DONE, FAILED, run_safely, say
from ddsm_tf.errors import InputError, missing_extra

try:
    import click
except ImportError:
    click = None
else:
    from ddsm_tf.commands import ddsm

PROGRAM = "ddsm"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failure, 2 bad input, 130 interrupted."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Every error is one line on stderr."""
    if click is None:
        return say(PROGRAM, str(missing_extra("click", "train")), FAILED)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return run_safely(PROGRAM, lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    try:
        # Not `ddsm.main`, which turns an interrupt into one without its message.
        with ddsm.make_context(PROGRAM, arguments) as context:
            ddsm.invoke(context)
        return DONE
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        return BAD_INPUT
    except click.ClickException as error:
        raise InputError(error.format_message()) from error


if __name__ == "__main__":
    main()

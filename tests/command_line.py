"""The command line, called in this process."""

from mistudio import cli


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of `mistudio ARGUMENTS`."""
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err

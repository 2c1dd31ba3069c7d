"""Every option of a run: declared once in a group's dataclass, read from the command line and --config_file."""

from library.options.command_line import CommandLine, parse, read_command_line, read_training
from library.options.groups import GROUPS, Options, public_values

__all__ = ["GROUPS", "CommandLine", "Options", "parse", "public_values", "read_command_line", "read_training"]

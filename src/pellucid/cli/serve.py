"""`pellucid serve`: a model over HTTP."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pellucid.server.options import Option

DESCRIPTION = """
Serve a model over HTTP, in the form of the OpenAI API (and of Anthropic's at /v1/messages): clients need another base
URL and nothing else. It listens at once, and fetches and loads the model meanwhile; /ready tells how far it is. Ctrl-C
or SIGTERM ends it: requests that were begun are finished first, and a second one aborts them.

Each option has a variable in the environment, PELLUCID_SERVE_ and its name (PELLUCID_SERVE_PORT; lists with commas:
PELLUCID_SERVE_API_KEYS), and a key in the file of --config (port, api_keys). Options win over the environment, and that
over the file. Sizes may have units: 512KiB, 2GB.
"""

EXAMPLES = """
pellucid serve
pellucid serve gemma-3-270m --port 8080 --served-model-name gemma
pellucid serve --api-key-file ~/.config/pellucid/keys --host 0.0.0.0
pellucid serve --config serve.toml --print-config
PELLUCID_SERVE_LOG_FORMAT=json pellucid serve
"""


def configure(parser: argparse.ArgumentParser) -> None:
    from pellucid.server.options import GROUPS

    parser.usage = "%(prog)s [options] [MODEL]"
    parser.add_argument("--config", metavar="FILE", help="a TOML file with options (or PELLUCID_SERVE_CONFIG)")
    parser.add_argument(
        "--print-config", action="store_true", help="print all options with their values and origins, and end"
    )
    for heading, options in GROUPS.items():
        group = parser.add_argument_group(heading)
        for option in options:
            _add(group, option)


def run(args: argparse.Namespace) -> int:
    from pellucid.server.config import resolve
    from pellucid.server.options import OPTIONS

    flags = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    config = resolve(flags, os.environ, args.config)
    if args.print_config:
        print(config.as_toml())
        return 0
    from pellucid.server.run import serve

    return serve(config)


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    if option.name == "model":
        group.add_argument("model", nargs="?", metavar=option.metavar, help=_help(option))
    elif option.metavar is None:
        group.add_argument(
            option.flag, dest=option.name, action=argparse.BooleanOptionalAction, default=None, help=_help(option)
        )
    else:
        action = "append" if option.singular else "store"
        group.add_argument(option.flag, dest=option.name, action=action, metavar=option.metavar, help=_help(option))


def _help(option: Option) -> str:
    default = default_of(option)
    return option.help if default is None else f"{option.help} (default: {default})"


def default_of(option: Option) -> str | None:
    """The default of an option, as one would write it; None where there is none to write, or its help tells it."""
    from pellucid.server.options import DEFAULTS, NONE

    default = DEFAULTS.get(option.name)
    if "default:" in option.help or option.singular or option.name not in DEFAULTS:
        return None
    if default is None:
        return NONE
    if isinstance(default, bool):
        return "yes" if default else "no"
    if option.metavar == "SIZE":
        return f"{default // 2**20}MiB" if default % 2**20 == 0 else f"{default // 2**10}KiB"
    return f"{default:g}" if isinstance(default, float) else str(default)

"""The root command.  It gathers the commands, and only here exceptions become messages and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Final

import click

from migrated import __version__
from migrated.cli import failure
from migrated.cli.certificates import certificates
from migrated.cli.configuration import config
from migrated.cli.daemons import helper, source, target
from migrated.cli.demo import demo
from migrated.cli.evacuate import evacuate
from migrated.cli.guests import guests
from migrated.cli.history import logs, report
from migrated.cli.host import check, inspect
from migrated.cli.migrations import VERBS
from migrated.cli.plan import plan
from migrated.errors import MigratedError

_EPILOG: Final = "Exit codes: 0 done, 1 failed, 2 usage, 3 aborted, 124 timed out, 130 interrupted."


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(__version__, prog_name="migrated", message="%(prog)s %(version)s")
@click.option(
    "--agent", metavar="PATH|URL", envvar="MIGRATED_AGENT", help="Agent to talk to, for the verbs that need one."
)
@click.pass_context
def root(context: click.Context, agent: str | None) -> None:
    """Move running guests' memory between hosts, outside the VMM, over huge pages."""
    context.obj = agent


for command in (
    source,
    target,
    helper,
    plan,
    *VERBS,
    report,
    logs,
    evacuate,
    guests,
    check,
    config,
    inspect,
    certificates,
    demo,
):
    root.add_command(command)


def run(arguments: list[str] | None = None) -> int:
    """Run ``arguments`` (default: the process's) and return the exit code.  Never raise and never show a traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    try:
        code = root.main(args=given, prog_name="migrated", standalone_mode=False)
    except click.Abort:
        print("interrupted", file=sys.stderr)
        return failure.INTERRUPTED
    except KeyboardInterrupt:
        return failure.INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return failure.USAGE
    except (MigratedError, click.ClickException) as error:
        failure.tell(error, as_json=as_json)
        return failure.exit_code_of_error(error)
    except BrokenPipeError:
        # Our reader (head, less) has exited.  Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failure.DONE
    except Exception as error:  # noqa: BLE001 - no traceback ever reaches a user who did not ask
        failure.tell(error, as_json=as_json)
        if os.environ.get("MIGRATED_DEBUG"):
            traceback.print_exc()
        else:
            print("  set MIGRATED_DEBUG=1 to see where", file=sys.stderr)
        return failure.FAILED
    return code if isinstance(code, int) else failure.DONE

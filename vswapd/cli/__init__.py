# SPDX-License-Identifier: MIT
"""cli — vswapctl: the parser; one file per verb does the work.

Starts in a few ms: standard library only, and each verb's module is imported when it is asked for
(tests/unit/test_startup.py). Whatever goes wrong ends in one line on stderr and exit status 2 (wrong
usage) or 1.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys

from vswapd import __version__, config
from vswapd.failure import STATUS_USAGE, Failure
from vswapd.sizes import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """Errors in one line, instead of usage and error in several."""

    def error(self, message: str) -> NoReturn:
        wrong, choices, names = message.partition(" (choose from ")
        if choices:
            import difflib

            value = wrong.rpartition("invalid choice: ")[2].strip("'")
            close = difflib.get_close_matches(value, re.findall(r"[\w-]+", names), 1)
            message = f"{wrong}, did you mean '{close[0]}'?" if close else message
        raise Failure(message, f"see {self.prog} --help", STATUS_USAGE)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1 << 22):
        raise argparse.ArgumentTypeError(f"'{text}' is not a PID")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds up to 3600")
    return value


def _interval(text: str) -> float:
    seconds = _seconds(text)
    if seconds < 0.1:
        raise argparse.ArgumentTypeError(f"'{text}' is too often; give at least 0.1")
    return seconds


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit",
        type=_size,
        metavar="SIZE",
        help="RAM that the command and all it starts may cost: resident, compressed pool and metadata "
        "(default: 80%% of the available RAM; at least 16M)",
    )
    parser.add_argument(
        "--group",
        metavar="NAME",
        help="run in this group of the daemon's configuration, within its limit (instead of --limit)",
    )
    parser.add_argument(
        "--pool", type=_size, metavar="SIZE", help="cap the compressed pool's part of it (default: adapts)"
    )
    parser.add_argument(
        "--spill",
        action="append",
        default=[],
        metavar="PATH[:SIZE]",
        help="swap to this file or block device; repeat for more, in order of preference "
        "(default: a private sparse file in $VSWAPD_SPILL_DIR or /var/tmp)",
    )
    parser.add_argument("--no-spill", action="store_true", help="RAM only: running out of it is a clear end")
    parser.add_argument(
        "--encrypt", action="store_true", help="encrypt what is swapped to disk, under a key that is only in memory"
    )
    parser.add_argument("--no-recompress", action="store_true", help="do not compress old pages again, with zstd")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--socket",
        metavar="PATH",
        help="use the daemon that listens there (default: $VSWAPD_SOCKET or /run/vswapd/vswapd.sock "
        "if it answers, else a private one)",
    )
    where.add_argument(
        "--private", action="store_true", help="use a private daemon for the life of the command"
    )
    parser.add_argument(
        "--stats",
        metavar="FILE",
        help="write status as JSON at the end, with exit status, peak usage and time",
    )
    parser.add_argument(
        "--torture",
        action="store_true",
        help="evict random runs of pages all the time, whatever the limit (for tests)",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="COMMAND", help="the program and its arguments"
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="everything, as one JSON object")
    how.add_argument(
        "--watch",
        nargs="?",
        const=2.0,
        type=_interval,
        metavar="SECONDS",
        help="again and again, until interrupted (default: every 2 s)",
    )


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="look so often (default: every 1 s)",
    )


def _add_pid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pid", type=_pid, metavar="PID", help="a managed process")


def _add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="wait no longer (default 60)"
    )
    _add_pid(parser)


def _add_detach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="all that the daemon serves")
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="wait no longer, for each (default 60)"
    )
    parser.add_argument("pid", nargs="?", type=_pid, metavar="PID", help="a managed process")


_ON_OFF = ("on", "off")


def _add_limit(parser: argparse.ArgumentParser) -> None:
    _add_pid(parser)
    parser.add_argument(
        "size",
        type=_size,
        nargs="?",
        metavar="SIZE",
        help="new limit of all processes that share one with it (default: as it is)",
    )
    parser.add_argument("--pool", type=_size, metavar="SIZE", help="cap its compressed pool; 0: adapt")
    parser.add_argument("--spill", type=_size, metavar="SIZE", help="most that it takes on backends; 0: no limit")
    parser.add_argument("--writeback", choices=_ON_OFF, help="write its pages to backends when its pool is full")
    parser.add_argument("--recompress", choices=_ON_OFF, help="compress its old pages again, with zstd")


def _add_attach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit",
        type=_size,
        metavar="SIZE",
        help="RAM that the process may cost: resident, compressed pool and metadata "
        "(default: 80%% of what it has and is available)",
    )
    parser.add_argument("pid", type=_pid, metavar="PID", help="a running process")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "program", nargs="?", metavar="PROGRAM", help="look also at this program: whether it can be managed"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("check", "show", "example"),
        metavar="ACTION",
        help="check: name every mistake; show: what is in force and where it was set; "
        "example: a file with every key, to begin with",
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="with its drop-ins FILE.d/*.conf (default: /etc/vswapd/vswapd.conf, if it is there)",
    )


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), metavar="SHELL", help="bash or zsh")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=_seconds, default=16.0, metavar="SECONDS", help="watch it for so long (default 16)"
    )
    parser.add_argument(
        "--room",
        type=_size,
        action="append",
        metavar="SIZE",
        help="say what it would cost to leave room for so much; repeat for more (default: 3/4, 1/2 and 1/4)",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("pid", type=_pid, metavar="PID", help="any process")


def _add_install_service(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="/", metavar="DIR", help="install below this directory (default: /)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--no-start", action="store_true", help="put the files in place, and start nothing")
    parser.add_argument("--uninstall", action="store_true", help="remove all that nobody has changed")


def _priority(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 1 << 20
    if not -config.PRIORITY_MAX - 1 <= value <= config.PRIORITY_MAX:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from -32768 to 32767")
    return value


def _add_swapon(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=_size, default=0, metavar="SIZE", help="use so much of it (default: as fits)"
    )
    parser.add_argument(
        "-p",
        "--priority",
        type=_priority,
        metavar="N",
        help="higher is written to first, equal ones at the same time (default: below all others)",
    )
    parser.add_argument(
        "--rate", type=_size, default=0, metavar="SIZE", help="write back so much a second at most (default: no limit)"
    )
    parser.add_argument(
        "-d", "--discard", action="store_true", help="discard freed segments of a device (files are always punched)"
    )
    parser.add_argument(
        "--encrypt", action="store_true", help="encrypt what is written to it, under a key that is only in memory"
    )
    parser.add_argument("path", metavar="PATH", help="a file, made if absent, or a block device")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="progress and result as JSON, one object a line")


def _add_swapoff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="all spill files and devices")
    parser.add_argument(
        "--force", action="store_true", help="begin even if there is not room for all, and wait for room"
    )
    _add_json(parser)
    parser.add_argument("path", nargs="?", metavar="PATH", help="a spill file or device in use")


def _add_compact(parser: argparse.ArgumentParser) -> None:
    _add_json(parser)
    parser.add_argument("path", metavar="PATH", help="a spill file or device in use")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("path", metavar="PATH", help="a spill file or device, in use or not; it is only read")


_VERBS = {
    "run": (_add_run, "run a command inside a memory limit", "vswapctl run --limit 2G -- python3 job.py"),
    "status": (_add_status, "show where the memory is", "vswapctl status --json"),
    "top": (_add_top, "watch where the memory is, and change limits", "vswapctl top"),
    "swaps": (lambda _: None, "list spill files and devices like /proc/swaps", "vswapctl swaps"),
    "pageout": (_add_page, "swap out all of a process that can be", "vswapctl pageout 4711"),
    "pagein": (_add_page, "bring all of a process back", "vswapctl pagein 4711"),
    "swapon": (_add_swapon, "add a spill file or device", "vswapctl swapon /mnt/fast/spill --size 64G"),
    "swapoff": (_add_swapoff, "empty and remove a spill file or device", "vswapctl swapoff /mnt/fast/spill"),
    "compact": (_add_compact, "give unused space of a spill file back", "vswapctl compact /mnt/fast/spill"),
    "check": (_add_check, "look for damage in a spill file or device", "vswapctl check /mnt/fast/spill"),
    "limit": (_add_limit, "change a running command's limit", "vswapctl limit 4711 1.5GiB"),
    "attach": (_add_attach, "manage a process that runs already", "vswapctl attach --limit 2G 4711"),
    "detach": (_add_detach, "bring all of a process back and let it go", "vswapctl detach 4711"),
    "report": (_add_report, "say what a limit would cost a process", "vswapctl report --seconds 60 4711"),
    "upgrade": (lambda _: None, "have the installed version take over", "vswapctl upgrade"),
    "config": (_add_config, "check or show vswapd.conf", "vswapctl config check"),
    "completion": (_add_completion, "print a completion script", "vswapctl completion bash"),
    "install-service": (
        _add_install_service,
        "install the daemon as a service of systemd, and start it",
        "vswapctl install-service --dry-run",
    ),
    "doctor": (_add_doctor, "check this machine and explain what it lacks", "vswapctl doctor ./program"),
}


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="vswapctl",
        description="Run programs inside a memory limit, with swap in user space.",
        epilog="example: vswapctl run --limit 2G -- sort -S 8G big.txt",
    )
    parser.add_argument("--version", action="version", version=f"vswapctl {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, (add_arguments, summary, example) in _VERBS.items():
        verb = verbs.add_parser(
            name, help=summary, description=summary, epilog=f"example: {example}", allow_abbrev=False
        )
        if name == "run":  # argparse has no words for "the rest is the command's"
            verb.usage = "vswapctl run [OPTIONS] -- COMMAND [ARGUMENT...]"
        add_arguments(verb)
        if name not in ("run", "config", "completion", "install-service", "report"):
            verb.add_argument(
                "--socket",
                metavar="PATH",
                help="ask the daemon that listens there (default: the system's, else the only private one)",
            )
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. What follows the first `--` is the command's, untouched."""
    before, rest = list(arguments), []
    if "--" in before:
        cut = before.index("--")
        before, rest = before[:cut], before[cut:]
    options = make_parser().parse_args(before)
    if rest and options.verb != "run":
        raise Failure(
            f"'--' means nothing to {options.verb}", f"see vswapctl {options.verb} --help", STATUS_USAGE
        )
    if options.verb == "run":
        # `run sh -c … -- x`: the command began before the `--`, which is then its own.
        options.command += rest if options.command else rest[1:]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """`vswapctl`."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        verb = importlib.import_module(f"vswapd.cli.{options.verb.replace('-', '_')}")
        return int(verb.main(options))
    except Failure as error:
        # One line, whatever names the user gave.
        print("vswapctl:", " ".join(str(error).split("\n")), file=sys.stderr)
        return error.status
    except BrokenPipeError:
        return 1  # `vswapctl status | head`
    except KeyboardInterrupt:
        return 130

"""Carry out the runs of a profile without Jupyter, say how long they take, and merge records.

    python -m apbm_core.study.grid --profile gpu --minutes 25 seeds=[0]      train what is not recorded, 25 minutes long
    python -m apbm_core.study.grid plan --profile gpu                        what there is to do, and how long it takes
    python -m apbm_core.study.grid plan --profile gpu --cards 1 8 64         likewise on cards that are not here
    python -m apbm_core.study.grid merge results/own/gpu elsewhere/gpu       add the second's records to the first

Exit codes: 0 everything is recorded; 75 stopped where it can go on, by its minutes or by SIGTERM: give the same command
again; 1 an error that the message says how to mend; 130 interrupted.
"""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apbm_core.errors import ApbmError
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.merge import merge
from apbm_core.study.grid.paper import estimate as on_paper
from apbm_core.study.grid.profiles import (
    lay_over,
    load_profile,
    parse_assignments,
    parse_with_assignments,
    repository,
)
from apbm_core.study.grid.work import Work
from apbm_core.study.records import OWN
from apbm_core.study.training import stopping

_COMMANDS = ("run", "plan", "merge")


def open_study(profile: str, results: str | Path, values: Mapping[str, Any]) -> Study:
    """The study of a profile with ``values`` laid over it, in ``<results>/<profile>``.

    Raises:
        ConfigError: an unknown profile or parameter, or a value that is impossible.
    """
    root = repository() or Path.cwd()
    parameters = lay_over(load_profile(root, profile), values).parameters
    return Study(parameters, root / results / profile, records_only=False)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options; argparse ends the program when they make no sense."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in (*_COMMANDS, "-h", "--help"):
        arguments.insert(0, "run")
    parser = argparse.ArgumentParser(
        prog="python -m apbm_core.study.grid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "carry out what has no record yet"),
        ("plan", "say what that is, and how long it takes"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--profile", default="quick", help="a file in notebooks/profiles (default: %(default)s)")
        command.add_argument("--results", default=OWN, help="folder for the results (default: %(default)s)")
        command.add_argument("more", metavar="NAME=VALUE", nargs="*", help="the study's parameters; values are YAML")
        if name == "run":
            command.add_argument("--minutes", type=float, help="stop after so long, where it can go on")
        else:
            text = "say what the whole grid would take on so many cards that are not here, from counts on paper"
            command.add_argument("--cards", type=int, nargs="+", metavar="N", default=[], help=text)
    command = commands.add_parser("merge", help="add the records of other folders to the first", allow_abbrev=False)
    command.add_argument("into", help="a folder results/<profile>")
    command.add_argument("sources", nargs="+", help="others of its kind")
    return parse_with_assignments(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, stopping.ask)
    try:
        if options.command == "merge":
            added = merge(options.into, options.sources)
            print(f"{len(added)} records added to {options.into}.")
            return 0
        values = parse_assignments(options.more)
        if getattr(options, "minutes", None) is not None:
            values["minutes"] = options.minutes
        study = open_study(options.profile, options.results, values)
        if options.command == "plan" and options.cards:
            print(on_paper(study.configs(), "equal-time" in study.parameters.schedules).words(options.cards))
            return 0
        if options.command == "plan":
            print(Work(study).plan())
            return 0
        records = study.run()
        print(f"All {len(records)} runs are recorded in {study.results.path}.")
        return 0
    except stopping.Stopped as stop:
        print(stop, file=sys.stderr)
        return stopping.GO_ON
    except ApbmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoints.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""``python -m apbm_core.study.ablation``: single variants, beds and seeds of the ablation, trained and listed.

The whole of it, with its pages, is ``make reproduce PROFILE=ablation``.
"""

import argparse
import sys
from collections.abc import Sequence

from apbm_core.errors import ApbmError
from apbm_core.study.ablation import design, tables
from apbm_core.study.ablation.variants import VARIANTS
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.records import PUBLISHED_RESULTS


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 for an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m apbm_core.study.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--bed", default="resnet20", help=f"where to compare: {', '.join(design.BEDS)}")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), metavar="NAME", help="all by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(design.SEEDS), metavar="SEED")
    parser.add_argument("--folder", default=f"{PUBLISHED_RESULTS}/{design.FOLDER}", help="where the records are")
    given = parser.parse_args(arguments)
    try:
        wanted = design.configs(given.bed, given.variants, given.seeds)
        parameters = StudyParameters.parse(design.BEDS[given.bed] | {"split": "tuning"})
        design.run(Study(parameters, given.folder), wanted)
        print(tables.variants(design.recorded(given.folder, given.bed)).round(2).to_string(index=False))
    except ApbmError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

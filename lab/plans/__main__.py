"""Plans: the best images for a budget.

    python -m lab.plans search      find the plan of a model for a budget
    python -m lab.plans learn       improve plans, or steps without caching, by gradient
    python -m lab.plans transfer    write a plan of one model for another
"""

import sys

from lab.plans.learn import learn
from lab.plans.plans import transfer
from lab.plans.search import search
from run import arguments
from run.cli import command
from unet_caching.errors import UserError


@command
def main() -> None:
    verb, words = (sys.argv[1:] or [""])[0], sys.argv[2:]
    if verb in ("search", "learn"):
        (search if verb == "search" else learn)(words)
    elif verb == "transfer":
        arguments.call(transfer, words, "python -m lab.plans transfer")
    elif verb in ("-h", "--help"):
        print(__doc__)
    else:
        raise UserError("name what to do: search, learn or transfer (each has a --help)")


if __name__ == "__main__":
    main()

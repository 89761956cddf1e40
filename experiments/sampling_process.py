"""Sample commands one after another in one process, which starts and imports once; their words as JSON on stdin."""

import importlib
import json
import sys


def main() -> None:
    for module, *words in json.load(sys.stdin):
        sys.argv = [module, *words]
        importlib.import_module(module).main()


if __name__ == "__main__":
    main()

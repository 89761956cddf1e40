"""Sample commands one after another in one process, which starts and imports once; their words as JSON on a line of
stdin. The process ends with the one that started it: when stdin is closed."""

import importlib
import json
import os
import sys
import threading


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)      # not sys.stdin.read: its lock would be missed when the interpreter ends
    os._exit(1)             # images appear whole or not at all, and the same command goes on


def main() -> None:
    lines = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for module, *words in lines:
        sys.argv = [module, *words]
        importlib.import_module(module).main()


if __name__ == "__main__":
    main()

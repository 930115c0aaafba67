"""The program of a child process: `python -P .../sg_local/child.py FUNCTION FD`, started by child_process.py alone."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

if __name__ == "__main__":
    # The very package that this file lies in: a checkout need not be installed, or another version of it may be. By
    # sys.path, what lies beside the package could hide other modules.
    spec = PathFinder.find_spec("sg_local", [str(Path(__file__).resolve().parents[1])])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["sg_local"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)

    from sg_local.child_process import serve

    sys.exit(serve(sys.argv[1], int(sys.argv[2])))

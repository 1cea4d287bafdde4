"""Read every small model of one library with the version that is installed, and print the outcomes as JSON.

    python -m benchmarks.versions LIBRARY          see `make matrix`, which does it for many versions

An outcome is "read" (T u is the library's own output, and `describe` said so before), "skipped" with the reason of
`describe` or of the reading, "absent" where this version has no such layer or cannot run the small model, or "wrong".
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from importlib.metadata import version

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it on import, and any library may import triton first

import torch

from benchmarks.layers import CASES, Case, NotReadError, measure
from ess_monitor.capture import find_layers, layer_infos
from ess_monitor.errors import format_error


def outcome(case: Case) -> tuple[str, str]:
    """Return what became of a case, and the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.random.fork_rng(devices=()):
                model, args, kwargs = case.build()
            model.train(case.modes[0] == "train")(*args, **kwargs)
        except Exception as error:
            return "absent", format_error(error)
    if not any(type(module).__name__ == case.layer for module in model.modules()):
        return "absent", f"no {case.layer} in the model"
    if not any(type(layer.module).__name__ == case.layer for layer in find_layers(model)):
        infos = [info for info in layer_infos(model) if info.module.rpartition(".")[2] == case.layer]
        return ("skipped", str(infos[0].reason)) if infos else ("wrong", "it is in no row of describe")
    try:
        rows = [measure(case, mode) for mode in case.modes]
    except NotReadError as error:
        return "skipped", str(error)
    except Exception as error:
        return "wrong", format_error(error)
    if any(row.described != row.measured for row in rows):
        return "wrong", f"described {rows[0].described}, measured {rows[0].measured}"
    error = max(row.error for row in rows)
    return ("read", "") if error < case.tolerance else ("wrong", f"T u differs by {error:.1e}")


def main() -> int:
    """Print one line of JSON: version, and outcome and reason of every case."""
    library = sys.argv[1]
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the libraries warn about each missing kernel
    cases = [case for case in CASES if case.library == library]
    importlib.import_module(cases[0].package)
    layers = {case.name.removeprefix(f"{library} "): outcome(case) for case in cases}
    print(json.dumps({"version": version(library), "layers": layers}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

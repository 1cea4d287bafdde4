"""Updates the script that report pages carry: `python .ci/plotly.py [VERSION]`, by default the one in use.

It is the bundle of plotly.js with lines, bars and heat maps, from the npm registry, which checks its hash. Afterwards
run tests/report and look at a page; a new major version of plotly.js also raises plotly's in pyproject.toml.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "plotly.js-cartesian-dist-min"
FOLDER = Path(__file__).parents[1] / "ess_monitor" / "report" / "templates"
SCRIPT = FOLDER / "plotly.min.js"


def version() -> str:
    """Return the version in use."""
    found = re.search(r"plotly\.js \(cartesian - minified\) v([\d.]+)", SCRIPT.read_text(encoding="utf-8")[:500])
    assert found is not None, f"{SCRIPT} is not the script of {PACKAGE}"
    return found[1]


def main() -> None:
    """Download one version and replace script and license."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else version()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", f"{PACKAGE}@{wanted}"], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as files:
            for name, path in (("plotly-cartesian.min.js", SCRIPT), ("LICENSE", FOLDER / "plotly.LICENSE")):
                member = files.extractfile(f"package/{name}")
                assert member is not None
                path.write_bytes(member.read())
    print(f"plotly.js {version()}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""FuseSoC generator: the engine's Verilog and its SystemVerilog package.

FuseSoC gives it the path of a YAML file, which holds ``vlnv``, ``files_root`` and ``parameters``
(``preset`` or ``config``, a file of the core that asks; ``settings``, a list of ``field=value``).
It writes the sources and a core file that names them into the current folder. The stmoe command
comes from the Python environment that FuseSoC runs in.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

CORE = """CAPI=2:
name: {vlnv}
filesets:
  rtl:
    files:
      - stmoe_engine_pkg.sv: {{file_type: systemVerilogSource}}
      - stmoe_engine.v: {{file_type: verilogSource}}
targets:
  default:
    filesets: [rtl]
"""


def main(path: str) -> int:
    """Write the sources; the exit status is that of ``stmoe generate``."""
    request = yaml.safe_load(Path(path).read_text())
    parameters = request.get("parameters") or {}
    unknown = sorted(set(parameters) - {"preset", "config", "settings"})
    if unknown:
        print(f"stmoe: no such parameter: {', '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        from stmoe.cli import main as stmoe
    except ImportError:
        print(f"stmoe: not installed for {sys.executable}: pip install stmoe", file=sys.stderr)
        return 2
    if "config" in parameters:
        source = ["--config", str(Path(request["files_root"]) / parameters["config"])]
    else:
        source = ["--preset", str(parameters.get("preset", "tiny"))]
    settings = [word for text in parameters.get("settings", []) for word in ("--set", str(text))]
    files = ["-o", "stmoe_engine.v", "--sv-package", "stmoe_engine_pkg.sv"]
    status = stmoe(["generate", *source, *settings, *files])
    if status == 0:
        Path("stmoe_engine.core").write_text(CORE.format(vlnv=request["vlnv"]))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

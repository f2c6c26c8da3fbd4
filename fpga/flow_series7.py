# SPDX-License-Identifier: Apache-2.0
"""7 series: Vivado to the bitstream where it is installed; a project and Yosys's count where not.

There is no 7 series place and route on PyPI, so without Vivado the flow ends in everything that
another machine needs: the Verilog, constraints, Tcl and build script of a Vivado project, and
the netlist and script for openXC7's nextpnr-xilinx.
"""

from __future__ import annotations

import json
import re
import shlex

from amaranth.vendor import XilinxPlatform

from fpga.flow import HIDE_FIELDS, NAME, Job, NoBitstream, TimingFailed, first_error
from fpga.tools import Tool, ToolFailed, find, run
from fpga.use import Use, clocks_of_vivado, of_vivado, of_yosys, slacks_of_vivado

__all__ = ["TOOLS", "build", "synthesise"]

TOOLS = ("vivado", "yosys")

GATE = """\
foreach check {setup hold} {
    set slack [get_property SLACK [get_timing_paths -$check]]
    if {$slack ne "" && $slack < 0} {
        puts "ERROR: timing is not met: worst $check slack is $slack ns; no bitstream is written"
        exit 1
    }
}
"""
"""Tcl before ``write_bitstream``, which by itself does not mind timing that fails."""

OPENXC7 = """\
#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# {name}.json to {name}.bit with openXC7 (https://github.com/openXC7). Not run by `make bitstream`:
# it has no part in the pinned tools, and nextpnr-xilinx's timing is less well known than Vivado's.
set -e
cd "$(dirname "$0")"
: "${{NEXTPNR_XILINX:=nextpnr-xilinx}}" "${{FASM2FRAMES:=fasm2frames}}"
: "${{XC7FRAMES2BIT:=xc7frames2bit}}"
: "${{NEXTPNR_XILINX_DIR:=/snap/openxc7/current/opt/nextpnr-xilinx}}"
: "${{PRJXRAY_DB_DIR:=$NEXTPNR_XILINX_DIR/external/prjxray-db}}"
: "${{CHIPDB:?the folder of the chip database {database}.bin}}"
"$NEXTPNR_XILINX" --chipdb "$CHIPDB/{database}.bin" --xdc {name}.xdc --json {name}.json \\
    --freq {megahertz:g} --seed {seed} --fasm {name}.fasm
"$FASM2FRAMES" --part {part} --db-root "$PRJXRAY_DB_DIR/artix7" {name}.fasm >{name}.frames
"$XC7FRAMES2BIT" --part_file "$PRJXRAY_DB_DIR/artix7/{part}/part.yaml" --part_name {part} \\
    --frm_file {name}.frames --output_file {name}.bit
"""

SYNTHESIS = f"""\
read_verilog {NAME}.v
{HIDE_FIELDS}
synth_xilinx -flatten -abc9 -arch xc7 -top {NAME}
tee -q -o {NAME}.stat.json stat -json
write_json {NAME}.json
"""


class _TimingGate(XilinxPlatform):
    """Put between a board's platform and Amaranth's, this has Vivado stop where timing fails."""

    def toolchain_prepare(self, fragment, name, *, script_before_bitstream="", **kwargs):
        script = f"{GATE}{script_before_bitstream}"
        return super().toolchain_prepare(fragment, name, script_before_bitstream=script, **kwargs)


def _open_part(part: str) -> str:
    """Project X-Ray's name of a part: it knows neither temperature nor power grades."""
    return re.sub(r"^(xc7a\d+t)i?(\D+\d+-\d)L?$", r"\1\2", part)


def _write_project(job: Job) -> list[str]:
    """Write every file of the project; returns Vivado's command line."""
    platform = type(f"{job.board.platform.__name__}Gated", (job.board.platform, _TimingGate), {})
    plan = job.plan(platform())
    part = _open_part(job.board.part)
    (job.project / f"{NAME}.ys").write_text(SYNTHESIS)
    script = job.project / "openxc7.sh"
    script.write_text(
        OPENXC7.format(
            name=NAME,
            part=part,
            database=re.sub(r"-\d$", "", part),
            megahertz=job.clock_hz / 1e6,
            seed=job.seed,
        )
    )
    script.chmod(0o755)
    (job.project / f"build_{NAME}.sh").chmod(0o755)
    ((vivado, *arguments),) = json.loads(plan.files[f"build_{NAME}.json"])["commands"]
    assert vivado == "vivado"
    return arguments


def _with_vivado(job: Job, vivado: Tool, arguments: list[str]) -> None:
    project = job.project
    seconds, status = run(vivado, arguments, folder=project, log=job.log, label="Vivado")
    job.report["seconds"][vivado.name] = seconds
    timing = project / f"{NAME}_timing.rpt"
    placed = project / f"{NAME}_utilization_place.rpt"
    synthesised = project / f"{NAME}_utilization_synth.rpt"
    try:
        if placed.is_file():
            job.used(of_vivado(placed), "placement")
        elif synthesised.is_file():
            job.used(of_vivado(synthesised), "synthesis")
        if timing.is_file():
            slacks = slacks_of_vivado(timing)
            job.report["slack_ns"] = slacks
            print(
                "bitstream: worst slack after routing: "
                + ", ".join(f"{name} {slack:.3f} ns" for name, slack in slacks.items()),
                flush=True,
            )
            job.timed(clocks_of_vivado(timing))
            for name, slack in slacks.items():
                if slack < 0:
                    raise TimingFailed(
                        f"timing is not met: {name} is {slack:.3f} ns; no bitstream was kept"
                    )
    except ValueError as error:
        raise ToolFailed(f"vivado's report cannot be read: {error}") from None
    if status or not timing.is_file():
        raise ToolFailed(f"vivado failed: {first_error(project / f'{NAME}.log', job.log)}")
    made = project / f"{NAME}.bit"
    if not made.is_file():
        raise ToolFailed(f"vivado wrote no {NAME}.bit: see {job.log}")
    job.keep(made)


def synthesise(job: Job) -> Use:
    """Write the project and run Yosys for openXC7; returns what the design takes by its count."""
    yosys = find("yosys")
    if yosys is None:
        raise ToolFailed("yosys not found: `make bitstream` installs it from PyPI")
    job.begin()
    job.uses(yosys)
    _write_project(job)
    arguments = ["-q", "-l", f"{NAME}.rpt", f"{NAME}.ys"]
    seconds, status = run(
        yosys, arguments, folder=job.project, log=job.log, label="synthesis (minutes)"
    )
    job.report["seconds"][yosys.name] = seconds
    if status:
        raise ToolFailed(f"yosys failed: {first_error(job.log, job.project / f'{NAME}.rpt')}")
    return of_yosys(job.project / f"{NAME}.stat.json", job.board)


def build(job: Job) -> None:
    """Make the bitstream with Vivado, or the project without; or raise what went wrong.

    Raises
    ------
    NoBitstream
        The project is complete, but there is no Vivado.
    ToolFailed
        A tool is missing or has ended with an error.
    DoesNotFit
        By Yosys's count, or by Vivado's.
    TimingFailed
        Vivado's WNS, WHS or WPWS is below 0.
    """
    vivado = find("vivado")
    if vivado is not None:
        job.begin()
        job.uses(vivado)
        _with_vivado(job, vivado, _write_project(job))
        return
    job.used(synthesise(job), "Yosys's synthesis")
    raise NoBitstream(
        "no bitstream was made: vivado is not on PATH; install Vivado (the free edition has "
        f"{job.board.part}) and run this again, or give openXC7 "
        f"{shlex.quote(str(job.project / 'openxc7.sh'))}; the project lies in {job.project}"
    )

# SPDX-License-Identifier: Apache-2.0
"""ECP5: Yosys, nextpnr-ecp5 and ecppack, which pip brings (YoWASP), to the bitstream."""

from __future__ import annotations

import json

from fpga.flow import ABC9_SCRIPT, BARE_READS, ECP5_OPTIONS, HIDE_FIELDS, NAME, Job, first_error
from fpga.tools import Tool, ToolFailed, find, run
from fpga.use import Use, clocks_of_nextpnr, of_nextpnr, of_yosys

__all__ = ["TOOLS", "build", "synthesise"]

TOOLS = ("yosys", "nextpnr-ecp5", "ecppack")


def _tool(name: str) -> Tool:
    tool = find(name)
    if tool is None:
        raise ToolFailed(f"{name} not found: `make bitstream` installs it from PyPI")
    return tool


def _do(job: Job, tool: Tool, arguments: list[str], label: str) -> int:
    seconds, status = run(tool, arguments, folder=job.project, log=job.log, label=label)
    job.report["seconds"][tool.name] = seconds
    return status


def synthesise(job: Job) -> tuple[Use, list[list[str]]]:
    """Write the project and run Yosys.

    Returns
    -------
    use, commands : tuple
        What the design takes by Yosys's count, and the arguments of the tools that come next.
    """
    yosys = _tool("yosys")
    job.begin()
    job.uses(yosys)
    plan = job.plan(
        job.board.platform(),
        script_after_read=f"{BARE_READS}\n{HIDE_FIELDS}\n{ABC9_SCRIPT}",
        synth_opts=ECP5_OPTIONS,
        script_after_synth=f"tee -q -o {NAME}.stat.json stat -json",
        nextpnr_opts=f"--seed {job.seed} --router router2 --report {NAME}.report.json",
    )
    # Amaranth's build script holds its commands as lists too.
    first, *rest = json.loads(plan.files[f"build_{NAME}.json"])["commands"]
    assert [first[0], *(command[0] for command in rest)] == list(TOOLS)
    if _do(job, yosys, first[1:], "synthesis (minutes)"):
        raise ToolFailed(f"yosys failed: {first_error(job.log, job.project / f'{NAME}.rpt')}")
    return of_yosys(job.project / f"{NAME}.stat.json", job.board), [c[1:] for c in rest]


def build(job: Job) -> None:
    """Make the bitstream, or raise what went wrong.

    Raises
    ------
    ToolFailed
        A tool is missing or has ended with an error.
    DoesNotFit
        By Yosys's count already, or by nextpnr's.
    TimingFailed
        After place and route.
    """
    nextpnr, ecppack = _tool("nextpnr-ecp5"), _tool("ecppack")
    use, (place, pack) = synthesise(job)
    job.used(use, "synthesis")
    job.uses(nextpnr)
    report = job.project / f"{NAME}.report.json"
    # nextpnr ends with an error too where timing fails, but writes its report before that.
    status = _do(job, nextpnr, place, "place and route (minutes)")
    if report.is_file():
        job.used(of_nextpnr(report), "place and route")
        job.timed(clocks_of_nextpnr(report))
    if status or not report.is_file():
        error = first_error(job.project / f"{NAME}.tim", job.log)
        raise ToolFailed(f"nextpnr-ecp5 failed: {error}")
    if _do(job, ecppack, pack, "packing the bitstream"):
        raise ToolFailed(f"ecppack failed: {first_error(job.log)}")
    job.keep(job.project / f"{NAME}.bit")

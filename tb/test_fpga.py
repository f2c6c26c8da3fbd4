# SPDX-License-Identifier: Apache-2.0
"""Boards and bitstreams: `make boards`, `make bitstream`.

Most tests put a small design in the board top's place, so that each tool runs for seconds. Vivado
is not to be had here: a script plays it, checks how it is called and hands out reports in its
format. What a real Vivado makes of the project is not tested.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from amaranth.hdl import Module, Signal
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from fpga import board as fpga_board
from fpga import build
from fpga.board import Board, BoardError, Capacity, all_boards, board_named
from fpga.flow import NAME, Job
from fpga.pll import Ecp5Pll, Series7Pll
from fpga.use import Use, clocks_of_vivado, of_vivado, of_yosys, slacks_of_vivado
from stmoe.synthesis import ANY_ON_COLLISION
from stmoe_golden.config import PRESETS, preset

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

PINS = {
    # From the makers' own files, not from amaranth-boards: emard/ulx3s doc/constraints
    # ulx3s_v20.lpf, where ftdi_txd is what the FTDI sends, and Digilent's Arty-A7 master XDC,
    # where uart_txd_in is.
    "ulx3s": {
        "clk25_0__io": "G2",
        "uart_0__rx__io": "M1",
        "uart_0__tx__io": "L4",
        **{f"led_{i}__io": pin for i, pin in enumerate(("B2", "C2", "C1", "D2"))},
    },
    "arty_a7": {
        "clk100_0__io": "E3",
        "rst_0__io": "C2",
        "uart_0__rx__io": "A9",
        "uart_0__tx__io": "D10",
        **{f"led_{i}__io": pin for i, pin in enumerate(("H5", "J5", "T9", "T10"))},
    },
}
PINS["arty_a7_100t"] = PINS["arty_a7"]


def yowasp(name: str) -> str:
    """Path of one of pip's FPGA tools; skips the test where the extra is not installed."""
    path = BIN / f"yowasp-{name}"
    if not path.exists():
        pytest.skip("the extra `fpga` is not installed (`make bitstream` installs it)")
    return str(path)


class SmallTop(wiring.Component):
    """Takes the board top's place: a byte of memory for each count, and some arithmetic."""

    attributes: ClassVar[dict[str, int]] = {}

    def __init__(self, config, *, clock_hz: int, baud: int):
        super().__init__({"rx": In(1), "tx": Out(1), "leds": Out(4)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.ram = ram = memory.Memory(shape=16, depth=1024, init=[], attrs=self.attributes)
        write, read = ram.write_port(), ram.read_port()
        count, total = Signal(48), Signal(48)
        m.d.sync += [count.eq(count + 1), total.eq(total + (count ^ read.data))]
        m.d.comb += [
            write.addr.eq(count),
            write.data.eq(total),
            write.en.eq(self.rx),
            read.addr.eq(total),
            self.tx.eq(total[-1]),
            self.leds.eq(total[40:]),
        ]
        return m


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The small design instead of the board top, no Vivado, and a folder for what is built."""
    monkeypatch.setattr("stmoe.harness.board_top.BoardTop", SmallTop)
    monkeypatch.setenv("VIVADO", str(tmp_path / "no-vivado"))
    for name in ("YOSYS", "NEXTPNR_ECP5", "ECPPACK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "out"


def bitstream(folder: Path, *words: str) -> int:
    return build.main(["bitstream", "--build-dir", str(folder), *words])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bitstream: ")
    return line


# Boards -------------------------------------------------------------------------------------------


def test_boards_are_listed_with_part_preset_and_capacity(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert build.main(["boards"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(all_boards())
    assert {"ulx3s", "arty_a7", "arty_a7_100t"} <= set(all_boards())
    for board, line in zip(all_boards().values(), lines, strict=True):
        assert board.part in line and board.default_preset in line
        assert f"{board.capacity.luts:,}" in line and str(board.capacity.block_rams) in line
    assert "LUTs" in head and "PRESET" in head


@pytest.mark.parametrize("board", all_boards().values(), ids=all_boards())
def test_default_preset_is_the_largest_that_was_measured_to_fit(board: Board) -> None:
    use, default = build.measured(board.family), board.default_preset
    size = PRESETS[default].table_bits
    larger = [name for name, config in PRESETS.items() if config.table_bits > size]
    open_ = []
    for name in [default, *larger]:
        try:
            board.check_tables(name, preset(name))
        except BoardError:
            assert name != default
            continue
        if name not in use:
            open_.append(name)
        elif name in board.slow_presets:
            assert not use[name].excess(board), name
        else:
            assert bool(use[name].excess(board)) == (name != default), name
    if open_:
        names = " ".join(open_)
        pytest.skip(f"not measured on {board.family}: python -m fpga.build measure {names}")


def test_a_board_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that fpga/README.md shows makes a board that can be built."""
    readme = (ROOT / "fpga" / "README.md").read_text()
    (text,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "shown.py").write_text(text)
    monkeypatch.setattr(
        fpga_board.board_files, "__path__", [*fpga_board.board_files.__path__, str(tmp_path)]
    )
    try:
        (new,) = set(all_boards()) - {"ulx3s", "arty_a7", "arty_a7_100t"}
        board = board_named(new)
        job = Job(board, "tiny", preset("tiny"), board.clock_hz, 1, tmp_path / "out", SmallTop)
        job.begin()
        job.plan(board.platform())
        assert (job.project / f"{NAME}.lpf").is_file() or (job.project / f"{NAME}.xdc").is_file()
    finally:
        sys.modules.pop("fpga.boards.shown", None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no board is named (BOARD=); boards are arty_a7, arty_a7_100t, ulx3s"),
        (("--board", "icebreaker"), "unknown board 'icebreaker'; boards are arty_a7, "),
        (("--board", "ulx3s", "--preset", "large"), "unknown preset 'large'; presets are tiny, "),
        (
            ("--board", "ulx3s", "--preset", "qwen3_30b_a3b"),
            "preset qwen3_30b_a3b does not fit ulx3s: its tables are 25,165,824 bits, 6.6 times "
            "the 3,833,856 of block RAM",
        ),
        (
            ("--board", "arty_a7", "--preset", "deepseek_v2_lite"),
            "does not fit arty_a7: its tables are 3,407,872 bits, 1.8 times the 1,843,200 of",
        ),
        (("--board", "ulx3s", "--clock", "57"), "makes exactly from 25 MHz, not 57 MHz"),
        (("--board", "ulx3s", "--clock", "fast"), "--clock: must be a frequency in MHz"),
        (("--board", "ulx3s", "--clock", "-50"), "--clock: must be a frequency in MHz, not '-50'"),
        (("--board", "ulx3s", "--seed", "0"), "--seed: must be an integer from 1 to 2147483647"),
        (("--board", "ulx3s", "--fast"), "unrecognized arguments: --fast"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bitstream(tmp_path / "out", *words) == 2
    assert says in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_make_passes_its_settings_on() -> None:
    command = ["make", "-n", "bitstream", "BOARD=ulx3s", "PRESET=tiny", "CLOCK=25", "SEED=3"]
    inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    run = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True)
    shown = " ".join(run.stdout.replace("\\\n", " ").split())
    assert "-m fpga.build bitstream --board 'ulx3s' --preset 'tiny'" in shown, run.stderr
    assert "--clock '25' --seed '3'" in shown


def test_board_refuses_a_preset_or_clock_that_there_is_not() -> None:
    board = board_named("ulx3s")
    with pytest.raises(BoardError, match="default_preset must be one of tiny, "):
        dataclasses.replace(board, default_preset="huge")
    for slow in ("huge", board.default_preset):
        with pytest.raises(BoardError, match="slow_presets must be of tiny, .* but the default"):
            dataclasses.replace(board, slow_presets=(slow,))
    with pytest.raises(BoardError, match="makes exactly from 25 MHz, not 33 MHz"):
        dataclasses.replace(board, clock_hz=33_000_000)


# Clock --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("megahertz", [25, 50, 62.5, 75, 100])
def test_ecp5_pll_is_set_as_project_trellis_would(megahertz: float, tmp_path: Path) -> None:
    command = [yowasp("ecppll"), "-i", "25", "-o", str(megahertz), "-f", "pll.v"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    text = (tmp_path / "pll.v").read_text()
    want = [int(re.search(rf"\.{n}\((\d+)\)", text)[1]) for n in ("CLKI_DIV", "CLKFB_DIV")]  # type: ignore
    setting = Ecp5Pll.solve(25_000_000, round(megahertz * 1e6))
    assert [setting.divide, setting.feedback] == want
    assert setting.output == int(re.search(r"\.CLKOP_DIV\((\d+)\)", text)[1])  # type: ignore


@pytest.mark.parametrize("kind", [Ecp5Pll, Series7Pll])
@pytest.mark.parametrize("megahertz", [12.5, 50, 62.5, 100])
def test_pll_makes_the_frequency_within_its_limits(
    kind: type[Ecp5Pll] | type[Series7Pll], megahertz: float
) -> None:
    source, wanted = 100_000_000, round(megahertz * 1e6)
    settings = list(kind._settings(source, wanted))
    assert kind.solve(source, wanted) in settings
    low, high = (400e6, 800e6) if kind is Ecp5Pll else (800e6, 1600e6)
    for divide, feedback, output in settings:
        # What the counters do: UG472 figure 3-2; on ECP5 the feedback is taken behind the output's.
        oscillator = source / divide * feedback * (output if kind is Ecp5Pll else 1)
        assert oscillator / output == pytest.approx(wanted)
        assert low <= round(oscillator) <= high


@pytest.mark.parametrize("kind", [Ecp5Pll, Series7Pll])
@pytest.mark.parametrize("wanted", [0, 1, 2_000_000_000, 33_333_333, True])
def test_pll_refuses_what_it_cannot_make(
    kind: type[Ecp5Pll] | type[Series7Pll], wanted: int
) -> None:
    with pytest.raises(ValueError, match="must be"):
        kind.solve(25_000_000, wanted)


# Projects -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PINS)
def test_constraints_have_the_makers_pins_and_the_clock(name: str, tmp_path: Path) -> None:
    board = board_named(name)
    job = Job(board, "tiny", preset("tiny"), board.clock_hz, 1, tmp_path / name, SmallTop)
    job.begin()
    job.plan(board.platform())
    if board.family == "ecp5":
        text = (job.project / f"{NAME}.lpf").read_text()
        pins = dict(re.findall(r'LOCATE COMP "(\w+)" SITE "(\w+)";', text))
        assert 'FREQUENCY PORT "clk25_0__io" 25000000.0 HZ;' in text
        assert text.count("IO_TYPE=LVCMOS33") == len(pins)
    else:
        text = (job.project / f"{NAME}.xdc").read_text()
        pins = {
            port: pin
            for pin, port in re.findall(r'set_property LOC (\w+) \[get_ports "(\w+)"\]', text)
        }
        assert 'create_clock -name clk100_0__io -period 10.0 [get_nets "clk100_0__io"]' in text
        assert text.count('IOSTANDARD "LVCMOS33"') == len(pins)
    assert pins == PINS[name]


@pytest.mark.parametrize(
    ("name", "part", "open_part"),
    [
        ("arty_a7", "xc7a35ticsg324-1L", "xc7a35tcsg324-1"),
        ("arty_a7_100t", "xc7a100ticsg324-1L", "xc7a100tcsg324-1"),
    ],
)
def test_arty_without_vivado_ends_in_a_complete_project_and_status_3(
    name: str, part: str, open_part: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yowasp("yosys")
    assert bitstream(small, "--board", name, "--preset", "tiny") == 3
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    project = small / name / "project"
    assert re.search("no bitstream was made: vivado is not on PATH; install Vivado", line)
    assert line.endswith(f"the project lies in {project}")
    assert re.search(r"LUT6 +\d+ of +\d\d,\d\d\d +\d+\.\d%", captured.out)
    assert re.search(r"RAMB36 +0\.5 of ", captured.out), "16 kbit of memory are half a RAMB36"
    assert not list(small.rglob("*.bit"))

    report = json.loads((small / name / "report.json").read_text())
    assert report["bitstream"] is None
    assert report["part"] == part
    # 96 bits of counters, and the reset's two.
    assert report["use"]["registers"] == 98

    assert f"module {NAME}(" in (project / f"{NAME}.v").read_text()
    tcl = (project / f"{NAME}.tcl").read_text()
    assert f"-part {part}" in tcl
    assert 0 < tcl.index("route_design") < tcl.index("timing is not met") < tcl.index("\nwrite_bit")
    assert "BITSTREAM.CONFIG.SPI_BUSWIDTH" in tcl, "the board's own settings are kept"
    assert f"-source {NAME}.tcl" in (project / f"build_{NAME}.sh").read_text()
    script = project / "openxc7.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    assert f"--part_name {open_part} " in script.read_text()
    assert f"--xdc {NAME}.xdc --json {NAME}.json" in script.read_text()
    netlist = json.loads((project / f"{NAME}.json").read_text())["modules"][NAME]
    assert set(netlist["ports"]) == set(PINS[name])
    kinds = {cell["type"] for cell in netlist["cells"].values()}
    assert {"PLLE2_BASE", "BUFG", "RAMB18E1", "IBUF", "OBUFT"} <= kinds


def test_openxc7_script_gives_each_tool_what_the_last_one_wrote(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for the three tools, none of which can be had here."""
    yowasp("yosys")
    assert bitstream(small, "--board", "arty_a7", "--preset", "tiny") == 3
    project = small / "arty_a7" / "project"
    fake = tmp_path / "tool"
    fake.write_text(
        "#!/bin/sh\n"
        'echo "$@" >>tools.log\n'
        "while [ $# -gt 1 ]; do\n"
        '  case $1 in --fasm|--output_file) : >"$2";; --json|--xdc|--frm_file) [ -e "$2" ];; esac '
        "|| exit 9\n"
        "  shift\n"
        "done\n"
    )
    fake.chmod(0o755)
    tools = {n: str(fake) for n in ("NEXTPNR_XILINX", "FASM2FRAMES", "XC7FRAMES2BIT")}
    command = [str(project / "openxc7.sh")]
    run = subprocess.run(command, env=os.environ | tools, capture_output=True, text=True)
    assert run.returncode and "the folder of the chip database xc7a35tcsg324.bin" in run.stderr
    subprocess.run(command, env=os.environ | tools | {"CHIPDB": "/db"}, check=True)
    calls = (project / "tools.log").read_text().splitlines()
    assert len(calls) == 3
    assert "--chipdb /db/xc7a35tcsg324.bin" in calls[0] and "--freq 50" in calls[0]
    assert (project / f"{NAME}.bit").is_file()


# Vivado, played by a script -----------------------------------------------------------------------

UTILIZATION = """\
1. Slice Logic
--------------

+----------------------------+------+-------+-----------+-------+
|          Site Type         | Used | Fixed | Available | Util% |
+----------------------------+------+-------+-----------+-------+
| Slice LUTs{star}                | {luts} |     0 |     20800 | 55.30 |
|   LUT as Logic             | 9864 |     0 |     20800 | 47.42 |
| Slice Registers            | 8379 |     0 |     41600 | 20.14 |
+----------------------------+------+-------+-----------+-------+
+-------------------+------+-------+-----------+-------+
|     Site Type     | Used | Fixed | Available | Util% |
+-------------------+------+-------+-----------+-------+
| Block RAM Tile    | 24.5 |     0 |        50 | 49.00 |
|   RAMB36/FIFO*    |   20 |     0 |        50 | 40.00 |
+-------------------+------+-------+-----------+-------+
+----------------+------+-------+-----------+-------+
| DSPs           |    2 |     0 |        90 |  2.22 |
+----------------+------+-------+-----------+-------+
"""

TIMING = """\
------------------------------------------------------------------------------------------------
| Design Timing Summary
| ---------------------
------------------------------------------------------------------------------------------------

    WNS(ns)      TNS(ns)  TNS Failing Endpoints  TNS Total Endpoints      WHS(ns)      THS(ns)  \
THS Failing Endpoints  THS Total Endpoints     WPWS(ns)     TPWS(ns)  TPWS Failing Endpoints  \
TPWS Total Endpoints
    -------      -------  ---------------------  -------------------      -------      -------  \
---------------------  -------------------     --------     --------  ----------------------  \
--------------------
    {wns:7.3f}        0.000                      0                45198      {whs:7.3f}        \
0.000                      0                45198        3.750        0.000                       \
0                 15526


------------------------------------------------------------------------------------------------
| Clock Summary
| -------------
------------------------------------------------------------------------------------------------

Clock         Waveform(ns)       Period(ns)      Frequency(MHz)
-----         ------------       ----------      --------------
clk100_0__io  {{0.000 5.000}}      10.000          100.000
  feedback    {{0.000 5.000}}      10.000          100.000
  output      {{0.000 10.000}}     20.000          50.000


------------------------------------------------------------------------------------------------
| Intra Clock Table
| -----------------
------------------------------------------------------------------------------------------------

Clock             WNS(ns)      TNS(ns)  TNS Failing Endpoints  TNS Total Endpoints      WHS(ns)
-----             -------      -------  ---------------------  -------------------      -------
clk100_0__io
  feedback
  output          {wns:7.3f}        0.000                      0                45198     {whs:7.3f}


------------------------------------------------------------------------------------------------
| Inter Clock Table
| -----------------
------------------------------------------------------------------------------------------------
"""


@pytest.fixture
def vivado(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a script on PATH that acts as Vivado would on a design with these figures."""

    def act(
        *, luts: int = 11504, wns: float = 1.698, whs: float = 0.02, status: int = 0, places=True
    ) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        reports = tmp_path / "reports"
        reports.mkdir()
        stages = ("synth", "place") if places else ("synth",)
        for stage in stages:
            text = UTILIZATION.format(luts=luts, star="*" if stage == "synth" else " ")
            (reports / f"{NAME}_utilization_{stage}.rpt").write_text(text)
        if places:
            (reports / f"{NAME}_timing.rpt").write_text(TIMING.format(wns=wns, whs=whs))
        if not status:
            (reports / f"{NAME}.bit").write_bytes(b"bits")
        script = folder / "vivado"
        script.write_text(
            "#!/bin/sh\n"
            '[ "$1" = -version ] && { echo "Vivado v2023.2 (64-bit)"; exit; }\n'
            f'[ "$*" = "-mode batch -log {NAME}.log -source {NAME}.tcl" ] || exit 64\n'
            f"[ -f {NAME}.v ] && [ -f {NAME}.xdc ] && [ -f {NAME}.tcl ] || exit 66\n"
            f"cp {reports}/* .\n"
            f"[ {status} = 0 ] || echo 'ERROR: [Place 30-640] Place Check' >{NAME}.log\n"
            f"exit {status}\n"
        )
        script.chmod(0o755)
        monkeypatch.delenv("VIVADO", raising=False)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return script

    return act


def test_vivado_makes_the_bitstream_and_its_summaries_are_printed(
    small: Path, vivado: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vivado()
    assert bitstream(small, "--board", "arty_a7", "--preset", "tiny") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert re.search(r"LUT6 +11,504 of  20,800  55\.3%", captured.out)
    assert re.search(r"RAMB36 +24\.5 of +50  49\.0%", captured.out)
    assert "WNS 1.698 ns, WHS 0.020 ns, WPWS 3.750 ns" in captured.out
    assert re.search(r"output +54\.64 MHz of 50\.00 MHz: met", captured.out)
    assert (small / "arty_a7" / "arty_a7.bit").read_bytes() == b"bits"
    report = json.loads((small / "arty_a7" / "report.json").read_text())
    assert report["bitstream"] == "arty_a7.bit"
    assert report["tools"] == {"vivado": "Vivado v2023.2 (64-bit)"}


@pytest.mark.parametrize("status", [0, 1], ids=["by hand", "as its script tells it"])
@pytest.mark.parametrize(
    ("wns", "whs", "says"),
    [
        (-0.5, 0.02, "timing is not met: output reaches 48.78 MHz of 50.00 MHz"),
        (1.0, -0.031, "timing is not met: WHS is -0.031 ns"),
    ],
)
def test_no_bitstream_where_vivados_timing_fails(
    wns: float,
    whs: float,
    says: str,
    status: int,
    small: Path,
    vivado: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    vivado(wns=wns, whs=whs, status=status)
    assert bitstream(small, "--board", "arty_a7", "--preset", "tiny") == 1
    assert says in one_line(capsys)
    assert not (small / "arty_a7" / "arty_a7.bit").exists()
    assert json.loads((small / "arty_a7" / "report.json").read_text())["bitstream"] is None


def test_design_that_vivado_cannot_place_is_told_by_how_much_it_is_too_large(
    small: Path, vivado: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vivado(luts=31200, status=1, places=False)
    assert bitstream(small, "--board", "arty_a7", "--preset", "tiny") == 2
    assert "31,200 LUT6 of 20,800 (50% too many)" in one_line(capsys)


def test_vivados_error_is_passed_on(
    small: Path, vivado: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vivado(status=1, places=False)
    assert bitstream(small, "--board", "arty_a7", "--preset", "tiny") == 1
    assert "vivado failed: ERROR: [Place 30-640] Place Check" in one_line(capsys)


def test_vivados_reports_are_read_as_they_are_written(tmp_path: Path) -> None:
    use, timing = tmp_path / "use.rpt", tmp_path / "timing.rpt"
    use.write_text(UTILIZATION.format(luts=123, star="*"))
    timing.write_text(TIMING.format(wns=-1.25, whs=0.1))
    assert of_vivado(use) == Use(luts=123, registers=8379, block_rams=24.5, multipliers=2)
    assert slacks_of_vivado(timing) == {"WNS": -1.25, "WHS": 0.1, "WPWS": 3.75}
    ((name, achieved, constraint),) = map(dataclasses.astuple, clocks_of_vivado(timing))
    assert (name, round(achieved, 3), constraint) == ("output", 47.059, 50.0)
    timing.write_text("nothing of the kind")
    with pytest.raises(ValueError, match="no section Design Timing Summary"):
        slacks_of_vivado(timing)


# ECP5, with pip's tools ---------------------------------------------------------------------------


def luts_of_nextpnr(project: Path) -> int:
    """LUTs that nextpnr says it was given, before it packs them."""
    match = re.search(r"Total LUT4s: +(\d+)/", (project / f"{NAME}.tim").read_text())
    assert match
    return int(match[1])


def test_ulx3s_ends_in_a_bitstream_with_pips_tools_alone(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    yowasp("nextpnr-ecp5")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert bitstream(small, "--board", "ulx3s", "--preset", "tiny", "--clock", "62.5") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert re.search(r"LUT4 +\d+ of  83,640", captured.out)
    assert re.search(r"registers +\d+ of  83,640", captured.out)
    assert re.search(r"DP16KD \(18 kbit\) +1 of ", captured.out)
    assert re.search(r"\d+\.\d\d MHz of 62\.50 MHz: met", captured.out)
    made = (small / "ulx3s" / "ulx3s.bit").read_bytes()
    # ECP5's preamble, behind comments (FPGA-TN-02039).
    assert b"\xff\xff\xbd\xb3" in made[:512]
    unpack = [yowasp("ecpunpack"), "--input", "ulx3s.bit", "--textcfg", "again.config"]
    subprocess.run(unpack, cwd=small / "ulx3s", check=True, capture_output=True)
    config = (small / "ulx3s" / "again.config").read_text()
    assert config.startswith(".device LFE5U-85F")
    report = json.loads((small / "ulx3s" / "report.json").read_text())
    assert report["bitstream"] == "ulx3s.bit"
    assert report["clock_mhz"] == 62.5
    project = small / "ulx3s" / "project"
    use = of_yosys(project / f"{NAME}.stat.json", board_named("ulx3s"))
    assert use.luts == luts_of_nextpnr(project)


def test_a_memory_that_may_collide_needs_no_registers_of_its_own(tmp_path: Path) -> None:
    """Else Yosys makes what is read the old word where a write meets it, in logic for an ECP5."""
    yowasp("yosys")
    board, registers = board_named("ulx3s"), []
    for attributes in ({}, ANY_ON_COLLISION):
        top = type("Top", (SmallTop,), {"attributes": attributes})
        job = Job(board, "tiny", preset("tiny"), board.clock_hz, 1, tmp_path / "out", top)
        use, _ = build.FLOWS["ecp5"].synthesise(job)
        assert use.block_rams == 1
        registers.append(use.registers)
    assert registers[0] >= registers[1] + 16, registers


def test_ulx3s_makes_no_bitstream_where_timing_fails(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yowasp("nextpnr-ecp5")
    stale = small / "ulx3s" / "ulx3s.bit"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier build")
    assert bitstream(small, "--board", "ulx3s", "--preset", "tiny", "--clock", "400") == 1
    assert re.search(r"timing is not met: \S+ reaches \d+\.\d\d MHz of 400\.00", one_line(capsys))
    assert not list(small.rglob("*.bit"))
    report = json.loads((small / "ulx3s" / "report.json").read_text())
    assert report["bitstream"] is None
    assert [clock["met"] for clock in report["clocks"]].count(False) == 1


def test_design_too_large_by_yosys_count_is_told_by_how_much(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    yowasp("yosys")
    board = dataclasses.replace(
        board_named("ulx3s"),
        capacity=Capacity(
            luts=50, registers=83_640, block_rams=208, block_ram_bits=18_432, multipliers=156
        ),
    )
    monkeypatch.setattr(build, "board_named", lambda name: board)
    assert bitstream(small, "--board", "ulx3s", "--preset", "tiny") == 2
    line = one_line(capsys)
    assert re.search(r"preset tiny does not fit ulx3s: \d+ LUT4 of 50 \(\d+% too many\)", line)
    assert "DP16KD" not in line


@pytest.mark.slow
def test_the_board_top_itself_becomes_a_bitstream(tmp_path: Path) -> None:
    """The whole command, as a user gives it, with the smallest preset: a few minutes."""
    yowasp("nextpnr-ecp5")
    command = [sys.executable, "-m", "fpga.build", "bitstream", "--board", "ulx3s"]
    command += ["--preset", "tiny", "--build-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "ulx3s" / "report.json").read_text())
    assert (tmp_path / "ulx3s" / report["bitstream"]).stat().st_size > 100_000
    # nextpnr keeps periods in whole picoseconds.
    wanted = pytest.approx(report["clock_mhz"], rel=1e-4)
    (clock,) = (c for c in report["clocks"] if c["constraint"] == wanted)
    assert clock["met"] and report["use"]["luts"] > 5_000
    # The board top has carries and distributed memory, which count as several LUTs.
    project = tmp_path / "ulx3s" / "project"
    use = of_yosys(project / f"{NAME}.stat.json", board_named("ulx3s"))
    assert use.luts == luts_of_nextpnr(project)

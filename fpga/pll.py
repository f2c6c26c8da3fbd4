# SPDX-License-Identifier: Apache-2.0
"""The PLL that makes the design's clock from the board's, for each family.

Both are components with ``i`` (the board's clock), ``o`` (the design's) and ``locked`` (``o`` may
be used; changes at any time), and make the asked frequency exactly or not at all: the UART's
speed and the timing constraints are derived from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from amaranth.hdl import Const, Instance, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Ecp5Pll", "Series7Pll"]

MHZ = 1_000_000


class Setting(NamedTuple):
    """Counters of a PLL: ``input / divide`` is the phase detector's frequency."""

    divide: int
    feedback: int
    output: int


class _Pll(wiring.Component):
    """What the families share: the ports, and the search for a setting.

    Parameters
    ----------
    input_hz, output_hz : int
        Frequencies of ``i`` and ``o``.

    Raises
    ------
    ValueError
        No setting makes ``output_hz`` exactly.
    """

    DETECTOR: tuple[int, int]
    """Lowest and highest frequency of the phase detector, in Hz."""
    OSCILLATOR: tuple[int, int]
    """The same of the oscillator."""
    DIVIDE: range
    FEEDBACK: range
    OUTPUT: range
    FEEDBACK_FROM_OUTPUT: bool
    """The oscillator is divided for the output before it is fed back."""

    def __init__(self, input_hz: int, output_hz: int):
        self.input_hz, self.output_hz = input_hz, output_hz
        self.setting = self.solve(input_hz, output_hz)
        super().__init__({"i": In(1), "o": Out(1), "locked": Out(1)})

    @classmethod
    def solve(cls, input_hz: int, output_hz: int) -> Setting:
        """The setting that makes ``output_hz`` exactly, or :class:`ValueError`."""
        for name, value in (("input_hz", input_hz), ("output_hz", output_hz)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer, 1 or more, not {value!r}")
        middle = sum(cls.OSCILLATOR) // 2
        # The fastest phase detector has the least jitter; then the oscillator mid-range.
        settings = sorted(
            cls._settings(input_hz, output_hz),
            key=lambda s: (s.divide, abs(output_hz * s.output - middle), s.output),
        )
        if not settings:
            raise ValueError(
                f"clock must be one that the PLL makes exactly from {input_hz / MHZ:g} MHz, "
                f"not {output_hz / MHZ:g} MHz"
            )
        return settings[0]

    @classmethod
    def _settings(cls, input_hz: int, output_hz: int) -> Iterator[Setting]:
        for divide in cls.DIVIDE:
            if not cls.DETECTOR[0] <= Fraction(input_hz, divide) <= cls.DETECTOR[1]:
                continue
            for output in cls.OUTPUT:
                ratio = Fraction(output_hz * divide, input_hz)
                feedback = ratio if cls.FEEDBACK_FROM_OUTPUT else ratio * output
                if feedback.denominator != 1 or int(feedback) not in cls.FEEDBACK:
                    continue
                if cls.OSCILLATOR[0] <= output_hz * output <= cls.OSCILLATOR[1]:
                    yield Setting(divide, int(feedback), output)


class Ecp5Pll(_Pll):
    """EHXPLLL of an ECP5, with feedback from its output (Lattice FPGA-TN-02200; limits from the
    family's data sheet, FPGA-DS-02012)."""

    DETECTOR = (10 * MHZ, 400 * MHZ)
    OSCILLATOR = (400 * MHZ, 800 * MHZ)
    DIVIDE = range(1, 129)
    FEEDBACK = range(1, 81)
    OUTPUT = range(1, 129)
    FEEDBACK_FROM_OUTPUT = True

    def elaborate(self, platform):
        m = Module()
        setting = self.setting
        m.submodules.pll = Instance(
            "EHXPLLL",
            # nextpnr derives the constraint of CLKOP from that of CLKI and the dividers. The
            # analogue settings are the ones that Project Trellis' ecppll gives for every PLL.
            a_FREQUENCY_PIN_CLKI=f"{self.input_hz / MHZ:g}",
            a_FREQUENCY_PIN_CLKOP=f"{self.output_hz / MHZ:g}",
            a_ICP_CURRENT="12",
            a_LPF_RESISTOR="8",
            a_MFG_ENABLE_FILTEROPAMP="1",
            a_MFG_GMCREF_SEL="2",
            p_CLKI_DIV=setting.divide,
            p_CLKFB_DIV=setting.feedback,
            p_CLKOP_DIV=setting.output,
            p_CLKOP_CPHASE=setting.output - 1,  # no phase shift
            p_CLKOP_FPHASE=0,
            p_CLKOP_ENABLE="ENABLED",
            p_FEEDBK_PATH="CLKOP",
            p_OUTDIVIDER_MUXA="DIVA",
            p_DPHASE_SOURCE="DISABLED",
            p_INTFB_WAKE="DISABLED",
            p_PLLRST_ENA="DISABLED",
            p_STDBY_ENABLE="DISABLED",
            i_CLKI=self.i,
            i_CLKFB=self.o,
            i_RST=Const(0),
            i_STDBY=Const(0),
            i_PHASESEL0=Const(0),
            i_PHASESEL1=Const(0),
            i_PHASEDIR=Const(1),
            i_PHASESTEP=Const(1),
            i_PHASELOADREG=Const(1),
            i_PLLWAKESYNC=Const(0),
            i_ENCLKOP=Const(0),
            o_CLKOP=self.o,
            o_LOCK=self.locked,
        )
        return m


class Series7Pll(_Pll):
    """PLLE2_BASE of a 7 series device, with its output on a global buffer (Xilinx UG472; limits of
    speed grade -1 from DS181)."""

    DETECTOR = (19 * MHZ, 450 * MHZ)
    OSCILLATOR = (800 * MHZ, 1600 * MHZ)
    DIVIDE = range(1, 57)
    FEEDBACK = range(2, 65)
    OUTPUT = range(1, 129)
    FEEDBACK_FROM_OUTPUT = False

    def elaborate(self, platform):
        m = Module()
        setting = self.setting
        feedback, output = Signal(), Signal()
        m.submodules.pll = Instance(
            "PLLE2_BASE",
            p_CLKIN1_PERIOD=1e9 / self.input_hz,
            p_DIVCLK_DIVIDE=setting.divide,
            p_CLKFBOUT_MULT=setting.feedback,
            p_CLKOUT0_DIVIDE=setting.output,
            i_CLKIN1=self.i,
            i_CLKFBIN=feedback,
            i_PWRDWN=Const(0),
            i_RST=Const(0),
            o_CLKFBOUT=feedback,
            o_CLKOUT0=output,
            o_LOCKED=self.locked,
        )
        m.submodules.buffer = Instance("BUFG", i_I=output, o_O=self.o)
        return m

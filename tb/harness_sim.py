# SPDX-License-Identifier: Apache-2.0
"""The cocotb side of a simulation of ``SimTop``: configures the engine, feeds the trace.

Run by ``tb/sim_run.py``, which passes its settings as JSON in ``STMOE_SIM``. Python sleeps while
the simulation runs: it is woken when a bank of the trace is empty, every ``wake_cycles``, and at
the end.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, ValueChange
from cocotbext.axi import AxiLiteBus, AxiLiteMaster

from stmoe.harness.buffer_memory import BufferPlace
from stmoe.harness.content_checker import AddressMap
from stmoe.harness.sim_top import BANK_WORDS, row_layout
from stmoe.register_map import COUNTERS, registers
from stmoe_golden.config import NUM_SEGMENTS, EngineConfig

CLOCK_NS = 10
RESET_CYCLES = 5
MAX_ROUNDS_INITIALISE = 1000
"""Polls of STATUS, ``wake_cycles`` apart at most, before clearing the tables counts as stuck."""


class SimulationFailed(AssertionError):
    """The run cannot go on; the message says why."""


def trace_rows(
    config: EngineConfig, experts: np.ndarray, new: np.ndarray, token_id: np.ndarray
) -> Iterator[int]:
    """Rows of the trace memory: for each token its token word and its route words."""
    layout = row_layout(config)
    word = layout["word"]
    at = {name: word.offset + field.offset for name, field in word.shape}
    valid = 1 << layout["valid"].offset
    token_row = valid | 1 << at["is_token"]
    route_rows = [valid | layer << at["layer"] for layer in range(config.num_layers)]
    shifts = [at["experts"] + i * config.expert_bits for i in range(config.top_k)]
    for sets, first, name in zip(experts, new.tolist(), token_id.tolist(), strict=True):
        yield token_row | first << at["new_sequence"] | (name & 0xFFFF_FFFF) << at["token_id"]
        for row, chosen in zip(route_rows, sets.tolist(), strict=True):
            for expert, shift in zip(chosen, shifts, strict=True):
                row |= expert << shift
            yield row


class RegisterPort:
    """Reads and writes registers by name over AXI4-Lite."""

    def __init__(self, dut: Any, config: EngineConfig) -> None:
        self.map = {register.name: register for register in registers(config)}
        self.bus = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)

    async def write(self, name: str, value: int, *index: int) -> None:
        address = self.map[name].at(*index)
        answer = await self.bus.write(address, (value & 0xFFFF_FFFF).to_bytes(4, "little"))
        if answer.resp:
            raise SimulationFailed(f"writing {value:#x} to {name}{list(index)}: {answer.resp!r}")

    async def read(self, name: str, *index: int) -> int:
        answer = await self.bus.read(self.map[name].at(*index), 4)
        if answer.resp:
            raise SimulationFailed(f"reading {name}{list(index)}: {answer.resp!r}")
        return int.from_bytes(answer.data, "little")

    async def status(self, name: str) -> int:
        field = self.map["STATUS"].field(name)
        return (await self.read("STATUS") & field.mask) >> field.lsb

    async def segments(self, config: EngineConfig, addresses: AddressMap) -> None:
        """Write the harness's address map: one segment per layer, the others unused. Takes effect
        with the next :meth:`configure`."""
        for layer in range(config.num_layers):
            base = addresses.base(layer)
            await self.write("SEGMENT_BASE_LOW", base, layer, 0)
            await self.write("SEGMENT_BASE_HIGH", base >> 32, layer, 0)
            await self.write("SEGMENT_STRIDE", addresses.stride, layer, 0)
            await self.write("SEGMENT_BEATS", addresses.beats, layer, 0)
            for segment in range(1, NUM_SEGMENTS):
                await self.write("SEGMENT_BEATS", 0, layer, segment)

    async def place(self, config: EngineConfig) -> None:
        """Program where the harness keeps a buffer behind AXI, for the commit that follows."""
        place = BufferPlace(config)
        await self.write("BUFFER_BASE_LOW", place.base)
        await self.write("BUFFER_BASE_HIGH", place.base >> 32)
        await self.write("SLOT_STRIDE", place.stride)

    async def configure(self, changes: dict[str, Any]) -> None:
        """Write shadow registers and commit them with those that were written before. ``changes``
        may have ``control``, ``predictors``, ``threshold`` (quarter units), ``quotas`` (one number
        for all layers, or a list), ``irq_enable``."""
        unknown = set(changes) - {"control", "predictors", "threshold", "quotas", "irq_enable"}
        if unknown:
            raise SimulationFailed(f"unknown settings {sorted(unknown)}")
        if "irq_enable" in changes:
            await self.write("IRQ_ENABLE", changes["irq_enable"])
        if "control" in changes:
            await self.write("CONTROL", changes["control"])
        if "predictors" in changes:
            await self.write("PREDICTORS", changes["predictors"])
        if "threshold" in changes:
            await self.write("THRESHOLD", changes["threshold"])
        if "quotas" in changes:
            layers = self.map["QUOTA"].dims[0].count
            quotas = changes["quotas"]
            quotas = [quotas] * layers if isinstance(quotas, int) else quotas
            for layer, quota in enumerate(quotas):
                await self.write("QUOTA", quota, layer)
        await self.write("COMMIT", 1)
        if await self.status("commit_refused"):
            raise SimulationFailed(f"commit refused: {changes}")
        while await self.status("commit_pending"):
            pass

    async def counters(self) -> dict[str, int]:
        """Every counter by name, and the status registers in lower case."""
        values = {c.name: await self.read("COUNTER", i) for i, c in enumerate(COUNTERS)}
        for name in ("STATUS", "IRQ_STATUS", "CYCLE_LOW"):
            values[name.lower()] = await self.read(name)
        return values


class Banks:
    """Keeps the two banks of the trace memory filled."""

    def __init__(self, dut: Any, rows: Iterator[int]) -> None:
        self.dut = dut
        self.rows = rows
        self.filled = 0
        self.turn = 0
        self.ended = False
        self.cells = [dut.bank[i] for i in range(2 * BANK_WORDS)]

    def refill(self) -> None:
        """Write the banks that have been read; a bank's last rows may be empty (not valid)."""
        while not self.ended:
            bit = 1 << self.turn
            if (int(self.dut.consumed.value) ^ self.filled) & bit:
                return
            cells = self.cells[self.turn * BANK_WORDS : (self.turn + 1) * BANK_WORDS]
            for i, cell in enumerate(cells):
                row = next(self.rows, None)
                if row is None:
                    self.ended = True
                    if i == 0:
                        return
                    for rest in cells[i:]:
                        rest.value = 0
                    break
                cell.value = row
            self.filled ^= bit
            self.dut.filled.value = self.filled
            self.turn ^= 1


class Progress:
    """One line about every second, to the file that the settings name."""

    def __init__(self, path: str | None, total: int) -> None:
        self.total = total
        self.begin = self.last = time.monotonic()
        self.last_cycle = 0
        self.file = None
        if path:
            try:
                self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            except OSError:
                self.file = None

    def show(self, tokens: int, cycle: int, *, final: bool = False) -> None:
        now = time.monotonic()
        if self.file is None or (now - self.last < 1 and not final):
            return
        if final:
            speed = cycle / max(now - self.begin, 1e-9)
        else:
            speed = (cycle - self.last_cycle) / (now - self.last)
        text = f"{tokens} of {self.total} tokens, {cycle} cycles, {speed:,.0f} cycles/s\n"
        os.write(self.file, text.encode())
        self.last, self.last_cycle = now, cycle


async def _run(dut: Any, settings: dict[str, Any], result: dict[str, Any]) -> None:
    config = EngineConfig.load(settings["config"])
    with np.load(settings["trace"]) as trace:
        total = settings["tokens"]
        arrays = [trace[name][:total] for name in ("experts", "new", "token_id")]
    for name, value in settings["inputs"].items():
        getattr(dut, name).value = value
    dut.tokens.value = total
    dut.filled.value = 0
    dut.rst.value = 1
    # Unit 'step' costs nothing less; nanoseconds make waves readable.
    Clock(dut.clk, CLOCK_NS, "ns", impl="gpi").start()
    port = RegisterPort(dut, config)
    await ClockCycles(dut.clk, RESET_CYCLES)
    dut.rst.value = 0
    await ClockCycles(dut.clk, 2)

    await port.segments(config, AddressMap(config, settings["stride"]))
    for _ in range(MAX_ROUNDS_INITIALISE):
        if await port.status("initialised"):
            break
        await ClockCycles(dut.clk, 50)
    else:
        raise SimulationFailed("STATUS.initialised never rose")
    if config.buffer == "axi":
        await port.place(config)
    await port.configure(settings["registers"])

    progress = Progress(settings["progress"], total)
    banks = Banks(dut, trace_rows(config, *arrays))
    changes = sorted(settings["reconfigure"])
    begin, cpu_begin = time.monotonic(), time.process_time()
    first_cycle = int(dut.cycle.value)
    woken = ValueChange(dut.wake)
    while not dut.done.value:
        if dut.stuck.value:
            raise SimulationFailed(
                f"no progress for {settings['inputs']['stall_limit']} cycles, after "
                f"{int(dut.tokens_finished.value)} of {total} tokens, in cycle "
                f"{int(dut.cycle.value)}"
            )
        banks.refill()
        while changes and changes[0][0] <= int(dut.tokens_finished.value):
            await port.configure(changes.pop(0)[1])
        await woken
        progress.show(int(dut.tokens_finished.value), int(dut.cycle.value))
    result["done_cycle"] = int(dut.cycle.value)
    while not dut.quiet.value:
        if int(dut.cycle.value) - result["done_cycle"] > settings["inputs"]["stall_limit"]:
            raise SimulationFailed("all tokens have finished, but the engine never comes to rest")
        await woken
    result["wall_seconds"] = time.monotonic() - begin
    result["cpu_seconds"] = time.process_time() - cpu_begin
    result["run_cycles"] = int(dut.cycle.value) - first_cycle
    progress.show(total, result["run_cycles"], final=True)
    result["counters"] = await port.counters()


@cocotb.test()
async def replay(dut: Any) -> None:
    """Replay a trace on ``SimTop``; the outcome is the JSON file that the settings name."""
    settings = json.loads(os.environ["STMOE_SIM"])
    # The log on standard output is written by the simulator; a line of Python's, which is
    # buffered apart, could land in the middle of one of its lines.
    stream = open(settings["cocotb_log"], "w")  # noqa: SIM115 (open until the process ends)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(stream)
    sys.stdout = sys.stderr = stream
    result: dict[str, Any] = {"error": None, "counters": {}}
    try:
        await _run(dut, settings, result)
    except SimulationFailed as error:
        result["error"] = str(error)
        raise
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        for name in settings["outputs"]:
            result[name] = int(getattr(dut, name).value)
        Path(settings["result"]).write_text(json.dumps(result, indent=1))

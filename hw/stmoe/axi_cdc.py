# SPDX-License-Identifier: Apache-2.0
"""AXI4 reads across a clock boundary: the engine on one clock, the memory on another.

The clocks may have any frequencies and phases. Nothing but two asynchronous FIFOs and one reset
handshake lies between them; examples/clock_crossing/ has the timing constraints.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.cdc import AsyncFFSynchronizer, FFSynchronizer
from amaranth.lib.fifo import AsyncFIFO
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .payloads import axi4_read_signature

__all__ = ["AxiReadCrossing", "CrossingReset", "StreamCrossing"]

RESET_CYCLES = 16
"""Cycles of the memory's clock that its reset lasts at least, as many AXI blocks ask for."""


def _depth(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not 4 <= value <= 4096 or value & (value - 1):
        raise ValueError(f"{name} must be a power of two, 4 to 4096, not {value}")
    return value


class StreamCrossing(wiring.Component):
    """A stream from one clock domain to another, through an :class:`~amaranth.lib.fifo.AsyncFIFO`.

    **Latency.** A beat taken from ``i`` is on ``o`` after the second edge of the reading clock, so
    one to two of its cycles later, and can be taken with the third. Its place is free again after
    the second edge of the writing clock from when ``o`` has given it away.

    **Throughput.** One beat in each cycle of the slower clock, when ``depth`` covers that round
    trip: 8 at clocks that are alike, 16 with any margin for stalls. With less it is ``depth``
    beats a round trip, and never wrong.

    **Reset.** Both domains have to be reset together, as :class:`CrossingReset` does: the two
    sides keep pointers of the same FIFO. Resetting ``o_domain`` alone does nothing here.

    Parameters
    ----------
    shape : :py:`ShapeLike`
        Payload of both streams.
    i_domain, o_domain : str
        Clock domains of ``i`` and ``o``.
    depth : int
        Beats in the FIFO, a power of two, 4 to 4096.

    Members
    -------
    i : :py:`In(stream.Signature(shape))`
    o : :py:`Out(stream.Signature(shape))`
    """

    def __init__(self, shape, *, i_domain: str, o_domain: str, depth: int = 16) -> None:
        self._i_domain = i_domain
        self._o_domain = o_domain
        self._depth = _depth("depth", depth)
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        payload = Cat(self.i.payload)
        m.submodules.fifo = fifo = AsyncFIFO(
            width=len(payload),
            depth=self._depth,
            w_domain=self._i_domain,
            r_domain=self._o_domain,
        )
        m.d.comb += [
            fifo.w_data.eq(payload),
            fifo.w_en.eq(self.i.valid),
            self.i.ready.eq(fifo.w_rdy),
            Cat(self.o.payload).eq(fifo.r_data),
            self.o.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(self.o.ready),
        ]
        return m


class AxiReadCrossing(wiring.Component):
    """AXI4 reads of a manager on one clock, answered on another: a FIFO for AR and one for R.

    Nothing is reordered, changed or dropped: order within an ID is that of the memory. An address
    in the FIFO counts as presented for the engine (``prefetch_outstanding`` and
    ``max_outstanding`` hold from its side), so a demand waits for at most ``address_depth``
    addresses more than without. A read takes four to six cycles of each clock longer.

    **Reset.** As for :class:`StreamCrossing`. A reset loses what is in the FIFOs, and beats
    that the memory still owes come after it, for IDs that know nothing of them. So what answers
    is reset as well, with the output of :class:`CrossingReset`.

    Parameters
    ----------
    config : :class:`EngineConfig`
    manager_domain, memory_domain : str
        Clock domains of ``manager`` and ``memory``.
    address_depth, data_depth : int
        Addresses and beats that the FIFOs hold, powers of two, 4 to 4096. The defaults sustain a
        beat in every cycle of the slower clock.

    Members
    -------
    manager : :py:`In(axi4_read_signature(config))`
        The engine's side.
    memory : :py:`Out(axi4_read_signature(config))`
        The memory's.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        manager_domain: str = "sync",
        memory_domain: str = "memory",
        address_depth: int = 4,
        data_depth: int = 16,
    ) -> None:
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self._manager_domain = manager_domain
        self._memory_domain = memory_domain
        self._address_depth = _depth("address_depth", address_depth)
        self._data_depth = _depth("data_depth", data_depth)
        signature = axi4_read_signature(config)
        super().__init__({"manager": In(signature), "memory": Out(signature)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.ar = ar = StreamCrossing(
            self.manager.ar.payload.shape(),
            i_domain=self._manager_domain,
            o_domain=self._memory_domain,
            depth=self._address_depth,
        )
        m.submodules.r = r = StreamCrossing(
            self.manager.r.payload.shape(),
            i_domain=self._memory_domain,
            o_domain=self._manager_domain,
            depth=self._data_depth,
        )
        wiring.connect(m, wiring.flipped(self.manager.ar), ar.i)
        wiring.connect(m, ar.o, wiring.flipped(self.memory.ar))
        wiring.connect(m, wiring.flipped(self.memory.r), r.i)
        wiring.connect(m, r.o, wiring.flipped(self.manager.r))
        return m


class CrossingReset(wiring.Component):
    """Resets both sides of a crossing together, for as long as that takes.

    ``manager_reset`` rises one cycle after ``reset`` does, ``memory_reset`` with it (at once, not
    waiting for its clock), however short ``reset`` is. Both stay until ``reset`` is low and the
    memory's clock has run for ``RESET_CYCLES``; ``memory_reset`` falls first, in step with its
    clock, ``manager_reset`` some cycles after it. So while the memory's clock stands still the
    manager stays in reset. After power-up both are high.

    Its own registers have no reset: it must be given the *unextended* one as ``reset``.

    Parameters
    ----------
    manager_domain, memory_domain : str
        Their clocks are used, their resets are not.

    Members
    -------
    reset : :py:`In(1)`
        Synchronous to ``manager_domain``.
    manager_reset : :py:`Out(1)`
        A register of ``manager_domain``: the reset of that domain.
    memory_reset : :py:`Out(1)`
        A register of ``memory_domain``, set asynchronously, cleared in step: its reset.
    """

    def __init__(self, *, manager_domain: str = "sync", memory_domain: str = "memory") -> None:
        self._manager_domain = manager_domain
        self._memory_domain = memory_domain
        super().__init__({"reset": In(1), "manager_reset": Out(1), "memory_reset": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        manager, memory = m.d[self._manager_domain], m.d[self._memory_domain]

        # Four phases, which a reset never cuts short: request up, answer up, request down, answer
        # down. Without that a second reset could meet the answer to the first.
        hold = Signal(init=1, reset_less=True)
        request = Signal(init=1, reset_less=True)
        answer = Signal(reset_less=True)
        answered = Signal()
        count = Signal(range(RESET_CYCLES), reset_less=True)

        m.submodules.answer_cdc = FFSynchronizer(answer, answered, o_domain=self._manager_domain)
        with m.If(~hold):
            manager += [hold.eq(self.reset), request.eq(self.reset)]
        with m.Elif(request):
            manager += request.eq(~answered | self.reset)
        with m.Elif(~answered):
            manager += [hold.eq(self.reset), request.eq(self.reset)]
        m.d.comb += self.manager_reset.eq(hold)

        m.submodules.reset_cdc = AsyncFFSynchronizer(
            request, self.memory_reset, o_domain=self._memory_domain
        )
        with m.If(~self.memory_reset):
            memory += [count.eq(0), answer.eq(0)]
        with m.Elif(count != RESET_CYCLES - 1):
            memory += [count.eq(count + 1), answer.eq(0)]
        with m.Else():
            memory += answer.eq(1)
        return m

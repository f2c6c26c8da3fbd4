// SPDX-License-Identifier: Apache-2.0
// Runs the driver's test on the RTL: each register access is an AXI4-Lite transaction on its pins.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "Vsim_top.h"
#include "sim.h"
#include "stmoe.h"
#include "verilated.h"

namespace {

constexpr unsigned kTimeout = 200000;  // cycles that any one wait may take

std::unique_ptr<VerilatedContext> context;
std::unique_ptr<Vsim_top> top;
unsigned bus_errors = 0;

// From one falling edge to the next: inputs change, and outputs are looked at, in between.
void cycle() {
    for (int clk : {1, 0}) {
        top->clk = clk;
        top->eval();
        context->timeInc(5);
    }
}

void settle() { top->eval(); }

template <typename Condition>
void wait_for(const char *what, Condition condition) {
    settle();
    for (unsigned i = 0; !condition(); i++) {
        if (i == kTimeout) {
            std::fprintf(stderr, "sim: no %s within %u cycles\n", what, kTimeout);
            std::exit(1);
        }
        cycle();
    }
}

// One handshake: valid is high until a rising edge at which ready is high.
template <typename Valid, typename Ready>
void send(const char *what, Valid &valid, const Ready &ready) {
    valid = 1;
    wait_for(what, [&] { return ready != 0; });
    cycle();
    valid = 0;
    settle();
}

}  // namespace

extern "C" uint32_t stmoe_read32(uintptr_t address) {
    top->s_axil_araddr = address - SIM_BASE;
    send("ARREADY", top->s_axil_arvalid, top->s_axil_arready);
    wait_for("RVALID", [] { return top->s_axil_rvalid != 0; });
    const uint32_t value = top->s_axil_rdata;
    bus_errors += top->s_axil_rresp != 0;
    top->s_axil_rready = 1;
    cycle();
    top->s_axil_rready = 0;
    return value;
}

extern "C" void stmoe_write32(uintptr_t address, uint32_t value) {
    top->s_axil_awaddr = address - SIM_BASE;
    top->s_axil_wdata = value;
    top->s_axil_awvalid = top->s_axil_wvalid = 1;
    wait_for("AWREADY and WREADY", [] {
        const bool aw = top->s_axil_awvalid && top->s_axil_awready;
        const bool w = top->s_axil_wvalid && top->s_axil_wready;
        if (!aw && !w) return false;
        cycle();
        if (aw) top->s_axil_awvalid = 0;
        if (w) top->s_axil_wvalid = 0;
        settle();
        return !top->s_axil_awvalid && !top->s_axil_wvalid;
    });
    wait_for("BVALID", [] { return top->s_axil_bvalid != 0; });
    bus_errors += top->s_axil_bresp != 0;
    top->s_axil_bready = 1;
    cycle();
    top->s_axil_bready = 0;
}

extern "C" void sim_token(bool new_sequence) {
    top->token_new_sequence = new_sequence;
    send("token.ready", top->token_valid, top->token_ready);
}

extern "C" void sim_route(unsigned layer, const unsigned *experts, unsigned count) {
    top->route_layer = layer;
    top->route_experts = 0;
    // SIM_EXPERT_BITS: from the package, see the Makefile.
    for (unsigned i = 0; i < count; i++)
        top->route_experts |= static_cast<uint64_t>(experts[i]) << i * SIM_EXPERT_BITS;
    send("route.ready", top->route_valid, top->route_ready);
}

extern "C" void sim_wait_grants(unsigned count) {
    wait_for("grant", [count] { return top->grants >= count; });
}

extern "C" bool sim_irq(void) {
    settle();
    return top->irq != 0;
}

extern "C" unsigned sim_bus_errors(void) {
    const unsigned count = bus_errors;
    bus_errors = 0;
    return count;
}

int main(int argc, char **argv) {
    context = std::make_unique<VerilatedContext>();
    context->commandArgs(argc, argv);
    top = std::make_unique<Vsim_top>(context.get());
    for (int i = 0; i < 4; i++) cycle();
    top->rst_n = 1;
    const int status = driver_test();
    top->final();
    return status;
}

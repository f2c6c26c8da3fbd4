// SPDX-License-Identifier: Apache-2.0
// Simulation only: a memory whose words are a function of their address. It answers one burst after
// the other, a beat every other cycle, and checks what every burst of the engine has in common.
module expert_memory
  import stmoe_engine_pkg::*;
(
    input logic clk_i,
    input logic rst_ni,
    axi4_read_if.subordinate axi
);

  localparam int unsigned BeatBytes = AxiDataWidth / 8;

  logic [AxiAddrWidth-1:0] address;
  logic [7:0] left;
  logic answering, pause;

  // With +corrupt the last beat of each burst is wrong, to see that somebody notices.
  logic corrupt;
  initial corrupt = $test$plusargs("corrupt") != 0;

  // The beat at a byte address.
  function automatic logic [AxiDataWidth-1:0] content(logic [AxiAddrWidth-1:0] beat_address);
    return AxiDataWidth'(beat_address) * AxiDataWidth'('h9e3779b97f4a7c15);
  endfunction

  assign axi.arready = !answering;
  assign axi.rvalid = answering && !pause;
  assign axi.rdata = content(address) ^ AxiDataWidth'(corrupt && axi.rlast);
  assign axi.rlast = left == 0;
  assign axi.rresp = 2'b00;

  always_ff @(posedge clk_i) begin
    pause <= !pause;
    if (!rst_ni) begin
      answering <= 0;
      pause <= 0;
    end else if (axi.arvalid && axi.arready) begin
      assert (axi.arsize == 3'($clog2(BeatBytes)) && axi.arburst == 2'b01);
      assert ({axi.arlock, axi.arprot, axi.arqos} == '0 && axi.arcache == 4'b0011);
      assert (32'(axi.araddr[11:0]) + (32'(axi.arlen) + 1) * BeatBytes <= 4096);
      answering <= 1;
      axi.rid <= axi.arid;
      address <= axi.araddr;
      left <= axi.arlen;
    end else if (axi.rvalid && axi.rready) begin
      address <= address + AxiAddrWidth'(BeatBytes);
      left <= left - 1;
      answering <= !axi.rlast;
    end
  end

endmodule : expert_memory

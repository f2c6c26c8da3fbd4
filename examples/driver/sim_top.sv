// SPDX-License-Identifier: Apache-2.0
// What the driver's test runs on: the engine with its registers brought out, a memory, and an
// accelerator that releases each grant at once. Tokens and routes come from the C++ side.
module sim_top
  import stmoe_engine_pkg::*;
(
    input logic clk,
    input logic rst_n,
    output logic irq,

    input logic [AxilAddrWidth-1:0] s_axil_awaddr,
    input logic s_axil_awvalid,
    output logic s_axil_awready,
    input logic [31:0] s_axil_wdata,
    input logic s_axil_wvalid,
    output logic s_axil_wready,
    output logic [1:0] s_axil_bresp,
    output logic s_axil_bvalid,
    input logic s_axil_bready,
    input logic [AxilAddrWidth-1:0] s_axil_araddr,
    input logic s_axil_arvalid,
    output logic s_axil_arready,
    output logic [31:0] s_axil_rdata,
    output logic [1:0] s_axil_rresp,
    output logic s_axil_rvalid,
    input logic s_axil_rready,

    input logic token_valid,
    input logic token_new_sequence,
    output logic token_ready,
    input logic route_valid,
    input logic [LayerBits-1:0] route_layer,
    input logic [TopK-1:0][ExpertBits-1:0] route_experts,
    output logic route_ready,
    output int unsigned grants
);

  axi4_lite_if #(.AddrWidth(AxilAddrWidth)) axil ();
  axi4_read_if #(
      .IdWidth(AxiIdWidth), .AddrWidth(AxiAddrWidth), .DataWidth(AxiDataWidth)
  ) axi ();
  stream_if #(.payload_t(token_t)) token ();
  stream_if #(.payload_t(route_t)) route ();
  stream_if #(.payload_t(grant_t)) grant ();
  stream_if #(.payload_t(release_t)) release_slot ();
  stream_if #(.payload_t(fill_t)) fill ();

  stmoe_axi u_engine (
      .clk_i(clk),
      .rst_ni(rst_n),
      .irq_o(irq),
      .s_axil(axil),
      .m_axi(axi),
      .token,
      .route,
      .grant,
      .release_slot,
      .fill
  );

  expert_memory u_memory (
      .clk_i(clk),
      .rst_ni(rst_n),
      .axi
  );

  assign axil.awaddr = s_axil_awaddr;
  assign axil.awprot = '0;
  assign axil.awvalid = s_axil_awvalid;
  assign s_axil_awready = axil.awready;
  assign axil.wdata = s_axil_wdata;
  assign axil.wstrb = '1;
  assign axil.wvalid = s_axil_wvalid;
  assign s_axil_wready = axil.wready;
  assign s_axil_bresp = axil.bresp;
  assign s_axil_bvalid = axil.bvalid;
  assign axil.bready = s_axil_bready;
  assign axil.araddr = s_axil_araddr;
  assign axil.arprot = '0;
  assign axil.arvalid = s_axil_arvalid;
  assign s_axil_arready = axil.arready;
  assign s_axil_rdata = axil.rdata;
  assign s_axil_rresp = axil.rresp;
  assign s_axil_rvalid = axil.rvalid;
  assign axil.rready = s_axil_rready;

  assign token.payload = '{new_sequence: token_new_sequence, default: '0};
  assign token.valid = token_valid;
  assign token_ready = token.ready;
  assign route.payload = '{layer: route_layer, experts: route_experts, default: '0};
  assign route.valid = route_valid;
  assign route_ready = route.ready;

  assign fill.ready = 1;
  assign grant.ready = release_slot.ready;
  assign release_slot.valid = grant.valid;
  assign release_slot.payload = '{slot: grant.payload.slot, default: '0};

  always_ff @(posedge clk)
    if (!rst_n) grants <= 0;
    else if (grant.valid && grant.ready) begin
      assert (!grant.payload.error);
      grants <= grants + 1;
    end

endmodule : sim_top

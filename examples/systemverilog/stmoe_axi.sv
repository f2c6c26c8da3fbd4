// SPDX-License-Identifier: Apache-2.0
// The generated engine behind SystemVerilog interfaces: payloads are the structs of
// stmoe_engine_pkg, which `stmoe generate --sv-package` writes with the engine's Verilog.
//
// rst_ni is synchronous to clk_i. With STMOE_MEMORY_CLOCK defined, for an engine that was generated
// with --memory-clock, m_axi belongs to m_axi_aclk_i, and m_axi_aresetn_o resets what answers it.
module stmoe_axi
  import stmoe_engine_pkg::*;
(
    input logic clk_i,
    input logic rst_ni,
    output logic irq_o,
`ifdef STMOE_MEMORY_CLOCK
    input logic m_axi_aclk_i,
    output logic m_axi_aresetn_o,
`endif

    axi4_lite_if.subordinate s_axil,  // registers
    axi4_read_if.manager m_axi,  // reads the experts

    stream_if.sink token,  // a token begins
    stream_if.sink route,  // the router's decision in one layer
    stream_if.source grant,  // an expert is in its slot
    stream_if.sink release_slot,  // and has been used
    stream_if.source fill  // writes the expert buffer
);

  stmoe_engine u_engine (
      .clk(clk_i),
      .rst(!rst_ni),
      .irq(irq_o),
`ifdef STMOE_MEMORY_CLOCK
      .m_axi_aclk(m_axi_aclk_i),
      .m_axi_aresetn(m_axi_aresetn_o),
`endif

      .s_axil_awaddr (s_axil.awaddr),
      .s_axil_awprot (s_axil.awprot),
      .s_axil_awvalid(s_axil.awvalid),
      .s_axil_awready(s_axil.awready),
      .s_axil_wdata  (s_axil.wdata),
      .s_axil_wstrb  (s_axil.wstrb),
      .s_axil_wvalid (s_axil.wvalid),
      .s_axil_wready (s_axil.wready),
      .s_axil_bresp  (s_axil.bresp),
      .s_axil_bvalid (s_axil.bvalid),
      .s_axil_bready (s_axil.bready),
      .s_axil_araddr (s_axil.araddr),
      .s_axil_arprot (s_axil.arprot),
      .s_axil_arvalid(s_axil.arvalid),
      .s_axil_arready(s_axil.arready),
      .s_axil_rdata  (s_axil.rdata),
      .s_axil_rresp  (s_axil.rresp),
      .s_axil_rvalid (s_axil.rvalid),
      .s_axil_rready (s_axil.rready),

      .m_axi_arid   (m_axi.arid),
      .m_axi_araddr (m_axi.araddr),
      .m_axi_arlen  (m_axi.arlen),
      .m_axi_arsize (m_axi.arsize),
      .m_axi_arburst(m_axi.arburst),
      .m_axi_arlock (m_axi.arlock),
      .m_axi_arcache(m_axi.arcache),
      .m_axi_arprot (m_axi.arprot),
      .m_axi_arqos  (m_axi.arqos),
      .m_axi_arvalid(m_axi.arvalid),
      .m_axi_arready(m_axi.arready),
      .m_axi_rid    (m_axi.rid),
      .m_axi_rdata  (m_axi.rdata),
      .m_axi_rresp  (m_axi.rresp),
      .m_axi_rlast  (m_axi.rlast),
      .m_axi_rvalid (m_axi.rvalid),
      .m_axi_rready (m_axi.rready),

      .s_axis_token_tdata   (token.payload),
      .s_axis_token_tvalid  (token.valid),
      .s_axis_token_tready  (token.ready),
      .s_axis_route_tdata   (route.payload),
      .s_axis_route_tvalid  (route.valid),
      .s_axis_route_tready  (route.ready),
      .m_axis_grant_tdata   (grant.payload),
      .m_axis_grant_tvalid  (grant.valid),
      .m_axis_grant_tready  (grant.ready),
      .s_axis_release_tdata (release_slot.payload),
      .s_axis_release_tvalid(release_slot.valid),
      .s_axis_release_tready(release_slot.ready),
      .m_axis_fill_tdata    (fill.payload),
      .m_axis_fill_tvalid   (fill.valid),
      .m_axis_fill_tready   (fill.ready)
  );

  // A payload of another type would be cut or extended in silence.
  initial begin
    assert ($bits(token.payload) == $bits(token_t));
    assert ($bits(route.payload) == $bits(route_t));
    assert ($bits(grant.payload) == $bits(grant_t));
    assert ($bits(release_slot.payload) == $bits(release_t));
    assert ($bits(fill.payload) == $bits(fill_t));
    assert ($bits(m_axi.rdata) == AxiDataWidth);
  end

endmodule : stmoe_axi

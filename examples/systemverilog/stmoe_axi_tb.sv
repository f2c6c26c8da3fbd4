// SPDX-License-Identifier: Apache-2.0
// Configures the engine, plays tokens through it and uses what it grants.
//
// A memory answers reads with words that are a function of their address, and the expert buffer
// keeps what `fill` writes. So at each grant every word of the slot has to be that of the expert.
// Prints "PASS" and ends with 0, or says what is wrong and does not.
module stmoe_axi_tb;
  import stmoe_engine_pkg::*;

  localparam int unsigned Tokens = 12;
  localparam int unsigned BeatBytes = AxiDataWidth / 8;
  localparam int unsigned SlotBeats = SlotBytes / BeatBytes;
  // Cycles: a beat takes two here.
  localparam int unsigned Timeout = 100_000 + 8 * Tokens * NumLayers * TopK * SlotBeats;

  // docs/registers.md
  localparam int unsigned Identity = 'h000;
  localparam int unsigned Capability0 = 'h008;
  localparam int unsigned Commit = 'h02c;
  localparam int unsigned Status = 'h030;
  localparam int unsigned IrqStatus = 'h034;
  localparam int unsigned IrqEnable = 'h038;
  localparam int unsigned Counter = 'h100;
  localparam int unsigned Quota = 'h400;
  localparam int unsigned Segment = 'h4000;
  localparam int unsigned CounterRoutes = 2, CounterHits = 4, CounterGrants = 18;

  logic clk, rst_n, irq;
  initial begin
    clk = 0;
    forever #5ns clk = !clk;
  end

`ifdef STMOE_MEMORY_CLOCK
  // No whole number of its cycles fits one of the engine's.
  logic memory_clk, memory_rst_n;
  initial begin
    memory_clk = 0;
    forever #1.7ns memory_clk = !memory_clk;
  end
`else
  wire memory_clk = clk, memory_rst_n = rst_n;
`endif

  axi4_lite_if #(.AddrWidth(AxilAddrWidth)) axil ();
  axi4_read_if #(
      .IdWidth(AxiIdWidth), .AddrWidth(AxiAddrWidth), .DataWidth(AxiDataWidth)
  ) axi ();
  stream_if #(.payload_t(token_t)) token ();
  stream_if #(.payload_t(route_t)) route ();
  stream_if #(.payload_t(grant_t)) grant ();
  stream_if #(.payload_t(release_t)) release_slot ();
  stream_if #(.payload_t(fill_t)) fill ();

  stmoe_axi dut (
      .clk_i(clk),
      .rst_ni(rst_n),
      .irq_o(irq),
`ifdef STMOE_MEMORY_CLOCK
      .m_axi_aclk_i(memory_clk),
      .m_axi_aresetn_o(memory_rst_n),
`endif
      .s_axil(axil),
      .m_axi(axi),
      .token,
      .route,
      .grant,
      .release_slot,
      .fill
  );

  expert_memory u_memory (
      .clk_i(memory_clk),
      .rst_ni(memory_rst_n),
      .axi
  );

  // Layers are 1 MiB apart, experts one slot.
  function automatic logic [AxiAddrWidth-1:0] expert_address(int unsigned layer,
                                                              int unsigned expert);
    return AxiAddrWidth'(layer << 20) + AxiAddrWidth'(expert * SlotBytes);
  endfunction

  // The buffer, and the accelerator that uses and releases each grant at once ------------------

  logic [AxiDataWidth-1:0] buffer[NumSlots * SlotBeats];
  int unsigned grants;
  logic [NumExperts-1:0] wanted[NumLayers];
  grant_t used;

  function automatic int unsigned place(int unsigned slot, int unsigned offset);
    return slot * SlotBeats + offset;
  endfunction

  assign fill.ready = 1;
  always_ff @(posedge clk)
    if (fill.valid) begin
      // Whatever else TDATA has is 0.
      assert (fill.payload == '{
          slot: fill.payload.slot, offset: fill.payload.offset, data: fill.payload.data, default: '0
      });
      buffer[place(32'(fill.payload.slot), 32'(fill.payload.offset))] <= fill.payload.data;
    end

  assign grant.ready = !release_slot.valid || release_slot.ready;
  assign used = grant.payload;

  always_ff @(posedge clk) begin
    if (release_slot.ready) release_slot.valid <= 0;
    if (!rst_n) begin
      release_slot.valid <= 0;
      grants <= 0;
    end else if (grant.valid && grant.ready) begin
      assert (used == '{
          layer: used.layer, expert: used.expert, slot: used.slot, error: used.error, default: '0
      });
      if (used.error) $fatal(1, "a grant with an error");
      if (!wanted[used.layer][$clog2(NumExperts)'(used.expert)])
        $fatal(1, "layer %0d: expert %0d was not asked for", used.layer, used.expert);
      for (int unsigned i = 0; i < SlotBeats; i++)
        if (buffer[place(32'(used.slot), i)] != u_memory.content(
                expert_address(32'(used.layer), 32'(used.expert)) + AxiAddrWidth'(i * BeatBytes)
            ))
          $fatal(1, "slot %0d does not hold layer %0d's expert %0d", used.slot, used.layer,
                 used.expert);
      grants <= grants + 1;
      release_slot.valid <= 1;
      release_slot.payload <= '{slot: used.slot, default: '0};
    end
  end

  // Bus accesses and streams ----------------------------------------------------------------

  task automatic axil_write(int unsigned offset, logic [31:0] value);
    @(negedge clk);
    axil.awaddr = AxilAddrWidth'(offset);
    axil.wdata = value;
    axil.awvalid = 1;
    axil.wvalid = 1;
    axil.bready = 1;
    while (axil.awvalid || axil.wvalid) begin
      @(posedge clk);
      if (axil.awready) axil.awvalid <= 0;
      if (axil.wready) axil.wvalid <= 0;
      @(negedge clk);
    end
    while (!axil.bvalid) @(negedge clk);
    if (axil.bresp != 0) $fatal(1, "write to %04h: response %0d", offset, axil.bresp);
    @(negedge clk);
    axil.bready = 0;
  endtask

  task automatic axil_read(int unsigned offset, output logic [31:0] value);
    @(negedge clk);
    axil.araddr = AxilAddrWidth'(offset);
    axil.arvalid = 1;
    axil.rready = 1;
    while (axil.arvalid) begin
      @(posedge clk);
      if (axil.arready) axil.arvalid <= 0;
      @(negedge clk);
    end
    while (!axil.rvalid) @(negedge clk);
    if (axil.rresp != 0) $fatal(1, "read of %04h: response %0d", offset, axil.rresp);
    value = axil.rdata;
    @(negedge clk);
    axil.rready = 0;
  endtask

  task automatic expect_read(int unsigned offset, logic [31:0] wanted_value);
    logic [31:0] value;
    axil_read(offset, value);
    if (value != wanted_value)
      $fatal(1, "register %04h is %08h, not %08h", offset, value, wanted_value);
  endtask

  task automatic send_token(logic first);
    @(negedge clk);
    token.payload = '{new_sequence: first, default: '0};
    token.valid = 1;
    do @(posedge clk); while (!token.ready);
    token.valid <= 0;
  endtask

  task automatic send_route(logic [LayerBits-1:0] layer, int unsigned first);
    @(negedge clk);
    route.payload = '0;
    route.payload.layer = layer;
    wanted[layer] = '0;
    for (int unsigned i = 0; i < TopK; i++) begin
      route.payload.experts[i] = ExpertBits'((first + i) % NumExperts);
      wanted[layer][(first + i) % NumExperts] = 1;
    end
    route.valid = 1;
    do @(posedge clk); while (!route.ready);
    route.valid <= 0;
  endtask

  // The run ---------------------------------------------------------------------------------

  initial begin
    logic [31:0] status, hits;
    axil.awvalid = 0;
    axil.wvalid = 0;
    axil.arvalid = 0;
    axil.bready = 0;
    axil.rready = 0;
    {axil.awprot, axil.arprot} = '0;
    axil.wstrb = '1;
    token.valid = 0;
    route.valid = 0;
    repeat (4) @(negedge clk);
    rst_n = 1;

    expect_read(Identity, "STMO");
    expect_read(Capability0, NumLayers | NumExperts << 16);
    for (int unsigned layer = 0; layer < NumLayers; layer++) begin
      axil_write(Segment + layer * 'h40 + 'h0, 32'(expert_address(layer, 0)));
      axil_write(Segment + layer * 'h40 + 'h4, 0);
      axil_write(Segment + layer * 'h40 + 'h8, SlotBytes);
      axil_write(Segment + layer * 'h40 + 'hc, SlotBeats);
    end

    do axil_read(Status, status); while (!status[2]);
    if (status != 'b100) $fatal(1, "STATUS is %08h when the tables are clear", status);

    // More slots than there are: refused, and an interrupt.
    axil_write(IrqEnable, 'h10);
    axil_write(Quota, NumExperts + 1);
    axil_write(Commit, 1);
    axil_read(Status, status);
    if (!status[1] || status[0] || !irq) $fatal(1, "an illegal quota was not refused");
    axil_write(Status, 'h2);
    axil_write(IrqStatus, 'h10);
    @(negedge clk);
    if (irq) $fatal(1, "the interrupt was not cleared");
    axil_write(Quota, 1);
    axil_write(Commit, 1);
    do axil_read(Status, status); while (status[0]);
    if (status[1]) $fatal(1, "a legal quota was refused");

    // Every other token uses the same experts.
    for (int unsigned i = 0; i < Tokens; i++) begin
      send_token(i == 0);
      for (int unsigned layer = 0; layer < NumLayers; layer++) begin
        send_route(LayerBits'(layer), 2 * layer + 3 * (i % 2));
        while (grants != (i * NumLayers + layer + 1) * TopK) @(negedge clk);
      end
    end
    do axil_read(Status, status); while (status[3]);
    expect_read(Counter + 4 * CounterRoutes, Tokens * NumLayers);
    expect_read(Counter + 4 * CounterGrants, Tokens * NumLayers * TopK);
    axil_read(Counter + 4 * CounterHits, hits);
    if (hits == 0) $fatal(1, "nothing was ever resident");
    $display("%0d tokens, %0d grants, every word of every slot as in memory", Tokens, grants);
    $display("PASS");
    $finish;
  end

  initial begin
    repeat (Timeout) @(posedge clk);
    $fatal(1, "not over after %0d cycles", Timeout);
  end

endmodule : stmoe_axi_tb

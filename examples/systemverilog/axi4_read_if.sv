// SPDX-License-Identifier: Apache-2.0
// The read channels of AXI4.
interface axi4_read_if #(
    parameter int unsigned IdWidth = 4,
    parameter int unsigned AddrWidth = 32,
    parameter int unsigned DataWidth = 64
);
  logic [IdWidth-1:0] arid;
  logic [AddrWidth-1:0] araddr;
  logic [7:0] arlen;
  logic [2:0] arsize;
  logic [1:0] arburst;
  logic arlock;
  logic [3:0] arcache;
  logic [2:0] arprot;
  logic [3:0] arqos;
  logic arvalid, arready;
  logic [IdWidth-1:0] rid;
  logic [DataWidth-1:0] rdata;
  logic [1:0] rresp;
  logic rlast;
  logic rvalid, rready;

  modport manager(
      output arid, araddr, arlen, arsize, arburst, arlock, arcache, arprot, arqos, arvalid, rready,
      input arready, rid, rdata, rresp, rlast, rvalid
  );
  modport subordinate(
      input arid, araddr, arlen, arsize, arburst, arlock, arcache, arprot, arqos, arvalid, rready,
      output arready, rid, rdata, rresp, rlast, rvalid
  );
endinterface : axi4_read_if

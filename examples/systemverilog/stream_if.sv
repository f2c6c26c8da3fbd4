// SPDX-License-Identifier: Apache-2.0
// One beat is handed over in each cycle in which valid and ready are high. valid waits for nothing,
// and the payload holds until it is taken.
interface stream_if #(
    parameter type payload_t = logic
);
  payload_t payload;
  logic valid, ready;

  modport source(output payload, valid, input ready);
  modport sink(input payload, valid, output ready);
endinterface : stream_if

# SPDX-License-Identifier: Apache-2.0
# Vivado constraints for an engine made with `stmoe generate --memory-clock`. Both clocks need a
# create_clock (or come from an MMCM); nothing between them may be cut with set_clock_groups or
# set_false_path, which would take the limits below out of force.
#
# The one figure to set: at most the shorter of the two clock periods, in ns.
set stmoe_cdc_max_delay 4.000

# FIFO pointers are Gray-coded: one bit changes at a time, and the bits of one value must not
# arrive more than a cycle of the writing clock apart.
set_max_delay -datapath_only $stmoe_cdc_max_delay -from [get_cells -hier -regexp {.*crossing/(ar|r)/fifo/(produce_w|consume_r)_gry_reg\[\d+\]}] -to [get_cells -hier -regexp {.*crossing/(ar|r)/fifo/(produce|consume)_cdc/stage0_reg\[\d+\]}]
set_bus_skew $stmoe_cdc_max_delay -from [get_cells -hier -regexp {.*crossing/ar/fifo/produce_w_gry_reg\[\d+\]}] -to [get_cells -hier -regexp {.*crossing/ar/fifo/produce_cdc/stage0_reg\[\d+\]}]
set_bus_skew $stmoe_cdc_max_delay -from [get_cells -hier -regexp {.*crossing/ar/fifo/consume_r_gry_reg\[\d+\]}] -to [get_cells -hier -regexp {.*crossing/ar/fifo/consume_cdc/stage0_reg\[\d+\]}]
set_bus_skew $stmoe_cdc_max_delay -from [get_cells -hier -regexp {.*crossing/r/fifo/produce_w_gry_reg\[\d+\]}] -to [get_cells -hier -regexp {.*crossing/r/fifo/produce_cdc/stage0_reg\[\d+\]}]
set_bus_skew $stmoe_cdc_max_delay -from [get_cells -hier -regexp {.*crossing/r/fifo/consume_r_gry_reg\[\d+\]}] -to [get_cells -hier -regexp {.*crossing/r/fifo/consume_cdc/stage0_reg\[\d+\]}]

# The memory of each FIFO (distributed RAM, written by one clock and read by the other): a word is
# read two cycles after it was written at the earliest.
set_max_delay -datapath_only $stmoe_cdc_max_delay -from [get_cells -hier -regexp {.*crossing/(ar|r)/fifo/storage_reg.*}] -to [get_clocks -of_objects [get_cells -hier -regexp {.*crossing_reset/(answer|hold)_reg}]]

# The reset handshake's answer, and the resets, which are set at once and released in step.
set_max_delay -datapath_only $stmoe_cdc_max_delay -from [get_cells -hier -regexp {.*crossing_reset/answer_reg}] -to [get_cells -hier -regexp {.*crossing_reset/answer_cdc/stage0_reg}]
set_false_path -to [get_pins -of_objects [get_cells -hier -regexp {.*(crossing_reset/reset_cdc|crossing/(ar|r)/fifo/rst_cdc)/stage[01]_reg}] -filter {REF_PIN_NAME == PRE}]

# Synchronisers stay together and are not optimised.
set_property ASYNC_REG TRUE [get_cells -hier -regexp {.*crossing(_reset|/(ar|r)/fifo)/(produce|consume|rst|answer|reset)_cdc/stage[01]_reg(\[\d+\])?}]

# SPDX-License-Identifier: Apache-2.0
# The same for tools that read plain SDC (OpenSTA, Quartus, Genus): all paths between the two
# clocks end in a synchroniser, in the memory of a FIFO, or at an asynchronous set, so one limit for
# all of them is right: Gray-coded pointers must not spread over more than a cycle.
#
# Set both periods, in ns. The limit is the shorter one; hold does not apply between the clocks.
set stmoe_engine_period 10.000
set stmoe_memory_period 4.000

create_clock -name clk -period $stmoe_engine_period [get_ports clk]
create_clock -name m_axi_aclk -period $stmoe_memory_period [get_ports m_axi_aclk]

set stmoe_cdc_max_delay [expr {min($stmoe_engine_period, $stmoe_memory_period)}]
set_max_delay $stmoe_cdc_max_delay -from [get_clocks clk] -to [get_clocks m_axi_aclk]
set_max_delay $stmoe_cdc_max_delay -from [get_clocks m_axi_aclk] -to [get_clocks clk]
set_false_path -hold -from [get_clocks clk] -to [get_clocks m_axi_aclk]
set_false_path -hold -from [get_clocks m_axi_aclk] -to [get_clocks clk]

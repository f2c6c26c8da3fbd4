/* SPDX-License-Identifier: Apache-2.0
 *
 * The registers in the processor's memory map, as device memory: neither cached nor reordered.
 */
#include "stmoe.h"

uint32_t stmoe_read32(uintptr_t address)
{
    return *(const volatile uint32_t *)address;
}

void stmoe_write32(uintptr_t address, uint32_t value)
{
    *(volatile uint32_t *)address = value;
}

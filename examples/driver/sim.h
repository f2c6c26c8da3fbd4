/* SPDX-License-Identifier: Apache-2.0
 *
 * What the simulation offers the driver's test besides stmoe_read32() and stmoe_write32(). The
 * clock runs only while one of these waits for something.
 */
#ifndef SIM_H
#define SIM_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Where the simulated bus has the engine. */
#define SIM_BASE ((uintptr_t)0x40000000u)

/* Hands a token, or the route of one layer, to the engine. */
void sim_token(bool new_sequence);
void sim_route(unsigned layer, const unsigned *experts, unsigned count);

/* Waits until there have been `count` grants since reset. */
void sim_wait_grants(unsigned count);

/* Level of the interrupt. */
bool sim_irq(void);

/* Accesses that were answered with an error since the last call. */
unsigned sim_bus_errors(void);

/* The test: 0 when all is well. */
int driver_test(void);

#ifdef __cplusplus
}
#endif

#endif /* SIM_H */

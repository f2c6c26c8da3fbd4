/* SPDX-License-Identifier: Apache-2.0
 *
 * A driver for the registers of the ST-MoE prefetch engine, without an operating system:
 * freestanding C11, no allocation, no global state. It takes the shape of the engine from its
 * CAPABILITY registers, so one binary serves every configuration. Registers: docs/registers.md.
 *
 * stmoe_probe() comes first. Then segments, quotas, threshold and control in any order,
 * stmoe_commit(), and the first token. A function that can fail returns an enum stmoe_result and
 * has changed nothing when that is STMOE_RANGE.
 */
#ifndef STMOE_H
#define STMOE_H

#include <stdbool.h>
#include <stdint.h>

#include "stmoe_registers.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One access to a register, `address` being that of the engine plus the offset. stmoe_mmio.c has
 * them for registers that lie in memory; link others for any other way to the bus. */
uint32_t stmoe_read32(uintptr_t address);
void stmoe_write32(uintptr_t address, uint32_t value);

enum stmoe_result {
    STMOE_OK = 0,
    STMOE_ABSENT,       /* IDENTITY is not an engine's */
    STMOE_INCOMPATIBLE, /* the register map has another major version, or is older than this */
    STMOE_RANGE,        /* an argument is out of range; nothing was written */
    STMOE_REFUSED,      /* the engine refused the configuration and keeps the one before */
    STMOE_TIMEOUT       /* it did not happen within `polls` reads of STATUS */
};

/* One engine, and its shape as stmoe_probe() found it. */
struct stmoe {
    uintptr_t base;
    uint32_t version; /* as VERSION has it: major << 16 | minor << 8 | patch */
    unsigned num_layers, num_experts, top_k;
    unsigned spatial_depth; /* spatial predictors that were built, D */
    unsigned num_slots;
    uint32_t slot_bytes; /* largest expert */
    unsigned beat_bytes; /* one AXI beat: what addresses and sizes are multiples of */
    unsigned addr_width; /* bits of an AXI address */
    unsigned num_segments;
    int32_t threshold_limit; /* thresholds are -limit to limit - 1 quarter units */
};

/* Causes of the interrupt; or them together. */
enum stmoe_cause {
    STMOE_IRQ_ERROR = STMOE_IRQ_STATUS_ERROR_MASK,
    STMOE_IRQ_WATCHDOG = STMOE_IRQ_STATUS_WATCHDOG_MASK,
    STMOE_IRQ_ILLEGAL = STMOE_IRQ_STATUS_ILLEGAL_MASK,
    STMOE_IRQ_COUNTER_WRAP = STMOE_IRQ_STATUS_COUNTER_WRAP_MASK,
    STMOE_IRQ_COMMIT_REFUSED = STMOE_IRQ_STATUS_COMMIT_REFUSED_MASK,
    STMOE_IRQ_ALL = STMOE_IRQ_ERROR | STMOE_IRQ_WATCHDOG | STMOE_IRQ_ILLEGAL |
                    STMOE_IRQ_COUNTER_WRAP | STMOE_IRQ_COMMIT_REFUSED
};

/* Switches of stmoe_set_control(); or them together. After reset all are on (STMOE_ADAPTIVE: where
 * the engine was built so). */
enum stmoe_control {
    STMOE_PREFETCH = STMOE_CONTROL_PREFETCH_ENABLE_MASK,
    STMOE_LEARN = STMOE_CONTROL_LEARNING_ENABLE_MASK,
    STMOE_ORDERED = STMOE_CONTROL_ORDERED_MASK,
    STMOE_ADAPTIVE = STMOE_CONTROL_ADAPTIVE_MASK
};

/* Finds the engine at `base` and reads its shape. STMOE_ABSENT, STMOE_INCOMPATIBLE. */
enum stmoe_result stmoe_probe(struct stmoe *engine, uintptr_t base);

/* Waits until the tables have been cleared after reset. STMOE_TIMEOUT. */
enum stmoe_result stmoe_wait_ready(const struct stmoe *engine, uint32_t polls);

/* Where part `segment` of a layer's experts lies: `bytes` of expert e at `address` + e * `stride`.
 * From the next commit on, which checks that the parts of a layer together are at most `slot_bytes`
 * and more than nothing; a load under way ends as it began. 0 bytes: no such part. All three are
 * multiples of `beat_bytes`. STMOE_RANGE. */
enum stmoe_result stmoe_set_segment(const struct stmoe *engine, unsigned layer, unsigned segment,
                                    uint64_t address, uint32_t stride, uint32_t bytes);

/* Slots that stay with a layer, from the next commit on. STMOE_RANGE: more than its experts. */
enum stmoe_result stmoe_set_quota(const struct stmoe *engine, unsigned layer, unsigned slots);

/* Confidence threshold in quarter units, from the next commit on; with STMOE_ADAPTIVE the lowest
 * that a layer's may be. STMOE_RANGE. */
enum stmoe_result stmoe_set_threshold(const struct stmoe *engine, int32_t quarters);

/* Which of enum stmoe_control are on, from the next commit on. */
void stmoe_set_control(const struct stmoe *engine, uint32_t switches);

/* Which kinds of predictor are enabled, from the next commit on: bit 0 the bias, bit 1 the temporal
 * one, bit 1 + d the spatial one of distance d. STMOE_RANGE: one that was not built. */
enum stmoe_result stmoe_set_predictors(const struct stmoe *engine, uint32_t kinds);

/* Makes segments, quotas, threshold, control and predictors take effect, all at once.
 * STMOE_REFUSED: the quotas leave fewer than top_k slots, or a layer's parts do not fit its slots or
 * are nothing; all of them stay as they were in the engine, though not in its shadow registers.
 * STMOE_TIMEOUT: it is still pending. */
enum stmoe_result stmoe_commit(const struct stmoe *engine, uint32_t polls);

/* After a commit that moved experts: waits until no load reads from where they were, which is when
 * that memory may be used for something else. The next commit that moves any waits on the bus
 * until then. STMOE_TIMEOUT. */
enum stmoe_result stmoe_wait_moved(const struct stmoe *engine, uint32_t polls);

/* An event counter, modulo 2^32. */
uint32_t stmoe_counter(const struct stmoe *engine, enum stmoe_counter which);

/* Clock cycles since reset, 40 bits. Not for two callers at once: the upper part is sampled. */
uint64_t stmoe_cycle(const struct stmoe *engine);

/* Whether the engine has work in progress. */
bool stmoe_busy(const struct stmoe *engine);

/* Which of enum stmoe_cause raise the interrupt. */
void stmoe_irq_enable(const struct stmoe *engine, uint32_t causes);

/* The causes since they were last taken, enabled or not; clears those that it returns. */
uint32_t stmoe_irq_take(const struct stmoe *engine);

#ifdef __cplusplus
}
#endif

#endif /* STMOE_H */

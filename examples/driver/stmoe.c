/* SPDX-License-Identifier: Apache-2.0 */
#include "stmoe.h"

/* The register map this was written for; a later minor version only adds to it. */
#define MAJOR 1u
#define MINOR 0u

#define FIELD(value, register_field)                                                              \
    (((value) & STMOE_##register_field##_MASK) >> STMOE_##register_field##_SHIFT)

static uint32_t get(const struct stmoe *engine, uint32_t offset)
{
    return stmoe_read32(engine->base + offset);
}

static void put(const struct stmoe *engine, uint32_t offset, uint32_t value)
{
    stmoe_write32(engine->base + offset, value);
}

/* Waits for `value` in the bits of STATUS that `mask` says. */
static enum stmoe_result wait_status(const struct stmoe *engine, uint32_t mask, uint32_t value,
                                     uint32_t polls)
{
    for (; polls > 0; polls--) {
        if ((get(engine, STMOE_STATUS_OFFSET) & mask) == value)
            return STMOE_OK;
    }
    return STMOE_TIMEOUT;
}

enum stmoe_result stmoe_probe(struct stmoe *engine, uintptr_t base)
{
    uint32_t version, word;

    engine->base = base;
    if (get(engine, STMOE_IDENTITY_OFFSET) != STMOE_IDENTITY_RESET)
        return STMOE_ABSENT;
    version = get(engine, STMOE_VERSION_OFFSET);
    engine->version = version;
    if (FIELD(version, VERSION_MAJOR) != MAJOR || version >> 8 < (MAJOR << 8 | MINOR))
        return STMOE_INCOMPATIBLE;
    word = get(engine, STMOE_CAPABILITY0_OFFSET);
    engine->num_layers = FIELD(word, CAPABILITY0_NUM_LAYERS);
    engine->num_experts = FIELD(word, CAPABILITY0_NUM_EXPERTS);
    word = get(engine, STMOE_CAPABILITY1_OFFSET);
    engine->top_k = FIELD(word, CAPABILITY1_TOP_K);
    engine->spatial_depth = FIELD(word, CAPABILITY1_SPATIAL_DEPTH);
    word = get(engine, STMOE_CAPABILITY2_OFFSET);
    engine->num_slots = FIELD(word, CAPABILITY2_NUM_SLOTS);
    word = get(engine, STMOE_CAPABILITY3_OFFSET);
    engine->beat_bytes = FIELD(word, CAPABILITY3_AXI_DATA_WIDTH) / 8;
    engine->addr_width = FIELD(word, CAPABILITY3_AXI_ADDR_WIDTH);
    word = get(engine, STMOE_CAPABILITY4_OFFSET);
    engine->threshold_limit = (int32_t)1 << (FIELD(word, CAPABILITY4_SCORE_BITS) - 1);
    engine->num_segments = FIELD(word, CAPABILITY4_NUM_SEGMENTS);
    engine->slot_bytes = get(engine, STMOE_CAPABILITY5_OFFSET);
    return STMOE_OK;
}

enum stmoe_result stmoe_wait_ready(const struct stmoe *engine, uint32_t polls)
{
    return wait_status(engine, STMOE_STATUS_INITIALISED_MASK, STMOE_STATUS_INITIALISED_MASK, polls);
}

enum stmoe_result stmoe_set_segment(const struct stmoe *engine, unsigned layer, unsigned segment,
                                    uint64_t address, uint32_t stride, uint32_t bytes)
{
    if (layer >= engine->num_layers || segment >= engine->num_segments)
        return STMOE_RANGE;
    if (address >> engine->addr_width || bytes > engine->slot_bytes)
        return STMOE_RANGE;
    /* The last expert too; the engine does not look at that. */
    if (bytes != 0 &&
        (address + (uint64_t)stride * (engine->num_experts - 1) + bytes - 1) >> engine->addr_width)
        return STMOE_RANGE;
    if (((uint32_t)address | stride | bytes) & (engine->beat_bytes - 1))
        return STMOE_RANGE;
    put(engine, STMOE_SEGMENT_BASE_LOW_OFFSET(layer, segment), (uint32_t)address);
    put(engine, STMOE_SEGMENT_BASE_HIGH_OFFSET(layer, segment), (uint32_t)(address >> 32));
    put(engine, STMOE_SEGMENT_STRIDE_OFFSET(layer, segment), stride);
    put(engine, STMOE_SEGMENT_BEATS_OFFSET(layer, segment), bytes / engine->beat_bytes);
    return STMOE_OK;
}

enum stmoe_result stmoe_set_quota(const struct stmoe *engine, unsigned layer, unsigned slots)
{
    if (layer >= engine->num_layers || slots > engine->num_experts)
        return STMOE_RANGE;
    put(engine, STMOE_QUOTA_OFFSET(layer), slots);
    return STMOE_OK;
}

enum stmoe_result stmoe_set_threshold(const struct stmoe *engine, int32_t quarters)
{
    if (quarters < -engine->threshold_limit || quarters >= engine->threshold_limit)
        return STMOE_RANGE;
    put(engine, STMOE_THRESHOLD_OFFSET, (uint32_t)quarters);
    return STMOE_OK;
}

void stmoe_set_control(const struct stmoe *engine, uint32_t switches)
{
    put(engine, STMOE_CONTROL_OFFSET, switches);
}

enum stmoe_result stmoe_commit(const struct stmoe *engine, uint32_t polls)
{
    put(engine, STMOE_STATUS_OFFSET, STMOE_STATUS_COMMIT_REFUSED_MASK);
    put(engine, STMOE_COMMIT_OFFSET, STMOE_COMMIT_COMMIT_MASK);
    /* The write is answered when the check is done. */
    if (get(engine, STMOE_STATUS_OFFSET) & STMOE_STATUS_COMMIT_REFUSED_MASK)
        return STMOE_REFUSED;
    return wait_status(engine, STMOE_STATUS_COMMIT_PENDING_MASK, 0, polls);
}

enum stmoe_result stmoe_wait_moved(const struct stmoe *engine, uint32_t polls)
{
    return wait_status(engine,
                       STMOE_STATUS_COMMIT_PENDING_MASK | STMOE_STATUS_OLD_SEGMENTS_MASK, 0, polls);
}

enum stmoe_result stmoe_set_predictors(const struct stmoe *engine, uint32_t kinds)
{
    if (kinds >> (engine->spatial_depth + 2))
        return STMOE_RANGE;
    put(engine, STMOE_PREDICTORS_OFFSET, kinds);
    return STMOE_OK;
}

uint32_t stmoe_counter(const struct stmoe *engine, enum stmoe_counter which)
{
    return get(engine, STMOE_COUNTER_OFFSET(which));
}

uint64_t stmoe_cycle(const struct stmoe *engine)
{
    /* Reading the lower part samples the upper one. */
    uint32_t low = get(engine, STMOE_CYCLE_LOW_OFFSET);

    return (uint64_t)get(engine, STMOE_CYCLE_HIGH_OFFSET) << 32 | low;
}

bool stmoe_busy(const struct stmoe *engine)
{
    return (get(engine, STMOE_STATUS_OFFSET) & STMOE_STATUS_BUSY_MASK) != 0;
}

void stmoe_irq_enable(const struct stmoe *engine, uint32_t causes)
{
    put(engine, STMOE_IRQ_ENABLE_OFFSET, causes);
}

uint32_t stmoe_irq_take(const struct stmoe *engine)
{
    uint32_t causes = get(engine, STMOE_IRQ_STATUS_OFFSET);

    put(engine, STMOE_IRQ_STATUS_OFFSET, causes);
    return causes;
}

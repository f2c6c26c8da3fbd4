/* SPDX-License-Identifier: Apache-2.0
 *
 * The driver on the RTL: what an application does with an engine, with every answer checked.
 */
#include <stdio.h>

#include "sim.h"
#include "stmoe.h"

#define POLLS 10000u
#define TOKENS 6u
#define MAX_TOP_K 16u

static int failures;

#define CHECK(condition)                                                                          \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                        \
            failures++;                                                                           \
        }                                                                                         \
    } while (0)

/* Experts first, first + 1, ... of a layer. */
static void route(const struct stmoe *engine, unsigned layer, unsigned first)
{
    unsigned experts[MAX_TOP_K];

    for (unsigned i = 0; i < engine->top_k; i++)
        experts[i] = (first + i) % engine->num_experts;
    sim_route(layer, experts, engine->top_k);
}

static void test_probe(struct stmoe *engine)
{
    struct stmoe none;

    /* SCRATCH is no identity. */
    stmoe_write32(SIM_BASE + STMOE_SCRATCH_OFFSET, 0x12345678u);
    CHECK(stmoe_probe(&none, SIM_BASE + STMOE_SCRATCH_OFFSET) == STMOE_ABSENT);

    CHECK(stmoe_probe(engine, SIM_BASE) == STMOE_OK);
    CHECK(engine->version == STMOE_VERSION_RESET);
    CHECK(engine->num_layers == STMOE_QUOTA_LAYERS);
    CHECK(engine->num_segments == STMOE_SEGMENT_BEATS_SEGMENTS);
    CHECK(engine->slot_bytes == STMOE_CAPABILITY5_RESET);
    CHECK(engine->top_k >= 1 && engine->top_k <= MAX_TOP_K);
    CHECK(engine->num_slots >= engine->top_k);
    CHECK(engine->beat_bytes == 8 || engine->beat_bytes == 16);
    CHECK(stmoe_wait_ready(engine, POLLS) == STMOE_OK);
    CHECK(!stmoe_busy(engine));
    CHECK(sim_bus_errors() == 0);
    printf("engine: %u layers of %u experts, top-%u, %u slots of %lu bytes\n",
           engine->num_layers, engine->num_experts, engine->top_k, engine->num_slots,
           (unsigned long)engine->slot_bytes);
}

static void test_range(const struct stmoe *engine)
{
    const uint32_t beat = engine->beat_bytes;

    CHECK(stmoe_set_quota(engine, engine->num_layers, 0) == STMOE_RANGE);
    CHECK(stmoe_set_quota(engine, 0, engine->num_experts + 1) == STMOE_RANGE);
    CHECK(stmoe_set_threshold(engine, engine->threshold_limit) == STMOE_RANGE);
    CHECK(stmoe_set_threshold(engine, -engine->threshold_limit - 1) == STMOE_RANGE);
    CHECK(stmoe_set_segment(engine, engine->num_layers, 0, 0, 0, 0) == STMOE_RANGE);
    CHECK(stmoe_set_segment(engine, 0, engine->num_segments, 0, 0, 0) == STMOE_RANGE);
    CHECK(stmoe_set_segment(engine, 0, 0, beat / 2, 0, beat) == STMOE_RANGE);
    CHECK(stmoe_set_segment(engine, 0, 0, 0, beat + 1, beat) == STMOE_RANGE);
    CHECK(stmoe_set_segment(engine, 0, 0, 0, 0, engine->slot_bytes + beat) == STMOE_RANGE);
    CHECK(stmoe_set_segment(engine, 0, 0, (uint64_t)1 << engine->addr_width, 0, beat) ==
          STMOE_RANGE);
    CHECK(stmoe_set_segment(engine, 0, 0, ((uint64_t)1 << engine->addr_width) - beat, beat, beat) ==
          STMOE_RANGE);
    CHECK(stmoe_set_predictors(engine, 1u << (engine->spatial_depth + 2)) == STMOE_RANGE);
    CHECK(sim_bus_errors() == 0);
}

static void configure(const struct stmoe *engine)
{
    for (unsigned layer = 0; layer < engine->num_layers; layer++) {
        /* Two parts an expert, as of a checkpoint that keeps gate and up apart from down. */
        const uint32_t half = engine->slot_bytes / 2;
        const uint64_t address = (uint64_t)layer << 24;

        CHECK(stmoe_set_segment(engine, layer, 0, address, half, half) == STMOE_OK);
        CHECK(stmoe_set_segment(engine, layer, 1, address + (1u << 20), half, half) == STMOE_OK);
        CHECK(stmoe_set_quota(engine, layer, 1) == STMOE_OK);
    }
    CHECK(stmoe_set_threshold(engine, -400) == STMOE_OK);
    CHECK(stmoe_set_predictors(engine, (1u << (engine->spatial_depth + 2)) - 1) == STMOE_OK);
    stmoe_set_control(engine, STMOE_PREFETCH | STMOE_LEARN | STMOE_ORDERED);
    CHECK(stmoe_commit(engine, POLLS) == STMOE_OK);
    CHECK(sim_bus_errors() == 0);
}

static void test_refused_commit(const struct stmoe *engine)
{
    stmoe_irq_enable(engine, STMOE_IRQ_COMMIT_REFUSED);
    CHECK(!sim_irq());
    for (unsigned layer = 0; layer < engine->num_layers; layer++)
        CHECK(stmoe_set_quota(engine, layer, engine->num_experts) == STMOE_OK);
    CHECK(stmoe_commit(engine, POLLS) == STMOE_REFUSED);
    CHECK(sim_irq());
    CHECK(stmoe_irq_take(engine) == STMOE_IRQ_COMMIT_REFUSED);
    CHECK(!sim_irq());
    CHECK(stmoe_irq_take(engine) == 0);
}

static void test_segments_that_do_not_fit(const struct stmoe *engine)
{
    const uint32_t beat = engine->beat_bytes;

    /* Each part fits a slot, but both together do not. */
    CHECK(stmoe_set_segment(engine, 0, 1, 1u << 20, beat, engine->slot_bytes) == STMOE_OK);
    CHECK(stmoe_commit(engine, POLLS) == STMOE_REFUSED);
    CHECK(stmoe_irq_take(engine) == STMOE_IRQ_COMMIT_REFUSED);
    /* A layer without anything to load. */
    for (unsigned part = 0; part < engine->num_segments; part++)
        CHECK(stmoe_set_segment(engine, 0, part, 0, 0, 0) == STMOE_OK);
    CHECK(stmoe_commit(engine, POLLS) == STMOE_REFUSED);
    CHECK(stmoe_irq_take(engine) == STMOE_IRQ_COMMIT_REFUSED);
    configure(engine);
    CHECK(stmoe_wait_moved(engine, POLLS) == STMOE_OK);
}

static void test_traffic(const struct stmoe *engine)
{
    unsigned grants = 0;
    const uint64_t begin = stmoe_cycle(engine);
    const unsigned needed = TOKENS * engine->num_layers * engine->top_k;

    for (unsigned token = 0; token < TOKENS; token++) {
        sim_token(token == 0);
        for (unsigned layer = 0; layer < engine->num_layers; layer++) {
            route(engine, layer, layer);
            grants += engine->top_k;
            sim_wait_grants(grants);
        }
    }
    for (unsigned i = 0; i < POLLS && stmoe_busy(engine); i++)
        ;
    CHECK(!stmoe_busy(engine));
    CHECK(stmoe_cycle(engine) > begin);
    CHECK(stmoe_counter(engine, STMOE_COUNTER_TOKENS) == TOKENS);
    CHECK(stmoe_counter(engine, STMOE_COUNTER_SEQUENCES) == 1);
    CHECK(stmoe_counter(engine, STMOE_COUNTER_ROUTES) == TOKENS * engine->num_layers);
    CHECK(stmoe_counter(engine, STMOE_COUNTER_GRANTS) == needed);
    CHECK(stmoe_counter(engine, STMOE_COUNTER_RELEASES) == needed);
    CHECK(stmoe_counter(engine, STMOE_COUNTER_ERROR_GRANTS) == 0);
    CHECK(stmoe_counter(engine, STMOE_COUNTER_HITS) + stmoe_counter(engine, STMOE_COUNTER_LATES) +
              stmoe_counter(engine, STMOE_COUNTER_MISSES) ==
          needed);
    /* Every token uses the same experts, and the buffer has room for all of them. */
    CHECK(stmoe_counter(engine, STMOE_COUNTER_HITS) > 0);
    CHECK(stmoe_irq_take(engine) == 0);
    printf("%u tokens: %u experts needed, %u granted\n", TOKENS, needed, grants);
}

static void test_interrupt_of_an_illegal_route(const struct stmoe *engine)
{
    const unsigned legal = stmoe_counter(engine, STMOE_COUNTER_ROUTES);
    unsigned same[MAX_TOP_K] = {0};

    stmoe_irq_enable(engine, STMOE_IRQ_ALL & ~(uint32_t)STMOE_IRQ_ILLEGAL);
    sim_token(false);
    sim_route(0, same, engine->top_k); /* expert 0 more than once */
    CHECK(stmoe_counter(engine, STMOE_COUNTER_ILLEGAL) == 1);
    CHECK(stmoe_counter(engine, STMOE_COUNTER_ROUTES) == legal);
    CHECK(!sim_irq());
    stmoe_irq_enable(engine, STMOE_IRQ_ALL);
    CHECK(sim_irq());
    CHECK(stmoe_irq_take(engine) == STMOE_IRQ_ILLEGAL);
    CHECK(!sim_irq());
}

int driver_test(void)
{
    struct stmoe engine;

    test_probe(&engine);
    test_range(&engine);
    test_refused_commit(&engine);
    configure(&engine);
    test_segments_that_do_not_fit(&engine);
    test_traffic(&engine);
    test_interrupt_of_an_illegal_route(&engine);
    CHECK(sim_bus_errors() == 0);
    puts(failures ? "FAIL" : "PASS");
    return failures != 0;
}

// A grid on the host: blocks one after the other, the lanes of a block as fibers that meet at barriers.
#include "emulator.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "fibers.h"

namespace emu {

enum Order : int { FORWARD = 0, REVERSE = 1, RANDOM = 2 };

/// Lanes that meet in shuffles. Values lie twice, by turns: a lane may bring its next one while others read the last. So do
/// the marks by which a race detector knows of a meeting: who leaves one knows nothing of who has come to the next.
struct Warp {
    uint64_t values[2][32];
    char marks[2];
    uint32_t arrived = 0, expected = 0;
    uint64_t opened = 0;
};

// Static objects of the kernel's file register here while it is loaded, whichever file is first.
std::vector<Shared *> &all_shared() {
    static std::vector<Shared *> every;
    return every;
}
std::vector<const Registered *> &all_kernels() {
    static std::vector<const Registered *> every;
    return every;
}

Shared::Shared(size_t bytes) : bytes(bytes), start(new char[bytes]) { all_shared().push_back(this); }

Registered::Registered(const char *name, void (*call)(const void *), size_t bytes, unsigned threads)
    : name(name), call(call), bytes(bytes), threads(threads) {
    all_kernels().push_back(this);
}

struct Grid {
    Fibers fibers;
    Index grid, block, at;
    unsigned lanes = 0, live = 0, arrived = 0;
    uint64_t opened = 0;
    char marks[2];
    std::vector<Warp> warps;
    std::function<void()> body;
    std::mt19937 random;
    std::string failure;
    char begin = 0, end = 0;
};
static Grid here;

EMU_SCHEDULER unsigned lane() { return here.fibers.current->lane; }
EMU_SCHEDULER Index thread_index() { return {lane(), 0, 0}; }
EMU_SCHEDULER Index block_index() { return here.at; }
EMU_SCHEDULER Index block_size() { return here.block; }
EMU_SCHEDULER Index grid_size() { return here.grid; }

/// Ends the launch from within a lane, which never runs on.
[[noreturn]] EMU_SCHEDULER static void fail(const std::string &what) {
    here.failure = "block " + std::to_string(here.at.x) + ", lane " + std::to_string(lane()) + ": " + what;
    for (;;) {
        here.fibers.yield();
    }
}

void check_aligned(const void *address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        fail("a load or store of " + std::to_string(bytes) + " bytes at an address that is no multiple of them");
    }
}

EMU_SCHEDULER void block_barrier() {
    Fiber &fiber = *here.fibers.current;
    char *mark = &here.marks[here.opened % 2];
    release(mark);
    // A lane that has ended never comes: the kernels here keep all lanes until their last barrier.
    if (++here.arrived == here.lanes) {
        here.arrived = 0;
        here.opened++;
    } else {
        fiber.wait = Wait::Block;
        fiber.since = here.opened;
    }
    // The last to come is not the first to go on: the order of the launch decides.
    here.fibers.yield();
    acquire(mark);
}

/// Waits for all lanes of `mask`, and gives which turn of the warp this was.
EMU_SCHEDULER static uint64_t turn_of_warp(uint32_t mask) {
    Fiber &fiber = *here.fibers.current;
    Warp &warp = here.warps[fiber.lane / 32];
    const uint32_t own = 1u << fiber.lane % 32;
    if (!(mask & own)) {
        fail("a lane that its own mask leaves out");
    }
    if (warp.arrived != 0 && warp.expected != mask) {
        fail("lanes of a warp came with different masks");
    }
    const uint64_t turn = warp.opened;
    release(&warp.marks[turn % 2]);
    warp.expected = mask;
    warp.arrived |= own;
    if (warp.arrived == mask) {
        warp.arrived = 0;
        warp.opened++;
    } else {
        fiber.wait = Wait::Warp;
        fiber.since = turn;
        here.fibers.yield();
    }
    acquire(&warp.marks[turn % 2]);
    return turn;
}

EMU_SCHEDULER void warp_barrier(uint32_t mask) { turn_of_warp(mask); }

EMU_SCHEDULER uint64_t shuffled(uint32_t mask, uint64_t value, unsigned source, bool within) {
    Fiber &fiber = *here.fibers.current;
    Warp &warp = here.warps[fiber.lane / 32];
    warp.values[warp.opened % 2][fiber.lane % 32] = value;
    const uint64_t turn = turn_of_warp(mask);
    if (!within) {
        return value;
    }
    if (!(mask >> source & 1)) {
        fail("a shuffle from a lane that its mask leaves out");
    }
    return warp.values[turn % 2][source];
}

static const char *letter(Wait wait) {
    return wait == Wait::Block ? "b" : wait == Wait::Warp ? "w" : wait == Wait::Ended ? "." : "r";
}

EMU_SCHEDULER static void lane_body() {
    Fibers::arrived(*here.fibers.current);
    for (;;) {
        acquire(&here.begin);
        here.body();
        release(&here.end);
        here.fibers.current->wait = Wait::Ended;
        here.live--;
        here.fibers.yield();
    }
}

EMU_SCHEDULER static bool can_run(const Fiber &fiber) {
    switch (fiber.wait) {
        case Wait::Nothing: return true;
        case Wait::Block: return fiber.since != here.opened;
        case Wait::Warp: return fiber.since != here.warps[fiber.lane / 32].opened;
        case Wait::Ended: return false;
    }
    return false;
}

static void fail_stuck() {
    here.failure = "block " + std::to_string(here.at.x) + ": lanes wait for others that never come: ";
    for (unsigned each = 0; each < here.lanes; each++) {
        here.failure += letter(here.fibers.at(each).wait);
    }
}

/// Runs some lanes, one after the other, until each waits or has ended, or the block's barrier opens. Whether any ran.
EMU_SCHEDULER static bool run_lanes(const unsigned *first, const unsigned *last) {
    bool moved = false;
    const uint64_t opened = here.opened;
    for (const unsigned *each = first; each != last && here.failure.empty() && here.opened == opened; each++) {
        Fiber &fiber = here.fibers.at(*each);
        if (can_run(fiber)) {
            fiber.wait = Wait::Nothing;
            here.fibers.resume(fiber);
            moved = true;
        }
    }
    return moved;
}

/// Forward and reverse, a warp gets as far as it can before the next one begins, and the first one goes on first from a
/// barrier; at random, lanes of all warps take turns.
EMU_SCHEDULER static void run_block(Order order) {
    here.fibers.grow(here.lanes, lane_body);
    here.warps.assign((here.lanes + 31) / 32, Warp{});
    here.live = here.lanes;
    here.arrived = 0;
    for (Shared *shared : all_shared()) {
        std::fill_n(shared->start, shared->bytes, char(0xff));
    }
    std::vector<unsigned> turns(here.lanes);
    std::iota(turns.begin(), turns.end(), 0u);
    if (order == REVERSE) {
        std::reverse(turns.begin(), turns.end());
    }
    for (unsigned each : turns) {
        here.fibers.at(each).lane = each;
        here.fibers.at(each).wait = Wait::Nothing;
    }
    const unsigned together = order == RANDOM ? here.lanes : 32;
    release(&here.begin);
    while (here.live && here.failure.empty()) {
        if (order == RANDOM) {
            std::shuffle(turns.begin(), turns.end(), here.random);
        }
        bool moved = false;
        for (unsigned first = 0; first < here.lanes; first += together) {
            const unsigned *lanes = turns.data() + first;
            const unsigned *end = lanes + std::min(together, here.lanes - first);
            const uint64_t opened = here.opened;
            while (run_lanes(lanes, end)) {
                moved = true;
                if (order == RANDOM || here.opened != opened) {
                    break;
                }
            }
            if (here.opened != opened) {
                break;
            }
        }
        if (!moved && here.failure.empty()) {
            fail_stuck();
        }
    }
    acquire(&here.end);
}

static void run_grid(Order order, unsigned seed) {
    here.random.seed(seed);
    here.failure.clear();
    here.lanes = here.block.x;
    std::vector<unsigned> blocks(here.grid.x);
    std::iota(blocks.begin(), blocks.end(), 0u);
    if (order == REVERSE) {
        std::reverse(blocks.begin(), blocks.end());
    } else if (order == RANDOM) {
        std::shuffle(blocks.begin(), blocks.end(), here.random);
    }
    for (unsigned each : blocks) {
        here.at = {each, 0, 0};
        run_block(order);
        if (!here.failure.empty()) {
            here.fibers.drop();
            return;
        }
    }
}

static int refuse(const std::string &why) {
    here.failure = why;
    return 1;
}

}  // namespace emu

/// What the last launch that failed has to say.
extern "C" const char *zx_failure() { return emu::here.failure.c_str(); }

/// Runs a kernel to its end: 0, or 1 where it failed. `order`: 0 forward, 1 reverse, 2 random by `seed`.
extern "C" int zx_launch(const char *entry, unsigned grid, unsigned block, const void *args, size_t bytes, int order,
                         unsigned seed) {
    using namespace emu;
    const std::string name = entry;
    for (const Registered *each : all_kernels()) {
        if (each->name != name) {
            continue;
        }
        if (each->bytes != bytes) {
            return refuse(name + ": expected arguments of " + std::to_string(each->bytes) + " bytes, got " +
                          std::to_string(bytes));
        }
        if (grid == 0 || block != each->threads) {
            return refuse(name + ": expected blocks of " + std::to_string(each->threads) + " lanes, got " +
                          std::to_string(grid) + " of " + std::to_string(block));
        }
        const std::vector<char> copy(static_cast<const char *>(args), static_cast<const char *>(args) + bytes);
        here.grid = {grid, 1, 1};
        here.block = {block, 1, 1};
        here.body = [each, &copy] { each->call(copy.data()); };
        run_grid(static_cast<Order>(order), seed);
        here.body = nullptr;
        return here.failure.empty() ? 0 : 1;
    }
    return refuse(name + ": no kernel of that name");
}

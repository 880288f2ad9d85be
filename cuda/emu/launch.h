// A grid on the host: blocks one after the other, the lanes of a block as fibers that meet at barriers.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>

#include "fibers.h"

namespace emu {

struct Index {
    unsigned x, y, z;
};

enum Order : int { FORWARD = 0, REVERSE = 1, RANDOM = 2 };

/// Lanes that meet in shuffles. Values lie twice, by turns: a lane may bring its next one while others read the last.
struct Warp {
    uint64_t values[2][32];
    uint32_t arrived = 0, expected = 0;
    uint64_t opened = 0;
};

/// Memory of a block that all its lanes see, filled with nonsense when a block begins.
class Shared {
   public:
    explicit Shared(size_t bytes) : bytes(bytes), start(new char[bytes]) { all().push_back(this); }
    void *memory() { return start.get(); }
    void poison() { std::memset(start.get(), 0xcd, bytes); }
    static std::vector<Shared *> &all() {
        static std::vector<Shared *> every;
        return every;
    }

   private:
    size_t bytes;
    std::unique_ptr<char[]> start;
};

struct Grid {
    Fibers fibers;
    Index grid, block, at;
    unsigned lanes = 0, live = 0, arrived = 0;
    uint64_t opened = 0;
    std::vector<Warp> warps;
    std::vector<char> dynamic;
    std::function<void()> body;
    std::mt19937 random;
    std::string failure;
    char begin = 0, end = 0;
};
inline Grid here;

EMU_SCHEDULER inline unsigned lane() { return here.fibers.current->lane; }
EMU_SCHEDULER inline Index thread_index() { return {lane(), 0, 0}; }
EMU_SCHEDULER inline Index block_index() { return here.at; }
EMU_SCHEDULER inline Index block_size() { return here.block; }
EMU_SCHEDULER inline Index grid_size() { return here.grid; }

/// Ends the launch from within a lane, which never runs on.
[[noreturn]] EMU_SCHEDULER inline void fail(const std::string &what) {
    here.failure = "block " + std::to_string(here.at.x) + ", lane " + std::to_string(lane()) + ": " + what;
    for (;;) {
        here.fibers.yield();
    }
}

inline void check_aligned(const void *address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        fail("a load or store of " + std::to_string(bytes) + " bytes at an address that is no multiple of them");
    }
}

EMU_SCHEDULER inline void block_barrier() {
    Fiber &fiber = *here.fibers.current;
    release(&here.opened);
    // A lane that has ended never comes: the kernels here keep all lanes until their last barrier.
    if (++here.arrived == here.lanes) {
        here.arrived = 0;
        here.opened++;
    } else {
        fiber.wait = Wait::Block;
        fiber.since = here.opened;
        here.fibers.yield();
    }
    acquire(&here.opened);
}

/// Waits for all lanes of `mask`, and gives which turn of the warp this was.
EMU_SCHEDULER inline uint64_t warp_barrier(uint32_t mask) {
    Fiber &fiber = *here.fibers.current;
    Warp &warp = here.warps[fiber.lane / 32];
    const uint32_t own = 1u << fiber.lane % 32;
    if (!(mask & own)) {
        fail("a lane that its own mask leaves out");
    }
    if (warp.arrived != 0 && warp.expected != mask) {
        fail("lanes of a warp came with different masks");
    }
    release(&warp.opened);
    const uint64_t turn = warp.opened;
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
    acquire(&warp.opened);
    return turn;
}

EMU_SCHEDULER inline uint64_t shuffled(uint32_t mask, uint64_t value, unsigned source, bool within) {
    Fiber &fiber = *here.fibers.current;
    Warp &warp = here.warps[fiber.lane / 32];
    warp.values[warp.opened % 2][fiber.lane % 32] = value;
    const uint64_t turn = warp_barrier(mask);
    if (!within) {
        return value;
    }
    if (!(mask >> source & 1)) {
        fail("a shuffle from a lane that its mask leaves out");
    }
    return warp.values[turn % 2][source];
}

inline const char *letter(Wait wait) {
    return wait == Wait::Block ? "b" : wait == Wait::Warp ? "w" : wait == Wait::Ended ? "." : "r";
}

EMU_SCHEDULER inline void lane_body() {
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

EMU_SCHEDULER inline bool can_run(const Fiber &fiber) {
    switch (fiber.wait) {
        case Wait::Nothing: return true;
        case Wait::Block: return fiber.since != here.opened;
        case Wait::Warp: return fiber.since != here.warps[fiber.lane / 32].opened;
        case Wait::Ended: return false;
    }
    return false;
}

EMU_SCHEDULER inline void run_block(Order order) {
    here.fibers.grow(here.lanes, lane_body);
    here.warps.assign((here.lanes + 31) / 32, Warp{});
    here.live = here.lanes;
    here.arrived = 0;
    for (Shared *shared : Shared::all()) {
        shared->poison();
    }
    std::fill(here.dynamic.begin(), here.dynamic.end(), char(0xcd));
    std::vector<unsigned> turns(here.lanes);
    std::iota(turns.begin(), turns.end(), 0u);
    if (order == REVERSE) {
        std::reverse(turns.begin(), turns.end());
    }
    for (unsigned each : turns) {
        here.fibers.at(each).lane = each;
        here.fibers.at(each).wait = Wait::Nothing;
    }
    release(&here.begin);
    while (here.live && here.failure.empty()) {
        if (order == RANDOM) {
            std::shuffle(turns.begin(), turns.end(), here.random);
        }
        bool moved = false;
        for (unsigned each : turns) {
            Fiber &fiber = here.fibers.at(each);
            if (can_run(fiber)) {
                fiber.wait = Wait::Nothing;
                here.fibers.resume(fiber);
                moved = true;
                if (!here.failure.empty()) {
                    break;
                }
            }
        }
        if (!moved) {
            here.failure = "block " + std::to_string(here.at.x) + ": lanes wait for others that never come: ";
            for (unsigned each = 0; each < here.lanes; each++) {
                here.failure += letter(here.fibers.at(each).wait);
            }
        }
    }
    acquire(&here.end);
}

inline void run_grid(Order order, unsigned seed) {
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

}  // namespace emu

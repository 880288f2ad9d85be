// One fiber for each lane of a block, on one thread of the host: who runs next is chosen by the launch's order and
// seed, so that whatever lanes leave to chance changes between launches.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// The scheduler's own accesses are no part of the program that a sanitizer looks at.
#define EMU_SCHEDULER __attribute__((no_sanitize("thread"), noinline))

namespace emu {

/// What a lane waits for.
enum class Wait { Nothing, Block, Warp, Ended };

struct Fiber {
    static constexpr size_t STACK = 256 * 1024;

    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    unsigned lane = 0;
    Wait wait = Wait::Ended;
    /// How often the barrier that it waits at had opened when it came.
    uint64_t since = 0;
    void *fake_stack = nullptr;
    const void *scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    void *tsan = nullptr;
};

/// Switches between the scheduler, which runs on the caller's stack, and fibers.
class Fibers {
   public:
    /// A fiber that runs `body` each time it is resumed after an end, for ever.
    void grow(size_t count, void (*entry)()) {
        while (fibers.size() < count) {
            auto fiber = std::make_unique<Fiber>();
            getcontext(&fiber->context);
            fiber->context.uc_stack = {fiber->stack.get(), 0, Fiber::STACK};
            fiber->context.uc_link = nullptr;
            makecontext(&fiber->context, entry, 0);
#if defined(__SANITIZE_THREAD__)
            fiber->tsan = __tsan_create_fiber(0);
#endif
            fibers.push_back(std::move(fiber));
        }
    }

    /// Drops all fibers, wherever they stand: what their stacks hold is not destroyed.
    void drop() {
#if defined(__SANITIZE_THREAD__)
        for (auto &fiber : fibers) {
            __tsan_destroy_fiber(fiber->tsan);
        }
#endif
        fibers.clear();
    }

    Fiber &at(size_t index) { return *fibers[index]; }

    Fiber *current = nullptr;

    /// From the scheduler into a fiber, until that yields.
    EMU_SCHEDULER void resume(Fiber &fiber) {
        current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), Fiber::STACK);
#endif
#if defined(__SANITIZE_THREAD__)
        tsan = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
        swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
        current = nullptr;
    }

    /// From a fiber to the scheduler, until that resumes it.
    EMU_SCHEDULER void yield() {
        Fiber &fiber = *current;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fiber.fake_stack, fiber.scheduler_stack, fiber.scheduler_size);
#endif
#if defined(__SANITIZE_THREAD__)
        __tsan_switch_to_fiber(tsan, __tsan_switch_to_fiber_no_sync);
#endif
        swapcontext(&fiber.context, &scheduler);
        arrived(fiber);
    }

    /// First thing on a fiber after every switch to it.
    EMU_SCHEDULER static void arrived(Fiber &fiber) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fiber.fake_stack, &fiber.scheduler_stack, &fiber.scheduler_size);
#else
        (void)fiber;
#endif
    }

   private:
    std::vector<std::unique_ptr<Fiber>> fibers;
    ucontext_t scheduler;
    void *fake_stack = nullptr;
    void *tsan = nullptr;
};

/// Tells a race detector that what lanes did before they came to a barrier is seen by those that leave it.
inline void release(void *barrier) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(barrier);
#else
    (void)barrier;
#endif
}
inline void acquire(void *barrier) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(barrier);
#else
    (void)barrier;
#endif
}

}  // namespace emu

// Streams that are threads, and events that are entries of their queues.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "clocks.h"

namespace sim {

/// One recording of an event: what the stream had seen then, and whether its thread has come so far.
class Recording {
 public:
  explicit Recording(Clock clock) : clock(std::move(clock)) {}
  const Clock clock;
  void finish();
  bool done() const { return done_.load(); }
  void wait();
  std::chrono::steady_clock::time_point time;

 private:
  std::atomic<bool> done_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
};

/// Memory is written by its second address: `target` and `source` are aliases, or host addresses.
struct Task {
  enum class Kind { Copy, Poison, Record, Wait } kind;
  unsigned char* target = nullptr;
  const unsigned char* source = nullptr;
  std::size_t bytes = 0;
  bool late = false;  // sleeps before it copies, with its target poisoned
  std::shared_ptr<Recording> recording = nullptr;
};

/// How long late copies sleep, in microseconds, and what they draw it from; each setting begins the draws anew.
struct Delay {
  std::atomic<std::uint64_t> low{0}, high{2000}, seed{0}, setting{0};
};
extern Delay delay;
/// What the delay is for a copy of an actor, counted from the last setting.
std::uint64_t drawn(int actor, std::uint64_t copy);

constexpr unsigned char POISON = 0xFF;

class Stream {
 public:
  Stream(int device, int index, int actor) : device(device), index(index), actor(actor) {}
  const int device, index, actor;

  void enqueue(Task task);
  /// Returns when all that was enqueued before has been done.
  void drain();
  bool idle();
  /// Does what is left and ends the thread, which the next task starts anew.
  void stop();

 private:
  void work();
  void run(const Task& task);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  std::uint64_t submitted_ = 0, completed_ = 0, copies_ = 0, setting_ = 0;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace sim

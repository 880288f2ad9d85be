#include "streams.h"

#include <pthread.h>

#include <cstring>

namespace sim {

Delay delay;

void Recording::finish() {
  std::lock_guard lock(mutex_);
  time = std::chrono::steady_clock::now();
  done_ = true;
  changed_.notify_all();
}

void Recording::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return done_.load(); });
}

void Stream::enqueue(Task task) {
  std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  submitted_++;
  if (!thread_.joinable()) {
    ending_ = false;
    thread_ = std::thread([this] { work(); });
    std::string name = "sim:" + std::to_string(device) + "/" + std::to_string(index);
    pthread_setname_np(thread_.native_handle(), name.c_str());
  }
  changed_.notify_all();
}

void Stream::drain() {
  std::unique_lock lock(mutex_);
  std::uint64_t wanted = submitted_;
  changed_.wait(lock, [&] { return completed_ >= wanted; });
}

bool Stream::idle() {
  std::lock_guard lock(mutex_);
  return completed_ == submitted_;
}

void Stream::stop() {
  std::thread ended;
  {
    std::lock_guard lock(mutex_);
    ending_ = true;
    changed_.notify_all();
    ended.swap(thread_);
  }
  if (ended.joinable()) ended.join();
}

void Stream::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return ending_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    run(task);
    lock.lock();
    completed_++;
    changed_.notify_all();
  }
}

namespace {

// The finaliser of splitmix64: a delay depends on the seed, the stream and the place of the copy in it alone.
std::uint64_t mixed(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

std::uint64_t drawn(int actor, std::uint64_t copy) {
  std::uint64_t low = delay.low, high = delay.high;
  return low + mixed(delay.seed + mixed((std::uint64_t(actor) << 40) + copy)) % (high - low + 1);
}

void Stream::run(const Task& task) {
  switch (task.kind) {
    case Task::Kind::Poison:
      std::memset(task.target, POISON, task.bytes);
      break;
    case Task::Kind::Record:
      task.recording->finish();
      break;
    case Task::Kind::Wait:
      task.recording->wait();
      break;
    case Task::Kind::Copy: {
      bool overlaps = task.source < task.target + task.bytes && task.target < task.source + task.bytes;
      if (!overlaps) std::memset(task.target, POISON, task.bytes);
      if (task.late) {
        if (std::uint64_t setting = delay.setting; setting != setting_) {
          setting_ = setting;
          copies_ = 0;
        }
        std::uint64_t micros = drawn(actor, copies_++);
        if (micros > 0) std::this_thread::sleep_for(std::chrono::microseconds(micros));
      }
      std::memmove(task.target, task.source, task.bytes);
      break;
    }
  }
}

}  // namespace sim

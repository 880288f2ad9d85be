// Host memory that copies reach while the host goes on: pinned by the allocator here, or registered by its owner.
#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "machine.h"

namespace sim {

// The range that all of the bytes lie in.
HostRange* Machine::range_of(Address address, std::size_t bytes) {
  auto found = ranges_.upper_bound(address);
  bool inside = found != ranges_.end() && found->second.low <= address && address + bytes <= found->second.high;
  return inside ? &found->second : nullptr;
}

bool Machine::is_pinned(const void* address) {
  std::lock_guard lock(mutex_);
  return range_of(reinterpret_cast<Address>(address), 1) != nullptr;
}

// Moves memory whose copies have ended to what can be given out again, as torch's allocator for CUDA does.
void Machine::collect_pinned() {
  std::erase_if(deferred_pinned_, [&](const auto& each) {
    const HostRange& range = each.second;
    for (auto& use : range.uses)
      if (!use->done()) return false;
    checker_.forget(range.low, range.high);
    free_pinned_.emplace(range.high - range.low, range.low);
    return true;
  });
}

void* Machine::allocate_pinned(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  std::lock_guard lock(mutex_);
  std::size_t capacity = (bytes + 4095) / 4096 * 4096;
  collect_pinned();
  void* memory = nullptr;
  auto found = free_pinned_.lower_bound(capacity);
  if (found != free_pinned_.end() && found->first <= 2 * capacity) {
    capacity = found->first;
    memory = reinterpret_cast<void*>(found->second);
    free_pinned_.erase(found);
  } else {
    memory = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw OutOfMemory(std::to_string(bytes) + " bytes of pinned memory: " + std::strerror(errno));
  }
  std::memset(memory, POISON, capacity);
  Address low = reinterpret_cast<Address>(memory);
  ranges_.emplace(low + capacity, HostRange{low, low + capacity, true, {}});
  return memory;
}

void Machine::release_pinned(void* address) {
  if (address == nullptr || in_bad_fork()) return;
  std::lock_guard lock(mutex_);
  auto found = ranges_.upper_bound(reinterpret_cast<Address>(address));
  deferred_pinned_.emplace(found->second.low, std::move(found->second));
  ranges_.erase(found);
}

void Machine::register_host(Address address, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  auto next = ranges_.upper_bound(address);
  if (bytes == 0 || (next != ranges_.end() && next->second.low < address + bytes))
    throw std::runtime_error("host memory at " + std::to_string(address) + " of " + std::to_string(bytes) +
                             " bytes is empty or registered already");
  if (registered_ + bytes > register_limit_)
    throw std::runtime_error(std::to_string(bytes) + " bytes of host memory cannot be registered: " +
                             std::to_string(registered_) + " of " + std::to_string(register_limit_) + " are already");
  registered_ += bytes;
  ranges_.emplace(address + bytes, HostRange{address, address + bytes, false, {}});
}

// The memory may go away afterwards, so a copy that nobody has waited for is an error; it is waited for all the same.
void Machine::unregister_host(Address address) {
  std::vector<std::shared_ptr<Recording>> uses;
  {
    std::lock_guard lock(mutex_);
    HostRange* range = range_of(address, 1);
    if (range == nullptr || range->low != address || range->owned)
      throw std::runtime_error("no host memory is registered at " + std::to_string(address));
    checker_.access(checker_.begin(HOST, "unregister_host"), range->low, range->high, true, true);
    checker_.forget(range->low, range->high);
    registered_ -= range->high - range->low;
    uses = std::move(range->uses);
    ranges_.erase(range->high);
  }
  for (auto& each : uses) each->wait();
}

void Machine::set_register_limit(std::size_t bytes) {
  std::lock_guard lock(mutex_);
  register_limit_ = bytes;
}

void Machine::host_access(Address address, std::size_t bytes, bool writes, const std::string& who) {
  std::lock_guard lock(mutex_);
  // The host is ordered before whatever is enqueued later: only what is under way now can meet it.
  checker_.access(checker_.begin(HOST, who), address, address + bytes, writes, true);
}

}  // namespace sim

// Device memory: where it is, who gets it next, and what happens to a host that touches it.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "machine.h"

namespace sim {

namespace {

constexpr std::size_t PAGE = 4096;

std::atomic<bool> started{false};
std::atomic<bool> bad_fork{false};
std::atomic<Address> guarded{0};
struct sigaction before;
std::atomic<bool> told{false};

std::size_t round_up(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

// Only what a signal handler may do.
void write_number(char* at, Address number, int base, int digits) {
  for (int i = digits - 1; i >= 0; i--, number /= base) at[i] = "0123456789abcdef"[number % base];
}

void tell(Address address) {
  char line[] = "simulated device: the host touches device memory at 0x0000000000000000, which is memory of sim:0\n";
  write_number(std::strstr(line, "0x") + 2, address, 16, 16);
  write_number(std::strstr(line, "sim:") + 4, (address - guarded) / DEVICE_BYTES, 10, 1);
  [[maybe_unused]] auto written = ::write(2, line, sizeof line - 1);
}

void on_fault(int signal, siginfo_t* about, void* context) {
  int kept = errno;
  Address address = reinterpret_cast<Address>(about->si_addr);
  Address base = guarded;
  if (base != 0 && address >= base && address < base + DEVICES * DEVICE_BYTES) {
    if (told.exchange(true)) {
      // Whoever was here before has said what it had to say and returned: the next try ends the process.
      ::signal(signal, SIG_DFL);
      return;
    }
    tell(address);
  }
  errno = kept;
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(signal, about, context);
  } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
    ::signal(signal, SIG_DFL);
  } else {
    before.sa_handler(signal);
  }
}

void refuse_child() { bad_fork = true; }

}  // namespace

bool Machine::in_bad_fork() { return bad_fork; }
bool Machine::used() { return started; }

Machine& Machine::get() {
  if (bad_fork)
    throw std::runtime_error("the simulated device was in use when this process was forked: a child cannot use it; fork "
                             "before its first use, or start a new process");
  // Never destroyed: threads of streams and tensors may outlive whatever ends first.
  static Machine* machine = [] {
    auto* made = new Machine();
    pthread_atfork(nullptr, nullptr, refuse_child);
    return made;
  }();
  return *machine;
}

Machine::Machine() {
  for (int device = 0; device < DEVICES; device++) {
    left_[device] = -1;
    for (int index = 0; index < STREAMS; index++) {
      int actor = 1 + device * STREAMS + index;
      streams_[device][index] = std::make_unique<Stream>(device, index, actor);
      checker_.name_actor(actor, "stream " + std::to_string(index) + " of sim:" + std::to_string(device));
    }
  }
  reserve();
  started = true;
}

void Machine::reserve() {
  constexpr std::size_t all = DEVICES * DEVICE_BYTES;
  file_ = memfd_create("simulated-device", MFD_CLOEXEC);
  if (file_ < 0 || ftruncate(file_, all) != 0)
    throw std::runtime_error(std::string("the simulated device has no memory: memfd: ") + std::strerror(errno));
  void* shown = mmap(nullptr, all, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file_, 0);
  void* alias = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_, 0);
  if (shown == MAP_FAILED || alias == MAP_FAILED)
    throw std::runtime_error(std::string("the simulated device has no memory: mmap: ") + std::strerror(errno));
  madvise(alias, all, MADV_DONTFORK);
  madvise(alias, all, MADV_DONTDUMP);
  base_ = reinterpret_cast<Address>(shown);
  to_alias_ = static_cast<unsigned char*>(alias) - static_cast<unsigned char*>(shown);
  guarded = base_;
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigaction(SIGSEGV, &action, &before);
}

unsigned char* Machine::alias(const void* address) const {
  return const_cast<unsigned char*>(static_cast<const unsigned char*>(address)) + to_alias_;
}

bool Machine::is_device(const void* address) const {
  Address at = reinterpret_cast<Address>(address);
  return at >= base_ && at < base_ + DEVICES * DEVICE_BYTES;
}

int Machine::device_of(const void* address) const {
  return is_device(address) ? static_cast<int>((reinterpret_cast<Address>(address) - base_) / DEVICE_BYTES) : -1;
}

void Machine::open(Address low, Address high, bool opened) {
  if (low >= high) return;
  Address first = low / PAGE * PAGE, end = round_up(high, PAGE);
  if (!is_device(reinterpret_cast<void*>(low)) || !is_device(reinterpret_cast<void*>(high - 1)))
    throw std::runtime_error("a kernel is to touch memory that is not the device's");
  if (mprotect(reinterpret_cast<void*>(first), end - first, opened ? PROT_READ | PROT_WRITE : PROT_NONE) != 0)
    throw std::runtime_error(std::string("mprotect: ") + std::strerror(errno));
}

Block* Machine::take_free(Stream* stream, int device, std::size_t bytes) {
  auto& those = free_[device];
  auto found = those.lower_bound({stream, bytes});
  if (found == those.end() || found->first.first != stream || found->first.second > bytes + bytes / 4) return nullptr;
  Block* block = found->second;
  those.erase(found);
  if (!block->poisoned) std::memset(alias(reinterpret_cast<void*>(block->address)), POISON, block->capacity);
  return block;
}

Block* Machine::carve(Stream* stream, int device, std::size_t bytes) {
  std::size_t capacity = round_up(bytes, bytes < 16 * PAGE ? GRAIN : PAGE);
  std::size_t at = bytes < 16 * PAGE ? carved_[device] : round_up(carved_[device], PAGE);
  if (at + capacity > DEVICE_BYTES) return nullptr;
  carved_[device] = at + capacity;
  Address address = base_ + device * DEVICE_BYTES + at;
  std::memset(alias(reinterpret_cast<void*>(address)), POISON, capacity);
  return new Block{address, capacity, 0, device, stream, {}, true};
}

Block* Machine::allocate(int device, std::size_t bytes) {
  check_there(device);
  std::lock_guard lock(mutex_);
  std::size_t counted = round_up(bytes, GRAIN);
  Usage& usage = usage_[device];
  free_deferred(false);
  if (usage.in_use + counted > usage.limit) free_deferred(true);
  Stream* stream = streams_[device][current_stream_index(device)].get();
  collect(stream);
  Block* block = nullptr;
  if (usage.in_use + counted <= usage.limit) {
    block = take_free(stream, device, counted);
    if (block == nullptr) block = carve(stream, device, counted);
  }
  if (block == nullptr)
    throw OutOfMemory("sim:" + std::to_string(device) + " is out of memory: " + std::to_string(bytes) + " bytes wanted, " +
                      std::to_string(usage.in_use) + " of " + std::to_string(usage.limit) + " in use");
  block->bytes = counted;
  usage.in_use += counted;
  usage.allocations++;
  usage.peak = std::max(usage.peak, usage.in_use);
  // Whoever had the memory before on this stream may still use it: for other streams allocating is as good as a write.
  Operation operation = checker_.begin(stream->actor, "allocation");
  checker_.take(operation, block->address, block->address + bytes, {});
  return block;
}

void Machine::release(Block* block) {
  if (bad_fork) return;
  std::lock_guard lock(mutex_);
  Freed freed{block, {}};
  for (Stream* each : block->others) freed.recordings.push_back(record_on(*each));
  block->others.clear();
  deferred_.push_back(std::move(freed));
  free_deferred(false);
}

void Machine::free_deferred(bool wait) {
  std::erase_if(deferred_, [&](Freed& each) {
    for (auto& recording : each.recordings) {
      if (wait) recording->wait();
      if (!recording->done()) return false;
    }
    usage_[each.block->device].in_use -= each.block->bytes;
    freed_.push_back(std::move(each));
    return true;
  });
}

// Whatever was freed on the stream might be given out next. Who uses it on another stream must be known to be done by
// now: to the stream, which may have waited since, or to the allocator, which has seen recorded streams come so far.
void Machine::collect(Stream* stream) {
  std::erase_if(freed_, [&](Freed& each) {
    Block* block = each.block;
    if (block->stream != stream) return false;
    std::vector<Clock> seen;
    for (auto& recording : each.recordings) seen.push_back(recording->clock);
    Operation operation = checker_.begin(stream->actor, "free");
    checker_.take(operation, block->address, block->address + block->capacity, seen);
    unsigned char* memory = alias(reinterpret_cast<void*>(block->address));
    if (stream->idle()) {
      std::memset(memory, POISON, block->capacity);
    } else {
      stream->enqueue({Task::Kind::Poison, memory, nullptr, block->capacity});
    }
    block->poisoned = true;
    // The last to come is the first to go, so that who uses it still is found out.
    auto& those = free_[block->device];
    std::pair key{stream, block->capacity};
    those.emplace_hint(those.lower_bound(key), key, block);
    return true;
  });
}

void Machine::use_on(Block* block, Stream& stream) {
  std::lock_guard lock(mutex_);
  if (&stream != block->stream) block->others.insert(&stream);
}

void Machine::empty_cache() {
  std::lock_guard lock(mutex_);
  free_deferred(false);
  for (auto& device : streams_)
    for (auto& each : device) collect(each.get());
  for (auto& those : free_) {
    for (auto& [key, block] : those) {
      if (block->capacity < 16 * PAGE || !block->stream->idle()) continue;
      std::size_t offset = block->address - base_;
      if (fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, block->capacity) == 0)
        block->poisoned = false;
    }
  }
}

std::size_t Machine::resident() const {
  struct stat about {};
  fstat(file_, &about);
  return static_cast<std::size_t>(about.st_blocks) * 512;
}

Usage Machine::usage(int device) {
  std::lock_guard lock(mutex_);
  return usage_[device];
}

void Machine::reset_peak(int device) {
  std::lock_guard lock(mutex_);
  usage_[device].peak = usage_[device].in_use;
}

void Machine::reset_bytes(int device) {
  std::lock_guard lock(mutex_);
  usage_[device].up = usage_[device].down = 0;
}

void Machine::set_limit(int device, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  usage_[device].limit = std::min(bytes, DEVICE_BYTES);
}

}  // namespace sim

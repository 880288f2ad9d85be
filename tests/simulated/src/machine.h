// The simulated machine: two devices with memory and streams, host memory that copies reach, and who has waited for what.
//
// Device memory is one anonymous file that is mapped twice. Tensors show addresses of the first mapping, which nobody may
// touch; the backend works through the second. Nothing here knows of PyTorch.
//
// A process starts to have all of this at the first use. A child that is forked afterwards is refused everything.
#pragma once

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "clocks.h"
#include "streams.h"

namespace sim {

constexpr int DEVICES = 2;
constexpr int STREAMS = 33;  // of a device: the default stream, and those of the pool, which are given out in turn
constexpr std::size_t DEVICE_BYTES = std::size_t{32} << 30;
constexpr std::size_t GRAIN = 512;

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Device memory, from its allocation to the end of its reuse.
struct Block {
  Address address;
  std::size_t capacity;
  std::size_t bytes;  // as counted: what was asked for, rounded up to a grain
  int device;
  Stream* stream;            // on which it was allocated
  std::set<Stream*> others;  // `record_stream`
  bool poisoned;
};

struct Event {
  int device = 0;
  std::shared_ptr<Recording> recording;
  bool asked = false;  // a query of this recording has been counted as a wait
  bool forgotten = false;
};

/// Host memory that copies may use while the host goes on.
struct HostRange {
  Address low, high;
  bool owned;  // by the allocator of pinned memory, else registered
  std::vector<std::shared_ptr<Recording>> uses;
};

struct Wait {
  std::string text;
  bool news;  // whether it has ordered anything that was not ordered before
};

struct Usage {
  std::size_t in_use = 0, peak = 0, limit = DEVICE_BYTES, allocations = 0;
  std::uint64_t up = 0, down = 0;
};

class Machine {
 public:
  static Machine& get();
  static bool in_bad_fork();
  static bool used();

  // memory.cpp
  Block* allocate(int device, std::size_t bytes);
  void release(Block* block);
  void use_on(Block* block, Stream& stream);
  unsigned char* alias(const void* address) const;
  bool is_device(const void* address) const;
  int device_of(const void* address) const;
  void empty_cache();
  /// Lets code of the host that plays a kernel touch device memory at the addresses that tensors show, or no more.
  void open(Address low, Address high, bool opened);
  /// Bytes of device memory that are in this process's resident memory.
  std::size_t resident() const;
  Usage usage(int device);
  void reset_peak(int device);
  void reset_bytes(int device);
  void set_limit(int device, std::size_t bytes);

  // host.cpp
  void* allocate_pinned(std::size_t bytes);
  void release_pinned(void* address);
  void register_host(Address address, std::size_t bytes);
  void unregister_host(Address address);
  bool is_pinned(const void* address);
  /// More than this cannot be registered at once.
  void set_register_limit(std::size_t bytes);
  void host_access(Address address, std::size_t bytes, bool writes, const std::string& who);

  // order.cpp
  Stream& stream(int device, int index);
  Stream& current_stream(int device);
  int next_stream(int device);
  void name_stream(Stream& stream, const std::string& name);
  void record(Event& event, Stream& stream);
  void block(Event& event, Stream& stream);
  bool query(Event& event);
  void synchronize(Event& event);
  void synchronize(Stream& stream);
  void synchronize_device(int device);
  bool query(Stream& stream);
  /// The host has waited for the stream, as some operations do: not one of the counted waits.
  void join_host(Stream& stream);
  void stop_threads();

  struct Touch {
    Address low, high;
    bool writes;
  };
  /// What a stream does next, with all that it touches; returns when the stream has come so far that the host can do it.
  Operation begin(Stream& stream, const std::string& name, const std::vector<Touch>& touched);
  void touch(const Operation& operation, const std::vector<Touch>& touched);

  enum class Way { Up, Down, Within };
  /// A copy of plain bytes as the next thing that the stream does. The host waits for it where `late` is not set, or where
  /// memory of the host is not pinned.
  void copy(Stream& stream, Way way, void* target, const void* source, std::size_t bytes, bool late);

  /// The device does so many more operations and copies; whoever asks it for anything afterwards gets an error.
  void lose(int device, std::int64_t after);

  std::vector<Race> races();
  std::vector<Wait> waits();
  void forget_wait(std::uint64_t number);
  void reset();

 private:
  Machine();
  std::mutex mutex_;
  Checker checker_;

  // memory.cpp
  Address base_ = 0;
  std::ptrdiff_t to_alias_ = 0;
  int file_ = -1;
  std::array<Usage, DEVICES> usage_;
  std::array<std::size_t, DEVICES> carved_{};
  std::array<std::multimap<std::pair<Stream*, std::size_t>, Block*>, DEVICES> free_;
  struct Freed {
    Block* block;
    std::vector<std::shared_ptr<Recording>> recordings;  // of the streams that were recorded, when it was freed
  };
  std::vector<Freed> deferred_;  // until their recordings are done
  std::vector<Freed> freed_;     // until their streams are asked for memory
  void reserve();
  void free_deferred(bool wait);
  void collect(Stream* stream);
  Block* take_free(Stream* stream, int device, std::size_t bytes);
  Block* carve(Stream* stream, int device, std::size_t bytes);

  // host.cpp
  std::map<Address, HostRange> ranges_;  // by their end
  std::size_t registered_ = 0, register_limit_ = ~std::size_t{0};
  std::multimap<std::size_t, Address> free_pinned_;
  std::map<Address, HostRange> deferred_pinned_;
  HostRange* range_of(Address address, std::size_t bytes);
  void collect_pinned();

  // order.cpp
  std::array<std::array<std::unique_ptr<Stream>, STREAMS>, DEVICES> streams_;
  std::array<int, DEVICES> next_{};
  std::vector<Wait> waits_;
  std::set<std::uint64_t> forgotten_;
  std::array<std::atomic<std::int64_t>, DEVICES> left_;  // operations until the device is lost; below 0: it never is
  void operate(int device);
  void check_there(int device) const;
  bool wait_counts(const std::string& text, bool news);
  std::shared_ptr<Recording> record_on(Stream& stream);
};

/// Of the calling thread.
int current_device();
void set_current_device(int device);
int current_stream_index(int device);
void set_current_stream_index(int device, int index);

}  // namespace sim

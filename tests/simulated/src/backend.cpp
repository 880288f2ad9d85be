// The device as PyTorch knows one: allocators, device guard with streams and events, hooks, generators.
#include "backend.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>

namespace sim {

c10::Device resolved(c10::Device device) {
  int index = device.has_index() ? device.index() : current_device();
  TORCH_CHECK(index < DEVICES, "there is no device sim:", index, ": the simulated machine has ", DEVICES);
  return {TYPE, static_cast<c10::DeviceIndex>(index)};
}

namespace {

void free_block(void* block) {
  if (block != nullptr && !Machine::in_bad_fork()) Machine::get().release(static_cast<Block*>(block));
}

void free_pinned(void* memory) {
  if (memory != nullptr && !Machine::in_bad_fork()) Machine::get().release_pinned(memory);
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    c10::Device device = resolved({TYPE, -1});
    if (bytes == 0) return {nullptr, nullptr, &free_block, device};
    try {
      Block* block = Machine::get().allocate(device.index(), bytes);
      return {reinterpret_cast<void*>(block->address), block, &free_block, device};
    } catch (const OutOfMemory& error) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
    }
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    Machine& machine = Machine::get();
    Stream& stream = machine.current_stream(machine.device_of(target));
    machine.copy(stream, Machine::Way::Within, target, source, bytes, false);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override { Machine::get().empty_cache(); }
  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    auto* block = static_cast<Block*>(pointer.get_context());
    Machine& machine = Machine::get();
    if (block != nullptr) machine.use_on(block, machine.stream(stream.device_index(), stream.id()));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    Usage usage = Machine::get().usage(resolved({TYPE, device}).index());
    c10::CachingDeviceAllocator::DeviceStats stats{};
    for (auto* each : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*each)[0].current = usage.in_use;
      (*each)[0].peak = usage.peak;
    }
    stats.allocation[0].allocated = usage.allocations;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { Machine::get().reset_peak(resolved({TYPE, device}).index()); }
  std::pair<std::size_t, std::size_t> getMemoryInfo(c10::DeviceIndex device) override {
    Usage usage = Machine::get().usage(resolved({TYPE, device}).index());
    return {usage.limit - std::min(usage.limit, usage.in_use), usage.limit};
  }
};

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    void* memory = Machine::get().allocate_pinned(bytes);
    return {memory, memory, &free_pinned, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;

/// Gives the numbers of a generator of the host, so that operators of the host can draw from it.
struct SimGenerator final : c10::GeneratorImpl {
  SimGenerator(int device, at::Generator inner)
      : c10::GeneratorImpl({TYPE, static_cast<c10::DeviceIndex>(device)}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(std::move(inner)) {}
  void set_current_seed(std::uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(std::uint64_t offset) override { inner.set_offset(offset); }
  std::uint64_t get_offset() const override { return inner.get_offset(); }
  std::uint64_t current_seed() const override { return inner.current_seed(); }
  std::uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  at::Generator inner;

 private:
  SimGenerator* clone_impl() const override { return new SimGenerator(device_.index(), inner.clone()); }
};

at::Generator make_generator(c10::DeviceIndex device) {
  return at::make_generator<SimGenerator>(resolved({TYPE, device}).index(), at::detail::createCPUGenerator());
}

Event* event_of(void* event) { return static_cast<Event*>(event); }

Stream& stream_of(const c10::Stream& stream) {
  return Machine::get().stream(stream.device_index(), static_cast<int>(stream.id()));
}

c10::Stream torch_stream(c10::Device device, int index) {
  return c10::Stream(c10::Stream::UNSAFE, resolved(device), index);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    set_current_device(device.index());
    return before;
  }
  c10::Device getDevice() const override { return {TYPE, static_cast<c10::DeviceIndex>(current_device())}; }
  void setDevice(c10::Device device) const override { set_current_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() < DEVICES) set_current_device(device.index());
  }
  c10::Stream getStream(c10::Device device) const override {
    return torch_stream(device, current_stream_index(device.index()));
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return torch_stream(device, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return torch_stream(device, Machine::get().next_stream(device.index()));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    c10::Stream before = getStream(stream.device());
    set_current_stream_index(stream.device_index(), static_cast<int>(stream.id()));
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return &stream_of(stream); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete event_of(event); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event();
    Machine::get().record(*event_of(*event), stream_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) Machine::get().block(*event_of(event), stream_of(stream));
  }
  bool queryEvent(void* event) const override { return event == nullptr || Machine::get().query(*event_of(event)); }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }
  bool queryStream(const c10::Stream& stream) const override { return Machine::get().query(stream_of(stream)); }
  void synchronizeStream(const c10::Stream& stream) const override { Machine::get().synchronize(stream_of(stream)); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) Machine::get().synchronize(*event_of(event));
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override { Machine::get().synchronize_device(device); }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& stream) const override {
    device_memory.recordStream(pointer, stream);
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    TORCH_CHECK(first != nullptr && second != nullptr, "both events must be recorded before their time is asked for");
    auto &from = event_of(first)->recording, &to = event_of(second)->recording;
    TORCH_CHECK(from->done() && to->done(), "both events must have completed before their time is asked for");
    return std::chrono::duration<double, std::milli>(to->time - from->time).count();
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return Machine::used(); }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(c10::DeviceIndex device) const override { set_current_device(device); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device()); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    c10::DeviceIndex before = getCurrentDevice();
    set_current_device(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(resolved({TYPE, device}).index());
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override { return make_generator(device); }
  at::Device getDeviceFromPtr(void* data) const override {
    return {TYPE, static_cast<c10::DeviceIndex>(Machine::get().device_of(data))};
  }
  bool isPinnedPtr(const void* data) const override {
    return !Machine::in_bad_fork() && Machine::used() && Machine::get().is_pinned(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, std::size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &device_memory)

[[maybe_unused]] const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

}  // namespace

c10::Allocator* device_allocator() { return &device_memory; }

Block* block_of(const c10::Storage& storage) { return static_cast<Block*>(storage.data_ptr().get_context()); }

void resize_storage(const c10::Storage& storage, std::size_t bytes) {
  auto* impl = storage.unsafeGetStorageImpl();
  TORCH_CHECK(impl->resizable(), "this storage cannot be resized");
  int before = current_device();
  set_current_device(storage.device().index());
  c10::DataPtr memory = device_memory.allocate(bytes);
  std::size_t kept = std::min(bytes, impl->nbytes());
  if (kept > 0) device_memory.copy_data(memory.get(), impl->data(), kept);
  impl->set_data_ptr_noswap(std::move(memory));
  impl->set_nbytes(bytes);
  set_current_device(before);
}

const at::Generator& default_generator(int device) {
  static const std::array<at::Generator, DEVICES> all{make_generator(0), make_generator(1)};
  return all[device];
}

at::Generator inner_generator(const at::Generator& generator) {
  auto* ours = dynamic_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl());
  TORCH_CHECK(ours != nullptr, "a generator of sim is expected, got one of ", generator.device());
  return ours->inner;
}

}  // namespace sim

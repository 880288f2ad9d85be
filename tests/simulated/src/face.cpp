// What `module.py` calls: plain functions, which return 0, or -1 with `sim_error` saying why.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include <cstring>
#include <sstream>

#include "backend.h"

using namespace sim;

namespace {

thread_local std::string error, answer;

template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& thrown) {
    error = thrown.what_without_backtrace();
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  return -1;
}

// Names are ours or of operators: they hold nothing that JSON escapes but quotes.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char each : text) out += each == '"' || each == '\\' ? std::string("\\") + each : std::string(1, each);
  return out + "\"";
}

c10::GeneratorImpl* generator(int device) { return default_generator(device).unsafeGetGeneratorImpl(); }

}  // namespace

extern "C" {

const char* sim_error() { return error.c_str(); }
bool sim_in_bad_fork() { return Machine::in_bad_fork(); }
bool sim_used() { return Machine::used(); }

int sim_races(const char** json) {
  return guarded([&] {
    std::ostringstream out;
    out << "[";
    for (const Race& each : Machine::get().races()) {
      out << (out.tellp() > 1 ? "," : "") << "[" << quoted(each.first) << "," << quoted(each.first_actor) << ","
          << each.first_writes << "," << quoted(each.second) << "," << quoted(each.second_actor) << "," << each.second_writes
          << "," << each.low << "," << each.high << "]";
    }
    out << "]";
    answer = out.str();
    *json = answer.c_str();
  });
}

int sim_waits(const char** json) {
  return guarded([&] {
    std::ostringstream out;
    out << "[";
    for (const Wait& each : Machine::get().waits())
      out << (out.tellp() > 1 ? "," : "") << "[" << quoted(each.text) << "," << each.news << "]";
    out << "]";
    answer = out.str();
    *json = answer.c_str();
  });
}

int sim_forget_wait(std::uint64_t number) {
  return guarded([&] { Machine::get().forget_wait(number); });
}

int sim_reset() {
  return guarded([&] { Machine::get().reset(); });
}

int sim_set_delay(std::uint64_t low, std::uint64_t high, std::uint64_t seed) {
  return guarded([&] {
    TORCH_CHECK(low <= high, "a delay between ", low, " and ", high, " microseconds");
    delay.low = low;
    delay.high = high;
    delay.seed = seed;
    delay.setting++;
  });
}

int sim_delay(int device, int index, std::uint64_t copy, std::uint64_t* out) {
  return guarded([&] { *out = drawn(Machine::get().stream(device, index).actor, copy); });
}

int sim_usage(int device, std::uint64_t* out) {
  return guarded([&] {
    TORCH_CHECK(device >= 0 && device < DEVICES, "there is no device sim:", device);
    Usage usage = Machine::get().usage(device);
    std::uint64_t values[] = {usage.in_use, usage.peak, usage.limit, usage.allocations, usage.up, usage.down};
    std::memcpy(out, values, sizeof values);
  });
}

int sim_reset_peak(int device) {
  return guarded([&] { Machine::get().reset_peak(device); });
}

int sim_reset_bytes(int device) {
  return guarded([&] { Machine::get().reset_bytes(device); });
}

int sim_set_limit(int device, std::uint64_t bytes) {
  return guarded([&] { Machine::get().set_limit(device, bytes); });
}

int sim_empty_cache() {
  return guarded([&] { Machine::get().empty_cache(); });
}

int sim_resident(std::uint64_t* out) {
  return guarded([&] { *out = Machine::get().resident(); });
}

int sim_host_access(std::uint64_t address, std::uint64_t bytes, bool writes, const char* who) {
  return guarded([&] { Machine::get().host_access(address, bytes, writes, who); });
}

int sim_register_host(std::uint64_t address, std::uint64_t bytes) {
  return guarded([&] { Machine::get().register_host(address, bytes); });
}

int sim_unregister_host(std::uint64_t address) {
  return guarded([&] { Machine::get().unregister_host(address); });
}

int sim_set_register_limit(std::uint64_t bytes) {
  return guarded([&] { Machine::get().set_register_limit(bytes); });
}

int sim_lose(int device, std::int64_t after) {
  return guarded([&] { Machine::get().lose(device, after); });
}

// A kernel is played by the caller between the two calls, when the current stream has come so far, as operators are.
// touched: (low, high, writes) of all that it reads and writes. Nothing else of the device can be touched meanwhile, but
// for what shares a page with it.
int sim_begin_kernel(const char* name, const std::uint64_t* touched, std::uint64_t count) {
  return guarded([&] {
    Machine& machine = Machine::get();
    std::vector<Machine::Touch> touches;
    for (std::uint64_t i = 0; i < count; i++) touches.push_back({touched[3 * i], touched[3 * i + 1], touched[3 * i + 2] != 0});
    machine.begin(machine.current_stream(current_device()), name, touches);
    for (auto& each : touches) machine.open(each.low, each.high, true);
  });
}

int sim_end_kernel(const std::uint64_t* touched, std::uint64_t count) {
  return guarded([&] {
    for (std::uint64_t i = 0; i < count; i++) Machine::get().open(touched[3 * i], touched[3 * i + 1], false);
  });
}

// What device memory holds when the current stream has come so far: for whoever plays a kernel, to know what it will read.
int sim_peek(std::uint64_t address, std::uint64_t bytes, void* out) {
  return guarded([&] {
    Machine& machine = Machine::get();
    machine.begin(machine.current_stream(current_device()), "peek", {});
    std::memcpy(out, machine.alias(reinterpret_cast<const void*>(address)), bytes);
  });
}

int sim_name_stream(int device, int index, const char* name) {
  return guarded([&] { Machine::get().name_stream(Machine::get().stream(device, index), name); });
}

int sim_stop_threads() {
  return guarded([&] { Machine::get().stop_threads(); });
}

int sim_seed(int device, std::uint64_t seed) {
  return guarded([&] { generator(device)->set_current_seed(seed); });
}

std::uint64_t sim_initial_seed(int device) { return generator(device)->current_seed(); }

std::uint64_t sim_rng_bytes(int device) { return generator(device)->get_state()->numel(); }

int sim_rng_get(int device, void* out) {
  return guarded([&] {
    auto state = generator(device)->get_state();
    std::memcpy(out, state->data(), state->numel());
  });
}

int sim_rng_set(int device, const void* bytes, std::uint64_t count) {
  return guarded([&] {
    at::TensorBase state = at::detail::empty_cpu({static_cast<int64_t>(count)}, at::kByte);
    std::memcpy(state.mutable_data_ptr(), bytes, count);
    generator(device)->set_state(*state.unsafeGetTensorImpl());
  });
}

}  // extern "C"

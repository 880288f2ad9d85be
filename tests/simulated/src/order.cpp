// Streams, events, copies and waits, and what they mean to the checker.
#include <cstring>

#include "machine.h"

namespace sim {

namespace {

thread_local int device_now = 0;
thread_local std::array<int, DEVICES> stream_now{};

}  // namespace

int current_device() { return device_now; }

void set_current_device(int device) {
  if (device >= DEVICES) throw std::runtime_error("there is no device sim:" + std::to_string(device));
  if (device >= 0) device_now = device;
}

int current_stream_index(int device) { return stream_now[device < 0 ? device_now : device]; }
void set_current_stream_index(int device, int index) { stream_now[device < 0 ? device_now : device] = index; }

Stream& Machine::stream(int device, int index) {
  if (device < 0) device = device_now;
  if (device >= DEVICES || index < 0 || index >= STREAMS)
    throw std::runtime_error("there is no stream " + std::to_string(index) + " of sim:" + std::to_string(device));
  return *streams_[device][index];
}

Stream& Machine::current_stream(int device) { return stream(device, current_stream_index(device)); }

int Machine::next_stream(int device) {
  std::lock_guard lock(mutex_);
  return 1 + next_[device < 0 ? device_now : device]++ % (STREAMS - 1);
}

void Machine::name_stream(Stream& stream, const std::string& name) {
  std::lock_guard lock(mutex_);
  checker_.name_actor(stream.actor, name);
}

void Machine::lose(int device, std::int64_t after) { left_.at(device) = after; }

void Machine::check_there(int device) const {
  if (left_.at(device) == 0)
    throw std::runtime_error("sim:" + std::to_string(device) + " is lost: nothing that is on it can be reached any more");
}

void Machine::operate(int device) {
  check_there(device);
  if (left_.at(device) > 0) left_.at(device)--;
}

// Counts a wait of the program. A wait that was to be forgotten has no effect: false.
bool Machine::wait_counts(const std::string& text, bool news) {
  waits_.push_back({text, news});
  return !forgotten_.contains(waits_.size() - 1);
}

std::shared_ptr<Recording> Machine::record_on(Stream& stream) {
  auto recording = std::make_shared<Recording>(checker_.clock_now(stream.actor));
  if (stream.idle()) {
    recording->finish();
  } else {
    stream.enqueue({Task::Kind::Record, nullptr, nullptr, 0, false, recording});
  }
  return recording;
}

void Machine::record(Event& event, Stream& stream) {
  check_there(stream.device);
  std::lock_guard lock(mutex_);
  event.device = stream.device;
  event.recording = record_on(stream);
  event.asked = event.forgotten = false;
}

void Machine::block(Event& event, Stream& stream) {
  if (!event.recording) return;
  check_there(stream.device);
  std::lock_guard lock(mutex_);
  Clock after = checker_.clock_now(stream.actor);
  bool news = after.join(event.recording->clock);
  if (!wait_counts(checker_.actor_name(stream.actor) + " waits for an event", news)) return;
  checker_.clock(stream.actor) = std::move(after);
  if (!event.recording->done()) stream.enqueue({Task::Kind::Wait, nullptr, nullptr, 0, false, event.recording});
}

// However often a program asks whether a recording is done, that is one wait.
bool Machine::query(Event& event) {
  if (!event.recording) return true;
  check_there(event.device);
  std::lock_guard lock(mutex_);
  Clock after = checker_.clock(HOST);
  bool news = after.join(event.recording->clock);
  if (!event.asked) event.forgotten = !wait_counts("the host asks for an event", news);
  event.asked = true;
  if (event.forgotten) return true;
  if (!event.recording->done()) return false;
  checker_.clock(HOST) = std::move(after);
  return true;
}

void Machine::synchronize(Event& event) {
  if (!event.recording) return;
  check_there(event.device);
  {
    std::lock_guard lock(mutex_);
    Clock after = checker_.clock(HOST);
    bool news = after.join(event.recording->clock);
    if (!wait_counts("the host waits for an event", news)) return;
    checker_.clock(HOST) = std::move(after);
  }
  event.recording->wait();
}

void Machine::join_host(Stream& stream) {
  check_there(stream.device);
  {
    std::lock_guard lock(mutex_);
    checker_.clock(HOST).join(checker_.clock(stream.actor));
  }
  stream.drain();
}

void Machine::synchronize(Stream& stream) {
  check_there(stream.device);
  {
    std::lock_guard lock(mutex_);
    Clock after = checker_.clock(HOST);
    bool news = after.join(checker_.clock(stream.actor));
    if (!wait_counts("the host waits for " + checker_.actor_name(stream.actor), news)) return;
    checker_.clock(HOST) = std::move(after);
  }
  stream.drain();
}

void Machine::synchronize_device(int device) {
  if (device < 0) device = device_now;
  check_there(device);
  {
    std::lock_guard lock(mutex_);
    Clock after = checker_.clock(HOST);
    bool news = false;
    for (auto& each : streams_[device]) news |= after.join(checker_.clock(each->actor));
    if (!wait_counts("the host waits for sim:" + std::to_string(device), news)) return;
    checker_.clock(HOST) = std::move(after);
  }
  for (auto& each : streams_[device]) each->drain();
}

bool Machine::query(Stream& stream) {
  std::lock_guard lock(mutex_);
  if (!stream.idle()) return false;
  checker_.clock(HOST).join(checker_.clock(stream.actor));
  return true;
}

void Machine::stop_threads() {
  std::lock_guard lock(mutex_);
  for (auto& device : streams_)
    for (auto& each : device) each->drain();
  for (auto& device : streams_)
    for (auto& each : device) each->stop();
}

void Machine::touch(const Operation& operation, const std::vector<Touch>& touched) {
  std::lock_guard lock(mutex_);
  for (const Touch& each : touched) checker_.access(operation, each.low, each.high, each.writes);
}

Operation Machine::begin(Stream& stream, const std::string& name, const std::vector<Touch>& touched) {
  operate(stream.device);
  Operation operation;
  {
    std::lock_guard lock(mutex_);
    operation = checker_.begin(stream.actor, name);
    for (const Touch& each : touched) checker_.access(operation, each.low, each.high, each.writes);
  }
  stream.drain();
  return operation;
}

void Machine::copy(Stream& stream, Way way, void* target, const void* source, std::size_t bytes, bool late) {
  static const char* const NAMES[] = {"copy up", "copy down", "copy within"};
  operate(stream.device);
  Address to = reinterpret_cast<Address>(target), from = reinterpret_cast<Address>(source);
  {
    std::lock_guard lock(mutex_);
    HostRange* range = way == Way::Within ? nullptr : range_of(way == Way::Up ? from : to, bytes);
    bool waits = way != Way::Within && (!late || range == nullptr);
    Usage& usage = usage_[stream.device];
    (way == Way::Up ? usage.up : usage.down) += way == Way::Within ? 0 : bytes;
    Operation operation = checker_.begin(stream.actor, NAMES[static_cast<int>(way)]);
    checker_.access(operation, from, from + bytes, false, waits && way == Way::Up);
    checker_.access(operation, to, to + bytes, true, waits && way == Way::Down);
    auto* there = way == Way::Down ? static_cast<unsigned char*>(target) : alias(target);
    auto* here = way == Way::Up ? static_cast<const unsigned char*>(source) : alias(source);
    stream.enqueue({Task::Kind::Copy, there, here, bytes, late});
    if (range != nullptr && !waits) {
      std::erase_if(range->uses, [](auto& each) { return each->done(); });
      range->uses.push_back(record_on(stream));
    }
    if (!waits) return;
    checker_.clock(HOST).join(checker_.clock(stream.actor));
  }
  stream.drain();
}

std::vector<Race> Machine::races() {
  std::lock_guard lock(mutex_);
  return checker_.races();
}

std::vector<Wait> Machine::waits() {
  std::lock_guard lock(mutex_);
  return waits_;
}

void Machine::forget_wait(std::uint64_t number) {
  std::lock_guard lock(mutex_);
  forgotten_.insert(number);
}

// Counts from zero again, with everything done and ordered.
void Machine::reset() {
  std::lock_guard lock(mutex_);
  for (auto& device : streams_) {
    for (auto& each : device) {
      each->drain();
      checker_.clock(HOST).join(checker_.clock(each->actor));
    }
  }
  free_deferred(true);
  for (auto& each : left_) each = -1;
  checker_.reset();
  waits_.clear();
  forgotten_.clear();
}

}  // namespace sim

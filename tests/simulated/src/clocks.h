// Who has seen what: vector clocks of the host and of every stream, and the accesses that are not known to be over.
//
// An actor is the host (0) or a stream. Each operation of an actor has a number; a clock says for each actor up to which
// number its operations are over for whoever owns the clock. Work is ordered when it is enqueued: a stream has seen all
// that the host had seen by then. Host threads share one clock, since how they wait for one another is not seen here.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace sim {

using Address = std::uintptr_t;

class Clock {
 public:
  std::uint64_t of(int actor) const { return actor < static_cast<int>(seen_.size()) ? seen_[actor] : 0; }
  void advance(int actor, std::uint64_t number);
  /// Takes over what the other has seen; whether that was news.
  bool join(const Clock& other);

 private:
  std::vector<std::uint64_t> seen_;
};

constexpr int HOST = 0;

/// One operation of one actor, to which accesses belong.
struct Operation {
  int actor;
  std::uint64_t number;
  std::string name;
};

struct Race {
  std::string first, first_actor, second, second_actor;
  bool first_writes, second_writes;
  Address low, high;
};

/// All clocks and accesses of a process. Whoever calls holds the device's lock.
class Checker {
 public:
  /// An operation that the host enqueues now on `actor`, or does itself.
  Operation begin(int actor, std::string name);
  /// Reports whatever is not ordered before it; from then on the access itself is known unless `over`: the host has
  /// waited for it already.
  void access(const Operation& operation, Address low, Address high, bool writes, bool over = false);
  /// As a write that has also seen `clocks`, without the actor having seen them. All that was known there is over.
  void take(const Operation& operation, Address low, Address high, const std::vector<Clock>& clocks);
  /// Nobody looks at these addresses any more.
  void forget(Address low, Address high);

  Clock& clock(int actor);
  /// Of a stream to which the host is about to give something: it has seen what the host has seen.
  Clock& clock_now(int actor);
  void name_actor(int actor, std::string name);
  const std::string& actor_name(int actor) const { return names_[actor]; }
  const std::vector<Race>& races() const { return races_; }
  void reset();

 private:
  struct Access {
    Address low, high;
    bool writes;
    int actor;
    std::uint64_t number;
    std::string name;
  };
  // By the base-two logarithm of their length, so that those that overlap a range are near it in their order.
  std::array<std::multimap<Address, Access>, 64> accesses_;
  std::vector<Clock> clocks_{1};
  std::vector<std::uint64_t> numbers_{0};
  std::vector<std::string> names_{"the host"};
  std::vector<Race> races_;
  std::set<std::pair<std::string, std::string>> reported_;

  template <class Visit>
  void overlapping(Address low, Address high, Visit visit);
  void report(const Access& before, const Operation& now, bool writes, Address low, Address high);
};

}  // namespace sim

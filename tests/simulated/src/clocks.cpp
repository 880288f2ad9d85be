#include "clocks.h"

#include <algorithm>
#include <bit>

namespace sim {

void Clock::advance(int actor, std::uint64_t number) {
  if (actor >= static_cast<int>(seen_.size())) seen_.resize(actor + 1, 0);
  seen_[actor] = std::max(seen_[actor], number);
}

bool Clock::join(const Clock& other) {
  bool news = false;
  if (seen_.size() < other.seen_.size()) seen_.resize(other.seen_.size(), 0);
  for (std::size_t i = 0; i < other.seen_.size(); i++) {
    news |= seen_[i] < other.seen_[i];
    seen_[i] = std::max(seen_[i], other.seen_[i]);
  }
  return news;
}

Clock& Checker::clock(int actor) {
  if (actor >= static_cast<int>(clocks_.size())) {
    clocks_.resize(actor + 1);
    numbers_.resize(actor + 1, 0);
    names_.resize(actor + 1);
  }
  return clocks_[actor];
}

Clock& Checker::clock_now(int actor) {
  Clock& own = clock(actor);
  own.join(clocks_[HOST]);
  return own;
}

void Checker::name_actor(int actor, std::string name) {
  clock(actor);
  names_[actor] = std::move(name);
}

Operation Checker::begin(int actor, std::string name) {
  Clock& own = clock_now(actor);
  own.advance(actor, ++numbers_[actor]);
  return {actor, numbers_[actor], std::move(name)};
}

// Calls `visit` with each access that overlaps the range; erases those for which it returns false. What the host has
// waited for is ordered before all that it will ever enqueue: such accesses go without a visit.
template <class Visit>
void Checker::overlapping(Address low, Address high, Visit visit) {
  for (std::size_t k = 0; k < accesses_.size(); k++) {
    auto& those = accesses_[k];
    if (those.empty()) continue;
    Address reach = k + 1 < 64 ? (Address{1} << (k + 1)) - 1 : ~Address{0};
    auto each = those.lower_bound(low > reach ? low - reach : 0);
    while (each != those.end() && each->first < high) {
      const Access& access = each->second;
      bool over = clocks_[HOST].of(access.actor) >= access.number && access.actor != HOST;
      bool overlaps = access.low < high && low < access.high;
      bool keep = !over && (!overlaps || visit(access));
      each = keep ? std::next(each) : those.erase(each);
    }
  }
}

void Checker::report(const Access& before, const Operation& now, bool writes, Address low, Address high) {
  std::pair<std::string, std::string> key{before.name + "@" + names_[before.actor], now.name + "@" + names_[now.actor]};
  if (races_.size() >= 1000 || !reported_.insert(key).second) return;
  races_.push_back({before.name, names_[before.actor], now.name, names_[now.actor], before.writes, writes,
                    std::max(low, before.low), std::min(high, before.high)});
}

void Checker::access(const Operation& operation, Address low, Address high, bool writes, bool over) {
  if (low >= high) return;
  const Clock& seen = clock(operation.actor);
  overlapping(low, high, [&](const Access& before) {
    bool ordered = before.actor == operation.actor || seen.of(before.actor) >= before.number;
    if (!ordered && (before.writes || writes)) {
      report(before, operation, writes, low, high);
      return false;
    }
    // Whatever comes after this access and would have to be after that one is after both.
    bool covered = low <= before.low && before.high <= high;
    return !(covered && ordered && (writes || !before.writes));
  });
  if (over) return;
  int kind = std::bit_width(high - low) - 1;
  accesses_[kind].emplace(low, Access{low, high, writes, operation.actor, operation.number, operation.name});
}

void Checker::take(const Operation& operation, Address low, Address high, const std::vector<Clock>& clocks) {
  Clock seen = clock(operation.actor);
  for (const Clock& each : clocks) seen.join(each);
  overlapping(low, high, [&](const Access& before) {
    bool ordered = before.actor == operation.actor || seen.of(before.actor) >= before.number;
    if (!ordered) report(before, operation, true, low, high);
    return false;
  });
  int kind = std::bit_width(high - low) - 1;
  accesses_[kind].emplace(low, Access{low, high, true, operation.actor, operation.number, operation.name});
}

void Checker::forget(Address low, Address high) {
  overlapping(low, high, [](const Access&) { return false; });
}

void Checker::reset() {
  for (auto& those : accesses_) those.clear();
  races_.clear();
  reported_.clear();
}

}  // namespace sim

// Fibers, barriers, bulk copies. See machine.h.
#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {
constexpr size_t kStack = 256 * 1024;
alignas(1024) uint8_t shared_bytes[kSharedBytes];
ucontext_t starting, returning;

void enter() {
  Machine& m = machine();
  Fiber& self = *m.current;
  m.body();
  if (!self.open.empty()) m.error = "a thread ended with products that were not committed";
  self.done = true;
  _longjmp(m.scheduler, 1);
}
}  // namespace

Machine& machine() {
  static Machine one;
  one.shared = shared_bytes;
  return one;
}

void Machine::fail(const std::string& what) {
  if (error.empty()) {
    error = "block " + std::to_string(block) + ", thread " + std::to_string(current ? current->id : -1) + ": " + what;
  }
  _longjmp(scheduler, 1);
}

void Machine::resume(Fiber& f) {
  current = &f;
  if (_setjmp(scheduler) == 0) {
    if (f.started) _longjmp(f.context, 1);
    f.started = true;
    getcontext(&starting);
    starting.uc_stack.ss_sp = stacks[f.id].data();
    starting.uc_stack.ss_size = kStack;
    starting.uc_link = &returning;
    makecontext(&starting, enter, 0);
    setcontext(&starting);
  }
}

void Machine::wait_while(const uint64_t* word, uint64_t seen, const char* where) {
  Fiber& self = *current;
  while (*word == seen) {
    self.blocked_on = word, self.seen = seen, self.where = where;
    if (_setjmp(self.context) == 0) _longjmp(scheduler, 1);
  }
  self.blocked_on = nullptr;
}

std::string Machine::stuck() const {
  std::string text = "nobody can go on:";
  for (const Fiber& f : fibers) {
    if (!f.done && f.id % 32 == 0) text += " thread " + std::to_string(f.id) + " in " + f.where + ";";
  }
  return text;
}

void Machine::run_block(int count, int64_t number, int64_t all, std::function<void()> what) {
  threads = count, block = number, blocks = all, body = std::move(what);
  fibers.assign(threads, Fiber{});
  stacks.resize(std::max<size_t>(stacks.size(), threads));
  for (auto& s : stacks) s.resize(kStack);
  for (Warp& w : warps) w = Warp{};
  for (Meeting& m : meetings) m = Meeting{};
  for (Group& g : groups) g = Group{};
  copies.clear();
  std::memset(shared, 0xFF, kSharedBytes);  // every 2-byte number a NaN
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) fibers[i].id = order[i] = i;
  while (true) {
    // warps in random order, now and then single threads: nothing may depend on it
    const int unit = random() % 8 ? 32 : 1;
    std::vector<int> starts;
    for (int i = 0; i < threads; i += unit) starts.push_back(i);
    std::shuffle(starts.begin(), starts.end(), random);
    int moved = 0, left = 0;
    for (int start : starts) {
      for (int i = start; i < start + unit; ++i) {
        Fiber& f = fibers[i];
        if (f.done) continue;
        ++left;
        if (f.blocked_on && *f.blocked_on == f.seen) continue;
        ++moved;
        resume(f);
        if (!error.empty()) return;
      }
    }
    if (left == 0) break;
    if (!copies.empty() && (moved == 0 || random() % 4 == 0)) {
      finish_copy(random() % copies.size());
    } else if (moved == 0) {
      error = "block " + std::to_string(block) + ": " + stuck();
      return;
    }
  }
  current = nullptr;
  if (!copies.empty()) error = "a block ended before its copies had arrived";
}

void Machine::meet(Meeting& m, int count, const char* where) {
  const uint64_t turn = m.turn;
  if (++m.arrived == count) {
    m.arrived = 0;
    ++m.turn;
  } else {
    wait_while(&m.turn, turn, where);
  }
}

uint64_t Machine::exchange(uint64_t value, int from, const char* where) {
  Warp& w = warps[current->id / 32];
  const uint64_t turn = w.turn;
  w.value[turn & 1][current->id % 32] = value;
  if (++w.arrived == 32) {
    w.arrived = 0;
    ++w.turn;
  } else {
    wait_while(&w.turn, turn, where);
  }
  return w.value[turn & 1][from];
}

uint32_t Machine::vote(bool value) {
  Warp& w = warps[current->id / 32];
  const uint64_t turn = w.turn;
  exchange(value, 0, "a vote");
  uint32_t all = 0;
  for (int i = 0; i < 32; ++i) all |= static_cast<uint32_t>(w.value[turn & 1][i] & 1) << i;
  return all;
}

void Machine::settle_barrier(Barrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.pending = b.expected;
    ++b.phase;
  }
}

void Machine::arrive(Barrier& b) {
  if (b.pending <= 0 || b.pending > b.expected) fail("an arrival too many, or at what is no barrier");
  --b.pending;
  settle_barrier(b);
}

void Machine::start_copy(Copy copy, void* to) {
  std::memset(to, 0xFF, copy.bytes);  // what was there is gone from now on
  copies.push_back(std::move(copy));
}

void Machine::finish_copy(size_t i) {
  const Copy copy = copies[i];
  copies.erase(copies.begin() + i);
  copy.move();
  copy.barrier->bytes -= copy.bytes;
  settle_barrier(*copy.barrier);
}
}  // namespace emulator

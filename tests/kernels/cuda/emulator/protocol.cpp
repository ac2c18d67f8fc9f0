// The ring's protocol alone, over random lists: every slot must hold what its entry says, for as long as
// it is held, and everybody must come to the end. Faults show that the machine would notice.
#include <random>
#include <string>
#include <vector>

#include "tiles.cuh"

namespace {
using namespace megagen::cuda;
constexpr int kStages = 4, kDim = 64;
enum Fault { kNone, kImpatient, kTooFar, kTooEarly, kForgetful, kWrongPhase };

struct Seen {
  std::vector<uint32_t> owned[2];
};

// Lets go of entries as a faulty consumer would.
template <class Ring>
struct Faulty {
  Ring& ring;
  const uint32_t* list;
  int side, fault, place = 0;

  uint32_t wait(const Cursor<kStages>& at) {
    const uint32_t e = list[place];
    const bool skips = fault == kImpatient && !entry_owned(e, side);
    Cursor<kStages> from = at;
    if (fault == kWrongPhase) from.phase ^= 1;
    ++place;
    return skips ? e : ring.wait(from);
  }
  void release(int slot) {
    if (fault == kForgetful && side == 1 && hw::warp() == 5) return;
    ring.release(slot);
  }
};

template <class Ring>
struct Checker {
  RingMemory<kDim, kStages, 0>& memory;
  Ring& ring;
  Seen& seen;
  int side, fault;
  uint32_t holding = 0;

  // Every block's numbers are its own number.
  void look(int slot, uint32_t e) {
    for (const uint8_t* tile : {memory.first[slot], memory.second[slot]}) {
      const auto* bits = reinterpret_cast<const uint16_t*>(tile);
      const int thread = hw::thread() % 128;
      if (bits[thread] != entry_index(e) || bits[4095 - thread] != entry_index(e)) {
        hw::machine().fail("a slot does not hold its entry");
      }
    }
  }
  void take(int slot, int size) {
    const uint32_t e = memory.entries[slot];
    if (!entry_owned(e, side) || entry_size(e) != size) hw::machine().fail("an entry of the other side");
    if (hw::thread() % 128 == 0) seen.owned[side].push_back(e);
    look(slot, e);
    holding = e;
    hw::sync_group<128>(1 + side);  // as products would, this takes its time
  }
  void begin(int slot, int size) { take(slot, size); }
  template <class Release>
  void next(int held, int slot, int size, const Release& release) {
    const uint32_t before = holding;
    if (fault == kTooEarly) release();
    take(slot, size);
    look(held, before);
    if (fault != kTooEarly) release();
  }
  void finish(int held) { look(held, holding); }
  void whole(int slot, int size) { take(slot, size); }
};

// walk() with a reach that its own check refuses: nothing is let go of before the next owned entry is there.
template <class Ring, class Body>
void walk_too_far(Ring& ring, Cursor<kStages>& at, int count, int side, Body& body) {
  int held = -1;
  for (; count > 0; --count, at.advance()) {
    const uint32_t e = ring.wait(at);
    if (!entry_owned(e, side)) {
      ring.release(at.slot);
      continue;
    }
    body.take(at.slot, entry_size(e));
    if (held >= 0) ring.release(held);
    held = at.slot;
  }
  if (held >= 0) ring.release(held);
}
}  // namespace

// Walks `lists` random lists of up to `longest` entries by one CTA; null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* emulator_protocol(int fault, int seed, int lists,
                                                                                int longest) {
  static std::string problem;
  std::mt19937 random(seed);
  std::vector<uint16_t> blocks(64 * 64 * 64);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i / 4096;
  const CUtensorMap map{blocks.data(), 1, 64 * 64, kDim};
  std::vector<std::vector<uint32_t>> all(lists);
  Seen expected, seen;
  const int sizes[] = {64, 64, 64, 16, 48, 49};
  for (auto& list : all) {
    const int count = longest ? random() % (longest + 1) : 0, habit = random() % 3;
    for (int i = 0; i < count; ++i) {
      const int owners = habit == 0 ? random() % 4 : habit == 1 ? 1 + random() % 2 : 1 + (i / 7 % 2);
      list.push_back(entry(random() % 64, sizes[random() % 6], owners));
      for (int side = 0; side < 2; ++side) {
        if (owners >> side & 1) expected.owned[side].push_back(list.back());
      }
    }
  }
  const auto body = [&] {
    auto& memory = hw::shared<RingMemory<kDim, kStages, 0>>();
    RingUse<kDim, kStages, 0> ring{memory};
    if (hw::thread() == 0) ring.init();
    hw::sync_threads();
    Cursor<kStages> at;
    const int warp = hw::warp();
    for (const auto& list : all) {
      const int count = static_cast<int>(list.size());
      if (warp == kConsumerWarps) {
        ring.produce(at, list.data(), count, map, map, nullptr, 0);
        continue;
      }
      using Ring = Faulty<RingUse<kDim, kStages, 0>>;
      Ring faulty{ring, list.data(), warp / 4, fault};
      Checker<Ring> checker{memory, faulty, seen, warp / 4, fault};
      if (fault == kTooFar) {
        walk_too_far(faulty, at, count, warp / 4, checker);
      } else {
        walk<kStages - 1>(faulty, at, count, warp / 4, checker);
      }
    }
  };
  const char* error = hw::run(1, (kConsumerWarps + 1) * 32, body);
  if (error) {
    problem = error;
    return problem.c_str();
  }
  const bool alike = seen.owned[0] == expected.owned[0] && seen.owned[1] == expected.owned[1];
  return alike ? nullptr : "a side has not seen its own entries in order";
}

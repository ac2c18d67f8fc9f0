// The ring of tiles between one producer warp and two consumer warpgroups, and how a consumer walks it.
//
// A slot is full when its tiles have arrived and empty when all eight consumer warps have let go of it.
// Both consumers see every entry in order. A consumer that does not own an entry waits until it is full
// all the same, and only then lets go: an earlier arrival could be counted for the slot's previous use.
#pragma once
#include "layout.h"

namespace megagen::cuda {

// Where somebody is on the ring. The phase flips each time around; a fresh barrier counts as having
// completed phase 1, so the producer starts by waiting for 1 and a consumer for 0.
template <int kStages>
struct Cursor {
  int slot = 0;
  uint32_t phase = 0;
  MG_BOTH void advance() {
    if (++slot == kStages) slot = 0, phase ^= 1;
  }
};

// Walks `count` entries and hands those of this side to `body`:
//   begin(slot, size)        nothing is held
//   next(held, slot, size, release)  work on `held` is still to be finished; calls release() when it is
//   finish(held)             finish it with nothing new to overlap with
//   whole(slot, size)        all at once: a block of few tokens
// After begin and next the new slot is held: its last product waits for the next entry. An entry is
// looked for at most kReach - 1 places on, as the producer cannot refill the slot that is held.
template <int kReach, int kStages, class Ring, class Body>
MG_BOTH void walk(Ring& ring, Cursor<kStages>& at, int count, int side, Body& body) {
  static_assert(kReach <= kStages, "a consumer would wait for a slot that it holds itself");
  int held = -1, age = 0;
  while (true) {
    uint32_t found = 0;
    while (count > 0 && (held < 0 || age < kReach)) {
      const uint32_t e = ring.wait(at);
      if (entry_owned(e, side)) {
        found = e;
        break;
      }
      ring.release(at.slot);
      at.advance();
      --count, ++age;
    }
    const int size = entry_size(found);
    if (held >= 0 && size <= kSmall) {  // nothing found in reach, or a small block
      body.finish(held);
      ring.release(held);
      held = -1;
      if (size == 0) continue;
    } else if (size == 0) {
      return;
    }
    const int slot = at.slot;
    if (size <= kSmall) {
      body.whole(slot, size);
      ring.release(slot);
    } else {
      if (held >= 0) {
        body.next(held, slot, size, [&] { ring.release(held); });
      } else {
        body.begin(slot, size);
      }
      held = slot, age = 0;
    }
    at.advance();
    --count, ++age;
  }
}

// Walks a list handing every owned entry to body.whole(slot, size).
template <int kStages, class Ring, class Body>
MG_BOTH void walk_whole(Ring& ring, Cursor<kStages>& at, int count, int side, Body& body) {
  for (; count > 0; --count, at.advance()) {
    const uint32_t e = ring.wait(at);
    if (entry_owned(e, side)) body.whole(at.slot, entry_size(e));
    ring.release(at.slot);
  }
}
}  // namespace megagen::cuda

// wgmma as the PTX ISA describes it: matrices found in shared memory through their descriptors, fragments
// by thread. Written from the manual's figures, apart from layout.h, which it is there to check.
#pragma GCC optimize("O3")
#include <cmath>
#include <cstring>

#include "machine.h"

namespace emulator {

float number(uint16_t bits, bool fp16) {
  if (fp16) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t bits_of(float value, bool fp16) {
  if (fp16) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);  // to nearest, ties to even
}

namespace {
struct Matrix {
  float at[128][16];  // [row of A or column of B][k]
};

// Element (i, k) of the operand that a descriptor names; i runs along M or N.
void gather(Machine& m, uint64_t descriptor, bool transposed, bool fp16, int count, Matrix& out) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) m.fail("a descriptor without the 128-byte swizzle");
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < 16; ++k) {
      uint32_t at = start;
      if (transposed) {  // 64 neighbours in M or N are contiguous, one k is 128 bytes further
        at += (i / 64) * leading + (i % 64) * 2 + (k / 8) * stride + (k % 8) * 128;
      } else {  // 16 neighbours in K are contiguous, one i is 128 bytes further
        at += (i / 8) * stride + (i % 8) * 128 + k * 2;
      }
      at ^= (at >> 7 & 7) << 4;
      if (at < kSharedStart || at + 2 > kSharedStart + kSharedBytes) m.fail("a descriptor out of shared memory");
      uint16_t bits;
      std::memcpy(&bits, m.shared + at - kSharedStart, 2);
      out.at[i][k] = number(bits, fp16);
    }
  }
}

void check_alike(Machine& m, const Product& one, const Product& other) {
  if (one.columns != other.columns || one.b != other.b || one.a != other.a || one.rows_b != other.rows_b ||
      one.accumulate != other.accumulate || !one.registers != !other.registers) {
    m.fail("threads of a warpgroup issue different products");
  }
}
}  // namespace

void Machine::commit() {
  Fiber& self = *current;
  Group& group = groups[self.id / 128];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
  ++self.committed;
  ++group.commits;
  if (!eager) return;
  for (int i = self.id / 128 * 128, end = i + 128; i < end; ++i) {
    if (fibers[i].committed < self.committed) return;
  }
  execute(self.id / 128, self.committed);
}

void Machine::wait_products(uint64_t pending) {
  Fiber& self = *current;
  if (!self.open.empty()) fail("a wait with products that were not committed");
  if (self.committed <= pending) return;
  const uint64_t target = self.committed - pending;
  Group& group = groups[self.id / 128];
  const int first = self.id / 128 * 128;
  while (group.executed < target) {
    const uint64_t seen = group.commits;
    bool ready = true;
    for (int i = first; i < first + 128; ++i) ready = ready && fibers[i].committed >= target;
    if (ready) {
      execute(self.id / 128, target);
    } else {
      wait_while(&group.commits, seen, "a wait for products");
    }
  }
}

void Machine::execute(int number_of_group, uint64_t upto) {
  Group& group = groups[number_of_group];
  const int first = number_of_group * 128;
  static Matrix a, b;
  for (; group.executed < upto; ++group.executed) {
    const auto& example = fibers[first].groups[group.executed];
    for (size_t p = 0; p < example.size(); ++p) {
      const Product& one = example[p];
      ++products;
      gather(*this, one.b, one.rows_b, one.fp16, one.columns, b);
      if (!one.registers) gather(*this, one.a, one.rows_a, one.fp16, 64, a);
      for (int t = 0; t < 128; ++t) {
        const auto& theirs = fibers[first + t].groups[group.executed];
        if (theirs.size() != example.size()) fail("threads of a warpgroup commit different numbers of products");
        check_alike(*this, one, theirs[p]);
        if (!one.registers) continue;
        for (int r = 0; r < 4; ++r) {
          const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (r % 2), k = 2 * (t % 4) + 8 * (r / 2);
          a.at[row][k] = number(theirs[p].registers[r] & 0xFFFF, one.fp16);
          a.at[row][k + 1] = number(theirs[p].registers[r] >> 16, one.fp16);
        }
      }
      for (int t = 0; t < 128; ++t) {
        float* d = fibers[first + t].groups[group.executed][p].d;
        for (int i = 0; i < one.columns / 2; ++i) {
          const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i % 4 / 2), column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += a.at[row][k] * b.at[column][k];
          d[i] = one.accumulate ? d[i] + sum : sum;
        }
      }
    }
  }
}
}  // namespace emulator

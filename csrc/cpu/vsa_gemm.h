// Products of blocks: C (+)= A B with A and C up to kBlock rows, by tiles of kRows x kPanel numbers kept
// in registers.
//
// A matrix of tokens is kept in panels: columns [p kPanel, (p + 1) kPanel) of all rows lie together, a
// line of kPanel numbers a row. A map of scores is kept in rows of kBlock numbers.
#pragma once
#include "vec.h"
#include "vsa.h"

namespace megagen::MEGAGEN_ISA {
constexpr Index kPanel = 2 * kWidth;
constexpr Index kPanelSize = kBlock * kPanel;  // of a matrix with kBlock rows
constexpr Index kMapSize = kBlock * kBlock;
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif

MEGAGEN_INLINE Index smaller(Index a, Index b) { return a < b ? a : b; }
MEGAGEN_INLINE Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
// Floats of a matrix of kBlock rows in panels.
MEGAGEN_INLINE Index panels_size(Index columns) { return ceil_div(columns, kPanel) * kPanelSize; }

// How the numbers of A are found: A(i, k) = a[i * kRow + k * kColumn], and the next kChunk columns are
// kJump further on.
struct Panels {
  static constexpr Index kRow = kPanel, kColumn = 1, kChunk = kPanel, kJump = kPanelSize;
};
struct Map {
  static constexpr Index kRow = kBlock, kColumn = 1, kChunk = kBlock, kJump = 0;
};
struct MapTransposed {
  static constexpr Index kRow = 1, kColumn = kBlock, kChunk = kBlock, kJump = 0;
};

// What is written: a row of C is kLine floats after the one before, the next kPanel columns kNext.
struct ToMap {
  static constexpr Index kLine = kBlock, kNext = kPanel;
};
struct ToPanels {
  static constexpr Index kLine = kPanel, kNext = kPanelSize;
};
enum class Update { kSet, kAdd, kScaleAndAdd };  // C = AB, C + AB, diag(scale) C + AB

// Memory that will be read soon, fetched into the cache a line at a time while products run: lists of
// blocks jump through memory in a way that no processor foresees.
class Ahead {
 public:
  Ahead() = default;
  MEGAGEN_METHOD Ahead(const float* begin, Index floats)
      : next_(reinterpret_cast<const char*>(begin)), end_(reinterpret_cast<const char*>(begin + floats)) {}
  MEGAGEN_METHOD bool done() const { return next_ >= end_; }
  MEGAGEN_METHOD void fetch() {
    __builtin_prefetch(next_, 0, 2);
    next_ += kLine;
  }

 private:
  static constexpr Index kLine = 64;
  const char *next_ = nullptr, *end_ = nullptr;
};

// kRowsHere x (kVectors * kWidth) numbers of C. kFetches: a line of `ahead` every fourth column of A.
template <int kRowsHere, int kVectors, class A, class C, Update kUpdate, bool kFetches>
MEGAGEN_INLINE void multiply_tile(const float* a, const float* b, float* c, Index depth, const float* scale,
                                  Ahead& ahead) {
  Vec sum[kRowsHere][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRowsHere; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      if (kUpdate == Update::kSet) sum[i][v] = Vec{};
      if (kUpdate != Update::kSet) sum[i][v] = load<Vec>(c + i * C::kLine + v * kWidth);
      if (kUpdate == Update::kScaleAndAdd) sum[i][v] *= scale[i];
    }
  for (Index chunk = 0; chunk < depth; chunk += A::kChunk, a += A::kJump) {
    const Index columns = smaller(A::kChunk, depth - chunk);
    const auto add = [&](Index k) __attribute__((always_inline)) {
      Vec line[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) line[v] = load<Vec>(b + k * kPanel + v * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kRowsHere; ++i) {
        const float x = a[i * A::kRow + k * A::kColumn];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[i][v] += line[v] * x;
      }
    };
    Index k = 0;
    for (; k + 4 <= columns; k += 4) {
      if (kFetches) ahead.fetch();
#pragma GCC unroll 4
      for (Index each = 0; each < 4; ++each) add(k + each);
    }
    for (; k < columns; ++k) add(k);
    b += columns * kPanel;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRowsHere; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + i * C::kLine + v * kWidth, sum[i][v]);
}

// The last rows, fewer than kRows: exactly as many.
template <int kRowsHere, int kVectors, class A, class C, Update kUpdate>
MEGAGEN_INLINE void multiply_last(Index rows, const float* a, const float* b, float* c, Index depth,
                                  const float* scale, Ahead& ahead) {
  if constexpr (kRowsHere > 0) {
    if (rows == kRowsHere)
      return multiply_tile<kRowsHere, kVectors, A, C, kUpdate, false>(a, b, c, depth, scale, ahead);
    multiply_last<kRowsHere - 1, kVectors, A, C, kUpdate>(rows, a, b, c, depth, scale, ahead);
  }
}

template <int kVectors, class A, class C, Update kUpdate>
static void multiply_panel(Index rows, const float* a, const float* b, float* c, Index depth, const float* scale,
                           Ahead& ahead) {
  Index i = 0;
  for (; i + kRows <= rows && !ahead.done(); i += kRows)
    multiply_tile<kRows, kVectors, A, C, kUpdate, true>(a + i * A::kRow, b, c + i * C::kLine, depth, scale + i, ahead);
  for (; i + kRows <= rows; i += kRows)
    multiply_tile<kRows, kVectors, A, C, kUpdate, false>(a + i * A::kRow, b, c + i * C::kLine, depth, scale + i, ahead);
  multiply_last<kRows - 1, kVectors, A, C, kUpdate>(rows - i, a + i * A::kRow, b, c + i * C::kLine, depth, scale + i,
                                                    ahead);
}

// b: panels of b_rows lines, depth of them used; columns are rounded up to kWidth. ahead: what is fetched
// meanwhile, about as much as b is where all three sizes are full.
template <class A, class C, Update kUpdate>
static void multiply(Index rows, Index columns, Index depth, const float* a, const float* b, Index b_rows, float* c,
                     Ahead& ahead, const float* scale = nullptr) {
  for (Index first = 0; first < columns; first += kPanel, b += b_rows * kPanel, c += C::kNext) {
    if (columns - first > kWidth)
      multiply_panel<2, A, C, kUpdate>(rows, a, b, c, depth, scale, ahead);
    else
      multiply_panel<1, A, C, kUpdate>(rows, a, b, c, depth, scale, ahead);
  }
}
}  // namespace megagen::MEGAGEN_ISA

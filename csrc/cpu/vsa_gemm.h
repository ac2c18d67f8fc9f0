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

// kRowsHere x (kVectors * kWidth) numbers of C.
template <int kRowsHere, int kVectors, class A, class C, Update kUpdate>
MEGAGEN_INLINE void multiply_tile(const float* a, const float* b, float* c, Index depth, const float* scale) {
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
#pragma GCC unroll 4
    for (Index k = 0; k < columns; ++k, b += kPanel) {
      Vec line[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) line[v] = load<Vec>(b + v * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kRowsHere; ++i) {
        const float x = a[i * A::kRow + k * A::kColumn];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[i][v] += line[v] * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRowsHere; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + i * C::kLine + v * kWidth, sum[i][v]);
}

// The last rows, fewer than kRows: exactly as many.
template <int kRowsHere, int kVectors, class A, class C, Update kUpdate>
MEGAGEN_INLINE void multiply_last(Index rows, const float* a, const float* b, float* c, Index depth,
                                  const float* scale) {
  if constexpr (kRowsHere > 0) {
    if (rows == kRowsHere) return multiply_tile<kRowsHere, kVectors, A, C, kUpdate>(a, b, c, depth, scale);
    multiply_last<kRowsHere - 1, kVectors, A, C, kUpdate>(rows, a, b, c, depth, scale);
  }
}

template <int kVectors, class A, class C, Update kUpdate>
static void multiply_panel(Index rows, const float* a, const float* b, float* c, Index depth, const float* scale) {
  Index i = 0;
  for (; i + kRows <= rows; i += kRows)
    multiply_tile<kRows, kVectors, A, C, kUpdate>(a + i * A::kRow, b, c + i * C::kLine, depth, scale + i);
  multiply_last<kRows - 1, kVectors, A, C, kUpdate>(rows - i, a + i * A::kRow, b, c + i * C::kLine, depth, scale + i);
}

// b: panels of b_rows lines, depth of them used; columns are rounded up to kWidth.
template <class A, class C, Update kUpdate>
static void multiply(Index rows, Index columns, Index depth, const float* a, const float* b, Index b_rows, float* c,
                     const float* scale = nullptr) {
  for (Index first = 0; first < columns; first += kPanel, b += b_rows * kPanel, c += C::kNext) {
    if (columns - first > kWidth)
      multiply_panel<2, A, C, kUpdate>(rows, a, b, c, depth, scale);
    else
      multiply_panel<1, A, C, kUpdate>(rows, a, b, c, depth, scale);
  }
}
}  // namespace megagen::MEGAGEN_ISA

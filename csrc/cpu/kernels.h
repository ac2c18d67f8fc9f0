// The CPU operations: fp32, raw addresses, no torch headers.
//
// Letters: S tokens, B batch, R modulation rows, D model, N heads, K head size, F ffn. A "line" is the
// D (or N x K, or F) numbers of one token of one sample. Work is cut into units that do not depend on
// the number of threads, and each unit is summed in one order, so results are bitwise the same on any
// number of threads.
#pragma once
#include <cstdint>

namespace megagen {
using Index = int64_t;

// Which modulation row a token uses: rows[token], or where rows is null token / run (R equal runs).
// Sums over tokens are kept per segment, a stretch of at most kSegment tokens of one row, and added up
// in order at the end: bounds are its first tokens, or null where the segments of a run follow from run.
constexpr Index kSegment = 64;
struct Segments {
  Index num_tokens, count;
  const Index* bounds;  // [count + 1]
  const Index* rows;    // [num_tokens]
  Index run;
};

// scale, shift or gate: [R, B or 1, D], D contiguous.
struct Modulation {
  const float* data;
  Index row_stride, batch_stride;  // batch_stride 0: one for all samples
};

struct LayerNorm {
  Index batch, dim, num_rows, mod_batch;
  Segments segments;
  float eps, one;  // y = xhat * (one + scale) + shift
  const float* x;
  Modulation scale, shift;
  float *y, *mean, *rstd;                                // forward; mean and rstd [S, B]
  const float *dy;                                       // backward
  float *dx, *partial, *dscale, *dshift;                 // partial [count, B, 2, D]
};

struct Residual {
  Index batch, dim, num_rows, mod_batch;
  Segments segments;
  const float *x, *y;  // out = x + gate * y
  Modulation gate;
  float* out;
  const float* dout;
  float *dy, *partial, *dgate;  // partial [count, B, D]
};

struct NormRope {
  Index num_tokens, batch, heads, head_dim;
  Index token_stride, batch_stride, head_stride;  // of x; head_dim is contiguous
  Index num_features;                             // heads x head_dim over all tensor-parallel ranks
  float eps;
  const float *x, *weight, *cos, *sin;            // weight [N, K]; cos, sin [S, K / 2] or null
  const float* sum_squares;                       // [S, B] over all features, or null: computed here
  float *y, *rstd;                                // forward; y [S, B, N, K], rstd [S, B]
  const float* dy;                                // backward; attention hands it over in any layout
  Index dy_token_stride, dy_batch_stride, dy_head_stride;
  float *dx, *dsum_squares, *partial, *dweight;   // partial [segments of kSegment tokens, N, K]
};

struct BiasGelu {
  Index lines, dim;
  const float *x, *bias;  // bias [F] or null
  float* y;
  const float* dy;
  float *dx, *partial, *dbias;  // partial [ceil(lines / kSegment), F]
};

#define MEGAGEN_DECLARE(isa)                                  \
  namespace isa {                                             \
  void layernorm_forward(const LayerNorm& op, int threads);   \
  void layernorm_backward(const LayerNorm& op, int threads);  \
  void residual_forward(const Residual& op, int threads);     \
  void residual_backward(const Residual& op, int threads);    \
  void norm_rope_forward(const NormRope& op, int threads);    \
  void norm_rope_backward(const NormRope& op, int threads);   \
  void sum_squares(const NormRope& op, float* out, int threads); \
  void bias_gelu_forward(const BiasGelu& op, int threads);    \
  void bias_gelu_backward(const BiasGelu& op, int threads);   \
  }
MEGAGEN_DECLARE(generic)
#if MEGAGEN_X86
MEGAGEN_DECLARE(avx2)
MEGAGEN_DECLARE(avx512)
#endif
#undef MEGAGEN_DECLARE
}  // namespace megagen

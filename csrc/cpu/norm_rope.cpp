// RMSNorm over all heads, then interleaved RoPE on pairs (2h, 2h + 1) of each head:
//   n = x * rstd * weight, rstd = (sum_squares / num_features + eps)^(-1/2)
//   y[2h] = n[2h] cos[h] - n[2h+1] sin[h],  y[2h+1] = n[2h] sin[h] + n[2h+1] cos[h]
// Backward, with dn the inverse rotation of dy and dot = sum(dn * weight * x):
//   dx = rstd * dn * weight - x * rstd^3 * dot / num_features, dweight = sum over tokens of dn * x * rstd.
// Where sum_squares was given (tensor parallel: summed over ranks), dx leaves out its last term and
// dsum_squares = -rstd^3 * dot / (2 num_features) carries it.
#include <cmath>

#include "parallel.h"

namespace megagen::MEGAGEN_ISA {
static inline const float* head(const NormRope& op, Index token, Index b, Index n) {
  return op.x + token * op.token_stride + b * op.batch_stride + n * op.head_stride;
}

static inline float line_sum_squares(const NormRope& op, Index token, Index b) {
  float sum = 0;
  for (Index n = 0; n < op.heads; ++n) {
    const float* x = head(op, token, b, n);
    sum += sum_each(op.head_dim, [=](auto tag, Index i, auto& a, auto&) {
             const auto v = load<decltype(tag)>(x + i);
             a += v * v;
           }).a;
  }
  return sum;
}

// y = the pairs of x turned by the angle (cos, sign * sin).
static inline void rotate(const float* __restrict x, const float* __restrict cos, const float* __restrict sin,
                          float sign, Index half, float* __restrict y) {
  for (Index h = 0; h < half; ++h) {
    const float even = x[2 * h], odd = x[2 * h + 1], s = sign * sin[h];
    y[2 * h] = even * cos[h] - odd * s;
    y[2 * h + 1] = even * s + odd * cos[h];
  }
}

void sum_squares(const NormRope& op, float* out, int threads) {
  parallel_for(op.num_tokens, threads, [&](Index token) {
    for (Index b = 0; b < op.batch; ++b) out[token * op.batch + b] = line_sum_squares(op, token, b);
  });
}

constexpr Index kMaxHeadDim = 1024;  // the caller checks it

void norm_rope_forward(const NormRope& op, int threads) {
  const Index head_dim = op.head_dim, half = head_dim / 2;
  parallel_for(op.num_tokens, threads, [&](Index token) {
    float normed[kMaxHeadDim];
    for (Index b = 0; b < op.batch; ++b) {
      const Index line = token * op.batch + b;
      const float squares = op.sum_squares ? op.sum_squares[line] : line_sum_squares(op, token, b);
      const float rstd = 1.0f / std::sqrt(squares / op.num_features + op.eps);
      op.rstd[line] = rstd;
      for (Index n = 0; n < op.heads; ++n) {
        const float *x = head(op, token, b, n), *weight = op.weight + n * head_dim;
        float* y = op.y + (line * op.heads + n) * head_dim;
        float* into = op.cos ? normed : y;
        for_each(head_dim, [=](auto tag, Index i) {
          using T = decltype(tag);
          store(into + i, load<T>(x + i) * rstd * load<T>(weight + i));
        });
        if (op.cos) rotate(normed, op.cos + token * half, op.sin + token * half, 1.0f, half, y);
      }
    }
  });
}

void norm_rope_backward(const NormRope& op, int threads) {
  const Index head_dim = op.head_dim, half = head_dim / 2, dim = op.heads * head_dim;
  const Segments segments = plain_segments(op.num_tokens);
  parallel_for(segments.count, threads, [&](Index segment) {
    float turned[kMaxHeadDim];
    float* dweight = op.partial + segment * dim;
    for (Index i = 0; i < dim; ++i) dweight[i] = 0;
    const Index end = end_token(segments, segment);
    for (Index line = first_token(segments, segment) * op.batch; line < end * op.batch; ++line) {
      const Index token = line / op.batch, b = line % op.batch;
      const float rstd = op.rstd[line];
      float dot = 0;
      for (Index n = 0; n < op.heads; ++n) {
        const float *x = head(op, token, b, n), *weight = op.weight + n * head_dim;
        const float* dn = op.dy + token * op.dy_token_stride + b * op.dy_batch_stride + n * op.dy_head_stride;
        if (op.cos) {
          rotate(dn, op.cos + token * half, op.sin + token * half, -1.0f, half, turned);
          dn = turned;
        }
        float *dx = op.dx + (line * op.heads + n) * head_dim, *dw = dweight + n * head_dim;
        dot += sum_each(head_dim, [=](auto tag, Index i, auto& a, auto&) {
                 using T = decltype(tag);
                 const T dn_i = load<T>(dn + i), x_i = load<T>(x + i), g = dn_i * load<T>(weight + i);
                 a += g * x_i;
                 store(dx + i, g * rstd);
                 store(dw + i, load<T>(dw + i) + dn_i * x_i * rstd);
               }).a;
      }
      const float pull = rstd * rstd * rstd * dot / op.num_features;
      if (op.sum_squares) {
        op.dsum_squares[line] = -0.5f * pull;
        continue;
      }
      for (Index n = 0; n < op.heads; ++n) {
        const float* x = head(op, token, b, n);
        float* dx = op.dx + (line * op.heads + n) * head_dim;
        for_each(head_dim, [=](auto tag, Index i) {
          using T = decltype(tag);
          store(dx + i, load<T>(dx + i) - load<T>(x + i) * pull);
        });
      }
    }
  });
  sum_segments({segments, 1, dim, 1, 1, 1}, op.partial, 0, op.dweight, threads);
}
}  // namespace megagen::MEGAGEN_ISA

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
  Sums sums;
  for (Index n = 0; n < op.heads; ++n) {
    const float* x = head(op, token, b, n);
    sums.add(op.head_dim, [=](auto tag, Index i, auto& a, auto&) {
      const auto v = load<decltype(tag)>(x + i);
      a += v * v;
    });
  }
  return sums.total_a();
}

void sum_squares(const NormRope& op, float* out, int threads) {
  parallel_for(op.num_tokens, threads, [&](Index token) {
    for (Index b = 0; b < op.batch; ++b) out[token * op.batch + b] = line_sum_squares(op, token, b);
  });
}

// A token's angles for whole heads: turned[i] = n[i] cos[i] + n[other of the pair] sin[i].
constexpr Index kMaxHeadDim = 1024;  // the caller checks it
struct Angles {
  float cos[kMaxHeadDim], sin[kMaxHeadDim];
};
static inline void spread(const NormRope& op, Index token, Angles& angles) {
  const Index half = op.head_dim / 2;
  for (Index h = 0; h < half; ++h) {
    const float c = op.cos[token * half + h], s = op.sin[token * half + h];
    angles.cos[2 * h] = angles.cos[2 * h + 1] = c;
    angles.sin[2 * h] = -s;
    angles.sin[2 * h + 1] = s;
  }
}

void norm_rope_forward(const NormRope& op, int threads) {
  const Index head_dim = op.head_dim;
  parallel_for(op.num_tokens, threads, [&](Index token) {
    Angles angles;
    if (op.cos) spread(op, token, angles);
    const float *cos = angles.cos, *sin = angles.sin;
    for (Index b = 0; b < op.batch; ++b) {
      const Index line = token * op.batch + b;
      const float squares = op.sum_squares ? op.sum_squares[line] : line_sum_squares(op, token, b);
      const float rstd = 1.0f / std::sqrt(squares / op.num_features + op.eps);
      op.rstd[line] = rstd;
      for (Index n = 0; n < op.heads; ++n) {
        const float *x = head(op, token, b, n), *weight = op.weight + n * head_dim;
        float* y = op.y + (line * op.heads + n) * head_dim;
        const auto normed = [=](auto tag, Index i) {
          using T = decltype(tag);
          return load<T>(x + i) * rstd * load<T>(weight + i);
        };
        if (op.cos) {
          for_each(head_dim, [=](auto tag, Index i) {
            using T = decltype(tag);
            store(y + i, normed(tag, i) * load<T>(cos + i) + partner(tag, i, normed) * load<T>(sin + i));
          });
        } else {
          for_each(head_dim, [=](auto tag, Index i) { store(y + i, normed(tag, i)); });
        }
      }
    }
  });
}

// One token of one sample; dn(tag, i, dy) is the gradient of a head's normed values.
template <class F>
static inline void line_backward(const NormRope& op, Index token, Index b, float* dweight, F dn) {
  const Index line = token * op.batch + b, head_dim = op.head_dim;
  const float rstd = op.rstd[line];
  Sums sums;
  for (Index n = 0; n < op.heads; ++n) {
    const float *x = head(op, token, b, n), *weight = op.weight + n * head_dim;
    const float* dy = op.dy + token * op.dy_token_stride + b * op.dy_batch_stride + n * op.dy_head_stride;
    float *dx = op.dx + (line * op.heads + n) * head_dim, *dw = dweight + n * head_dim;
    sums.add(head_dim, [=](auto tag, Index i, auto& dot, auto&) {
      using T = decltype(tag);
      const T dn_i = dn(tag, i, dy), x_i = load<T>(x + i), g = dn_i * load<T>(weight + i);
      dot += g * x_i;
      store(dx + i, g * rstd);
      store(dw + i, load<T>(dw + i) + dn_i * x_i * rstd);
    });
  }
  const float pull = rstd * rstd * rstd * sums.total_a() / op.num_features;
  if (op.sum_squares) {
    op.dsum_squares[line] = -0.5f * pull;
    return;
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

void norm_rope_backward(const NormRope& op, int threads) {
  const Index dim = op.heads * op.head_dim;
  const Segments segments = plain_segments(op.num_tokens);
  parallel_for(segments.count, threads, [&](Index segment) {
    Angles angles;
    const float *cos = angles.cos, *sin = angles.sin;
    const auto straight = [](auto tag, Index i, const float* dy) { return load<decltype(tag)>(dy + i); };
    const auto turned_back = [=](auto tag, Index i, const float* dy) {
      using T = decltype(tag);
      const auto other = partner(tag, i, [=](auto t, Index j) { return load<decltype(t)>(dy + j); });
      return load<T>(dy + i) * load<T>(cos + i) - other * load<T>(sin + i);
    };
    float* dweight = op.partial + segment * dim;
    for (Index i = 0; i < dim; ++i) dweight[i] = 0;
    for (Index token = first_token(segments, segment); token < end_token(segments, segment); ++token) {
      if (op.cos) spread(op, token, angles);
      for (Index b = 0; b < op.batch; ++b) {
        if (op.cos)
          line_backward(op, token, b, dweight, turned_back);
        else
          line_backward(op, token, b, dweight, straight);
      }
    }
  });
  sum_segments({segments, 1, dim, 1, 1, 1}, op.partial, 0, op.dweight, threads);
}
}  // namespace megagen::MEGAGEN_ISA

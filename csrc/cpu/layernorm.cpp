// y = xhat * (one + scale) + shift with xhat = (x - mean) * rstd over D.
// Backward, with g = dy * (one + scale): dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),
// dscale = sum over tokens of dy * xhat, dshift = sum over tokens of dy.
#include <cmath>

#include "parallel.h"

namespace megagen::MEGAGEN_ISA {
void layernorm_forward(const LayerNorm& op, int threads) {
  const Index dim = op.dim;
  parallel_for(op.segments.num_tokens, threads, [&](Index token) {
    const Index row = row_of(op.segments, token);
    for (Index b = 0; b < op.batch; ++b) {
      const Index line = token * op.batch + b;
      const float *x = op.x + line * dim, *scale = line_of(op.scale, row, b), *shift = line_of(op.shift, row, b);
      const float mean = sum_each(dim, [=](auto tag, Index i, auto& a, auto&) {
                           a += load<decltype(tag)>(x + i);
                         }).total_a() / dim;
      const float variance = sum_each(dim, [=](auto tag, Index i, auto& a, auto&) {
                               const auto centred = load<decltype(tag)>(x + i) - mean;
                               a += centred * centred;
                             }).total_a() / dim;
      const float rstd = 1.0f / std::sqrt(variance + op.eps), one = op.one;
      float* y = op.y + line * dim;
      for_each(dim, [=](auto tag, Index i) {
        using T = decltype(tag);
        store(y + i, (load<T>(x + i) - mean) * rstd * (load<T>(scale + i) + one) + load<T>(shift + i));
      });
      op.mean[line] = mean;
      op.rstd[line] = rstd;
    }
  });
}

void layernorm_backward(const LayerNorm& op, int threads) {
  const Index dim = op.dim;
  parallel_for(op.segments.count * op.batch, threads, [&](Index unit) {
    const Index segment = unit / op.batch, b = unit % op.batch;
    float *dscale = op.partial + unit * 2 * dim, *dshift = dscale + dim;
    for (Index i = 0; i < 2 * dim; ++i) dscale[i] = 0;
    for (Index token = first_token(op.segments, segment); token < end_token(op.segments, segment); ++token) {
      const Index line = token * op.batch + b;
      const float *x = op.x + line * dim, *dy = op.dy + line * dim;
      const float* scale = line_of(op.scale, row_of(op.segments, token), b);
      const float mean = op.mean[line], rstd = op.rstd[line], one = op.one;
      const Sums sums = sum_each(dim, [=](auto tag, Index i, auto& g_sum, auto& gx_sum) {
        using T = decltype(tag);
        const T dy_i = load<T>(dy + i), xhat = (load<T>(x + i) - mean) * rstd;
        const T g = dy_i * (load<T>(scale + i) + one);
        g_sum += g;
        gx_sum += g * xhat;
        store(dscale + i, load<T>(dscale + i) + dy_i * xhat);
        store(dshift + i, load<T>(dshift + i) + dy_i);
      });
      const float g_mean = sums.total_a() / dim, gx_mean = sums.total_b() / dim;
      float* dx = op.dx + line * dim;
      for_each(dim, [=](auto tag, Index i) {
        using T = decltype(tag);
        const T xhat = (load<T>(x + i) - mean) * rstd;
        const T g = load<T>(dy + i) * (load<T>(scale + i) + one);
        store(dx + i, (g - g_mean - xhat * gx_mean) * rstd);
      });
    }
  });
  const Gather gather{op.segments, op.batch, dim, op.num_rows, op.mod_batch, 2};
  sum_segments(gather, op.partial, 0, op.dscale, threads);
  sum_segments(gather, op.partial, 1, op.dshift, threads);
}
}  // namespace megagen::MEGAGEN_ISA

// out = x + gate * y. Backward: dy = gate * dout, dgate = sum over tokens of dout * y (dx is dout).
#include "parallel.h"

namespace megagen::MEGAGEN_ISA {
void residual_forward(const Residual& op, int threads) {
  const Index dim = op.dim;
  parallel_for(op.segments.num_tokens, threads, [&](Index token) {
    for (Index b = 0; b < op.batch; ++b) {
      const Index at = (token * op.batch + b) * dim;
      const float *x = op.x + at, *y = op.y + at, *gate = line_of(op.gate, row_of(op.segments, token), b);
      float* out = op.out + at;
      for_each(dim, [=](auto tag, Index i) {
        using T = decltype(tag);
        store(out + i, load<T>(x + i) + load<T>(gate + i) * load<T>(y + i));
      });
    }
  });
}

void residual_backward(const Residual& op, int threads) {
  const Index dim = op.dim;
  parallel_for(op.segments.count * op.batch, threads, [&](Index unit) {
    const Index segment = unit / op.batch, b = unit % op.batch;
    float* dgate = op.partial + unit * dim;
    for (Index i = 0; i < dim; ++i) dgate[i] = 0;
    for (Index token = first_token(op.segments, segment); token < end_token(op.segments, segment); ++token) {
      const Index at = (token * op.batch + b) * dim;
      const float *y = op.y + at, *dout = op.dout + at, *gate = line_of(op.gate, row_of(op.segments, token), b);
      float* dy = op.dy + at;
      for_each(dim, [=](auto tag, Index i) {
        using T = decltype(tag);
        const T dout_i = load<T>(dout + i);
        store(dgate + i, load<T>(dgate + i) + dout_i * load<T>(y + i));
        store(dy + i, load<T>(gate + i) * dout_i);
      });
    }
  });
  const Gather gather{op.segments, op.batch, dim, op.num_rows, op.mod_batch, 1};
  sum_segments(gather, op.partial, 0, op.dgate, threads);
}
}  // namespace megagen::MEGAGEN_ISA

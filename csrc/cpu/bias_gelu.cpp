// y = gelu_tanh(u), u = x + bias. With z = sqrt(2 / pi) (u + 0.044715 u^3) and p = 1 / (1 + e^(-2z)):
//   y = u p,  dy/du = p + 2 u p (1 - p) dz/du.
// Only x is kept for the backward: p is made again.
#include "parallel.h"

namespace megagen::MEGAGEN_ISA {
constexpr float kTwoRootTwoOverPi = 1.5957691216057308f, kCubic = 0.044715f;

void bias_gelu_forward(const BiasGelu& op, int threads) {
  const float* bias = op.bias;
  parallel_for(op.lines, threads, [&](Index line) {
    const float* x = op.x + line * op.dim;
    float* y = op.y + line * op.dim;
    for_each(op.dim, [=](auto tag, Index i) {
      using T = decltype(tag);
      const T u = bias ? load<T>(x + i) + load<T>(bias + i) : load<T>(x + i);
      store(y + i, u / (exp(u * (u * u * kCubic + 1.0f) * -kTwoRootTwoOverPi) + 1.0f));
    });
  });
}

void bias_gelu_backward(const BiasGelu& op, int threads) {
  const float* bias = op.bias;
  const Segments segments = plain_segments(op.lines);
  parallel_for(segments.count, threads, [&](Index segment) {
    float* dbias = bias ? op.partial + segment * op.dim : nullptr;
    for (Index i = 0; bias && i < op.dim; ++i) dbias[i] = 0;
    const Index end = end_token(segments, segment);
    for (Index line = first_token(segments, segment); line < end; ++line) {
      const float *x = op.x + line * op.dim, *dy = op.dy + line * op.dim;
      float* dx = op.dx + line * op.dim;
      for_each(op.dim, [=](auto tag, Index i) {
        using T = decltype(tag);
        const T u = bias ? load<T>(x + i) + load<T>(bias + i) : load<T>(x + i);
        const T p = 1.0f / (exp(u * (u * u * kCubic + 1.0f) * -kTwoRootTwoOverPi) + 1.0f);
        const T slope = u * (1.0f - p) * (u * u * (3 * kCubic) + 1.0f) * kTwoRootTwoOverPi + 1.0f;
        const T g = load<T>(dy + i) * p * slope;
        store(dx + i, g);
        if (bias) store(dbias + i, load<T>(dbias + i) + g);
      });
    }
  });
  if (!bias) return;
  sum_segments({segments, 1, op.dim, 1, 1, 1}, op.partial, 0, op.dbias, threads);
}
}  // namespace megagen::MEGAGEN_ISA

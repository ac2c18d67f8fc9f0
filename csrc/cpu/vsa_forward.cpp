// The forward of block-sparse attention, one unit of work a query block: for each listed key block
//   S = Q K^T, m' = max(m, rowmax S), P = e^(scale S - m'), l = e^(m - m') l + rowsum P,
//   O = e^(m - m') O + P V,
// and at the end o = O / l, lse = m + ln l (the online softmax of FlashAttention, arXiv 2205.14135).
// Heads are taken a few at a time; their keys and values are packed once and stay in cache.
#include "parallel.h"
#include "vsa_softmax.h"
#include "vsa_tokens.h"

namespace megagen::MEGAGEN_ISA {
namespace {
// Floats of a packed key or value block (none where they come in panels), and of one worker's memory.
struct Sizes {
  Index keys, values, query, out, worker, group;

  Sizes(const Fine& op, int threads) {
    keys = turned_size(op.dim), values = op.v_panels ? 0 : panels_size(op.dim);
    query = panels_size(op.dim), out = query;
    worker = query + out + kMapSize;
    // enough query blocks at a time for the threads to share evenly
    group = smaller(op.batch * op.heads, ceil_div(16 * threads, op.num_q > 0 ? op.num_q : 1));
  }
  Index packed(const Fine& op) const { return group * op.num_k * (keys + values); }
};

// Of each row: its largest score so far (times log2 e), the sum of its powers, and the factor that turns
// sums for the old maximum into sums for the new one.
struct Rows {
  float largest[kBlock], sum[kBlock], factor[kBlock];
};

// A map of scores to powers of two, and the state of its rows. Columns are a multiple of kWidth where
// the map is full; where not, those from `columns` on are made to count for nothing.
static void soften(float* map, Index rows, Index columns, float scale, Rows& state) {
  const Index width = ceil_div(columns, kWidth) * kWidth;
  for (Index i = 0; i < rows; ++i) {
    float* row = map + i * kBlock;
    for (Index j = columns; j < width; ++j) row[j] = -__builtin_inff();
    Vec top = load<Vec>(row);
    for (Index j = kWidth; j < width; j += kWidth) {
      const Vec x = load<Vec>(row + j);
      top = x > top ? x : top;
    }
    const float found = largest(top) * scale;
    const float before = state.largest[i], now = found > before ? found : before;
    state.factor[i] = before - now;
    state.largest[i] = now;
  }
  for (Index i = 0; i < rows; i += kWidth) store(state.factor + i, exp2(load<Vec>(state.factor + i)));
  for (Index i = 0; i < rows; ++i) {
    float* row = map + i * kBlock;
    const float now = state.largest[i];
    Vec sum = Vec{};
    for (Index j = 0; j < width; j += kWidth) {
      const Vec power = exp2(load<Vec>(row + j) * scale - now);
      store(row + j, power);
      sum += power;
    }
    state.sum[i] = state.sum[i] * state.factor[i] + total(sum);
  }
}
}  // namespace

Index block_panels(Index dim) { return panels_size(dim); }

Index fine_forward_workspace(const Fine& op, int threads) {
  const Sizes sizes(op, threads);
  return sizes.packed(op) + threads * sizes.worker;
}

static void attend(const Fine& op, const Sizes& sizes, Index head, Index block, const float* packed, float* memory) {
  const Index b = head / op.heads, h = head % op.heads, slot = block * kBlock;
  const float* query = memory;
  float *out = memory + sizes.query, *map = out + sizes.out;
  const Index rows = op.lists.q_sizes[block], row_of_lists = head * op.num_q + block;
  const int32_t* listed = op.lists.idx + row_of_lists * op.lists.width;
  const float scale = op.scale * kLog2E;
  Rows state{};
  for (Index i = 0; i < kBlock; ++i) state.largest[i] = -__builtin_inff();
  if (op.q_panels)
    query = op.q_panels + row_of_lists * sizes.query;
  else if (rows > 0)
    read_panels(op.q, b, h, slot, rows, op.dim, memory);
  bool any = false;
  const auto keys_of = [&](Index key) { return packed + key * (sizes.keys + sizes.values); };
  const auto values_of = [&](Index key) {
    return op.v_panels ? op.v_panels + (head * op.num_k + key) * sizes.query : keys_of(key) + sizes.keys;
  };
  const Index count = rows > 0 ? op.lists.num[row_of_lists] : 0;
  for (Index place = 0; place < count; ++place) {
    const Index key = listed[place], columns = op.lists.kv_sizes[key];
    if (columns == 0) continue;
    Ahead next_keys, next_values;
    if (place + 1 < count) {
      next_keys = {keys_of(listed[place + 1]), sizes.keys};
      next_values = {values_of(listed[place + 1]), sizes.query};
    }
    multiply<Panels, ToMap, Update::kSet>(rows, columns, op.dim, query, keys_of(key), op.dim, map, next_keys);
    soften(map, rows, columns, scale, state);
    const float* values = values_of(key);
    if (any)
      multiply<Map, ToPanels, Update::kScaleAndAdd>(rows, op.dim, columns, map, values, kBlock, out, next_values,
                                                    state.factor);
    else
      multiply<Map, ToPanels, Update::kSet>(rows, op.dim, columns, map, values, kBlock, out, next_values);
    any = true;
  }
  float* lse = op.lse + row_of_lists * kBlock;
  for (Index i = 0; i < kBlock; ++i) {
    const bool real = any && i < rows;
    lse[i] = real ? (state.largest[i] + __builtin_log2f(state.sum[i])) * kLn2 : -__builtin_inff();
    state.factor[i] = real ? 1.0f / state.sum[i] : 0.0f;
  }
  write_panels(op.o, b, h, slot, any ? rows : 0, kBlock, op.dim, out, state.factor);
}

void fine_forward(const Fine& op, int threads) {
  const Sizes sizes(op, threads);
  float *packed = op.workspace, *memory = packed + sizes.packed(op);
  const Index heads = op.batch * op.heads, each = sizes.keys + sizes.values;
  for (Index first = 0; first < heads; first += sizes.group) {
    const Index count = smaller(sizes.group, heads - first);
    parallel_workers(count * op.num_k, threads, [&](Index unit, int worker) {
      const Index head = first + unit / op.num_k, block = unit % op.num_k, rows = op.lists.kv_sizes[block];
      float* keys = packed + unit * each;
      if (op.k_panels) return turn_panels(op.k_panels + (head * op.num_k + block) * sizes.query, rows, op.dim, keys);
      float* turned_from = memory + worker * sizes.worker;
      read_panels(op.k, head / op.heads, head % op.heads, block * kBlock, rows, op.dim, turned_from);
      turn_panels(turned_from, rows, op.dim, keys);
      read_panels(op.v, head / op.heads, head % op.heads, block * kBlock, rows, op.dim, keys + sizes.keys);
    });
    parallel_workers(count * op.num_q, threads, [&](Index unit, int worker) {
      const Index local = unit / op.num_q;
      attend(op, sizes, first + local, unit % op.num_q, packed + local * op.num_k * each,
             memory + worker * sizes.worker);
    });
  }
}
}  // namespace megagen::MEGAGEN_ISA

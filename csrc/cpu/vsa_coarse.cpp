// The coarse stage: attention of kBlock query blocks' means at a time to all key blocks' means,
//   A = scale qm km^T, oc = softmax(A) vm, lse = ln sum e^A, lists = the topk largest of each row of A.
// No map of all query by all key blocks is made: a worker holds the scores of its kBlock rows.
#include "parallel.h"
#include "vsa_select.h"
#include "vsa_softmax.h"
#include "vsa_tokens.h"

namespace megagen::MEGAGEN_ISA {
namespace {
struct Parts {
  Index units, maps;  // of queries and of keys, kBlock means each
  Index keys, values, worker;

  explicit Parts(const Coarse& op) {
    units = ceil_div(op.num_q, kBlock), maps = ceil_div(op.num_k, kBlock);
    keys = turned_size(op.dim), values = panels_size(op.dim);
    worker = 2 * values + maps * kMapSize + 2 * maps * kBlock;  // q, out, maps; a row of scores, and of keys
  }
};
}  // namespace

// One row of the maps: scaled scores to e^(A - max), its selection and log-sum. Returns the sum.
static float finish_row(const Coarse& op, const Parts& parts, float* row, float* line, Index number) {
  int32_t* keys = reinterpret_cast<int32_t*>(line + parts.maps * kBlock);
  const Index width = parts.maps * kBlock;
  float top = -__builtin_inff();
  for (Index j = 0; j < width; ++j) {
    float score = row[j / kBlock * kMapSize + j % kBlock];
    if (op.round_scores) score = rounded_to_bf16(rounded_to_bf16(score) * op.scale);
    line[j] = op.round_scores ? score : score * op.scale;
  }
  op.num[number] = static_cast<int32_t>(
      select_row(line, op.sizes, op.num_k, op.topk, keys, op.idx + number * op.topk));
  for (Index j = 0; j < width; ++j)
    if (j >= op.num_k || op.sizes[j] <= 0) line[j] = -__builtin_inff();
  for (Index j = 0; j < width; ++j) top = line[j] > top ? line[j] : top;
  Vec sum = Vec{};
  const bool any = op.num[number] > 0;
  for (Index j = 0; j < width; j += kWidth) {
    const Vec power = any ? exp2((load<Vec>(line + j) - top) * kLog2E) : Vec{};
    store(row + j / kBlock * kMapSize + j % kBlock, power);
    sum += power;
  }
  const float sums = total(sum);
  op.lse[number] = any ? top + __builtin_logf(sums) : -__builtin_inff();
  return any ? 1.0f / sums : 0.0f;
}

static void attend_all(const Coarse& op, const Parts& parts, Index head, Index unit, const float* packed,
                       float* memory) {
  const Index b = head / op.heads, h = head % op.heads, first = unit * kBlock;
  const Index rows = smaller(kBlock, op.num_q - first);
  float *query = memory, *out = query + parts.values, *maps = out + parts.values;
  float* line = maps + parts.maps * kMapSize;
  float factor[kBlock];
  Ahead ahead;
  read_panels(op.q, b, h, first, rows, op.dim, query);
  for (Index m = 0; m < parts.maps; ++m)
    multiply<Panels, ToMap, Update::kSet>(rows, smaller(kBlock, op.num_k - m * kBlock), op.dim, query,
                                          packed + m * (parts.keys + parts.values), op.dim, maps + m * kMapSize, ahead);
  for (Index i = 0; i < rows; ++i)
    factor[i] = finish_row(op, parts, maps + i * kBlock, line, head * op.num_q + first + i);
  for (Index i = 0; i < parts.values; ++i) out[i] = 0;
  for (Index m = 0; m < parts.maps; ++m)
    multiply<Map, ToPanels, Update::kAdd>(rows, op.dim, smaller(kBlock, op.num_k - m * kBlock), maps + m * kMapSize,
                                          packed + m * (parts.keys + parts.values) + parts.keys, kBlock, out, ahead);
  write_panels(op.o, b, h, first, rows, rows, op.dim, out, factor);
}

Index coarse_forward_workspace(const Coarse& op, int threads) {
  const Parts parts(op);
  return parts.maps * (parts.keys + parts.values) + threads * parts.worker;
}

void coarse_forward(const Coarse& op, int threads) {
  const Parts parts(op);
  float *packed = op.workspace, *memory = packed + parts.maps * (parts.keys + parts.values);
  for (Index head = 0; head < op.batch * op.heads; ++head) {
    const Index b = head / op.heads, h = head % op.heads;
    parallel_workers(parts.maps, threads, [&](Index m, int worker) {
      float *keys = packed + m * (parts.keys + parts.values), *turned_from = memory + worker * parts.worker;
      const Index rows = smaller(kBlock, op.num_k - m * kBlock);
      read_panels(op.k, b, h, m * kBlock, rows, op.dim, turned_from);
      turn_panels(turned_from, rows, op.dim, keys);
      read_panels(op.v, b, h, m * kBlock, rows, op.dim, keys + parts.keys);
    });
    parallel_workers(parts.units, threads, [&](Index unit, int worker) {
      attend_all(op, parts, head, unit, packed, memory + worker * parts.worker);
    });
  }
}

void select_topk(const Select& op, int threads) {
  parallel_workers(ceil_div(op.rows, kBlock), threads, [&](Index unit, int worker) {
    int32_t* keys = reinterpret_cast<int32_t*>(op.workspace + worker * op.num_k);
    const Index end = smaller(op.rows, (unit + 1) * kBlock);
    for (Index row = unit * kBlock; row < end; ++row)
      op.num[row] = static_cast<int32_t>(select_row(op.scores + row * op.num_k, op.sizes, op.num_k, op.topk, keys,
                                                    op.idx + row * op.topk));
  });
}

// Counts, their running sum, and query blocks in ascending order: a stable counting sort of the pairs.
void transpose_lists(const Transpose& op, int threads) {
  parallel_workers(op.heads, threads, [&](Index head, int) {
    int32_t *indptr = op.indptr + head * (op.num_k + 1), *rows = op.rows + head * op.num_q * op.width;
    const int32_t *num = op.num + head * op.num_q, *idx = op.idx + head * op.num_q * op.width;
    for (Index j = 0; j <= op.num_k; ++j) indptr[j] = 0;
    for (Index i = 0; i < op.num_q; ++i)
      for (Index place = 0; place < num[i]; ++place) ++indptr[idx[i * op.width + place] + 1];
    for (Index j = 0; j < op.num_k; ++j) indptr[j + 1] += indptr[j];
    const Index pairs = indptr[op.num_k];
    for (Index i = 0; i < op.num_q; ++i)
      for (Index place = 0; place < num[i]; ++place) {
        int32_t& next = indptr[idx[i * op.width + place]];
        rows[next++] = static_cast<int32_t>(i);
      }
    for (Index j = op.num_k; j > 0; --j) indptr[j] = indptr[j - 1];  // each had moved to the next one's start
    indptr[0] = 0;
    for (Index pair = pairs; pair < op.num_q * op.width; ++pair) rows[pair] = 0;
  });
}
}  // namespace megagen::MEGAGEN_ISA

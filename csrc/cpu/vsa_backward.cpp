// The backward of block-sparse attention in five products of blocks, no atomics. With g = dL/do and
// delta = rowsum(o g) - dL/dlse, for each listed pair of a query and a key block
//   P = e^(scale Q K^T - lse), dS = scale P (g V^T - delta),
//   dV += P^T g, dK += dS^T Q, dQ += dS K.
// Where there are heads enough for the threads, each takes whole ones, key block by key block, and adds to
// dK, dV and dQ at once. Elsewhere two passes take turns. The first has a unit for each key block: it walks
// the queries that list it, adds up dK and dV, and keeps the maps dS. The second has a unit for each query
// block: it walks the kept maps in the order of keys and adds up dQ. A turn is as many key blocks as
// kMapsPerThread maps hold. Neither the way nor where a turn ends changes an order of summation.
#include "parallel.h"
#include "vsa_softmax.h"
#include "vsa_tokens.h"

namespace megagen::MEGAGEN_ISA {
namespace {
constexpr Index kMapsPerThread = 256, kUnitsPerThread = 8;

struct Shape {
  Index each, turned;          // floats of a block in panels, and of a turned one
  bool by_head;                // a thread takes whole heads
  Index group;                 // heads taken together
  Index maps;                  // that fit in memory at once
  Index query, key;            // floats kept for a query block: q, g, dq, lse, delta; for a key block: k
  Index worker;

  Shape(const Fine& op, int threads) {
    each = panels_size(op.dim), turned = turned_size(op.dim);
    const Index heads = op.batch * op.heads;
    by_head = heads % threads == 0 || heads >= kUnitsPerThread * threads;
    group = by_head ? threads : smaller(heads, ceil_div(32 * threads, op.num_k > 0 ? op.num_k : 1));
    // at least one key block's queries, and enough units for the threads to share evenly
    maps = kMapsPerThread * threads;
    if (maps < kUnitsPerThread * threads * op.num_q) maps = kUnitsPerThread * threads * op.num_q;
    const Index pairs = group * op.num_q * op.lists.width;
    maps = by_head ? 0 : smaller(maps, pairs > op.num_q ? pairs : op.num_q);
    query = 3 * each + 2 * kBlock, key = by_head ? 0 : each;
    worker = 2 * turned + 4 * each + 2 * kMapSize;
  }
  Index queries(const Fine& op) const { return group * op.num_q * query; }
  Index keys(const Fine& op) const { return group * op.num_k * key; }
};

// What both passes read and write: the packed blocks of the heads at hand.
struct Group {
  const Fine& op;
  const Shape& shape;
  Index first_head;
  float *queries, *keys, *maps;

  Index head_of(Index local) const { return first_head + local; }
  float* q(Index local, Index block) const { return queries + (local * op.num_q + block) * shape.query; }
  float* g(Index local, Index block) const { return q(local, block) + shape.each; }
  float* dq(Index local, Index block) const { return g(local, block) + shape.each; }
  float* lse(Index local, Index block) const { return dq(local, block) + shape.each; }
  float* delta(Index local, Index block) const { return lse(local, block) + kBlock; }
  float* k(Index local, Index block) const { return keys + (local * op.num_k + block) * shape.key; }
  const int32_t* indptr(Index local) const { return op.lists.indptr + head_of(local) * (op.num_k + 1); }
  const int32_t* rows(Index local) const { return op.lists.rows + head_of(local) * op.num_q * op.lists.width; }
};

// Key blocks [begin, end) of the group's heads, counted over all of them, and the map of the first pair.
struct Turn {
  Index begin, end, first_pair;
};

// Pairs before key block `unit`, counted over the heads; unit may be one past the last.
Index pairs_before(const Group& group, Index unit) {
  const Index local = unit / group.op.num_k, block = unit % group.op.num_k;
  Index pairs = block > 0 ? group.indptr(local)[block] : 0;
  for (Index l = 0; l < local; ++l) pairs += group.indptr(l)[group.op.num_k];
  return pairs;
}
}  // namespace

static void pack_query(const Group& group, Index local, Index block, float* memory) {
  const Fine& op = group.op;
  const Index head = group.head_of(local), b = head / op.heads, h = head % op.heads, slot = block * kBlock;
  const Index rows = op.lists.q_sizes[block], at = (head * op.num_q + block) * kBlock;
  float *out = memory, *g = group.g(local, block), *dq = group.dq(local, block);
  read_panels(op.q, b, h, slot, rows, op.dim, group.q(local, block));
  read_panels(op.do_, b, h, slot, rows, op.dim, g);
  read_panels(op.o, b, h, slot, rows, op.dim, out);
  for (Index i = 0; i < group.shape.each; ++i) dq[i] = 0;
  for (Index i = 0; i < rows; ++i) {
    Vec sum = Vec{};
    for (Index d = 0; d < op.dim; d += kWidth) {
      const Index place = d / kPanel * kPanelSize + i * kPanel + d % kPanel;
      sum += load<Vec>(out + place) * load<Vec>(g + place);
    }
    group.delta(local, block)[i] = total(sum) - (op.dlse ? op.dlse[at + i] : 0.0f);
    group.lse(local, block)[i] = op.lse[at + i] * kLog2E;
  }
}

// Scores become P, products g V^T become dS; lanes past the real columns are never read again.
static void differentiate(float* p, float* ds, Index rows, Index columns, float scale, const float* lse,
                          const float* delta) {
  const float scale2 = scale * kLog2E;
  for (Index i = 0; i < rows; ++i)
    for (Index j = i * kBlock; j < i * kBlock + columns; j += kWidth) {
      const Vec power = exp2(load<Vec>(p + j) * scale2 - lse[i]);
      store(p + j, power);
      store(ds + j, power * scale * (load<Vec>(ds + j) - delta[i]));
    }
}

// The gradients of a key block; by head, its part of dQ too.
static void key_pass(const Group& group, const Turn& turn, Index unit, float* memory) {
  const Fine& op = group.op;
  const Shape& shape = group.shape;
  const Index local = unit / op.num_k, block = unit % op.num_k;
  const Index head = group.head_of(local), b = head / op.heads, h = head % op.heads, slot = block * kBlock;
  float *keys = memory, *values = keys + shape.turned, *dk = values + shape.turned, *dv = dk + shape.each;
  float *read_to = dv + shape.each, *own_k = read_to + shape.each, *p = own_k + shape.each;
  const Index columns = op.lists.kv_sizes[block];
  if (shape.by_head) read_panels(op.k, b, h, slot, columns, op.dim, own_k);
  const float* k = shape.by_head ? own_k : group.k(local, block);
  turn_panels(k, columns, op.dim, keys);
  read_panels(op.v, b, h, slot, columns, op.dim, read_to);
  turn_panels(read_to, columns, op.dim, values);
  for (Index i = 0; i < shape.each; ++i) dk[i] = dv[i] = 0;
  const int32_t *indptr = group.indptr(local), *listing = group.rows(local);
  float* ds = shape.by_head ? p + kMapSize : group.maps + (pairs_before(group, unit) - turn.first_pair) * kMapSize;
  for (Index place = indptr[block]; place < indptr[block + 1]; ++place) {
    const Index query = listing[place], rows = op.lists.q_sizes[query];
    const float *q = group.q(local, query), *g = group.g(local, query);
    Ahead ahead;
    if (place + 1 < indptr[block + 1]) ahead = {group.q(local, listing[place + 1]), (shape.by_head ? 3 : 2) * shape.each};
    multiply<Panels, ToMap, Update::kSet>(rows, columns, op.dim, q, keys, op.dim, p, ahead);
    multiply<Panels, ToMap, Update::kSet>(rows, columns, op.dim, g, values, op.dim, ds, ahead);
    differentiate(p, ds, rows, columns, op.scale, group.lse(local, query), group.delta(local, query));
    multiply<MapTransposed, ToPanels, Update::kAdd>(columns, op.dim, rows, p, g, kBlock, dv, ahead);
    multiply<MapTransposed, ToPanels, Update::kAdd>(columns, op.dim, rows, ds, q, kBlock, dk, ahead);
    if (shape.by_head)
      multiply<Map, ToPanels, Update::kAdd>(rows, op.dim, columns, ds, k, kBlock, group.dq(local, query), ahead);
    else
      ds += kMapSize;
  }
  const float* share = read_share(op.dkm, b, h, block, columns, op.dim, read_to);
  write_panels(op.dk, b, h, slot, columns, kBlock, op.dim, dk, nullptr, share);
  share = read_share(op.dvm, b, h, block, columns, op.dim, read_to);
  write_panels(op.dv, b, h, slot, columns, kBlock, op.dim, dv, nullptr, share);
}

// Place of `query` among the query blocks that list a key block (it is one of them).
static Index place_of(const int32_t* listing, Index begin, Index end, Index query) {
  while (end - begin > 1) {
    const Index middle = (begin + end) / 2;
    if (listing[middle] <= query)
      begin = middle;
    else
      end = middle;
  }
  return begin;
}

static void query_pass(const Group& group, const Turn& turn, Index unit) {
  const Fine& op = group.op;
  const Index local = unit / op.num_q, block = unit % op.num_q, first = local * op.num_k;
  const Index row = group.head_of(local) * op.num_q + block, rows = op.lists.q_sizes[block];
  const int32_t *indptr = group.indptr(local), *listing = group.rows(local);
  const int32_t* listed = op.lists.idx + row * op.lists.width;
  const Index base = pairs_before(group, first) - turn.first_pair;
  for (Index place = 0; place < op.lists.num[row]; ++place) {
    const Index key = listed[place];
    if (first + key < turn.begin) continue;
    if (first + key >= turn.end) break;
    Ahead ahead;
    const Index map = base + place_of(listing, indptr[key], indptr[key + 1], block);
    multiply<Map, ToPanels, Update::kAdd>(rows, op.dim, op.lists.kv_sizes[key], group.maps + map * kMapSize,
                                          group.k(local, key), kBlock, group.dq(local, block), ahead);
  }
}

Index fine_backward_workspace(const Fine& op, int threads) {
  const Shape shape(op, threads);
  return shape.queries(op) + shape.keys(op) + shape.maps * kMapSize + threads * shape.worker;
}

// The next turn from key block `begin` on: at least one, at most `units`, no more pairs than maps fit.
static Turn next_turn(const Group& group, Index begin, Index units) {
  Turn turn{begin, begin, pairs_before(group, begin)};
  do ++turn.end;
  while (turn.end < units && pairs_before(group, turn.end + 1) - turn.first_pair <= group.shape.maps);
  return turn;
}

static void write_query(const Group& group, Index local, Index block, float* memory) {
  const Fine& op = group.op;
  const Index head = group.head_of(local), b = head / op.heads, h = head % op.heads, rows = op.lists.q_sizes[block];
  const float* share = read_share(op.dqm, b, h, block, rows, op.dim, memory);
  write_panels(op.dq, b, h, block * kBlock, rows, kBlock, op.dim, group.dq(local, block), nullptr, share);
}

static void backward_by_head(const Fine& op, const Shape& shape, int threads) {
  const Index queries = op.num_q * shape.query;
  parallel_workers(op.batch * op.heads, threads, [&](Index head, int worker) {
    float *packed = op.workspace + worker * (queries + shape.worker), *memory = packed + queries;
    const Group group{op, shape, head, packed, nullptr, nullptr};
    for (Index block = 0; block < op.num_q; ++block) pack_query(group, 0, block, memory);
    for (Index block = 0; block < op.num_k; ++block) key_pass(group, {0, op.num_k, 0}, block, memory);
    for (Index block = 0; block < op.num_q; ++block) write_query(group, 0, block, memory);
  });
}

static void backward_in_turns(const Fine& op, const Shape& shape, int threads) {
  float *queries = op.workspace, *keys = queries + shape.queries(op), *maps = keys + shape.keys(op);
  float* memory = maps + shape.maps * kMapSize;
  const Index heads = op.batch * op.heads;
  for (Index first = 0; first < heads; first += shape.group) {
    const Group group{op, shape, first, queries, keys, maps};
    const Index count = smaller(shape.group, heads - first), units = count * op.num_k;
    parallel_workers(count * op.num_q, threads, [&](Index unit, int worker) {
      pack_query(group, unit / op.num_q, unit % op.num_q, memory + worker * shape.worker);
    });
    parallel_workers(units, threads, [&](Index unit, int) {
      const Index head = group.head_of(unit / op.num_k), block = unit % op.num_k;
      read_panels(op.k, head / op.heads, head % op.heads, block * kBlock, op.lists.kv_sizes[block], op.dim,
                  group.k(unit / op.num_k, block));
    });
    for (Turn turn{0, 0, 0}; turn.end < units;) {
      turn = next_turn(group, turn.end, units);
      parallel_workers(turn.end - turn.begin, threads, [&](Index unit, int worker) {
        key_pass(group, turn, turn.begin + unit, memory + worker * shape.worker);
      });
      const Index begin = turn.begin / op.num_k * op.num_q, end = ceil_div(turn.end, op.num_k) * op.num_q;
      parallel_workers(end - begin, threads, [&](Index unit, int) { query_pass(group, turn, begin + unit); });
    }
    parallel_workers(count * op.num_q, threads, [&](Index unit, int worker) {
      write_query(group, unit / op.num_q, unit % op.num_q, memory + worker * shape.worker);
    });
  }
}

void fine_backward(const Fine& op, int threads) {
  const Shape shape(op, threads);
  if (shape.by_head) return backward_by_head(op, shape, threads);
  backward_in_turns(op, shape, threads);
}
}  // namespace megagen::MEGAGEN_ISA

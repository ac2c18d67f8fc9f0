// Lists on the GPU, without the host knowing any length: merged lists of block pairs, and the transpose
// of query-to-key lists. Each output is a function of its inputs alone: atomics only set bits.
#pragma once
#include "hw.cuh"

namespace megagen::cuda {

constexpr int kListThreads = 256;

// Two neighbouring owners' ascending lists as one, each entry with its size and owners.
struct MergeArgs {
  const int* items;        // the lists
  const int* num;          // [BH, owners]: lengths of rows `stride` apart; null: lists start at indptr
  const int* indptr;       // [BH, owners + 1]: where lists start in rows `stride` apart
  const int* owner_sizes;  // [owners]: an owner of no tokens owns nothing
  const int* item_sizes;   // [items]: a block of no tokens has no owner
  uint32_t* entries;       // merged lists: 2 * stride apart, or where the pair's first list starts
  int* counts;             // [BH, pairs]
  int64_t sequences, stride;
  int owners, pairs;
};

struct Span {
  const int* first;
  int count;
};

HW_DEVICE Span owned_list(const MergeArgs& a, int64_t bh, int owner) {
  if (owner >= a.owners || a.owner_sizes[owner] == 0) return {a.items, 0};
  if (a.num) {
    const int64_t row = bh * a.owners + owner;
    return {a.items + row * a.stride, a.num[row]};
  }
  const int* starts = a.indptr + bh * (a.owners + 1) + owner;
  return {a.items + bh * a.stride + starts[0], starts[1] - starts[0]};
}

HW_DEVICE int lower_bound(const Span& list, int value) {
  int low = 0, high = list.count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list.first[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One side's part of a merge by one warp: an item's place is its rank in both lists less the items that
// both have before it. Side 0 writes what both have. Returns how many both have.
HW_DEVICE int merge_side(const MergeArgs& a, const Span& mine, const Span& other, int side, uint32_t* out) {
  int common = 0;
  for (int start = 0; start < mine.count; start += 32) {
    const int i = start + hw::lane();
    const bool here = i < mine.count;
    const int item = here ? mine.first[i] : 0;
    const int rank = here ? lower_bound(other, item) : 0;
    const bool both = here && rank < other.count && other.first[rank] == item;
    const uint32_t all = hw::ballot(both);
    const int before = common + hw::count_bits(all & ((1u << hw::lane()) - 1));
    if (here && !(both && side == 1)) {
      const int size = a.item_sizes[item];
      out[i + rank - before] = entry(item, size, size == 0 ? 0 : both ? 3 : 1 << side);
    }
    common += hw::count_bits(all);
  }
  return common;
}

// A warp per pair.
HW_SMALL_KERNEL(kListThreads)
merge_kernel(const MergeArgs a) {
  const int64_t item = hw::block() * (kListThreads / 32) + hw::warp();
  if (item >= a.sequences * a.pairs) return;
  const int64_t bh = item / a.pairs;
  const int owner = item % a.pairs * 2;
  const Span left = owned_list(a, bh, owner), right = owned_list(a, bh, owner + 1);
  uint32_t* out = a.entries + (a.num ? item * 2 * a.stride
                                     : bh * a.stride + a.indptr[bh * (a.owners + 1) + owner]);
  const int common = merge_side(a, left, right, 0, out);
  merge_side(a, right, left, 1, out);
  if (hw::lane() == 0) a.counts[item] = left.count + right.count - common;
}

// Pairs of each sequence by descending count, ties by number. A block per sequence.
HW_SMALL_KERNEL(kListThreads)
order_kernel(const int* counts, int* order, int pairs) {
  const int64_t start = hw::block() * pairs;
  for (int p = hw::thread(); p < pairs; p += kListThreads) {
    int rank = 0;
    for (int other = 0; other < pairs; ++other) {
      const int difference = counts[start + other] - counts[start + p];
      rank += difference > 0 || (difference == 0 && other < p);
    }
    order[start + rank] = p;
  }
}

// Transpose: bits[sequence][key][query] from the lists, then each key's queries in ascending order.
struct TransposeArgs {
  const int* idx;  // [BH, num_q, width]
  const int* num;  // [BH, num_q]
  uint32_t* bits;  // [sequences of this call, num_k, words], zero before
  int* indptr;     // [BH, num_k + 1]
  int* rows;       // [BH, num_q * width]
  int64_t first, sequences;  // the sequences of this call
  int num_q, num_k, width, words;
};

// A warp per query block.
HW_SMALL_KERNEL(kListThreads)
mark_kernel(const TransposeArgs a) {
  const int64_t row = hw::block() * (kListThreads / 32) + hw::warp();
  if (row >= a.sequences * a.num_q) return;
  const int64_t sequence = row / a.num_q, from = a.first * a.num_q + row;
  const int query = row % a.num_q;
  for (int i = hw::lane(); i < a.num[from]; i += 32) {
    const int key = a.idx[from * a.width + i];
    hw::atomic_or(a.bits + (sequence * a.num_k + key) * a.words + query / 32, 1u << query % 32);
  }
}

HW_DEVICE int sum_over_warp(int value) {
  for (int mask = 1; mask < 32; mask *= 2) value += hw::shuffle_xor(value, mask);
  return value;
}
// This lane's value and those of all lanes before it.
HW_DEVICE int sum_up_to(int value) {
  for (int by = 1; by < 32; by *= 2) {
    const int before = hw::shuffle_up(value, by);
    if (hw::lane() >= by) value += before;
  }
  return value;
}

// A warp per key block: how many queries list it.
HW_SMALL_KERNEL(kListThreads)
count_kernel(const TransposeArgs a) {
  const int64_t column = hw::block() * (kListThreads / 32) + hw::warp();
  if (column >= a.sequences * a.num_k) return;
  int count = 0;
  for (int w = hw::lane(); w < a.words; w += 32) count += hw::count_bits(a.bits[column * a.words + w]);
  count = sum_over_warp(count);
  const int64_t bh = a.first + column / a.num_k;
  if (hw::lane() == 0) a.indptr[bh * (a.num_k + 1) + column % a.num_k + 1] = count;
}

// A warp per sequence: counts to starts.
HW_SMALL_KERNEL(32)
scan_kernel(const TransposeArgs a) {
  int* starts = a.indptr + (a.first + hw::block()) * (a.num_k + 1);
  int total = 0;
  if (hw::lane() == 0) starts[0] = 0;
  for (int start = 0; start < a.num_k; start += 32) {
    const int i = start + hw::lane();
    const int upto = total + sum_up_to(i < a.num_k ? starts[i + 1] : 0);
    if (i < a.num_k) starts[i + 1] = upto;
    total = hw::broadcast(upto, 31);
  }
}

// A warp per key block: its queries, ascending.
HW_SMALL_KERNEL(kListThreads)
fill_kernel(const TransposeArgs a) {
  const int64_t column = hw::block() * (kListThreads / 32) + hw::warp();
  if (column >= a.sequences * a.num_k) return;
  const int64_t bh = a.first + column / a.num_k;
  int* out = a.rows + bh * a.num_q * a.width + a.indptr[bh * (a.num_k + 1) + column % a.num_k];
  for (int start = 0; start < a.words; start += 32) {
    const int w = start + hw::lane();
    uint32_t bits = w < a.words ? a.bits[column * a.words + w] : 0;
    const int mine = hw::count_bits(bits), upto = sum_up_to(mine);
    for (int at = upto - mine; bits; bits &= bits - 1) out[at++] = w * 32 + hw::first_bit(bits);
    out += hw::broadcast(upto, 31);
  }
}
}  // namespace megagen::cuda

// Video sparse attention on the CPU: sizes, addresses and lists, no torch headers. fp32 or bf16 in
// memory, fp32 in every sum.
//
// Letters: B batch, H heads, n blocks, D head size, M width of a list. A block is kBlock slots, its real
// tokens first; only those are read and computed. Work is cut into units that do not depend on the number
// of threads, and each number is summed in one order, so results are bitwise the same on any number.
#pragma once
#include <cstdint>

namespace megagen {
using Index = int64_t;
constexpr Index kBlock = 64;

// A tensor of tokens [B, H, slots, D], D contiguous, strides in elements. Where token_of_slot is given,
// slots are a permutation of what lies in memory: slot s is token token_of_slot[s], none where negative.
struct Tokens {
  void* data;
  bool bf16;
  Index batch_stride, head_stride, token_stride;
  const Index* token_of_slot;
};

// Key blocks idx[b, h, q, :num[b, h, q]] of each query block, ascending; indptr and rows are their
// transpose: query blocks rows[b, h, indptr[b, h, k] : indptr[b, h, k + 1]] list key block k, ascending.
struct BlockLists {
  Index width;                                    // M
  const int32_t *idx, *num, *q_sizes, *kv_sizes;  // sizes [n]: 0..kBlock
  const int32_t *indptr, *rows;                   // [B, H, n_k + 1], [B, H, n_q M]
};

// The fine stage: softmax(scale Q K^T) V over the tokens of the listed key blocks.
struct Fine {
  Index batch, heads, num_q, num_k, dim;
  float scale;
  BlockLists lists;
  Tokens q, k, v, o;  // o without data: it is not wanted
  float* lse;         // [B, H, n_q kBlock], natural logarithm; -inf where there is nothing to attend to
  // The forward's q, k and v in panels, as block_mean leaves them; null: they are read from tokens.
  const float *q_panels, *k_panels, *v_panels;
  Tokens do_, dq, dk, dv;
  const float* dlse;  // like lse, or null: 0
  // Gradients of blocks' means, one row a block: each token gets its share of them besides its own
  // gradient. Without data: 0.
  Tokens dqm, dkm, dvm;
  float* workspace;   // fine_*_workspace floats
};

// The coarse stage: dense attention of block means, and the key blocks with the largest scores.
struct Coarse {
  Index batch, heads, num_q, num_k, dim, topk;
  float scale;
  bool round_scores;                    // to bf16, before anything is made of them
  Tokens q, k, v, o;                    // one token a block
  const int32_t* sizes;                 // [n_k]: blocks of size 0 do not take part
  float* lse;                           // [B, H, n_q]
  int32_t *idx, *num;                   // [B, H, n_q, topk], [B, H, n_q]
  float* workspace;
};

// Selection alone: of scores [rows, n_k].
struct Select {
  Index rows, num_k, topk;
  const float* scores;
  const int32_t* sizes;
  int32_t *idx, *num;
  float* workspace;  // threads x n_k
};

// What surrounds the stages: tokens x, their blocks as `slots` or `panels` (without data: not wanted), one
// `mean` or coarse output a block.
struct Glue {
  Index batch, heads, num_blocks, dim;
  const int32_t* sizes;
  Tokens x, slots, mean;
  Tokens gate, dgate, dmean;  // gate with null data: 1
  float* panels;              // [B, H, n, block_panels]
};

struct Transpose {
  Index heads, num_q, num_k, width;  // heads: all of them, of every sample
  const int32_t *idx, *num;
  int32_t *indptr, *rows;
};

#define MEGAGEN_DECLARE(isa)                                              \
  namespace isa {                                                         \
  Index block_panels(Index dim);                                          \
  Index fine_forward_workspace(const Fine& op, int threads);              \
  void fine_forward(const Fine& op, int threads);                         \
  Index fine_backward_workspace(const Fine& op, int threads);             \
  void fine_backward(const Fine& op, int threads);                        \
  Index coarse_forward_workspace(const Coarse& op, int threads);          \
  void coarse_forward(const Coarse& op, int threads);                     \
  void select_topk(const Select& op, int threads);                        \
  void block_mean(const Glue& op, int threads);                           \
  void block_mean_backward(const Glue& op, int threads);                  \
  void combine(const Glue& op, int threads);                              \
  void combine_backward(const Glue& op, int threads);                     \
  void transpose_lists(const Transpose& op, int threads);                 \
  }
MEGAGEN_DECLARE(generic)
#if MEGAGEN_X86
MEGAGEN_DECLARE(avx2)
MEGAGEN_DECLARE(avx512)
#endif
#undef MEGAGEN_DECLARE
}  // namespace megagen

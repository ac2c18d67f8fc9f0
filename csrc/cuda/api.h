/* The entry points: plain C, device addresses as numbers, a cudaStream_t as a number.
 *
 * Letters: BH batch x heads (sequences), num_q / num_k blocks of 64 slots, M list width, D head size
 * (64 or 128), pairs = ceil(blocks / 2). Each returns NULL, or what went wrong (valid until the thread's
 * next call). Nothing waits for the GPU, allocates, or reads GPU memory on the host; checks of shapes
 * are the caller's. The current device must be that of the addresses. */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
typedef const char* MegagenError;

/* Number of devices these kernels run on (compute capability 9.0), or -1 with *reason set. */
int megagen_cuda_devices(MegagenError* reason);

/* Lists of `owners` blocks (ascending block numbers below 2^23) to lists of pairs of owners.
 * items [BH, owners, stride] with num [BH, owners]; or, num 0, items [BH, stride] with indptr
 * [BH, owners + 1]. -> entries [BH, pairs, 2 stride] (or [BH, stride] at the same indptr), counts
 * [BH, pairs]; order [BH, pairs] (0: not wanted) pairs by descending count. */
typedef struct {
  uint64_t items, num, indptr, owner_sizes, item_sizes, entries, counts, order;
  int64_t sequences, stride;
  int32_t owners;
  uint64_t stream;
} MegagenMerge;
MegagenError megagen_merge_lists(const MegagenMerge* a);

/* idx [BH, num_q, M], num [BH, num_q] -> indptr [BH, num_k + 1], rows [BH, num_q M], ascending.
 * bits: scratch of scratch_bytes >= megagen_transpose_bytes for one sequence; more is faster. */
typedef struct {
  uint64_t idx, num, indptr, rows, bits;
  int64_t sequences, scratch_bytes;
  int32_t num_q, num_k, width;
  uint64_t stream;
} MegagenTranspose;
int64_t megagen_transpose_bytes(int32_t num_q, int32_t num_k);
MegagenError megagen_transpose(const MegagenTranspose* a);

/* q, o [BH, num_q, 64, D]; k, v [BH, num_k, 64, D]; lse [BH, num_q, 64] fp32, natural logarithm; entries
 * and counts of query pairs. With `out`: o + gate * coarse to [B, tokens, H, D] at the tokens of
 * `token` [num_q 64] (-1: none); gate like out, coarse [BH, num_q, D]; o may then be 0. fp16: 1, bf16: 0. */
typedef struct {
  uint64_t q, k, v, o, lse, entries, counts, q_sizes, gate, coarse, out, token;
  int64_t sequences, tokens;
  int32_t heads, num_q, num_k, width, dim, fp16;
  float scale;
  uint64_t stream;
} MegagenForward;
MegagenError megagen_vsa_forward(const MegagenForward* a);

/* The way back from `out`: its gradient grad [B, tokens, H, D] -> that of o in blocks, tiled
 * [BH, num_q, 64, D] with zeros in empty slots, of the gate, dgate like grad, and of coarse, dcoarse. */
typedef struct {
  uint64_t grad, gate, coarse, tiled, dgate, dcoarse, token;
  int64_t sequences, tokens;
  int32_t heads, num_q, dim, fp16;
  uint64_t stream;
} MegagenCombine;
MegagenError megagen_combine_backward(const MegagenCombine* a);

/* bf16. grad like o; dlse 0 or like lse; stats: scratch [BH, num_q, 128] fp32, filled first. entries and
 * counts of query pairs (width: of one pair's list); key_* of key pairs, whose lists of a sequence are
 * key_width long. fast: dq is summed by atomic additions in fp32 scratch dq32 (like dq, any contents). */
typedef struct {
  uint64_t q, k, v, o, grad, lse, dlse, stats, dq, dk, dv, dq32;
  uint64_t entries, counts, key_entries, key_counts, key_order, key_indptr, q_sizes, k_sizes;
  int64_t sequences, key_width;
  int32_t num_q, num_k, width, dim, fast;
  float scale;
  uint64_t stream;
} MegagenBackward;
MegagenError megagen_vsa_backward(const MegagenBackward* a);

/* Loads the K and V tiles that lists name, as the forward does, and does nothing with them: what caches
 * and buses can deliver. bf16. */
typedef struct {
  uint64_t k, v, entries, counts;
  int64_t sequences;
  int32_t pairs, num_k, width, dim;
  uint64_t stream;
} MegagenProbe;
MegagenError megagen_gather_probe(const MegagenProbe* a);
#ifdef __cplusplus
}
#endif

// wgmma m64nNk16 for bf16 and fp16 with fp32 accumulators: A from registers or shared memory, B from
// shared memory. Matrix descriptors are those of layout.h.
#pragma once
#include <cstdint>

namespace megagen::cuda {
struct Bf16 {};
struct Fp16 {};

namespace hw {
#define MG_DEVICE __device__ __forceinline__

// Before the first wgmma and after registers that one uses were written by anything else.
MG_DEVICE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MG_DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are under way.
template <int kPending>
MG_DEVICE void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// After a wait: the compiler may not move reads of these accumulators to before it.
template <int kCount>
MG_DEVICE void settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// D = A B (accumulate 0) or D += A B. kRowsB: the contraction runs along B's rows (along_rows), or with
// kRowsA along A's. Chosen by the types: mma<Bf16, 64>.
template <class T, int N>
struct Mma;
template <class T, int N, bool kRowsB>
MG_DEVICE void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  Mma<T, N>::template registers<kRowsB>(d, a, b, accumulate);
}
template <class T, int N, bool kRowsA, bool kRowsB>
MG_DEVICE void mma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  Mma<T, N>::template shared<kRowsA, kRowsB>(d, a, b, accumulate);
}

// Operand numbers after the accumulators differ by N, hence the numbers in the table below.
#define MG_MMA(T, TYPE, N, D, OUT, p0, p1, p2, p3, p4, p5, p6)                                              \
  template <>                                                                                               \
  struct Mma<T, N> {                                                                                        \
    template <bool kRowsB>                                                                                  \
    static MG_DEVICE void registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p5 ", 0;\n"                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, "             \
                   "{%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", p, 1, 1, %" #p6 ";\n}\n"            \
                   : OUT                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(kRowsB))); \
    }                                                                                                       \
    template <bool kRowsA, bool kRowsB>                                                                     \
    static MG_DEVICE void shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {               \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\n"                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, "             \
                   "%" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 ";\n}\n"                                  \
                   : OUT                                                                                    \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(int(kRowsA)), "n"(int(kRowsB)));                  \
    }                                                                                                       \
  };
#define MG_O(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MG_D0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MG_D8 "%8,%9,%10,%11,%12,%13,%14,%15"
#define MG_D16 "%16,%17,%18,%19,%20,%21,%22,%23"
#define MG_D24 "%24,%25,%26,%27,%28,%29,%30,%31"
#define MG_D32 "%32,%33,%34,%35,%36,%37,%38,%39"
#define MG_D40 "%40,%41,%42,%43,%44,%45,%46,%47"
#define MG_D48 "%48,%49,%50,%51,%52,%53,%54,%55"
#define MG_D56 "%56,%57,%58,%59,%60,%61,%62,%63"
#define MG_ONE(...) __VA_ARGS__
#define MG_MMAS(T, TYPE)                                                                                             \
  MG_MMA(T, TYPE, 16, MG_D0, MG_ONE(MG_O(0)), 8, 9, 10, 11, 12, 13, 14)                                              \
  MG_MMA(T, TYPE, 32, MG_D0 "," MG_D8, MG_ONE(MG_O(0), MG_O(8)), 16, 17, 18, 19, 20, 21, 22)                         \
  MG_MMA(T, TYPE, 48, MG_D0 "," MG_D8 "," MG_D16, MG_ONE(MG_O(0), MG_O(8), MG_O(16)), 24, 25, 26, 27, 28, 29, 30)    \
  MG_MMA(T, TYPE, 64, MG_D0 "," MG_D8 "," MG_D16 "," MG_D24, MG_ONE(MG_O(0), MG_O(8), MG_O(16), MG_O(24)), 32, 33,   \
         34, 35, 36, 37, 38)                                                                                         \
  MG_MMA(T, TYPE, 128, MG_D0 "," MG_D8 "," MG_D16 "," MG_D24 "," MG_D32 "," MG_D40 "," MG_D48 "," MG_D56,            \
         MG_ONE(MG_O(0), MG_O(8), MG_O(16), MG_O(24), MG_O(32), MG_O(40), MG_O(48), MG_O(56)), 64, 65, 66, 67, 68,   \
         69, 70)
MG_MMAS(Bf16, "bf16")
MG_MMAS(Fp16, "f16")
#undef MG_MMAS
#undef MG_MMA
#undef MG_ONE
#undef MG_O
#undef MG_D0
#undef MG_D8
#undef MG_D16
#undef MG_D24
#undef MG_D32
#undef MG_D40
#undef MG_D48
#undef MG_D56
#undef MG_DEVICE
}  // namespace hw
}  // namespace megagen::cuda

// A processor in miniature: the threads of one block as fibers that switch only where the hardware would
// make them wait for one another. Bulk copies arrive late and in any order, products of wgmma are made
// at the earliest or at the latest moment that the rules allow; a program that is right cannot tell.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

constexpr int kMaxThreads = 384, kSharedBytes = 232448;
constexpr uint32_t kSharedStart = 1024;  // address of the first byte: 0 is nothing's address

struct Barrier {
  uint64_t phase;  // of the phase under way
  int expected, pending;
  int64_t bytes;  // still to arrive
};

// One wgmma of one thread.
struct Product {
  int columns;
  bool fp16, rows_a, rows_b, accumulate;
  const uint32_t* registers;  // A from registers, or null
  uint64_t a, b;
  float* d;
};

struct Copy {
  Barrier* barrier;
  int64_t bytes;
  std::function<void()> move;
};

struct Fiber {
  jmp_buf context;
  int id = 0;
  bool started = false, done = false;
  const uint64_t* blocked_on = nullptr;  // runs again once this differs from `seen`
  uint64_t seen = 0;
  const char* where = "";
  std::vector<Product> open;                 // not committed
  std::vector<std::vector<Product>> groups;  // committed, by number
  uint64_t committed = 0;
};

struct Warp {
  uint64_t turn = 0;
  int arrived = 0;
  uint64_t value[2][32];
};

struct Meeting {
  uint64_t turn = 0;
  int arrived = 0;
};

struct Group {  // a warpgroup's products
  uint64_t executed = 0, commits = 0;
};

struct Machine {
  std::mt19937 random{0};
  bool eager = false;  // products at once, or only when waited for
  int threads = 0;
  int64_t block = 0, blocks = 0;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::vector<std::vector<char>> stacks;
  Warp warps[kMaxThreads / 32];
  Meeting meetings[16];
  Group groups[kMaxThreads / 128];
  std::vector<Copy> copies;
  std::function<void()> body;
  std::string error;
  uint8_t* shared = nullptr;
  int64_t products = 0;

  void run_block(int threads, int64_t block, int64_t blocks, std::function<void()> body);
  // The current fiber stays until *word is not `seen`.
  void wait_while(const uint64_t* word, uint64_t seen, const char* where);
  [[noreturn]] void fail(const std::string& what);

  uint64_t exchange(uint64_t value, int from, const char* where);  // warp: the value of lane `from`
  uint32_t vote(bool value);
  void meet(Meeting& m, int threads, const char* where);

  void arrive(Barrier& b);
  void settle_barrier(Barrier& b);
  void start_copy(Copy copy, void* to);
  void commit();
  void wait_products(uint64_t pending);

 private:
  void execute(int group, uint64_t upto);
  void resume(Fiber& f);
  void finish_copy(size_t i);
  std::string stuck() const;
};

Machine& machine();
float number(uint16_t bits, bool fp16);
uint16_t bits_of(float value, bool fp16);
}  // namespace emulator

// limits.cpp: what this machine can do at most: multiply-adds a second, bytes a second, cycles a second.
// Compiled by limits.py once per instruction set and called through ctypes; it knows nothing of rnnfast.
// Every function runs for a given number of rounds and is timed by the caller. GNU vector extensions: gcc and clang.
#include <cstdint>

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif

namespace {

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(WIDTH)));
};

// 12 independent chains hide a latency of 4 cycles on 2 pipes; the compiler contracts a * b + c to one FMA where the target has it.
template <class T>
T multiply_add(std::int64_t rounds) {
  using V = typename Vector<T>::type;
  constexpr int chains = 12;
  V acc[chains], a, b;
  for (int i = 0; i < chains; ++i) acc[i] = V{} + static_cast<T>(i);
  a = V{} + static_cast<T>(0.999);
  b = V{} + static_cast<T>(0.001);
  asm volatile("" : "+m"(a), "+m"(b));
  for (std::int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < chains; ++i) acc[i] = acc[i] * a + b;
  }
  V sum = acc[0];
  for (int i = 1; i < chains; ++i) sum = sum + acc[i];
  T result = 0;
  for (unsigned i = 0; i < WIDTH / sizeof(T); ++i) result = result + sum[i];
  return result;
}

}  // namespace

extern "C" {

int width() { return WIDTH; }                                               // bytes in a vector
std::int64_t chains() { return 12; }                                        // multiply-adds in flight
float fma32(std::int64_t rounds) { return multiply_add<float>(rounds); }    // rounds * chains * WIDTH / 4 multiply-adds
double fma64(std::int64_t rounds) { return multiply_add<double>(rounds); }  // rounds * chains * WIDTH / 8 multiply-adds

// Reads bytes (a multiple of 8 * WIDTH) again and again, each vector once a round.
std::int64_t read(const void* data, std::int64_t bytes, std::int64_t rounds) {
  using V = Vector<std::int64_t>::type;
  V acc[8] = {};
  for (std::int64_t r = 0; r < rounds; ++r) {
    const V* p = static_cast<const V*>(data);
    for (std::int64_t i = 0; i < bytes / WIDTH; i += 8) {
      for (int j = 0; j < 8; ++j) acc[j] = acc[j] | p[i + j];
    }
    asm volatile("" ::: "memory");
  }
  V all = acc[0];
  for (int j = 1; j < 8; ++j) all = all | acc[j];
  std::int64_t result = 0;
  for (unsigned i = 0; i < WIDTH / 8; ++i) result |= all[i];
  return result;
}

// A chain of dependent instructions that no renamer removes: rounds * 96 cycles. A 64-bit multiplication takes 3 cycles on every x86-64
// core of the last ten years, a rotation takes 1 on aarch64.
std::uint64_t cycles(std::int64_t rounds) {
  std::uint64_t x = 0x9e3779b97f4a7c15u;
  for (std::int64_t r = 0; r < rounds; ++r) {
#if defined(__x86_64__)
    for (int i = 0; i < 32; ++i) asm volatile("imul %0, %0" : "+r"(x));
#elif defined(__aarch64__)
    for (int i = 0; i < 96; ++i) asm volatile("ror %0, %0, #1" : "+r"(x));
#else
    for (int i = 0; i < 96; ++i) {
      x = (x << 1) | (x >> 63);
      asm volatile("" : "+r"(x));
    }
#endif
  }
  return x;
}
}

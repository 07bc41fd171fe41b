// Which targets' tables this build has, which of them this CPU can run, and which one is used: the best, or RNNFAST_TARGET's.
//
// Compiled for the baseline CPU. __builtin_cpu_supports asks for the operating system's support of the registers (XCR0) as well.
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

#define RNNFAST_DECLARE(name) extern "C" __attribute__((visibility("hidden"))) const rnnfast::Kernels kernels_##name;
#ifdef RNNFAST_HAVE_X86
RNNFAST_DECLARE(v4_bf16)
RNNFAST_DECLARE(v4)
RNNFAST_DECLARE(v3)
#endif
RNNFAST_DECLARE(baseline)
RNNFAST_DECLARE(scalar)

namespace rnnfast {
namespace {

struct Found {
  const Kernels* table[8];
  int count = 0;
  void add(const Kernels& k) { table[count++] = &k; }
};

Found find() {
  Found f;
#ifdef RNNFAST_HAVE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2")) {
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) f.add(kernels_v4_bf16);
    f.add(kernels_v4);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    f.add(kernels_v3);
#endif
  f.add(kernels_baseline);
  f.add(kernels_scalar);
  return f;
}

const Found& found() {
  static const Found f = find();
  return f;
}

int first_choice() {
  const char* name = getenv("RNNFAST_TARGET");
  if (!name || !*name) return 0;
  std::string known;
  for (int i = 0; i < found().count; ++i) {
    if (strcmp(found().table[i]->target, name) == 0) return i;
    known += std::string(i ? ", " : "") + found().table[i]->target;
  }
  throw std::invalid_argument("RNNFAST_TARGET must name a target that this CPU runs, one of " + known + "; got " + name);
}

std::atomic<int> chosen{-1};

}  // namespace

int target_count() { return found().count; }
const Kernels& target(int i) { return *found().table[i]; }
const Kernels& kernels() {
  int i = chosen.load();
  if (i < 0) chosen.store(i = first_choice());
  return target(i);
}
void use_target(int i) { chosen.store(i); }

int gates(CellKind kind) { return kind >= GRU ? 3 : kind >= LSTM ? 4 : 1; }
bool carries(CellKind kind) { return kind >= LSTM; }

}  // namespace rnnfast

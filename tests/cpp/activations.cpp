// activations.cpp: the largest errors that csrc/vec.hpp states are true, for the instruction set this file is compiled for.
//
// Reads the table out of the header's own comment (argument 1: the header's path), sweeps each function densely over all its inputs
// (argument 2: how many float32 bit patterns to step by, 1 = every float32), and compares with libm in a wider type. An error is
// counted in units in the last place of the exact result. Includes vec.hpp alone.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "../../csrc/vec.hpp"
#include "check.hpp"

namespace {

template <class T>
struct Wider;
template <>
struct Wider<float> {
  typedef double type;
  typedef uint32_t bits;
};
template <>
struct Wider<double> {
  typedef long double type;
  typedef uint64_t bits;
};

template <class T>
T from_bits(typename Wider<T>::bits bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  template <class T>
  static Reg<T> ours(Reg<T> x) {
    return Maths<T>::sigmoid(x);
  }
  template <class W>
  static W exact(W x) {
    return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
  }
  static constexpr double at_minus_infinity = 0, at_infinity = 1;
};

struct Tanh {
  static constexpr const char* name = "tanh";
  template <class T>
  static Reg<T> ours(Reg<T> x) {
    return Maths<T>::tanh(x);
  }
  template <class W>
  static W exact(W x) {
    return std::tanh(x);
  }
  static constexpr double at_minus_infinity = -1, at_infinity = 1;
};

template <class T>
T ulp(T exact) {
  int exponent;
  std::frexp(exact, &exponent);  // exact = m 2^exponent, 1/2 <= |m| < 1
  return std::ldexp(T{1}, exponent - std::numeric_limits<T>::digits);
}

// A register at a time: lanes[] in, the worst error so far out.
template <class F, class T>
struct Sweep {
  T lanes[LANES<T>] = {};
  int filled = 0;
  double worst = 0;
  T worst_at = 0;

  void add(T x) {
    lanes[filled++] = x;
    if (filled == LANES<T>) measure();
  }
  void measure() {
    T y[LANES<T>];
    store<T>(y, F::template ours<T>(load<T>(lanes)));
    for (int i = 0; i < filled; ++i) {
      using W = typename Wider<T>::type;
      const W exact = F::template exact<W>(static_cast<W>(lanes[i]));
      if (std::fabs(exact) < static_cast<W>(std::numeric_limits<T>::min())) continue;  // not a normal number
      const W error = std::fabs(static_cast<W>(y[i]) - exact) / static_cast<W>(ulp<T>(static_cast<T>(exact)));
      if (!(error <= static_cast<W>(worst))) worst = static_cast<double>(error), worst_at = lanes[i];
    }
    filled = 0;
  }
};

template <class F, class T>
void error_is_as_stated(double stated, uint64_t step) {
  using B = typename Wider<T>::bits;
  Sweep<F, T> sweep;
  for (uint64_t bits = 0; bits <= std::numeric_limits<B>::max() - step; bits += step) {
    const T x = from_bits<T>(static_cast<B>(bits));
    if (std::isfinite(x)) sweep.add(x);
  }
  for (int i = -4000000; i <= 4000000; i += 7) sweep.add(static_cast<T>(i) / static_cast<T>(40000));  // where the curve bends, evenly
  sweep.measure();
  std::printf("%s %s: largest error %.2f ulp at %.9g, stated %.2f\n", F::name, sizeof(T) == 4 ? "float32" : "float64", sweep.worst,
              static_cast<double>(sweep.worst_at), stated);
  CHECK(sweep.worst <= stated);
}

template <class F, class T>
void ends_are_exact() {
  const double infinity = std::numeric_limits<double>::infinity();
  const double inputs[] = {-infinity, infinity, std::numeric_limits<double>::quiet_NaN(), 0.0};
  T y[4];
  for (int k = 0; k < 4; ++k) {
    T lanes[LANES<T>];
    for (T& lane : lanes) lane = static_cast<T>(inputs[k]);
    store<T>(lanes, F::template ours<T>(load<T>(lanes)));
    y[k] = lanes[LANES<T> - 1];
  }
  CHECK(static_cast<double>(y[0]) == F::at_minus_infinity);
  CHECK(static_cast<double>(y[1]) == F::at_infinity);
  CHECK(std::isnan(y[2]));
  CHECK(y[3] == static_cast<T>(F::template exact<double>(0.0)));
}

// tanh(−x) = −tanh x to the last bit, zeros' signs among it.
template <class T>
void tanh_is_odd() {
  for (int i = 0; i <= 4000; ++i) {
    T x[LANES<T>], y[LANES<T>], minus_y[LANES<T>];
    for (int lane = 0; lane < LANES<T>; ++lane) x[lane] = static_cast<T>(i * LANES<T> + lane) / static_cast<T>(4001);
    store<T>(y, Maths<T>::tanh(load<T>(x)));
    store<T>(minus_y, Maths<T>::tanh(-load<T>(x)));
    for (int lane = 0; lane < LANES<T>; ++lane) y[lane] = -y[lane];
    if (!CHECK(std::memcmp(y, minus_y, sizeof y) == 0)) return;
  }
}

template <class F>
void laws(const char* header, uint64_t step) {
  double stated32 = -1, stated64 = -1;
  if (std::FILE* file = std::fopen(header, "r")) {
    char line[512], format[64];
    std::snprintf(format, sizeof format, "// %s %%lf %%lf", F::name);
    while (stated64 < 0 && std::fgets(line, sizeof line, file)) {
      if (std::sscanf(line, format, &stated32, &stated64) != 2) stated32 = stated64 = -1;
    }
    std::fclose(file);
  }
  if (!CHECK(stated32 > 0 && stated64 > 0)) return;
  error_is_as_stated<F, float>(stated32, step);
  error_is_as_stated<F, double>(stated64, (uint64_t{1} << 36) * step - 1);  // odd: the low bits vary too
  ends_are_exact<F, float>();
  ends_are_exact<F, double>();
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::printf("usage: %s csrc/vec.hpp [step]\n", arguments[0]);
    return 2;
  }
  const uint64_t step = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 251;
#if defined(__x86_64__)
  if (LANES<float> == 16 && !__builtin_cpu_supports("avx512f")) return std::printf("0 passed, 0 failed: needs AVX-512\n"), 0;
  if (LANES<float> == 8 && !__builtin_cpu_supports("avx2")) return std::printf("0 passed, 0 failed: needs AVX2\n"), 0;
#endif
  std::printf("%d lanes of float32\n", LANES<float>);
  laws<Sigmoid>(arguments[1], step);
  laws<Tanh>(arguments[1], step);
  tanh_is_odd<float>();
  tanh_is_odd<double>();
  return test::report();
}

// learning.cpp: what a training step does beside the recurrent layers, asked through the border, for every target that this machine can
// run: softmax with cross-entropy, an embedding's gradient and Adam against plain loops in double, in parts and at once with the same bits.
//
// Every buffer is a heap block of exactly the size that is asked for, so that AddressSanitizer sees a step too far. Knows the border alone.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/kernels.hpp"
#include "check.hpp"

namespace {

using namespace rnnfast;

template <class T>
constexpr Dtype DTYPE = sizeof(T) == 4 ? FLOAT32 : FLOAT64;

template <class T>
std::vector<T> drawn(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<T> v(n);
  for (T& x : v) x = static_cast<T>(normal(random));
  v.shrink_to_fit();
  return v;
}
template <class T>
bool close(T value, double expected) {
  return std::fabs(static_cast<double>(value) - expected) <= (sizeof(T) == 4 ? 4e-6 : 1e-14) * (1 + std::fabs(expected));
}
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Calls part(begin, end) for [0, n), at once or in three parts.
template <class Part>
void whole_or_parts(bool whole, int64_t n, Part part) {
  if (whole) return part(0, n);
  part(0, n / 3), part(n / 3, n / 2), part(n / 2, n);
}

template <class T>
void softmax(const Kernels& k, int64_t N, int64_t V) {
  const std::vector<T> logits = drawn<T>(static_cast<size_t>(N * V), 1);
  std::vector<int64_t> targets(static_cast<size_t>(N));
  std::vector<double> weights(static_cast<size_t>(N));
  for (size_t n = 0; n < targets.size(); ++n) targets[n] = static_cast<int64_t>(n * 7) % V, weights[n] = static_cast<double>(n % 3);
  std::vector<T> gradients[2];
  for (const bool whole : {true, false}) {
    std::vector<T>& gradient = gradients[whole] = std::vector<T>(logits.size());
    std::vector<double> sums(targets.size()), picked(targets.size());
    const Softmax s{V, logits.data(), targets.data(), weights.data(), 1, gradient.data(), sums.data(), picked.data()};
    whole_or_parts(whole, N, [&](int64_t begin, int64_t end) { k.softmax(DTYPE<T>, s, begin, end); });
    for (size_t n = 0; n < targets.size(); ++n) {
      const T* a = logits.data() + n * static_cast<size_t>(V);
      double sum = 0;
      for (int64_t v = 0; v < V; ++v) sum += std::exp(static_cast<double>(a[v]));
      if (weights[n] != 0) CHECK(close(static_cast<T>(std::log(sums[n]) - picked[n]), std::log(sum) - static_cast<double>(a[targets[n]])));
      for (int64_t v = 0; v < V; ++v) {
        const double p = std::exp(static_cast<double>(a[v])) / sum - (v == targets[n] ? 1 : 0);
        CHECK(close(gradient[n * static_cast<size_t>(V) + static_cast<size_t>(v)], weights[n] * p));
      }
    }
  }
  CHECK(same(gradients[0], gradients[1]));
}

template <class T>
void scatter(const Kernels& k, int64_t N, int64_t width) {
  const std::vector<T> values = drawn<T>(static_cast<size_t>(N * width), 2), before = drawn<T>(static_cast<size_t>(5 * width), 3);
  std::vector<int64_t> rows(static_cast<size_t>(N));
  for (size_t n = 0; n < rows.size(); ++n) rows[n] = static_cast<int64_t>(n * n) % 5;
  std::vector<T> expected = before;  // the same additions in the same order
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = 0; i < width; ++i) {
      T& to = expected[static_cast<size_t>(rows[static_cast<size_t>(n)] * width + i)];
      to = to + values[static_cast<size_t>(n * width + i)];
    }
  for (const bool whole : {true, false}) {
    std::vector<T> table = before;
    const Scatter s{N, width, table.data(), rows.data(), values.data()};
    whole_or_parts(whole, width, [&](int64_t begin, int64_t end) { k.scatter(DTYPE<T>, s, begin, end); });
    CHECK(same(table, expected));
  }
}

template <class T>
void adam(const Kernels& k, int64_t N) {
  const size_t n = static_cast<size_t>(N);
  const std::vector<T> p = drawn<T>(n, 4), g = drawn<T>(n, 5), m = drawn<T>(n, 6);
  std::vector<T> v = drawn<T>(n, 7), results[2];
  for (T& x : v) x = x * x;
  for (const bool whole : {true, false}) {
    std::vector<T> q = p, mean = m, square = v;
    const Adam u{q.data(), g.data(), mean.data(), square.data(), 0.003, 0.9, 0.999, 1e-8, 0.01, 0.99};
    whole_or_parts(whole, N, [&](int64_t begin, int64_t end) { k.adam(DTYPE<T>, u, begin, end); });
    for (size_t i = 0; i < n; ++i) {
      const double gradient = static_cast<double>(g[i]) + 0.01 * static_cast<double>(p[i]);
      const double first = 0.9 * static_cast<double>(m[i]) + 0.1 * gradient;
      const double second = 0.999 * static_cast<double>(v[i]) + 0.001 * gradient * gradient;
      const double step = 0.003 * first / (std::sqrt(second) + 1e-8);
      CHECK(close(mean[i], first) && close(square[i], second));
      CHECK(std::fabs(static_cast<double>(q[i]) - (0.99 * static_cast<double>(p[i]) - step)) <=
            (sizeof(T) == 4 ? 4e-6 : 1e-14) * (1 + std::fabs(static_cast<double>(p[i])) + std::fabs(step)));
    }
    results[whole] = q;
  }
  CHECK(same(results[0], results[1]));
}

template <class T>
void all(const Kernels& k) {
  for (const int64_t V : {1, 3, 16, 17, 63, 129, 2500}) softmax<T>(k, 7, V);
  for (const int64_t width : {1, 3, 16, 33, 130}) scatter<T>(k, 40, width);
  for (const int64_t n : {1, 15, 64, 1001}) adam<T>(k, n);
}

}  // namespace

int main() {
  for (int i = 0; i < target_count(); ++i) {
    const int before = test::failed;
    all<float>(target(i));
    all<double>(target(i));
    std::printf("%s: %s\n", target(i).target, test::failed == before ? "holds" : "FAILS");
  }
  return test::report();
}

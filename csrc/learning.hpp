// What a training step does beside the recurrent layers, each for a part of the rows or numbers, so that threads share them and every
// result is the same for any number of threads: softmax with cross-entropy, the gradient of an embedding, Adam. Knows no thread.
#pragma once

#include "kernels.hpp"
#include "vec.hpp"

namespace {

using rnnfast::Adam;
using rnnfast::Scatter;
using rnnfast::Softmax;

// Lanes [0, n) of x, and `rest` in the others.
template <class T>
RNNFAST_INLINE Reg<T> first_lanes(Reg<T> x, int n, T rest) {
  if constexpr (LANES<T> == 1) {
    return x;
  } else {
    Reg<T> number;
    for (int i = 0; i < LANES<T>; ++i) number[i] = T(i);
    return number < all(T(n)) ? x : all(rest);
  }
}

// Rows [begin, end): loss_n = log Σ_v e^{a_nv} − a_n,target and da_nv = w_n (e^{a_nv} / Σ e − [v = target]), every a less the row's
// largest.
template <class T>
void softmax_rows(const Softmax& s, int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  const T lowest = -T(__builtin_huge_val());
  const FlushDenormals<T> guard;
  for (int64_t n = begin; n < end; ++n) {
    const T* const a = static_cast<const T*>(s.logits) + n * s.V;
    T* const da = s.gradient ? static_cast<T*>(s.gradient) + n * s.V : nullptr;
    const double weight = s.weights ? s.weights[n] : s.weight;
    s.sums[n] = 1, s.picked[n] = 0;
    if (weight == 0) {  // what it holds is not read
      for (int64_t v = 0; da && v < s.V; ++v) da[v] = T(0);
      continue;
    }
    const auto each = [&](auto visit) {
      for (int64_t v = 0; v < s.V; v += L) {
        const int count = s.V - v < L ? static_cast<int>(s.V - v) : L;
        visit(v, count, count < L ? first_lanes<T>(load(a + v, count), count, lowest) : load(a + v));
      }
    };
    T lane[L];
    Reg<T> top = all(lowest), sum = all(T(0));
    double total = 0;
    each([&](int64_t, int, Reg<T> x) { top = x > top ? x : top; });
    store(lane, top);
    T largest = lane[0];
    for (int i = 1; i < L; ++i) largest = lane[i] > largest ? lane[i] : largest;
    s.picked[n] = a[s.targets[n]] - largest;
    each([&](int64_t v, int count, Reg<T> x) {
      const Reg<T> e = Maths<T>::exp_of_negative(x - all(largest));
      sum = sum + e;
      if (da) store(da + v, e, count);
      if (v / L % 64 != 63 && v + L < s.V) return;
      store(lane, sum);  // short chains of T, long ones of double
      for (int i = 0; i < L; ++i) total += lane[i];
      sum = all(T(0));
    });
    s.sums[n] = total;
    if (!da) continue;
    const Reg<T> factor = all(static_cast<T>(weight / total));
    for (int64_t v = 0; v < s.V; v += L) {
      const int count = s.V - v < L ? static_cast<int>(s.V - v) : L;
      store(da + v, load(da + v, count) * factor, count);
    }
    da[s.targets[n]] -= static_cast<T>(weight);
  }
}

// Columns [begin, end) of table[row[n]] += values[n], in the order of n.
template <class T>
void scatter_columns(const Scatter& s, int64_t begin, int64_t end) {
  constexpr int L = LANES<T>;
  const FlushDenormals<T> guard;
  for (int64_t n = 0; n < s.N; ++n) {
    T* const to = static_cast<T*>(s.table) + s.rows[n] * s.width;
    const T* const from = static_cast<const T*>(s.values) + n * s.width;
    for (int64_t i = begin; i < end; i += L) {
      const int count = end - i < L ? static_cast<int>(end - i) : L;
      store(to + i, load(to + i, count) + load(from + i, count), count);
    }
  }
}

RNNFAST_INLINE float root(float x) { return __builtin_sqrtf(x); }
RNNFAST_INLINE double root(double x) { return __builtin_sqrt(x); }

// Kingma & Ba 2015, algorithm 1, for the numbers [begin, end): the caller has put the corrections for the start into rate and eps.
template <class T>
void adam_numbers(const Adam& u, int64_t begin, int64_t end) {
  T* const __restrict p = static_cast<T*>(u.p), * const __restrict mean = static_cast<T*>(u.mean);
  T* const __restrict square = static_cast<T*>(u.square);
  const T* const __restrict gradient = static_cast<const T*>(u.gradient);
  const T to_mean = T(1 - u.beta_1), to_square = T(1 - u.beta_2), rate = T(u.rate), eps = T(u.eps), decay = T(u.decay), kept = T(u.kept);
  const FlushDenormals<T> guard;
  for (int64_t i = begin; i < end; ++i) {
    const T g = gradient[i] + p[i] * decay;
    mean[i] += (g - mean[i]) * to_mean;            // m = β₁ m + (1 − β₁) g
    square[i] += (g * g - square[i]) * to_square;  // v = β₂ v + (1 − β₂) g²
    p[i] = p[i] * kept - mean[i] / (root(square[i]) + eps) * rate;
  }
}

}  // namespace

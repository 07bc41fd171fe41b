// A SIMD value: how many numbers fit the target's widest register, how they are loaded and stored, and exp, sigmoid, tanh of them.
//
// Reg<T> is a GNU vector (g++ and clang), so that + − · / and comparisons are the compiler's own; only the fused multiply-add and the
// masked load and store need an intrinsic. RNNFAST_SCALAR makes it one number, for debugging. Knows no matrix, cell or thread.
//
// Largest errors, in units in the last place of the exact result, over all finite inputs whose result is a normal number (tests/cpp
// measures them):
//               float32   float64
//   sigmoid        2.5       2.4
//   tanh           2.6       2.2
#pragma once

#include <stdint.h>
#include <string.h>

#if !defined(RNNFAST_SCALAR) && (defined(__AVX2__) || defined(__AVX512F__))
#include <immintrin.h>
#elif !defined(RNNFAST_SCALAR) && defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

#define RNNFAST_INLINE __attribute__((always_inline)) inline

#if defined(RNNFAST_SCALAR)
constexpr int REGISTER_BYTES = 0, REGISTERS = 16;
#elif defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int REGISTER_BYTES = 16, REGISTERS = 32;
#else
constexpr int REGISTER_BYTES = 16, REGISTERS = 16;
#endif

template <class T>
constexpr int LANES = REGISTER_BYTES == 0 ? 1 : REGISTER_BYTES / static_cast<int>(sizeof(T));

// f(0), …, f(N − 1), each with a constant: arrays of registers that are indexed so never lie in memory. Those that a loop indexes do,
// before and after the innermost loop, however it is unrolled.
template <int I>
struct Index {
  constexpr operator int() const { return I; }
};
template <int N, class F>
RNNFAST_INLINE void each(F f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f(Index<N - 1>{});
  }
}
#define RNNFAST_LAMBDA __attribute__((always_inline))

template <class T, int N>
struct Vector {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
struct Vector<T, 1> {
  typedef T type;
};
template <class T>
using Reg = typename Vector<T, LANES<T>>::type;

template <class T>
struct Bits;  // the integer as wide as a T, and the layout of its exponent
template <>
struct Bits<float> {
  typedef uint32_t type;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct Bits<double> {
  typedef uint64_t type;
  static constexpr int mantissa = 52, bias = 1023;
};

template <class T>
RNNFAST_INLINE Reg<T> all(T x) {  // x in every lane; x − 0 is x, −0 among it, and so becomes one broadcast (0 + x would not)
  return x - Reg<T>{};
}

// a·b + c, rounded once where the hardware can.
template <class T>
RNNFAST_INLINE Reg<T> fma(Reg<T> a, Reg<T> b, Reg<T> c) {
  if constexpr (LANES<T> == 1) return a * b + c;
#if !defined(RNNFAST_SCALAR) && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Reg<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (Reg<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif !defined(RNNFAST_SCALAR) && defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Reg<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (Reg<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif !defined(RNNFAST_SCALAR) && defined(__aarch64__)
  if constexpr (sizeof(T) == 4)
    return (Reg<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else
    return (Reg<T>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

template <class T>
RNNFAST_INLINE Reg<T> load(const T* p) {
  Reg<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
RNNFAST_INLINE void store(T* p, Reg<T> v) {
  memcpy(p, &v, sizeof v);
}
// v in a register from here on: where multiply-adds take an operand from memory, compilers like to load it again for each that uses it.
template <class T>
RNNFAST_INLINE Reg<T> once(Reg<T> v) {
#if !defined(RNNFAST_SCALAR) && defined(__AVX2__)
  __asm__("" : "+v"(v));
#endif
  return v;
}
// The first n lanes, 0 < n <= LANES; the others are read as 0 and never touched in memory.
template <class T>
RNNFAST_INLINE Reg<T> load(const T* p, int n) {
  if (n == LANES<T>) return load(p);
#if !defined(RNNFAST_SCALAR) && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Reg<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  else
    return (Reg<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
#elif !defined(RNNFAST_SCALAR) && defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Reg<T>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  else
    return (Reg<T>)_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)));
#else
  T part[LANES<T>] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
#endif
}
template <class T>
RNNFAST_INLINE void store(T* p, Reg<T> v, int n) {
  if (n == LANES<T>) return store(p, v);
#if !defined(RNNFAST_SCALAR) && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
#else
  T part[LANES<T>];  // by halves, since compilers call a function for what they copy by a loop, and masked stores are slow without AVX-512
  store(part, v);
  const T* from = part;
  if constexpr (LANES<T> > 4)
    if (n & 4) memcpy(p, from, 4 * sizeof(T)), p += 4, from += 4;
  if constexpr (LANES<T> > 2)
    if (n & 2) memcpy(p, from, 2 * sizeof(T)), p += 2, from += 2;
  if (n & 1) *p = *from;
#endif
}

// The lesser and the greater of a bound and x; NaN where x is, which these instructions take from their second operand.
template <class T>
RNNFAST_INLINE Reg<T> at_most(T bound, Reg<T> x) {
#if !defined(RNNFAST_SCALAR) && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Reg<T>)_mm512_maskz_min_ps(0xffff, (__m512)all(bound), (__m512)x);
  else
    return (Reg<T>)_mm512_maskz_min_pd(0xff, (__m512d)all(bound), (__m512d)x);
#elif !defined(RNNFAST_SCALAR) && defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Reg<T>)_mm256_min_ps((__m256)all(bound), (__m256)x);
  else
    return (Reg<T>)_mm256_min_pd((__m256d)all(bound), (__m256d)x);
#else
  return x > all(bound) ? all(bound) : x;
#endif
}
template <class T>
RNNFAST_INLINE Reg<T> at_least(T bound, Reg<T> x) {
#if !defined(RNNFAST_SCALAR) && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Reg<T>)_mm512_maskz_max_ps(0xffff, (__m512)all(bound), (__m512)x);
  else
    return (Reg<T>)_mm512_maskz_max_pd(0xff, (__m512d)all(bound), (__m512d)x);
#elif !defined(RNNFAST_SCALAR) && defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return (Reg<T>)_mm256_max_ps((__m256)all(bound), (__m256)x);
  else
    return (Reg<T>)_mm256_max_pd((__m256d)all(bound), (__m256d)x);
#else
  return x < all(bound) ? all(bound) : x;
#endif
}

// A whole, aligned register that goes to memory around the caches: what it overwrites is not read first, and what they hold stays. Before
// another thread may read it there must be a fence.
template <class T>
RNNFAST_INLINE void store_around(T* p, Reg<T> v) {
#if !defined(RNNFAST_SCALAR) && defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif !defined(RNNFAST_SCALAR) && defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store(p, v);
#endif
}
RNNFAST_INLINE void fence() {
#if !defined(RNNFAST_SCALAR) && defined(__AVX2__)
  _mm_sfence();
#endif
}

// Within every 128 bits of a and b: the lower halves' numbers in turn, a b a b, or the upper halves'; one instruction each.
template <class T>
RNNFAST_INLINE Reg<T> interleave_low(Reg<T> a, Reg<T> b) {
  constexpr int L = LANES<T>;
  if constexpr (sizeof(T) == 8) {
    if constexpr (L == 2) return __builtin_shufflevector(a, b, 0, 2);
    if constexpr (L == 4) return __builtin_shufflevector(a, b, 0, 4, 2, 6);
    if constexpr (L == 8) return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
  } else {
    if constexpr (L == 4) return __builtin_shufflevector(a, b, 0, 4, 1, 5);
    if constexpr (L == 8) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
    if constexpr (L == 16) return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  }
  return a;
}
template <class T>
RNNFAST_INLINE Reg<T> interleave_high(Reg<T> a, Reg<T> b) {
  constexpr int L = LANES<T>;
  if constexpr (sizeof(T) == 8) {
    if constexpr (L == 2) return __builtin_shufflevector(a, b, 1, 3);
    if constexpr (L == 4) return __builtin_shufflevector(a, b, 1, 5, 3, 7);
    if constexpr (L == 8) return __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  } else {
    if constexpr (L == 4) return __builtin_shufflevector(a, b, 2, 6, 3, 7);
    if constexpr (L == 8) return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    if constexpr (L == 16) return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  return b;
}
// The even 128 bits of a and then of b, or the odd ones.
template <class T>
RNNFAST_INLINE Reg<T> even_blocks(Reg<T> a, Reg<T> b) {
  typedef typename Vector<double, LANES<T> == 1 ? 1 : REGISTER_BYTES / 8>::type Wide;
  if constexpr (REGISTER_BYTES == 32) return (Reg<T>)__builtin_shufflevector((Wide)a, (Wide)b, 0, 1, 4, 5);
  if constexpr (REGISTER_BYTES == 64) return (Reg<T>)__builtin_shufflevector((Wide)a, (Wide)b, 0, 1, 4, 5, 8, 9, 12, 13);
  return a;
}
template <class T>
RNNFAST_INLINE Reg<T> odd_blocks(Reg<T> a, Reg<T> b) {
  typedef typename Vector<double, LANES<T> == 1 ? 1 : REGISTER_BYTES / 8>::type Wide;
  if constexpr (REGISTER_BYTES == 32) return (Reg<T>)__builtin_shufflevector((Wide)a, (Wide)b, 2, 3, 6, 7);
  if constexpr (REGISTER_BYTES == 64) return (Reg<T>)__builtin_shufflevector((Wide)a, (Wide)b, 2, 3, 6, 7, 10, 11, 14, 15);
  return b;
}
// In N registers, each run of as many as 128 bits hold numbers becomes the transposes of its squares of 128 bits.
template <class T, int N>
RNNFAST_INLINE void transpose_squares(Reg<T>* r) {
  constexpr int Q = LANES<T> == 1 ? 1 : 16 / static_cast<int>(sizeof(T));
  Reg<T> s[N];
  for (int round = 1; round < Q; round *= 2) {
    for (int q = 0; q < N; q += Q)
      for (int i = 0; i < Q / 2; ++i) {
        s[q + 2 * i] = interleave_low<T>(r[q + i], r[q + i + Q / 2]);
        s[q + 2 * i + 1] = interleave_high<T>(r[q + i], r[q + i + Q / 2]);
      }
    for (int i = 0; i < N; ++i) r[i] = s[i];
  }
}
// r[i] lane k becomes r[k] lane i: first within squares of 128 bits, then with these as the elements of a matrix.
template <class T>
RNNFAST_INLINE void transpose(Reg<T>* r) {
  constexpr int L = LANES<T>, Q = L == 1 ? 1 : 16 / static_cast<int>(sizeof(T)), SQUARES = L / Q;
  transpose_squares<T, L>(r);
  Reg<T> s[L];
  for (int round = 1; round < SQUARES; round *= 2) {
    for (int q = 0; q < Q; ++q)
      for (int i = 0; i < SQUARES / 2; ++i) {
        const Reg<T> a = r[2 * i * Q + q], b = r[(2 * i + 1) * Q + q];
        s[i * Q + q] = even_blocks<T>(a, b), s[(i + SQUARES / 2) * Q + q] = odd_blocks<T>(a, b);
      }
    for (int i = 0; i < L; ++i) r[i] = s[i];
  }
}

// r[i] = numbers i of LANES rows `pitch` apart, for i < TRANSPOSED: what loads and a transpose give, with fewer registers and shuffles
// where halves of registers can be loaded.
template <class T>
constexpr int TRANSPOSED = LANES<T> == 16 ? 8 : LANES<T>;
template <class T>
RNNFAST_INLINE void load_transposed(const T* p, int64_t pitch, Reg<T>* r) {
  if constexpr (LANES<T> == 16) {
    typedef typename Vector<double, 4>::type Half;
    Reg<T> rows[8];
    each<8>([&](auto i) RNNFAST_LAMBDA {  // squares of 4 rows side by side: from 0 and 4, and then from 8 and 12
      const T* from = p + (i + i / 4 * 4) * pitch;
      Half low, high;
      memcpy(&low, from, sizeof low);
      memcpy(&high, from + 4 * pitch, sizeof high);
      rows[i] = (Reg<T>)__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    });
    transpose_squares<T, 8>(rows);
    each<4>([&](auto i) RNNFAST_LAMBDA { r[i] = even_blocks<T>(rows[i], rows[4 + i]), r[4 + i] = odd_blocks<T>(rows[i], rows[4 + i]); });
  } else {
    for (int i = 0; i < LANES<T>; ++i) r[i] = load(p + i * pitch);
    transpose<T>(r);
  }
}

// Several narrow numbers in 32 bits, the first in the lowest: two bfloat16 (the upper half of a float32), or four bytes.
using Words = typename Vector<uint32_t, LANES<float>>::type;
RNNFAST_INLINE Words bits_of(Reg<float> x) {
  Words b;
  memcpy(&b, &x, sizeof b);
  return b;
}
RNNFAST_INLINE Reg<float> from_bits(Words b) {
  Reg<float> x;
  memcpy(&x, &b, sizeof x);
  return x;
}
RNNFAST_INLINE Words to_bfloat16(Reg<float> x) {  // to nearest, ties to even; NaN stays NaN
  const Words b = bits_of(x), rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return x != x ? (b >> 16) | 0x40u : rounded;
}
RNNFAST_INLINE Reg<float> pair_lanes(Reg<float> first, Reg<float> second) {
  return from_bits(to_bfloat16(first) | (to_bfloat16(second) << 16));
}
template <class W>
RNNFAST_INLINE W join_neighbours(W a, W b, unsigned shift) {  // (a₀ a₁) (a₂ a₃) … (b₀ b₁) …
  constexpr int L = sizeof(W) / 4;
  if constexpr (L == 4)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) | (__builtin_shufflevector(a, b, 1, 3, 5, 7) << shift);
  else if constexpr (L == 8)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) | (__builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15) << shift);
  else if constexpr (L == 16)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) |
           (__builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31) << shift);
  else
    return a | (b << shift);
}
RNNFAST_INLINE Reg<float> pair_neighbours(Reg<float> a, Reg<float> b) {
#if !defined(RNNFAST_SCALAR) && defined(__AVX512BF16__)
  return (Reg<float>)(__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
  return from_bits(join_neighbours(to_bfloat16(a), to_bfloat16(b), 16));
#endif
}
// x to the nearest whole number plus `offset`, in a byte of each word; |x| must be under 2^21.
RNNFAST_INLINE Words to_bytes(Reg<float> x, float offset) { return bits_of(x + all(0x1.8p+23f + offset)) & 0xffu; }
RNNFAST_INLINE Reg<float> to_float(Words whole) {  // of a signed whole number
  typedef typename Vector<int32_t, LANES<float>>::type Signed;
  Signed s;
  memcpy(&s, &whole, sizeof s);
#if defined(RNNFAST_SCALAR)
  return static_cast<float>(s);
#else
  return __builtin_convertvector(s, Reg<float>);
#endif
}
// sum + a₀ b₀ + … + a₃ b₃ of every lane's bytes: b's have a sign, and a's too where BYTE_OFFSET, which makes room for it, is 0. None is
// −128.
#if !defined(RNNFAST_SCALAR) && defined(__AVX512VNNI__)
constexpr unsigned BYTE_OFFSET = 128;
RNNFAST_INLINE Words add_byte_products(Words a, Words b, Words sum) {
  return (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#elif !defined(RNNFAST_SCALAR) && defined(__AVX2__) && !defined(__AVX512F__)
constexpr unsigned BYTE_OFFSET = 0;
RNNFAST_INLINE Words add_byte_products(Words a, Words b, Words sum) {  // |a| · ±b: no two products of bytes pass 16 bits
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)a), _mm256_sign_epi8((__m256i)b, (__m256i)a));
  return sum + (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr unsigned BYTE_OFFSET = 0;
RNNFAST_INLINE Words signed_byte(Words a, unsigned at) {
  const Words byte = (a >> at) & 0xffu, sign = byte & 0x80u;
  return byte - sign - sign;
}
RNNFAST_INLINE Words add_byte_products(Words a, Words b, Words sum) {
  for (unsigned at = 0; at < 32; at += 8) sum = sum + signed_byte(a, at) * signed_byte(b, at);
  return sum;
}
#endif
RNNFAST_INLINE Reg<float> broadcast_bits(const float* p) {
  uint32_t b;
  memcpy(&b, p, sizeof b);
  return from_bits(b - Words{});
}
// sum + a₀ b₀ + a₁ b₁ of every lane's pairs.
RNNFAST_INLINE Reg<float> add_pair_products(Reg<float> a, Reg<float> b, Reg<float> sum) {
#if !defined(RNNFAST_SCALAR) && defined(__AVX512BF16__)
  return (Reg<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const Words u = bits_of(a), v = bits_of(b);
  sum = fma<float>(from_bits(u << 16), from_bits(v << 16), sum);
  return fma<float>(from_bits(u & 0xffff0000u), from_bits(v & 0xffff0000u), sum);
#endif
}

// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2, the polynomials for (e^r − 1 − r) / r² fitted minimax in e^r − 1.
template <class T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float low = -88.0f, high = 88.0f;  // where n is −bias, for which 2^n counts as 0, and where it is bias
  static constexpr float log2e = 0x1.715476p+0f, ln2_high = 0x1.62e400p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float round = 0x1.8p+23f + Bits<float>::bias;
  static constexpr float p[] = {0x1.6d9908p-10f, 0x1.1227fep-7f, 0x1.555486p-5f, 0x1.5554b0p-3f, 0x1.000000p-1f};
};
template <>
struct Exponential<double> {
  static constexpr double low = -709.0, high = 709.0;
  static constexpr double log2e = 0x1.71547652b82fep+0, ln2_high = 0x1.62e42fefa0000p-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double round = 0x1.8p+52 + Bits<double>::bias;
  static constexpr double p[] = {0x1.af73f44c09ceep-26, 0x1.28a2b3fc8b79ap-22, 0x1.71ddebba011d6p-19, 0x1.a019a67ba137ep-16,
                                 0x1.a01a01b516a20p-13, 0x1.6c16c17f3bb8dp-10, 0x1.111111110e908p-7,  0x1.55555555520ddp-5,
                                 0x1.555555555555cp-3,  0x1.0000000000005p-1};
};

// The mathematics of the cells (see cells.hpp's M).
template <class T>
struct Maths {
  using V = Reg<T>;
  using E = Exponential<T>;
  using Int = typename Vector<typename Bits<T>::type, LANES<T>>::type;

  static RNNFAST_INLINE V sigmoid(V x) {  // 2^n / (2^n + e^{−r}) for x = n ln 2 + r
    V power;
    x = at_least<T>(E::low, at_most<T>(E::high, x));
    const V n = round_to_power(x, E::log2e, power), minus_r = fma<T>(n, all<T>(E::ln2_low), fma<T>(n, all<T>(E::ln2_high), -x));
    return power / ((power + all<T>(1)) + exp_less_1<1>(minus_r));
  }
  static RNNFAST_INLINE V tanh(V x) {  // ±u / (u + 1) with u = (e^{2|x|} − 1) / 2, which keeps every digit near 0
    V power;
    const V a = at_most<T>(30, size(x));  // where tanh is 1, and u still finite
    const V n = round_to_power(a, 2 * E::log2e, power);
    const V r = fma<T>(n, all<T>(-(E::ln2_high + E::ln2_low) / 2), a);  // in one step: where n is large, u's digits hardly count
    const V u = fma<T>(power, exp_less_1<2>(r), fma<T>(power, all<T>(T(0.5)), all<T>(T(-0.5))));
    const V d = u + all<T>(1);
    V t = u / d;
    if constexpr (sizeof(T) == 8) {  // takes back d's rounding and the quotient's
      const V lost = u - (d - all<T>(1));
      t = t + (fma<T>(-t, d, u) - t * lost) / d;
    }
    return with_sign_of(x, t);
  }
  static RNNFAST_INLINE V exp_of_negative(V x) {  // e^x for x <= 0
    V power;
    x = at_least<T>(E::low, x);
    const V n = round_to_power(x, E::log2e, power), r = fma<T>(n, all<T>(-E::ln2_low), fma<T>(n, all<T>(-E::ln2_high), x));
    return fma<T>(power, exp_less_1<1>(r), power);
  }
  static RNNFAST_INLINE V relu(V x) { return x < all<T>(0) ? all<T>(0) : x; }                  // NaN stays NaN
  static RNNFAST_INLINE V where_positive(V x, V v) { return x <= all<T>(0) ? all<T>(0) : v; }  // where x is NaN, too

 private:
  // n = round(x·per), and 2^n by its bits: n + bias is in the low ones of the sum, and those of `round` itself are shifted out.
  static RNNFAST_INLINE V round_to_power(V x, T per, V& power) {
    const V shifted = fma<T>(x, all<T>(per), all<T>(E::round));
    Int bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = bits << Bits<T>::mantissa;
    memcpy(&power, &bits, sizeof power);
    return shifted - all<T>(E::round);
  }
  // (e^{M r} − 1) / M for |M r| <= ln 2 / 2: the polynomial with its coefficients times powers of M.
  template <int M>
  static RNNFAST_INLINE V exp_less_1(V r) {
    constexpr int N = sizeof E::p / sizeof E::p[0];
    V q = all<T>(0);
    each<N>([&](auto k) RNNFAST_LAMBDA {
      T factor = 1;
      for (int i = k; i < N; ++i) factor *= M;
      q = k == 0 ? all<T>(E::p[k] * factor) : fma<T>(q, r, all<T>(E::p[k] * factor));
    });
    return fma<T>(r * r, q, r);
  }
  static constexpr typename Bits<T>::type SIGN = typename Bits<T>::type{1} << (8 * sizeof(T) - 1);
  static RNNFAST_INLINE V size(V x) {
    Int bits;
    memcpy(&bits, &x, sizeof bits);
    bits = bits & ~SIGN;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  static RNNFAST_INLINE V with_sign_of(V x, V positive) {
    Int bits, sign;
    memcpy(&bits, &positive, sizeof bits);
    memcpy(&sign, &x, sizeof sign);
    bits = bits | (sign & SIGN);
    memcpy(&positive, &bits, sizeof positive);
    return positive;
  }
};

// Flushes denormals to 0 for as long as it lives, and then puts the thread's floating-point state back as it was: recurrent nets that decay
// run 10 to 30 times slower on denormals. Only for float32: float64 is left alone.
template <class T>
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved(_mm_getcsr()) {
    if (sizeof(T) == 4) _mm_setcsr(saved | 0x8040u);
  }
  ~FlushDenormals() { _mm_setcsr(saved); }

 private:
  unsigned saved;
#elif defined(__aarch64__)
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    if (sizeof(T) == 4) __asm__ volatile("msr fpcr, %0" ::"r"(saved | (1ull << 24)));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved)); }

 private:
  uint64_t saved;
#endif
};

}  // namespace

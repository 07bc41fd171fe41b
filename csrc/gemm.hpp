// The product: C = first + A·W or C += A·W, in register tiles of MR rows by NV registers, over weights packed into panels.
//
// A and C are given as one pointer a row, so that gathered, strided and ragged rows need no copy. A panel holds NV registers' worth of
// columns for every k: [k][NV][LANES]; the last panel is narrower. Every element is one chain of fused multiply-adds with k ascending,
// whatever the tile, the k-block, the row count or the thread: equal inputs give equal bits. What is multiplied are the numbers themselves
// or their roundings to bfloat16, two to an element, or to bytes, four to an element (Exact, Halves, Bytes; chosen by Products). Knows no
// time, cell or thread.
#pragma once

#include "vec.hpp"

namespace {

constexpr int MAX_NV = 4;  // registers' worth of columns in a panel

// Rows of a tile: accumulators, the smaller operand held and one of the other must fit the register file.
constexpr int tile_rows(int nv) {
  if (REGISTERS == 32) return nv == 4 ? 6 : nv == 3 ? 9 : 8;
  return nv == 4 ? 3 : nv == 3 ? 4 : nv == 2 ? 6 : 8;
}
constexpr int MAX_ROWS = REGISTERS == 32 ? 9 : 8;
constexpr int PACKED_ROWS = 6;  // rows of A packed side by side by pack_columns: one tile or two
static_assert(PACKED_ROWS % tile_rows(MAX_NV) == 0);

constexpr int64_t FETCH_DISTANCE = 8192;  // bytes, of what a tile over few rows fetches of its own panel
// One row goes over so many panels at a time: as many sums as hide a multiply-add's latency, and as many streams for the prefetchers.
constexpr int ROW_PANELS = REGISTERS == 16 && REGISTER_BYTES > 0 ? 2 : 1;
// Narrow tiles use a panel up so fast that the next, from beyond the second-level cache, would keep them waiting, and read a column of A
// from a line of its own for every k. For wider registers fetching has not been measured.
constexpr bool FETCHES_AHEAD = REGISTERS == 16, PACKS_COLUMNS = REGISTERS == 16;

RNNFAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RNNFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RNNFAST_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// What the elements of A and W are, and how numbers become elements: DEPTH neighbouring k share one, and HEADER elements come before them.
// The numbers themselves:
template <class T>
struct Exact {
  typedef T type;
  typedef Reg<T> Sum;
  static constexpr int DEPTH = 1, HEADER = 0;
  static RNNFAST_INLINE Reg<T> broadcast(const T* a) { return all(*a); }
  static RNNFAST_INLINE Reg<T> add_product(Reg<T> a, Reg<T> b, Reg<T> sum) { return fma<T>(a, b, sum); }
  // A register of elements from DEPTH·LANES neighbouring numbers, of which n are there; from n columns of DEPTH rows (null: zeros).
  static RNNFAST_INLINE Reg<T> along(const T* from, int64_t n) { return load(from, static_cast<int>(n)); }
  static RNNFAST_INLINE Reg<T> across(const T* row, const T*, int n) { return load(row, n); }
};

// Two bfloat16, the even k in the lower half; their products are exact in float32 and added to a float32 sum.
struct Halves {
  typedef float type;
  typedef Reg<float> Sum;
  static constexpr int DEPTH = 2, HEADER = 0;
  static RNNFAST_INLINE Reg<float> broadcast(const float* a) { return broadcast_bits(a); }
  static RNNFAST_INLINE Reg<float> add_product(Reg<float> a, Reg<float> b, Reg<float> sum) { return add_pair_products(a, b, sum); }
  static RNNFAST_INLINE Reg<float> along(const float* from, int64_t n) {
    constexpr int L = LANES<float>;
    return pair_neighbours(load(from, static_cast<int>(n < L ? n : L)), n > L ? load(from + L, static_cast<int>(n - L)) : all(0.0f));
  }
  static RNNFAST_INLINE Reg<float> across(const float* row, const float* next, int n) {
    return pair_lanes(load(row, n), next ? load(next, n) : all(0.0f));
  }
};

// Four whole numbers q = round(x / scale), with a scale for each row of A and each column of W, that makes the largest of them 127:
// Σ x w ≈ scale_x scale_w Σ q_x q_w, summed exactly. A's bytes are q + BYTE_OFFSET, and BYTE_OFFSET Σ q_w is taken off at the end. The
// header of A is its scale and nothing, that of W its scales and the Σ q_w. Only A's rows and W's gates have this form.
struct Bytes {
  typedef float type;
  typedef Words Sum;
  static constexpr int DEPTH = 4, HEADER = 2;
  static RNNFAST_INLINE Reg<float> broadcast(const float* a) { return broadcast_bits(a); }
  static RNNFAST_INLINE Words add_product(Reg<float> a, Reg<float> b, Words sum) { return add_byte_products(bits_of(a), bits_of(b), sum); }
  static RNNFAST_INLINE Reg<float> value(Words sum, const float* a, Reg<float> scale, Reg<float> column_sum) {
    return to_float(sum - bits_of(column_sum) * BYTE_OFFSET) * (all(*a) * scale);
  }
  // The scale of n numbers, NaN where one of them is not finite.
  static float scale(const float* from, int64_t n) {
    constexpr int L = LANES<float>;
    Reg<float> largest = all(0.0f), not_finite = all(0.0f);
    for (int64_t i = 0; i < n; i += L) {
      const Reg<float> x = load(from + i, static_cast<int>(n - i < L ? n - i : L)), size = x < all(0.0f) ? -x : x;
      largest = size > largest ? size : largest;
      not_finite = not_finite + x * all(0.0f);
    }
    float lane[L], extra[L], result = 0, bad = 0;
    store(lane, largest);
    store(extra, not_finite);
    for (int i = 0; i < L; ++i) result = lane[i] > result ? lane[i] : result, bad += extra[i];
    return result / 127 + bad;
  }
  static RNNFAST_INLINE Reg<float> along(const float* from, int64_t n, Reg<float> inverse, float offset) {
    constexpr int L = LANES<float>;
    Words part[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t left = n - i * L;
      part[i] = to_bytes((left > 0 ? load(from + i * L, static_cast<int>(left < L ? left : L)) : all(0.0f)) * inverse, offset);
    }
    return from_bits(join_neighbours(join_neighbours(part[0], part[1], 8), join_neighbours(part[2], part[3], 8), 16));
  }
  static float inverse(float scale) { return scale > 0x1p-120f ? 1 / scale : 0; }  // all else counts as 0, or becomes NaN by its scale
};

// What else a tile does. Nothing; fetch memory into the second-level cache on its way, so many bytes for each k; or go over several whole
// panels at a time, so far apart, as do their columns.
struct Alone {
  static constexpr int PANELS = 1;
  static constexpr int64_t w_pitch = 0, c_pitch = 0;
  RNNFAST_INLINE void next() {}
};
struct Fetch {
  static constexpr int PANELS = 1;
  static constexpr int64_t w_pitch = 0, c_pitch = 0;
  const char* at;
  int64_t step;
  RNNFAST_INLINE void next() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + step / 2, 0, 2);
    at += step;
  }
};
template <int N>
struct Abreast {
  static constexpr int PANELS = N;
  int64_t w_pitch, c_pitch;
  RNNFAST_INLINE void next() {}
};

// One tile, of one element k at least. a[r][k·step] is A; `first` (NV·LANES) starts every row, or C itself where it is null; the last
// register stores `tail` lanes.
template <class E, class T, int MR, int WIDTH, class Also>
void tile(const T* const* a, int64_t step, int64_t K, const T* w, const T* first, T* const* c, int64_t c_at, int tail, Also also) {
  constexpr int L = LANES<T>, NV = WIDTH * Also::PANELS;
  const T* row[MR];
  typename E::Sum acc[MR][NV];
  const auto w_of = [&](auto v) RNNFAST_LAMBDA { return v / WIDTH * also.w_pitch + v % WIDTH * L; };
  const auto c_of = [&](auto v) RNNFAST_LAMBDA { return v / WIDTH * also.c_pitch + v % WIDTH * L; };
  const auto start = [&](auto r, auto v) RNNFAST_LAMBDA {
    if (first) return load(first + c_of(v));
    return v == NV - 1 ? load(c[r] + c_at + c_of(v), tail) : load(c[r] + c_at + c_of(v));
  };
  const T* const header = w;
  w += E::HEADER * WIDTH * L;
  each<MR>([&](auto r) RNNFAST_LAMBDA {
    row[r] = a[r];
    each<NV>([&](auto v) RNNFAST_LAMBDA {
      if constexpr (E::HEADER > 0)
        acc[r][v] = typename E::Sum{};
      else
        acc[r][v] = start(r, v);
    });
  });
  int64_t k = E::HEADER, at = k * step;
  do {
    if constexpr (MR < NV) {
      Reg<T> held[MR];
      each<MR>([&](auto r) RNNFAST_LAMBDA { held[r] = E::broadcast(row[r] + at); });
      each<NV>([&](auto v) RNNFAST_LAMBDA {
        const Reg<T> b = MR > 1 ? once<T>(load(w + w_of(v))) : load(w + w_of(v));
        each<MR>([&](auto r) RNNFAST_LAMBDA { acc[r][v] = E::add_product(held[r], b, acc[r][v]); });
      });
    } else {
      Reg<T> held[NV];
      each<NV>([&](auto v) RNNFAST_LAMBDA { held[v] = once<T>(load(w + w_of(v))); });
      each<MR>([&](auto r) RNNFAST_LAMBDA {
        const Reg<T> b = E::broadcast(row[r] + at);
        each<NV>([&](auto v) RNNFAST_LAMBDA { acc[r][v] = E::add_product(b, held[v], acc[r][v]); });
      });
    }
    also.next();
    at += step, w += WIDTH * L;
  } while (++k < K);
  each<MR>([&](auto r) RNNFAST_LAMBDA {
    T* const to = c[r] + c_at;
    each<NV>([&](auto v) RNNFAST_LAMBDA {
      Reg<T> sum;
      if constexpr (E::HEADER > 0)
        sum = start(r, v) + E::value(acc[r][v], row[r], load(header + w_of(v)), load(header + w_of(v) + WIDTH * L));
      else
        sum = acc[r][v];
      if (v == NV - 1)
        store(to + c_of(v), sum, tail);
      else
        store(to + c_of(v), sum);
    });
  });
}

// A tile's inner loop with its operands in registers, `rounds` times; returns the number of multiplications and additions. One operand
// changes its sign every time, so that nothing is left out.
template <class E>
__attribute__((noinline)) double multiply_in_registers(int64_t rounds) {
  typedef typename E::type T;
  constexpr int CHAINS = 10;
  T operand[LANES<T>];
  for (int i = 0; i < LANES<T>; ++i) operand[i] = T(1) / T(i + 2);
  Reg<T> a = load(operand), start[CHAINS];
  typename E::Sum sum[CHAINS];
  for (int i = 0; i < CHAINS; ++i) start[i] = all(T(i));  // else equal chains become one
  memcpy(sum, start, sizeof sum);
  const Reg<T> b = a;
  for (int64_t k = 0; k < rounds; ++k, a = -a)
#pragma GCC unroll 10
    for (int i = 0; i < CHAINS; ++i) sum[i] = E::add_product(a, b, sum[i]);
#pragma GCC unroll 10
  for (int i = 1; i < CHAINS; ++i) sum[0] = sum[0] + sum[i];
  memcpy(operand, &sum[0], sizeof sum[0]);
  __asm__ volatile("" : : "r"(operand) : "memory");
  return 2.0 * E::DEPTH * LANES<T> * CHAINS * static_cast<double>(rounds);
}

template <class T, class Also>
using TileFunction = void (*)(const T* const*, int64_t, int64_t, const T*, const T*, T* const*, int64_t, int, Also);

template <class E, class T, int NV, class Also, int... MR>
constexpr TileFunction<T, Also> TILES_OF[] = {nullptr,
                                              (MR <= tile_rows(NV) ? tile<E, T, (MR <= tile_rows(NV) ? MR : 1), NV, Also> : nullptr)...};
template <class E, int NV>
struct Tiles {  // by their rows
  using T = typename E::type;
  static constexpr const TileFunction<T, Alone>* of = TILES_OF<E, T, NV, Alone, 1, 2, 3, 4, 5, 6, 7, 8, 9>;
  static constexpr const TileFunction<T, Fetch>* fetching = TILES_OF<E, T, NV, Fetch, 1, 2, 3, 4, 5, 6, 7, 8, 9>;
  static constexpr TileFunction<T, Abreast<ROW_PANELS>> abreast = tile<E, T, 1, NV, Abreast<ROW_PANELS>>;  // of one
};

// f(Tiles<E, nv>{}).
template <class E, class F>
RNNFAST_INLINE auto visit_tiles(int nv, F f) {
  switch (nv) {
    case 1:
      return f(Tiles<E, 1>{});
    case 2:
      return f(Tiles<E, 2>{});
    case 3:
      return f(Tiles<E, 3>{});
    default:
      return f(Tiles<E, 4>{});
  }
}

// A panel's k-block that stays in the second-level cache while the row tiles pass over it. Smaller blocks, for the first level, lose: a
// tile streams 256 bytes a k at 24 multiply-adds, which the prefetcher keeps up with, and each block more costs a load and a store of the
// accumulators.
constexpr int64_t PANEL_BYTES = 128 * 1024;

// One panel: c[r][c_at ..] = first + a[r]·w, or += where first is null, for `rows` rows and K elements, a's from `a_at` on. Rows split
// evenly (8 = 4 + 4, not 6 + 2). `next`, where given: the panel whose turn is next, to be fetched meanwhile.
template <class E, class T, class... Next>
__attribute__((noinline)) void product(int nv, int tail, int64_t rows, int64_t K, const T* const* a, int64_t a_at, int64_t step, const T* w,
                                       const T* first, T* const* c, int64_t c_at, Next... next) {
  if (K <= E::HEADER) {  // nothing to add
    for (int64_t r = 0; first && r < rows; ++r)
      for (int v = 0; v < nv; ++v) store(c[r] + c_at + v * LANES<T>, load(first + v * LANES<T>), v == nv - 1 ? tail : LANES<T>);
    return;
  }
  const int64_t full = tile_rows(nv);
  const int64_t width = nv * LANES<T>;
  const int64_t K_block = rows <= full || E::HEADER ? most(K, 1) : most(1, PANEL_BYTES / (width * static_cast<int64_t>(sizeof(T))));
  int64_t k = 0;
  do {
    const int64_t k_count = least(K_block, K - k);
    [[maybe_unused]] Fetch fetch{};
    [[maybe_unused]] const bool many = rows >= 2 * full;
    if constexpr (sizeof...(Next) > 0) {  // each of many tiles its part of what comes next; the first of few what it will read itself
      const int64_t line = width * static_cast<int64_t>(sizeof(T));
      if (many)
        fetch = {reinterpret_cast<const char*>(k + k_count < K ? w + (k + k_count) * width : (next, ...)), ceil_div(line, rows / full)};
      else
        fetch = {reinterpret_cast<const char*>(w + k * width) + FETCH_DISTANCE, line};
    }
    for (int64_t r = 0; r < rows;) {
      const int64_t left = rows - r;
      const int64_t count = left >= 2 * full || left == full ? full : left > full ? ceil_div(left, 2) : left;
      const T* at[MAX_ROWS];
      for (int64_t i = 0; i < count; ++i) at[i] = a[r + i] + (a_at + k) * step;
      const T *const block = w + k * width, *const start = k == 0 ? first : nullptr;
      r += count;
      if constexpr (sizeof...(Next) > 0)
        if (many ? count == full : r == count) {
          visit_tiles<E>(nv, [=](auto tiles) { return tiles.fetching[count]; })(at, step, k_count, block, start, c + r - count, c_at, tail,
                                                                                fetch);
          fetch.at += k_count * fetch.step;
          continue;
        }
      visit_tiles<E>(nv, [=](auto tiles) { return tiles.of[count]; })(at, step, k_count, block, start, c + r - count, c_at, tail, Alone{});
    }
    k += k_count;
  } while (k < K);
}

// How N columns (or blocks of `slots` registers each) lie in panels of K elements a column.
//
// A block is LANES neighbouring units; with `slots` > 1 each unit has several columns (its gates), kept together.
template <class T>
struct Panels {
  int64_t blocks, slots, K, last;  // last: units in the last block
  int64_t per_panel;               // blocks in a panel: as many as MAX_NV registers hold
  Panels(int64_t units, int64_t slots_, int64_t K_)
      : blocks(ceil_div(units, LANES<T>)), slots(slots_), K(K_), last(units - (blocks - 1) * LANES<T>), per_panel(MAX_NV / slots_) {}
  int64_t count() const { return ceil_div(blocks, per_panel); }
  int64_t size() const { return blocks * slots * LANES<T> * K; }
  int64_t at(int64_t panel) const { return panel * per_panel * slots * LANES<T> * K; }
  int nv(int64_t panel) const { return static_cast<int>(least(per_panel, blocks - panel * per_panel) * slots); }
  // Are the i-th panel and those that follow it, going `down` or up, ROW_PANELS of whole registers?
  bool whole_abreast(int64_t i, bool down) const {
    const int64_t whole = blocks / per_panel - (slots == 1 && blocks % per_panel == 0 && last < LANES<T>);  // the first so many are
    return down ? i >= count() - whole && i + ROW_PANELS <= count() : i + ROW_PANELS <= whole;
  }
  // Should a product of so many rows fetch what comes next? Few tiles are done so soon that it only pays for what comes from memory.
  bool fetch_ahead(int64_t rows) const {
    if (!FETCHES_AHEAD || rows < 2) return false;
    return size() * static_cast<int64_t>(sizeof(T)) > (rows < 3 * tile_rows(MAX_NV) ? int64_t{6} << 20 : int64_t{1} << 18);
  }
  // That panel, going `down` or up; null after the last.
  const T* next(const T* packed, int64_t panel, bool down) const {
    return down ? panel > 0 ? packed + at(panel - 1) : nullptr : panel + 1 < count() ? packed + at(panel + 1) : nullptr;
  }
  // Lanes to store of the panel's last register where the destination has no padding (slots == 1).
  int tail(int64_t panel) const { return static_cast<int>(panel == count() - 1 ? last : LANES<T>); }
};

// How many numbers p is off the next place from which registers do not cross cache lines: NumPy aligns to 16 bytes.
template <class T>
RNNFAST_INLINE int64_t to_alignment(const T* p) {
  constexpr int L = LANES<T>;
  return (L - static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % L)) % L;
}
// Likewise for squares of rows `pitch` apart, 0 where it does not count: rows a page apart share their place in the first-level cache, and
// a line that two squares cross would be gone before the second.
template <class T>
RNNFAST_INLINE int64_t to_alignment(const T* p, int64_t pitch) {
  return pitch * static_cast<int64_t>(sizeof(T)) >= 4096 ? to_alignment(p) : 0;
}

// Elements [k_begin, k_end) of panel `panel` of Wᵀ, for W's rows grouped by gate: column (block, slot, lane) is row gate[slot] +
// unit·pitch, over k; p's first unit is `first_unit` of `units`, and units past the end are 0. A row has `pitch` numbers.
template <class E, class T>
__attribute__((noinline)) void pack_gates(const Panels<T>& p, int64_t panel, int64_t k_begin, int64_t k_end, int64_t first_unit,
                                          int64_t units, const T* const* gate, int64_t pitch, T* to) {
  constexpr int L = LANES<T>, D = E::DEPTH;
  const int nv = p.nv(panel);
  for (int v = 0; v < nv; ++v) {
    const int64_t unit = first_unit + (panel * p.per_panel + v / p.slots) * L;
    const T* from = gate[v % p.slots] + unit * pitch;
    const int64_t valid = least(L, units - unit);
    int64_t ahead = D == 1 ? to_alignment(from + k_begin, pitch) : 0;
    for (int64_t k0 = k_begin, count; k0 < k_end; k0 += count, ahead = 0) {
      count = least(ahead > 0 ? ahead : L, k_end - k0);
      Reg<T> square[L];
      for (int lane = 0; lane < L; ++lane)
        square[lane] = lane < valid ? E::along(from + lane * pitch + k0 * D, least(ahead > 0 ? ahead : L * D, pitch - k0 * D)) : all(T(0));
      transpose<T>(square);
      for (int i = 0; i < count; ++i) store(to + ((k0 - k_begin + i) * nv + v) * L, square[i]);
    }
  }
}

// Panel `panel` of the matrix of K rows whose row k is row[k] (columns in place): the weights as they stand, for products with Wᵀ, and rows
// of x or h for gradients.
template <class E, class T>
__attribute__((noinline)) void pack_rows(const Panels<T>& p, int64_t panel, int64_t K, const T* const* row, T* to) {
  constexpr int L = LANES<T>, D = E::DEPTH;
  const int nv = p.nv(panel), tail = p.tail(panel);
  const int64_t column = panel * p.per_panel * L;
  for (int64_t k = 0; k < K; k += D, to += nv * L) {
    const T* from = row[k] + column;
    const T* next = k + D <= K ? row[k + D - 1] + column : nullptr;
    for (int v = 0; v < nv; ++v) store(to + v * L, E::across(from + v * L, next ? next + v * L : nullptr, v == nv - 1 ? tail : L));
  }
}

// pack_gates of bytes, all of them, since a column's scale is known from all.
__attribute__((noinline)) inline void pack_gate_bytes(const Panels<float>& p, int64_t panel, int64_t first_unit, int64_t units,
                                                      const float* const* gate, int64_t pitch, float* to) {
  constexpr int L = LANES<float>, D = Bytes::DEPTH;
  const int nv = p.nv(panel);
  for (int v = 0; v < nv; ++v) {
    const int64_t unit = first_unit + (panel * p.per_panel + v / p.slots) * L;
    const float* from = gate[v % p.slots] + unit * pitch;
    const int64_t valid = least(L, units - unit);
    float scale[L] = {}, inverse[L] = {};
    for (int lane = 0; lane < valid; ++lane)
      scale[lane] = Bytes::scale(from + lane * pitch, pitch), inverse[lane] = Bytes::inverse(scale[lane]);
    Words sums = {};
    for (int64_t k = Bytes::HEADER; k < p.K; k += L) {
      const int64_t k0 = (k - Bytes::HEADER) * D;
      Reg<float> square[L];
      for (int lane = 0; lane < L; ++lane)
        square[lane] = lane < valid ? Bytes::along(from + lane * pitch + k0, least(L * D, pitch - k0), all(inverse[lane]), 0) : all(0.0f);
      transpose<float>(square);
      for (int64_t i = 0; i < least(L, p.K - k); ++i) {
        store(to + ((k + i) * nv + v) * L, square[i]);
        sums = add_byte_products(Words{} + 0x01010101u, bits_of(square[i]), sums);
      }
    }
    store(to + v * L, load(scale));
    store(to + (nv + v) * L, from_bits(sums));
  }
}

// Products over weights as they stand, where these are used once for few rows of A: packs would be written and read for nothing.
constexpr int GATE_ROWS = 8, COMBINED_ROWS = 64;  // so many rows of A by few_gates, and by combine_rows

// One register of columns: c[r][c_at ..] = first + a[r]·w, or += where first is null. Column l is the row of K numbers at w + l·K, 0 from
// `valid` on; squares of them are transposed in registers.
template <class T, int MR>
void few_gates(const T* const* a, int64_t K, const T* w, int valid, const T* first, T* const* c, int64_t c_at) {
  constexpr int L = LANES<T>, RUN = TRANSPOSED<T>;
  Reg<T> acc[MR];
  const auto add = [&](int64_t k, Reg<T> column)
                       RNNFAST_LAMBDA { each<MR>([&](auto r) RNNFAST_LAMBDA { acc[r] = fma<T>(all(a[r][k]), column, acc[r]); }); };
  const auto edge = [&](int64_t k, int64_t count) {
    Reg<T> square[L];
    for (int lane = 0; lane < L; ++lane) square[lane] = lane < valid ? load(w + lane * K + k, static_cast<int>(count)) : all(T(0));
    transpose<T>(square);
    for (int i = 0; i < count; ++i) add(k + i, square[i]);
  };
  each<MR>([&](auto r) RNNFAST_LAMBDA { acc[r] = load(first ? first : c[r] + c_at); });
  int64_t k = valid == L ? to_alignment(w, K) : 0;
  if (k > 0) edge(0, k);
  for (; valid == L && k + RUN <= K; k += RUN) {
    Reg<T> columns[RUN];
    load_transposed(w + k, K, columns);
    each<RUN>([&](auto i) RNNFAST_LAMBDA { add(k + i, columns[i]); });
  }
  for (; k < K; k += L) edge(k, least(L, K - k));
  each<MR>([&](auto r) RNNFAST_LAMBDA { store(c[r] + c_at, acc[r]); });
}

// N registers of combine_rows' columns from j on, the last of them with `count` lanes, over one row at least.
template <class T, int MR, int N>
RNNFAST_INLINE void combine_columns(const T* const* a, int64_t step, int64_t K, const T* const* row, int64_t j, int count, bool fresh,
                                    bool around, T* const* c) {
  constexpr int L = LANES<T>;
  Reg<T> acc[MR][N];
  each<MR>([&](auto r) RNNFAST_LAMBDA {
    each<N>([&](auto v) RNNFAST_LAMBDA { acc[r][v] = fresh ? all(T(0)) : load(c[r] + j + v * L, v == N - 1 ? count : L); });
  });
  int64_t k = 0;
  do {
    const T* const from = row[k] + j;
    Reg<T> held[N];
    each<N>([&](auto v) RNNFAST_LAMBDA { held[v] = once<T>(load(from + v * L, v == N - 1 ? count : L)); });
    each<MR>([&](auto r) RNNFAST_LAMBDA {
      const Reg<T> b = all(a[r][k * step]);
      each<N>([&](auto v) RNNFAST_LAMBDA { acc[r][v] = fma<T>(b, held[v], acc[r][v]); });
    });
  } while (++k < K);
  each<MR>([&](auto r) RNNFAST_LAMBDA {
    each<N>([&](auto v) RNNFAST_LAMBDA {
      around ? store_around(c[r] + j + v * L, acc[r][v]) : store(c[r] + j + v * L, acc[r][v], v == N - 1 ? count : L);
    });
  });
}

// c[r][0 .. width) += Σ_k a[r][k·step]·row[k][0 .. width) over K rows, or = where `fresh`. Stores begin where they are aligned, since
// weights' gradients are hardly anything else; where `around`, and every row is aligned alike, they go around the caches.
template <class T, int MR>
void combine_rows(const T* const* a, int64_t step, int64_t K, const T* const* row, int64_t width, bool fresh, bool around, T* const* c) {
  constexpr int L = LANES<T>, N = MR * MAX_NV <= REGISTERS / 2 ? MAX_NV : 2;
  const T* from[MR];
  T* to[MR];
  for (int r = 0; r < MR; ++r) from[r] = a[r], to[r] = c[r];
  const bool aligned = around && width % L == 0 && reinterpret_cast<uintptr_t>(c[0]) % sizeof(T) == 0;  // NumPy's need not be
  int64_t j = least(to_alignment(c[0]), width);
  if (j > 0) combine_columns<T, MR, 1>(from, step, K, row, 0, static_cast<int>(j), fresh, false, to);
  for (; j + N * L <= width; j += N * L) combine_columns<T, MR, N>(from, step, K, row, j, L, fresh, aligned, to);
  for (; j < width; j += L) combine_columns<T, MR, 1>(from, step, K, row, j, static_cast<int>(least(L, width - j)), fresh, false, to);
}

template <class T, int... MR>
struct FewGates {
  static_assert(sizeof...(MR) == GATE_ROWS);
  static constexpr void (*of[])(const T* const*, int64_t, const T*, int, const T*, T* const*, int64_t) = {few_gates<T, MR>...};
};
template <class T, int... MR>
struct CombineRows {
  static constexpr int MOST = sizeof...(MR);
  static constexpr void (*of[])(const T* const*, int64_t, int64_t, const T* const*, int64_t, bool, bool,
                                T* const*) = {combine_rows<T, MR>...};
};

// These two for `rows` rows of C.
template <class T>
void few_gates(int64_t rows, const T* const* a, int64_t K, const T* w, int valid, const T* first, T* const* c, int64_t c_at) {
  FewGates<T, 1, 2, 3, 4, 5, 6, 7, 8>::of[rows - 1](a, K, w, valid, first, c, c_at);
}
template <class T>
void combine_rows(int64_t rows, const T* const* a, int64_t step, int64_t K, const T* const* row, int64_t width, bool fresh, bool around,
                  T* const* c) {
  using Tiles = CombineRows<T, 1, 2, 3, 4>;
  for (int64_t r = 0, n; r < rows; r += n) {
    n = least(Tiles::MOST, rows - r);
    Tiles::of[n - 1](a + r, step, K, row, width, fresh, around, c + r);
  }
  if (around) fence();
}

// Columns [m0, m1) of the matrix of K rows whose row k is from + k·pitch, as [m / PACKED_ROWS][element][m % PACKED_ROWS]: A of a product
// over k with step PACKED_ROWS. m0 is a multiple of PACKED_ROWS; `columns` bounds what is packed, and up to 8 numbers more may be read.
template <class E, class T>
__attribute__((noinline)) void pack_columns(int64_t m0, int64_t m1, int64_t columns, int64_t K, const T* from, int64_t pitch, T* to) {
  constexpr int P = PACKED_ROWS, L = LANES<T>, D = E::DEPTH;
  // A block of lines stays in the first-level cache while its columns are taken in turn.
  constexpr int64_t K_block = REGISTERS == 32 ? 32 : 16;
  const int64_t elements = ceil_div(K, D);
  for (int64_t k0 = 0; k0 < K; k0 += K_block) {
    const int64_t k1 = least(K, k0 + K_block);
    for (int64_t m = m0; m < m1; m += P) {
      T* out = to + m * elements + k0 / D * P;
      const T* in = from + k0 * pitch + m;
      const int64_t valid = least(P, columns - m);
      for (int64_t k = k0; k < k1; k += D, out += P, in += D * pitch)
        for (int64_t i = 0; i < P; i += L) {
          const T* const second = k + D <= K ? in + (D - 1) * pitch + i : nullptr;
          const int room = static_cast<int>(least(L, P - i));
          if (REGISTER_BYTES < 64 && k + D < K) {  // without masks, whole registers: the next k's come over what is too much
            store(out + i, E::across(in + i, second, L));
          } else {
            const int n = static_cast<int>(least(L, valid - i));
            store(out + i, n > 0 ? E::across(in + i, second, n) : all(T(0)), room);
          }
        }
    }
  }
}

// What a job's products multiply: numbers of its own dtype; or in float32 also Halves; or, forward only, Bytes.
enum class Factors { EXACT, HALVES, BYTES };

template <class T>
class Products {
 public:
  explicit Products(Factors factors_) : factors(sizeof(T) == sizeof(float) ? factors_ : Factors::EXACT) {}

  int64_t elements(int64_t K) const {  // as which K numbers are multiplied
    return factors == Factors::EXACT ? K : factors == Factors::HALVES ? ceil_div(K, 2) : Bytes::HEADER + ceil_div(K, 4);
  }
  bool exact() const { return factors == Factors::EXACT; }
  bool packs_columns() const { return !exact() || PACKS_COLUMNS; }  // of A in products over tokens
  bool abreast(int64_t rows, int64_t elements) const {
    return ROW_PANELS > 1 && rows == 1 && elements > (factors == Factors::BYTES ? Bytes::HEADER : 0);
  }
  bool few(int64_t rows, int64_t most_rows) const { return exact() && 0 < rows && rows <= most_rows; }
  // Likewise for combine_rows, over rows `pitch` apart: whole pages apart they share their place in the first-level cache, which many
  // narrow tiles would read again and again.
  bool few_combined(int64_t rows, int64_t pitch) const {
    const bool crowded = REGISTERS == 16 && pitch > 0 && pitch * static_cast<int64_t>(sizeof(T)) % 4096 == 0;
    return few(rows, crowded ? COMBINED_ROWS / 4 - 1 : COMBINED_ROWS);
  }

  // Elements of `rows` rows of K numbers each, as pointers a row: the rows themselves, or `at` after `to` is filled.
  __attribute__((noinline)) const T* const* encode(int64_t K, int64_t rows, const T* const* from, T* to, const T** at) const {
    if (exact()) return from;
    if constexpr (sizeof(T) == sizeof(float)) {
      constexpr int L = LANES<T>;
      const bool bytes = factors == Factors::BYTES;
      const int64_t depth = bytes ? Bytes::DEPTH : Halves::DEPTH, count = elements(K), header = bytes ? Bytes::HEADER : Halves::HEADER;
      for (int64_t r = 0; r < rows; ++r, to += count) {
        at[r] = to;
        if (bytes) to[0] = Bytes::scale(from[r], K);
        const Reg<T> inverse = all(bytes ? Bytes::inverse(to[0]) : T(0));
        for (int64_t e = header, k = 0; e < count; e += L, k += depth * L) {
          const int64_t n = least(depth * L, K - k);
          store(to + e, bytes ? Bytes::along(from[r] + k, n, inverse, BYTE_OFFSET) : Halves::along(from[r] + k, n),
                static_cast<int>(least(L, count - e)));
        }
      }
    }
    return at;
  }
  // How many of `elements` to pack and multiply at a time where a panel is used once: all where they share a scale.
  int64_t block(int64_t elements, int64_t wanted) const { return factors == Factors::BYTES ? elements : least(elements, wanted); }

  // As the functions of these names.
  void multiply(int nv, int tail, int64_t rows, int64_t elements, const T* const* a, int64_t a_at, int64_t step, const T* w, const T* first,
                T* const* c, int64_t c_at, const T* next = nullptr) const {
    const auto run = [&](auto e) {
      using E = decltype(e);
      if constexpr (FETCHES_AHEAD)
        if (next) return product<E>(nv, tail, rows, elements, a, a_at, step, w, first, c, c_at, next);
      product<E>(nv, tail, rows, elements, a, a_at, step, w, first, c, c_at);
    };
    if constexpr (sizeof(T) == sizeof(float))
      if (factors == Factors::BYTES) return run(Bytes{});
    visit(run);
  }
  // One row over ROW_PANELS whole panels.
  void multiply_abreast(int nv, int64_t elements, const T* const* a, const T* w, int64_t w_pitch, const T* first, T* const* c, int64_t c_at,
                        int64_t c_pitch) const {
    if constexpr (ROW_PANELS > 1) {
      const auto run = [&](auto e) {
        visit_tiles<decltype(e)>(nv, [](auto tiles) { return tiles.abreast; })(a, 1, elements, w, first, c, c_at, LANES<T>,
                                                                               Abreast<ROW_PANELS>{w_pitch, c_pitch});
      };
      if constexpr (sizeof(T) == sizeof(float))
        if (factors == Factors::BYTES) return run(Bytes{});
      visit(run);
    }
  }
  void gates(const Panels<T>& p, int64_t panel, int64_t k_begin, int64_t k_end, int64_t first_unit, int64_t units, const T* const* gate,
             int64_t pitch, T* to) const {
    if constexpr (sizeof(T) == sizeof(float))
      if (factors == Factors::BYTES) return pack_gate_bytes(p, panel, first_unit, units, gate, pitch, to);
    visit([&](auto e) { pack_gates<decltype(e)>(p, panel, k_begin, k_end, first_unit, units, gate, pitch, to); });
  }
  void rows(const Panels<T>& p, int64_t panel, int64_t K, const T* const* row, T* to) const {
    visit([&](auto e) { pack_rows<decltype(e)>(p, panel, K, row, to); });
  }
  void columns(int64_t m0, int64_t m1, int64_t columns, int64_t K, const T* from, int64_t pitch, T* to) const {
    visit([&](auto e) {
      if constexpr (decltype(e)::DEPTH > 1 || PACKS_COLUMNS) pack_columns<decltype(e)>(m0, m1, columns, K, from, pitch, to);
    });
  }

 private:
  template <class F>
  void visit(F f) const {
    if constexpr (sizeof(T) == sizeof(float))
      if (factors == Factors::HALVES) return f(Halves{});
    f(Exact<T>{});
  }
  const Factors factors;
};

}  // namespace

// Time: the products and their endings in order, forward and backward (backpropagation through time).
//
//   forward    1  a   = bias + x W_ihᵀ                    before the loop over time, in chunks of time that stay in cache
//              2  a  += h_{t-1} W_hhᵀ ; Cell::forward     every step
//   backward   3  dh  = da_{t+1} W_hh ; Cell::backward    every step, backward in time
//              4  dx  = da W_ih                           after a chunk of time
//           5, 6  dW += daᵀ [x, h_{t-1}] ; db += Σ da     after a chunk of time
//
// The workers share a job in two ways: by rows of the batch (row groups, which never wait for each other within a chunk) and by units
// (which meet after every phase, `sync`). h_{t-1} is one pointer a row: to the caller's h_0, to y of the step before, to a fresh state
// after a reset, or, with output taps, into a history that is written downwards so that [y_{t-1}, y_{t-2}, …] lies in order. Knows nothing
// of Python.
#pragma once

#include "cells.hpp"
#include "gemm.hpp"
#include "kernels.hpp"

namespace {

using rnnfast::Job;
using rnnfast::Tokens;
using rnnfast::Worker;

// Hands out pieces of scratch; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base_) : base(static_cast<char*>(base_)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base + used;
    used += (static_cast<size_t>(most(count, 0)) * sizeof(T) + 127) & ~size_t{63};
    return reinterpret_cast<T*>(at);
  }
  size_t used = 0;

 private:
  char* base;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
template <class P>
RNNFAST_INLINE void swap(P& a, P& b) {
  const P c = a;
  a = b, b = c;
}
RNNFAST_INLINE Range share(int64_t n, int64_t i, int64_t parts) { return {n * i / parts, n * (i + 1) / parts}; }

template <class Cell, class T>
struct Sequence {
  static constexpr int L = LANES<T>;
  static constexpr int PRE = Cell::PRE, X = Cell::X_SLOTS, EARLY = Cell::H_FIRST, LATE = Cell::LATE;
  static constexpr bool RESETS_FIRST = LATE < PRE;  // n waits for r: a second phase
  static constexpr int64_t TAPE_BLOCK = 16;         // for every target and dtype, so that each reads what another wrote
  static_assert(TAPE_BLOCK % L == 0);
  using V = Reg<T>;
  using M = Maths<T>;

  const Job& j;
  const Worker& w;
  const Products<T> multiply;
  const int64_t H, S, Hp;            // Hp: H padded to whole blocks of the tape
  const int64_t units, group, crew;  // workers over units; this one's place among them; this one's row group
  Range blocks;                      // this worker's blocks of H
  Range rows;                        // this worker's rows of the batch, forward

  Sequence(const Job& job, const Worker& worker)
      : j(job),
        w(worker),
        multiply(job.compute == rnnfast::BFLOAT16 ? Factors::HALVES
                 : job.compute == rnnfast::INT8   ? Factors::BYTES
                                                  : Factors::EXACT),
        H(job.H),
        S(job.R * job.taps),
        Hp(ceil_div(job.H, TAPE_BLOCK) * TAPE_BLOCK),
        units(worker.count / worker.row_groups),
        group(worker.id % units),
        crew(worker.id / units),
        blocks(share(ceil_div(H, L), group, units)),
        rows(share_rows(0, job.T)) {}

  // Elements of a panel that is used once which are packed and multiplied at a time. Short blocks stay in cache; gates' rows are read along
  // k, where a long run is what prefetchers follow, and the others' across k, where so many rows are as many streams.
  static constexpr int64_t GATE_BLOCK = 512, ROW_BLOCK = 16;

  // ---- who does what -------------------------------------------------------------------------------------------------------------------

  // Row groups take neighbouring rows with about equally many tokens in the times [t0, t1).
  Range share_rows(int64_t t0, int64_t t1) const {
    if (w.row_groups == 1) return {0, j.B};
    return {row_bound(crew, t0, t1), row_bound(crew + 1, t0, t1)};
  }
  int64_t row_bound(int64_t i, int64_t t0, int64_t t1) const {
    if (i == w.row_groups || t0 == t1 || j.active[t1 - 1] == j.B) return j.B * i / w.row_groups;
    const int64_t goal = (j.start[t1] - j.start[t0]) * i / w.row_groups;
    int64_t row = 0, seen = 0, t = t1;  // t: where `row` ends, found going down as rows grow
    for (; row < j.B; ++row) {
      while (t > t0 && j.active[t - 1] <= row) --t;
      if (seen + (t - t0) / 2 >= goal) break;  // the bound that is nearest
      seen += t - t0;
    }
    return row;
  }
  void sync() const {
    if (units > 1) w.wait(w.waiter);
  }
  void join() const {
    if (w.count > 1) w.wait(w.waiter);
  }

  int64_t units_of(Range b) const { return least(b.end * L, H) - b.begin * L; }
  int lanes(int64_t block) const { return static_cast<int>(least(L, H - block * L)); }
  int64_t time(int64_t step) const { return j.reversed ? j.T - 1 - step : step; }  // its own inverse
  Range running(Range r, int64_t t) const { return {least(r.begin, j.active[t]), least(r.end, j.active[t])}; }

  const T* row_of(const Tokens& a, int64_t t, int64_t r) const {
    return static_cast<const T*>(a.data) + j.time[t] * a.step + j.index[r] * a.row;
  }
  T* out_row(const Tokens& a, int64_t t, int64_t r) const { return static_cast<T*>(a.data) + j.time[t] * a.step + j.index[r] * a.row; }
  static const T* in(const void* p) { return static_cast<const T*>(p); }
  static T* out(void* p) { return static_cast<T*>(p); }
  bool resets_at(int64_t t, int64_t r) const { return j.reset && j.reset[t * j.B + j.index[r]] >= 0; }

  // Rows of a ragged batch lie scattered, which no prefetcher foresees: they are fetched into the second-level cache while products run.
  bool is_ragged() const { return j.active[j.T - 1] < j.B; }
  static void fetch(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
  }
  // The rows of x that running(r, t) will read in a chunk of so many tokens, unless these are more than that cache would keep till then.
  void fetch_x(Range r, int64_t t, int64_t tokens) const {
    if (tokens * j.I * static_cast<int64_t>(sizeof(T)) > int64_t{1} << 18) return;
    for (Range run = running(r, t); run.begin < run.end; ++run.begin) fetch(row_of(j.x, t, run.begin), j.I);
  }

  // ---- the tape: what backward needs of each token -------------------------------------------------------------------------------------

  // First [H / TAPE_BLOCK][KEPT][TAPE_BLOCK] and q and hidden [Hp] of every token, so that backward reads in one stream; then every token's
  // c [Hp], which it needs a step earlier, unless y shows it. With `recompute` at most c, and backward makes the rest again for the tokens
  // of a chunk. rnnfast.diagnostics reads it, too.
  static constexpr int64_t Q_AT = Cell::KEPT, HIDDEN_AT = Q_AT + RESETS_FIRST;

  int64_t pitch() const { return (HIDDEN_AT + j.projected) * Hp; }
  bool carries_apart() const { return Cell::CARRIES && (!Cell::SHOWS_CARRY || j.projected); }
  bool keeps() const { return j.tape && !j.recompute; }
  int64_t tape_pitch() const { return j.recompute ? 0 : pitch(); }
  int64_t history_at() const { return j.start[j.T] * (tape_pitch() + (carries_apart() ? Hp : 0)); }
  int64_t history_pitch() const { return (j.T + j.taps) * j.R; }
  int64_t tape_size() const { return history_at() + (j.taps > 1 ? j.B * history_pitch() : 0); }
  T* tape_row(int64_t t, int64_t r) const { return out(j.tape) + (j.start[t] + r) * tape_pitch(); }
  const T* c_after(int64_t t, int64_t r) const { return carries_apart() ? tape_c(t, r) : row_of(j.y, t, r); }
  T* tape_c(int64_t t, int64_t r) const { return out(j.tape) + j.start[j.T] * tape_pitch() + (j.start[t] + r) * Hp; }
  T* history() const { return out(j.tape) + history_at(); }
  static int64_t kept_at(int64_t block, int k) { return (block * L / TAPE_BLOCK * Cell::KEPT + k) * TAPE_BLOCK + block * L % TAPE_BLOCK; }
  // Where the tape's blocks are wider than this target's, the worker with the last of these also fills the tape's last, up to this end, so
  // that equal calls leave equal tapes.
  int64_t tape_end() const { return blocks.size() > 0 && blocks.end == ceil_div(H, L) ? Hp / L : 0; }
  // The operand of step s lies here, newest first; y of step s goes R below.
  T* window(T* past, int64_t r, int64_t s) const { return past + r * history_pitch() + (j.T - s) * j.R; }

  // h_{t-1} and c_{t-1} of a token, as forward left them, for backward.
  const T* h_before(int64_t s, int64_t r) const {
    const int64_t t = time(s);
    if (resets_at(t, r)) return in(j.fresh_h);
    if (j.taps > 1) return window(history(), r, s);
    if (s == 0 || r >= j.active[time(s - 1)]) return in(j.h_0) + j.index[r] * S;
    return row_of(j.y, time(s - 1), r);
  }
  const T* c_before(int64_t s, int64_t r) const {
    if (resets_at(time(s), r)) return in(j.fresh_c);
    if (s == 0 || r >= j.active[time(s - 1)]) return in(j.c_0) + j.index[r] * H;
    return c_after(time(s - 1), r);
  }

  void load_peepholes(int64_t b, V* p) const {
    for (int i = 0; i < Cell::PEEP; ++i) p[i] = load(in(j.peep) + i * H + b * L, lanes(b));
  }

  // As elements of products: a row of K numbers; rows encoded into a worker's own memory.
  int64_t elements(int64_t K) const { return multiply.elements(K); }
  struct Encoded {
    T* numbers;
    const T** rows;
  };
  Encoded take_encoded(Arena& arena, int64_t rows_, int64_t K) const {
    if (multiply.exact()) return {nullptr, nullptr};
    T* numbers = arena.take<T>(rows_ * elements(K));
    return {numbers, arena.take<const T*>(rows_)};
  }

  // Packs this worker's part of what its row groups' peers with the same units share.
  template <class Pack>
  void pack_shared(const Panels<T>& p, Pack pack) const {
    for (int64_t panel = crew; panel < p.count(); panel += w.row_groups) pack(panel);
  }

  // ======================================================================================================================================

  // The sums `a` of a token lie as [block][slot][L] of own blocks; where slots are late, all early ones before all late ones, so that
  // either part fills whole panels.
  static constexpr int WIDE = RESETS_FIRST ? LATE : PRE;  // slots side by side
  int64_t a_at(int64_t b, int slot) const {
    return slot < WIDE ? (b * WIDE + slot) * L : (blocks.size() * WIDE + b * (PRE - WIDE) + slot - WIDE) * L;
  }

  // Some slots of a weight matrix, for the products that make sums; packed for this worker's units, or null where they are
  // used once: taken as they stand for few rows, else each panel is packed when it is used.
  struct Gates {
    const void* weights;
    int first_slot, slots;
    int64_t K;
    T* packed;
  };
  struct Forward {
    Gates x_early, x_late, h_early, h_late;
    T* w_hr;   // packed
    T* panel;  // a block of a panel, for weights that are used once
    Encoded encoded;
    T *bias, *peep, *b_hr, *a;  // one token's sums to start from; [PEEP][block][L]; [R]; [token of a chunk][sums]
    T *state, *c, *past;        // without a tape: [row][pitch], [row][Hp], [row][history_pitch]
    const T **from, **h_prev, **c_prev;
    T** to;
  };
  // Steps in a chunk of time: enough rows for products of good shape, few enough that the sums stay in cache.
  int64_t forward_steps(int64_t row_count, int64_t row_size) const {
    return most(1, least(most(j.T, 1), (int64_t{1} << 18) / (most(row_count, 1) * row_size * static_cast<int64_t>(sizeof(T)))));
  }
  Range out_blocks() const { return share(ceil_div(j.R, L), group, units); }

  Forward plan_forward(Arena& packs, Arena& arena) const {
    Forward f{};
    const int64_t most_blocks = ceil_div(ceil_div(H, L), units), most_rows = j.B, most_outs = ceil_div(ceil_div(j.R, L), units);
    const int64_t row_size = most_blocks * PRE * L;
    f.x_early = {j.w_ih, 0, X < WIDE ? X : WIDE, j.I, nullptr}, f.h_early = {j.w_hh, EARLY, LATE - EARLY, S, nullptr};
    f.x_late = {j.w_ih, LATE, PRE - LATE, j.I, nullptr}, f.h_late = {j.w_hh, LATE, PRE - LATE, H, nullptr};
    Gates* const parts[] = {&f.x_early, &f.x_late, &f.h_early, &f.h_late};
    for (int64_t g = 0; g < units; ++g) {  // one pack for each share of the units
      for (Gates* p : parts) {
        T* packed = used_once(*p) ? nullptr : packs.take<T>(most_blocks * p->slots * L * elements(p->K));
        if (g == group) p->packed = packed;
      }
      T* hr = packs.take<T>(j.projected ? most_outs * L * elements(H) : 0);
      T* bias = packs.take<T>(row_size);
      T* peep = packs.take<T>(Cell::PEEP * most_blocks * L);
      T* b_hr = packs.take<T>(most_outs * L);
      if (g == group) f.w_hr = hr, f.bias = bias, f.peep = peep, f.b_hr = b_hr;
    }
    for (int64_t i = 0; i < w.count; ++i) {
      const int64_t tokens = forward_steps(most_rows, row_size) * most_rows;
      T* a = arena.take<T>(tokens * row_size);
      const T** from = arena.take<const T*>(tokens);
      T** to = arena.take<T*>(tokens);
      const T** h_prev = arena.take<const T*>(most_rows);
      const T** c_prev = arena.take<const T*>(most_rows);
      T* panel = arena.take<T>(j.kept ? 0 : MAX_NV * L * multiply.block(elements(most(j.I, most(S, H))), GATE_BLOCK));
      const Encoded encoded = take_encoded(arena, tokens, most(j.I, most(S, H)));
      if (i == w.id) f.a = a, f.from = from, f.to = to, f.h_prev = h_prev, f.c_prev = c_prev, f.panel = panel, f.encoded = encoded;
    }
    f.state = keeps() ? nullptr : arena.take<T>(j.B * pitch());
    f.c = j.tape || !carries_apart() ? nullptr : arena.take<T>(j.B * Hp);
    f.past = j.taps == 1 ? nullptr : j.tape ? history() : arena.take<T>(j.B * history_pitch());
    return f;
  }

  // Are these weights read once, so that packs that nobody keeps would be written and read for nothing? Where row groups share the packing,
  // only they would each do it all.
  bool used_once(const Gates& p) const {
    return !j.kept && w.row_groups == 1 &&
           (p.weights == j.w_hh ? j.T == 1 : forward_steps(j.B, ceil_div(ceil_div(H, L), units) * PRE * L) >= j.T);
  }
  void pack_panel(const Gates& g, const Panels<T>& p, int64_t panel, int64_t k_begin, int64_t k_end, T* to) const {
    const T* gate[PRE];
    for (int s = 0; s < g.slots; ++s) gate[s] = in(g.weights) + Cell::GATE[g.first_slot + s] * H * g.K;
    multiply.gates(p, panel, k_begin, k_end, blocks.begin * L, H, gate, g.K, to);
  }

  // The weights' row blocks in slot order, and the sums' start: the biases that their slots' products bring along.
  void pack_forward(const Forward& f) const {
    const int64_t unit = blocks.begin * L, own = units_of(blocks);
    if (own > 0) {
      const Gates* const parts[] = {&f.x_early, &f.x_late, &f.h_early, &f.h_late};
      for (const Gates* g : parts) {
        if (!g->packed || g->slots == 0) continue;
        const Panels<T> p(own, g->slots, elements(g->K));
        pack_shared(p, [&](int64_t panel) { pack_panel(*g, p, panel, 0, p.K, g->packed + p.at(panel)); });
      }
      for (int64_t b = 0; crew == 0 && b < blocks.size(); ++b)
        for (int s = 0; s < PRE; ++s) {
          const int64_t at = Cell::GATE[s] * H + unit + b * L;
          V sum = all(T(0));
          if (j.b_ih && s < X) sum = sum + load(in(j.b_ih) + at, lanes(blocks.begin + b));
          if (j.b_hh && s >= EARLY) sum = sum + load(in(j.b_hh) + at, lanes(blocks.begin + b));
          store(f.bias + a_at(b, s), sum);
        }
      for (int64_t b = 0; crew == 0 && b < blocks.size(); ++b) {
        V p[Cell::PEEP + 1];
        load_peepholes(blocks.begin + b, p);
        for (int i = 0; i < Cell::PEEP; ++i) store(f.peep + (i * blocks.size() + b) * L, p[i]);
      }
    }
    if (j.projected) {
      const Range o = out_blocks();
      const int64_t first = o.begin * L, count = least(o.end * L, j.R) - first;
      if (count > 0) {
        const T* gate[1] = {in(j.w_hr)};
        const Panels<T> p(count, 1, elements(H));
        pack_shared(p, [&](int64_t panel) { multiply.gates(p, panel, 0, p.K, first, j.R, gate, H, f.w_hr + p.at(panel)); });
        for (int64_t i = 0; crew == 0 && i < o.size() * L; ++i) f.b_hr[i] = j.b_hr && i < count ? in(j.b_hr)[first + i] : T(0);
      }
    }
    join();
  }

  // The sums' slots that these weights make: a = first + from·W or a += from·W, for all of this worker's units. Steps go `down` the panels
  // and up in turn, so that each begins with those that the one before has left in cache.
  void affine(const Forward& f, const Gates& g, int64_t count, const T* const* from, const T* first, T* const* to,
              bool down = false) const {
    if (count == 0 || (g.K == 0 && !first)) return;  // a dense layer has no recurrence
    const Panels<T> p(units_of(blocks), g.slots, elements(g.K));
    const int64_t width = g.first_slot < WIDE ? WIDE : PRE - WIDE;  // of the part of a block's sums that the slots lie in
    static_assert(MAX_NV / PRE <= 1 || PRE == 1 || WIDE == LATE, "a panel of several blocks must find them side by side");
    const T* const* rows_in = multiply.encode(g.K, count, from, f.encoded.numbers, f.encoded.rows);
    if (!g.packed && multiply.few(count, GATE_ROWS)) {
      for (int64_t b = 0; b < blocks.size(); ++b)
        for (int s = g.first_slot; s < g.first_slot + g.slots; ++s)
          few_gates(count, rows_in, g.K, in(g.weights) + (Cell::GATE[s] * H + (blocks.begin + b) * L) * g.K, lanes(blocks.begin + b),
                    first ? first + a_at(b, s) : nullptr, to, a_at(b, s));
      return;
    }
    const bool ahead = g.packed && p.fetch_ahead(count);
    const int64_t c_pitch = p.per_panel * width * L;
    for (int64_t i = 0; i < p.count(); ++i) {
      if (g.packed && multiply.abreast(count, p.K) && p.whole_abreast(i, down)) {
        const int64_t panel = down ? p.count() - ROW_PANELS - i : i, at = a_at(0, g.first_slot) + panel * c_pitch;
        multiply.multiply_abreast(p.nv(panel), p.K, rows_in, g.packed + p.at(panel), p.at(1), first ? first + at : nullptr, to, at,
                                  c_pitch);
        i += ROW_PANELS - 1;
        continue;
      }
      const int64_t panel = down ? p.count() - 1 - i : i;
      const int64_t at = a_at(0, g.first_slot) + panel * c_pitch, block = g.packed ? p.K : multiply.block(p.K, GATE_BLOCK);
      int64_t k = 0;
      do {
        const int64_t end = least(p.K, k + block);
        if (!g.packed) pack_panel(g, p, panel, k, end, f.panel);
        multiply.multiply(p.nv(panel), L, count, end - k, rows_in, k, 1, g.packed ? g.packed + p.at(panel) : f.panel,
                          first && k == 0 ? first + at : nullptr, to, at, ahead ? p.next(g.packed, panel, down) : nullptr);
        k = end;
      } while (k < p.K);
    }
  }

  // The sums of these rows' tokens in the steps [s0, s1): the biases and what x adds to them. Returns the number of tokens.
  int64_t start_sums(const Forward& f, Range own, int64_t s0, int64_t s1) const {
    const int64_t row_size = blocks.size() * PRE * L;
    int64_t count = 0;
    for (int64_t s = s0; s < s1; ++s) {
      const Range run = running(own, time(s));
      for (int64_t r = run.begin; r < run.end; ++r, ++count) f.from[count] = row_of(j.x, time(s), r), f.to[count] = f.a + count * row_size;
    }
    if (row_size == 0 || count == 0) return count;
    affine(f, f.x_early, count, f.from, f.bias, f.to);
    if constexpr (RESETS_FIRST) affine(f, f.x_late, count, f.from, f.bias, f.to);
    for (int64_t b = 0; X < PRE && b < blocks.size(); ++b)  // slots that x does not reach start with their bias alone
      for (int64_t i = 0; i < count; ++i)
        for (int s = X; s < PRE; ++s) store(f.to[i] + a_at(b, s), load(f.bias + a_at(b, s)));
    return count;
  }

  void forward() const {
    const FlushDenormals<T> guard;
    Arena packs(w.packs), arena(w.scratch);
    const Forward f = plan_forward(packs, arena);
    if (!j.packed) pack_forward(f);

    for (int64_t r = rows.begin; r < rows.end; ++r) {
      f.h_prev[r] = in(j.h_0) + j.index[r] * S;
      f.c_prev[r] = Cell::CARRIES ? in(j.c_0) + j.index[r] * H : nullptr;
      if (j.taps > 1 && group == 0) memcpy(window(f.past, r, 0), f.h_prev[r], static_cast<size_t>(S) * sizeof(T));
    }
    const int64_t row_size = blocks.size() * PRE * L;
    const int64_t chunk = forward_steps(j.B, ceil_div(ceil_div(H, L), units) * PRE * L);
    for (int64_t s0 = 0; s0 < j.T; s0 += chunk) {
      const int64_t s1 = least(j.T, s0 + chunk);
      start_sums(f, rows, s0, s1);
      T* a = f.a;
      for (int64_t s = s0; s < s1; ++s) {
        const Range run = running(rows, time(s));
        if (is_ragged() && s + chunk < j.T) fetch_x(rows, time(s + chunk), chunk * j.B);
        forward_step(f, s, run, a);
        a += run.size() * row_size;
      }
    }
    for (int64_t r = rows.begin; r < rows.end && group == 0; ++r) {
      const int64_t at = j.index[r];
      if (j.h_T) memcpy(out(j.h_T) + at * S, f.h_prev[r], static_cast<size_t>(S) * sizeof(T));
    }
    for (int64_t r = rows.begin; Cell::CARRIES && j.c_T && r < rows.end; ++r)
      memcpy(out(j.c_T) + j.index[r] * H + blocks.begin * L, f.c_prev[r] + blocks.begin * L,
             static_cast<size_t>(most(0, units_of(blocks))) * sizeof(T));
  }

  // A token's q, and r in place of its sum.
  void reset_operand(T* sums, const T* c_prev, T* q) const {
    if constexpr (RESETS_FIRST)
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        V v[PRE], q_value;
        v[0] = load(sums + a_at(b - blocks.begin, 0));
        Cell::template reset<M, V>(v, load(c_prev + b * L, lanes(b)), q_value);
        store(sums + a_at(b - blocks.begin, 0), v[0]);
        store(q + b * L, q_value);
      }
    for (int64_t b = blocks.end; b < tape_end(); ++b) store(q + b * L, all(T(0)));
  }
  // From a token's sums to what it shows and what it keeps (not asked for where null).
  void ending(const Forward& f, const T* sums, const T* c_prev, T* kept_row, T* c_row, T* cells_row, T* h_row) const {
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      V v[PRE], p[Cell::PEEP + 1], kept[Cell::KEPT], c = all(T(0)), h;
      for (int g = 0; g < PRE; ++g) v[g] = load(sums + a_at(b - blocks.begin, g));
      for (int g = 0; g < Cell::PEEP; ++g) p[g] = load(f.peep + (g * blocks.size() + b - blocks.begin) * L);
      if constexpr (Cell::CARRIES) c = load(c_prev + b * L, lanes(b));
      Cell::template forward<M, V>(v, p, c, kept, c, h);
      if (kept_row)
        for (int k = 0; k < Cell::KEPT; ++k) store(kept_row + kept_at(b, k), kept[k]);
      if (Cell::CARRIES && c_row) store(c_row + b * L, c);
      if (Cell::CARRIES && cells_row) store(cells_row + b * L, c, lanes(b));
      if (h_row) store(h_row + b * L, h, lanes(b));
    }
    for (int64_t b = blocks.end; b < tape_end(); ++b) {
      for (int k = 0; kept_row && k < Cell::KEPT; ++k) store(kept_row + kept_at(b, k), all(T(0)));
      if (Cell::CARRIES && c_row) store(c_row + b * L, all(T(0)));
    }
  }

  void forward_step(const Forward& f, int64_t s, Range run, T* a) const {
    const int64_t t = time(s), row_size = blocks.size() * PRE * L, n = run.size();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = run.begin + i;
      if (resets_at(t, r)) f.h_prev[r] = in(j.fresh_h), f.c_prev[r] = in(j.fresh_c);
      f.to[i] = a + i * row_size;
    }
    for (int64_t i = 0; i < n && is_ragged() && !j.projected; ++i)
      fetch(out_row(j.y, t, run.begin + i) + blocks.begin * L, units_of(blocks));
    affine(f, f.h_early, n, f.h_prev + run.begin, nullptr, f.to, s % 2);
    if constexpr (RESETS_FIRST) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t r = run.begin + i;
        T* q = (keeps() ? tape_row(t, r) : f.state + r * pitch()) + Q_AT * Hp;
        reset_operand(f.to[i], f.c_prev[r], q);
        f.from[i] = q;
      }
      sync();
      affine(f, f.h_late, n, f.from, nullptr, f.to, s % 2);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = run.begin + i;
      T* kept_row = keeps() ? tape_row(t, r) : f.state + r * pitch();
      T* h_row = j.projected ? kept_row + HIDDEN_AT * Hp : out_row(j.y, t, r);
      T* c_row = !carries_apart() ? nullptr : j.tape ? tape_c(t, r) : f.c + r * Hp;
      ending(f, f.to[i], f.c_prev[r], keeps() ? kept_row : nullptr, c_row, Cell::CARRIES && j.cells.data ? out_row(j.cells, t, r) : nullptr,
             h_row);
      if (Cell::CARRIES) f.c_prev[r] = c_row ? c_row : h_row;
      f.from[i] = h_row;
    }
    sync();
    if (j.projected) {
      const Range o = out_blocks();
      const int64_t first = o.begin * L, count = least(o.end * L, j.R) - first;
      for (int64_t i = 0; i < n; ++i) f.to[i] = out_row(j.y, t, run.begin + i);
      if (count > 0) {
        const Panels<T> p(count, 1, elements(H));
        const T* const* rows_in = multiply.encode(H, n, f.from, f.encoded.numbers, f.encoded.rows);
        for (int64_t panel = 0; panel < p.count(); ++panel)
          multiply.multiply(p.nv(panel), p.tail(panel), n, p.K, rows_in, 0, 1, f.w_hr + p.at(panel), f.b_hr + panel * MAX_NV * L, f.to,
                            first + panel * MAX_NV * L);
      }
    }
    if (j.taps > 1) {
      const Range o = out_blocks();
      const int64_t first = o.begin * L, count = most(0, least(o.end * L, j.R) - first);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t r = run.begin + i;
        memcpy(window(f.past, r, s + 1) + first, out_row(j.y, t, r) + first, static_cast<size_t>(count) * sizeof(T));
      }
    }
    if (j.projected || j.taps > 1) sync();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = run.begin + i;
      f.h_prev[r] = j.taps > 1 ? window(f.past, r, s + 1) : out_row(j.y, t, r);
    }
  }

  // ======================================================================================================================================

  // Some columns of a weight matrix, or of some slots of it, for the products that send gradients back; packed, or null as in Gates.
  struct Columns {
    const void* weights;
    int from_slot, to_slot;  // w_hr: 0, 0
    int64_t pitch, column, width;
    T* packed;
  };
  struct Backward {
    Columns w_ih, w_early, w_late, w_hr;
    T* panel;        // a block of a panel, for weights that are used once
    const T** line;  // [PRE·H or R] rows of a weight matrix
    Encoded encoded;
    T *dh, *dc;               // [row][dh_pitch], [row][Hp]: gradients of the state that runs backward in time
    T *dhidden, *dq;          // [row][Hp]
    T *da, *dy_total;         // [token of a chunk][da_pitch], [token of a chunk][dy_pitch]
    T *da_next, *dy_next;     // the next chunk's, for a worker that is ahead; where packed, the same
    T *a_packed, *dy_packed;  // daᵀ, dy_totalᵀ for products over tokens, where these are not of the numbers themselves
    T* operand[4];            // packed x, h_{t-1}, q, hidden
    Forward again;            // with `recompute`
    T* kept;                  // [token of a chunk][pitch], likewise
    int64_t base;             // the chunk's first token
    Range rows;               // this worker's in the chunk
    T *zeros, *sums;          // [ROW_PANELS·MAX_NV·L]; [PRE·H]
    const T** from;
    T** to;
  };
  static int64_t spread(int64_t n) {  // a pitch whose rows do not fall onto the same cache sets
    const int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    return (ceil_div(n, line) | 1) * line;
  }
  int64_t da_pitch() const { return spread(PRE * H); }
  int64_t dy_pitch() const { return spread(j.R); }
  int64_t dh_pitch() const { return j.taps > 1 ? history_pitch() : Hp > S ? Hp : S; }
  int64_t operand_width(int i) const { return i == 0 ? j.I : i == 1 ? S : i == 2 ? (RESETS_FIRST ? H : 0) : j.projected ? H : 0; }
  Range h_blocks() const { return share(ceil_div(S, L), group, units); }

  // Tokens in a chunk of time, in whole steps: the same for any number of workers, since they are summed at once.
  int64_t backward_tokens() const { return j.B * most(1, least(j.T, 512 / most(j.B, 1))); }
  int64_t backward_from(int64_t s1) const {  // the first step of the chunk that ends at s1
    const int64_t end = time(s1 - 1);
    int64_t s0 = s1 - 1;
    while (s0 > 0 &&
           (j.reversed ? j.start[time(s0 - 1) + 1] - j.start[end] : j.start[end + 1] - j.start[time(s0 - 1)]) <= backward_tokens())
      --s0;
    return s0;
  }

  Backward plan_backward(Arena& arena) const {
    Backward f{};
    const int64_t tokens = backward_tokens();
    const int64_t most_h = ceil_div(ceil_div(S, L), units), most_blocks = ceil_div(ceil_div(H, L), units);
    const Range h = h_blocks();
    const int64_t h_first = h.begin * L, h_count = most(0, least(h.end * L, S) - h_first), first = blocks.begin * L;
    const int64_t own = most(0, units_of(blocks));
    f.w_ih = {j.w_ih, 0, X, j.I, 0, j.dx.data ? j.I : 0, nullptr};
    f.w_early = {j.w_hh, EARLY, LATE, S, h_first, h_count, nullptr};
    f.w_late = {j.w_hh, LATE, PRE, S, first, RESETS_FIRST ? own : 0, nullptr};
    f.w_hr = {j.w_hr, 0, 0, H, first, j.projected ? own : 0, nullptr};
    for (int64_t g = 0; g < units; ++g) {  // one pack a share of the units
      T* early = arena.take<T>(used_once(f.w_early) ? 0 : most_h * L * elements((LATE - EARLY) * H));
      T* late = arena.take<T>(used_once(f.w_late) ? 0 : most_blocks * L * elements((PRE - LATE) * H));
      T* hr = arena.take<T>(j.projected && !used_once(f.w_hr) ? most_blocks * L * elements(j.R) : 0);
      if (g == group) f.w_early.packed = early, f.w_late.packed = late, f.w_hr.packed = hr;
    }
    f.w_ih.packed = arena.take<T>(j.dx.data && !used_once(f.w_ih) ? Panels<T>(j.I, 1, elements(X * H)).size() : 0);
    Columns* const parts[] = {&f.w_ih, &f.w_early, &f.w_late, &f.w_hr};
    for (Columns* c : parts)
      if (used_once(*c)) c->packed = nullptr;
    f.dh = arena.take<T>(j.B * dh_pitch());
    f.dc = arena.take<T>(j.B * Hp);
    f.dhidden = arena.take<T>(j.projected ? j.B * Hp : 0);
    f.dq = arena.take<T>(RESETS_FIRST ? j.B * Hp : 0);
    f.da = f.da_next = arena.take<T>(tokens * da_pitch());
    f.dy_total = f.dy_next = arena.take<T>(j.projected ? tokens * dy_pitch() : 0);
    const bool packs = multiply.packs_columns();
    if (!packs) f.da_next = arena.take<T>(tokens * da_pitch()), f.dy_next = arena.take<T>(j.projected ? tokens * dy_pitch() : 0);
    f.a_packed = arena.take<T>(packs ? (PRE * H + PACKED_ROWS) * elements(tokens) : 0);
    f.dy_packed = arena.take<T>(packs && j.projected ? (j.R + PACKED_ROWS) * elements(tokens) : 0);
    for (int i = 0; i < 4; ++i)
      f.operand[i] = arena.take<T>(operand_width(i) ? Panels<T>(operand_width(i), 1, elements(tokens)).size() : 0);
    f.kept = nullptr;
    if (j.recompute) f.again = plan_forward(arena, arena), f.kept = arena.take<T>(tokens * pitch());
    const int64_t pointers = most(most(tokens, PRE * H), most(j.R, j.B));
    for (int64_t i = 0; i < w.count; ++i) {
      T* zeros = arena.take<T>(ROW_PANELS * MAX_NV * L);
      T* sums = arena.take<T>(most(PRE * H, j.R) + L);
      const T** from = arena.take<const T*>(pointers);
      T** to = arena.take<T*>(pointers);
      const T** line = arena.take<const T*>(most(PRE * H, j.R));
      T* panel = arena.take<T>(MAX_NV * L * row_block(j.B));
      const Encoded encoded = take_encoded(arena, tokens, most(PRE * H, j.R));
      if (i == w.id) f.zeros = zeros, f.sums = sums, f.from = from, f.to = to, f.line = line, f.panel = panel, f.encoded = encoded;
    }
    return f;
  }
  // Each block reads and writes all of what is summed: more rows of it ask for longer blocks.
  static int64_t row_block(int64_t n) { return most(ROW_BLOCK, n); }
  bool used_once(const Columns&) const { return j.T == 1 && w.row_groups == 1; }
  int64_t height(const Columns& c) const { return c.to_slot > c.from_slot ? (c.to_slot - c.from_slot) * H : j.R; }
  void lines(const Backward& f, const Columns& c) const {
    if (c.to_slot == 0)
      for (int64_t i = 0; i < j.R; ++i) f.line[i] = in(c.weights) + i * c.pitch + c.column;
    for (int s = c.from_slot; s < c.to_slot; ++s)
      for (int64_t u = 0; u < H; ++u) f.line[(s - c.from_slot) * H + u] = in(c.weights) + (Cell::GATE[s] * H + u) * c.pitch + c.column;
  }

  void pack_backward(const Backward& f) const {
    for (int64_t i = 0; i < ROW_PANELS * MAX_NV * L; ++i) f.zeros[i] = T(0);
    const int64_t first = blocks.begin * L;
    const Columns* const parts[] = {&f.w_early, &f.w_late, &f.w_hr, &f.w_ih};
    for (const Columns* c : parts) {
      if (c->width == 0 || !c->packed) continue;
      lines(f, *c);
      const Panels<T> p(c->width, 1, elements(height(*c)));
      const auto pack = [&](int64_t panel) { multiply.rows(p, panel, height(*c), f.line, c->packed + p.at(panel)); };
      if (c != &f.w_ih)
        pack_shared(p, pack);
      else  // one pack for all
        for (int64_t panel = w.id; panel < p.count(); panel += w.count) pack(panel);
    }
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      if (group == 0) {
        T* dh = f.dh + r * dh_pitch();
        const int64_t end = j.taps > 1 ? (j.T - steps_of(r)) * j.R : 0;
        for (int64_t i = 0; i < dh_pitch(); ++i) dh[i] = T(0);
        if (j.dh_T) memcpy(dh + end, in(j.dh_T) + j.index[r] * S, static_cast<size_t>(S) * sizeof(T));
      }
      T* dc = f.dc + r * Hp;
      for (int64_t i = first; i < blocks.end * L; ++i) dc[i] = j.dc_T && i < H ? in(j.dc_T)[j.index[r] * H + i] : T(0);
    }
    join();
  }
  int64_t steps_of(int64_t r) const {
    int64_t t = 0;
    while (t < j.T && j.active[t] > r) ++t;
    return t;
  }

  void backward() const {
    const FlushDenormals<T> guard;
    Arena arena(w.scratch);
    Backward f = plan_backward(arena);
    pack_backward(f);
    if (j.recompute) pack_forward(f.again);
    bool fresh = j.overwrite;  // is this the first chunk to reach the parameters' gradients, which has nothing to add to?
    for (int64_t s0, s1 = j.T; s1 > 0; s1 = s0) {
      s0 = backward_from(s1);
      const int64_t t0 = least(time(s0), time(s1 - 1)), t1 = most(time(s0), time(s1 - 1)) + 1;
      const int64_t base = j.start[t0], tokens = j.start[t1] - base;
      f.base = base;
      f.rows = share_rows(t0, t1);
      if (j.recompute) recompute(f, s0, s1);
      for (int64_t s = s1 - 1; s >= s0; --s) backward_step(f, s, base);
      join();
      gather(f, t0, t1, tokens);
      input_gradient(f, t0, t1, base, tokens);
      if (tokens > 0) vector_gradients(f, t0, t1, tokens, fresh);
      join();
      if (tokens > 0) parameter_gradients(f, t0, t1, tokens, fresh);
      fresh = fresh && tokens == 0;
      swap(f.da, f.da_next), swap(f.dy_total, f.dy_next);
    }
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const Range h = h_blocks();
      const int64_t first = h.begin * L, count = most(0, least(h.end * L, S) - first), at = j.index[r];
      const T* dh = f.dh + r * dh_pitch() + (j.taps > 1 ? j.T * j.R : 0);
      if (j.dh_0) memcpy(out(j.dh_0) + at * S + first, dh + first, static_cast<size_t>(count) * sizeof(T));
      if (Cell::CARRIES && j.dc_0)
        memcpy(out(j.dc_0) + at * H + blocks.begin * L, f.dc + r * Hp + blocks.begin * L,
               static_cast<size_t>(most(0, units_of(blocks))) * sizeof(T));
    }
  }

  const T* kept_row(const Backward& f, int64_t t, int64_t r) const {
    return j.recompute ? f.kept + (j.start[t] + r - f.base) * pitch() : tape_row(t, r);
  }
  // What forward did in the steps [s0, s1), for all of them at once, since every h_{t-1} and c_{t-1} is there.
  void recompute(const Backward& f, int64_t s0, int64_t s1) const {
    const Forward& g = f.again;
    const int64_t row_size = blocks.size() * PRE * L, chunk = forward_steps(j.B, ceil_div(ceil_div(H, L), units) * PRE * L);
    for (int64_t s = s0; s < s1; s += chunk) {
      const int64_t end = least(s1, s + chunk);
      const int64_t count = start_sums(g, f.rows, s, end);
      const auto each = [&](auto visit) {
        int64_t i = 0;
        for (int64_t step = s; step < end; ++step)
          for (Range run = running(f.rows, time(step)); run.begin < run.end; ++run.begin, ++i) visit(i, step, run.begin);
      };
      const auto row = [&](int64_t step, int64_t r) { return f.kept + (j.start[time(step)] + r - f.base) * pitch(); };
      each([&](int64_t i, int64_t step, int64_t r) { g.from[i] = h_before(step, r); });
      if (row_size > 0) affine(f.again, g.h_early, count, g.from, nullptr, g.to);
      if constexpr (RESETS_FIRST) {
        each([&](int64_t i, int64_t step, int64_t r) {
          T* q = row(step, r) + Q_AT * Hp;
          reset_operand(g.to[i], c_before(step, r), q);
          g.from[i] = q;
        });
        sync();
        if (row_size > 0) affine(g, g.h_late, count, g.from, nullptr, g.to);
      }
      each([&](int64_t i, int64_t step, int64_t r) {
        T* to = row(step, r);
        ending(g, g.to[i], Cell::CARRIES ? c_before(step, r) : nullptr, to, nullptr, nullptr, j.projected ? to + HIDDEN_AT * Hp : nullptr);
      });
    }
  }

  void backward_step(const Backward& f, int64_t s, int64_t base) const {
    const int64_t t = time(s);
    const Range run = running(f.rows, t);
    const int64_t n = run.size(), token = j.start[t] - base + run.begin;
    T* da = f.da + token * da_pitch();
    const int64_t h_first = f.w_early.column, h_count = f.w_early.width, first = blocks.begin * L, own = most(0, units_of(blocks));

    if (j.projected) {
      const Range o = out_blocks();
      for (int64_t i = 0; i < n; ++i) {
        const int64_t r = run.begin + i;
        const T* dh = j.taps > 1 ? window(f.dh, r, s + 1) : f.dh + r * dh_pitch();
        T* sum = f.dy_total + (token + i) * dy_pitch();
        const T* dy = row_of(j.dy, t, r);
        for (int64_t k = o.begin * L; k < least(o.end * L, j.R); ++k) sum[k] = dy[k] + dh[k];  // dL/dy_t = dy + what later steps send back
        f.from[i] = sum;
        f.to[i] = f.dhidden + r * Hp;
      }
      sync();
      send_back(f, f.w_hr, n, f.zeros, first, true);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = run.begin + i;
      const T* kept_from = kept_row(f, t, r);
      const T* c_row = Cell::CARRIES ? c_after(t, r) : nullptr;
      const T* c_prev = Cell::CARRIES ? c_before(s, r) : nullptr;
      const T* dy = row_of(j.dy, t, r);
      const T* dh_row = j.projected ? f.dhidden + r * Hp : j.taps > 1 ? window(f.dh, r, s + 1) : f.dh + r * dh_pitch();
      T* dc_row = f.dc + r * Hp;
      T* da_row = da + i * da_pitch();
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int m = lanes(b);
        V kept[Cell::KEPT], p[Cell::PEEP + 1], d[PRE], c = all(T(0)), before = all(T(0)), dc = all(T(0));
        for (int k = 0; k < Cell::KEPT; ++k) kept[k] = load(kept_from + kept_at(b, k));
        load_peepholes(b, p);
        if constexpr (Cell::CARRIES) c = load(c_row + b * L, m), before = load(c_prev + b * L, m), dc = load(dc_row + b * L);
        V dh = load(dh_row + b * L, m);
        if (Cell::SHOWS_CARRY && !j.projected)
          dh = dh + dc, dc = all(T(0));  // one state, whose two parts a caller sees as one between two calls
        if (!j.projected) dh = dh + load(dy + b * L, m);
        Cell::template backward<M, V>(kept, p, before, c, dh, dc, d);
        for (int k = 0; k < PRE; ++k)
          if (!(RESETS_FIRST && k == 0)) store(da_row + k * H + b * L, d[k], m);
        if constexpr (Cell::CARRIES) store(dc_row + b * L, dc);
      }
    }
    if constexpr (RESETS_FIRST) {
      sync();
      for (int64_t i = 0; i < n; ++i) f.from[i] = da + i * da_pitch() + LATE * H, f.to[i] = f.dq + (run.begin + i) * Hp;
      send_back(f, f.w_late, n, f.zeros, first, true, s % 2);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t r = run.begin + i;
        const T *kept_from = kept_row(f, t, r), *c_prev = c_before(s, r);
        for (int64_t b = blocks.begin; b < blocks.end; ++b) {
          V kept[Cell::KEPT], d[PRE], dc = load(f.dc + r * Hp + b * L);
          for (int k = 0; k < Cell::KEPT; ++k) kept[k] = load(kept_from + kept_at(b, k));
          Cell::template reset_backward<M, V>(kept, load(c_prev + b * L, lanes(b)), load(f.dq + r * Hp + b * L), dc, d);
          store(da + i * da_pitch() + b * L, d[0], lanes(b));
          store(f.dc + r * Hp + b * L, dc);
        }
      }
    }
    if (s == 0 && !j.dh_0 && !j.reset) return;  // nobody asks what came before
    sync();
    for (int64_t i = 0; i < n; ++i) {
      f.from[i] = da + i * da_pitch() + EARLY * H;
      f.to[i] = j.taps > 1 ? window(f.dh, run.begin + i, s) : f.dh + (run.begin + i) * dh_pitch();
    }
    if (s > 0 && is_ragged()) {
      const int64_t next = time(s - 1);
      for (Range r = running(f.rows, next); r.begin < r.end; ++r.begin) {
        fetch(row_of(j.dy, next, r.begin) + (j.projected ? 0 : first), j.projected ? j.R : own);
        fetch(h_before(s - 1, r.begin), j.R);  // for the weights' gradients, too
      }
      fetch_x(f.rows, next, backward_tokens());
    }
    send_back(f, f.w_early, n, j.taps > 1 ? nullptr : f.zeros, h_first, false, s % 2);
    if (j.reset) {
      for (int64_t r = run.begin; r < run.end; ++r) {
        const int64_t event = j.reset[t * j.B + j.index[r]];
        if (event < 0) continue;
        for (int64_t k = h_first; k < h_first + h_count; ++k)
          out(j.dreset_h)[event * S + k] = f.dh[r * dh_pitch() + k], f.dh[r * dh_pitch() + k] = T(0);
        for (int64_t k = first; Cell::CARRIES && k < first + own; ++k)
          out(j.dreset_c)[event * H + k] = f.dc[r * Hp + k], f.dc[r * Hp + k] = T(0);
      }
    }
    if (j.projected || j.taps > 1) sync();  // else a worker's dh are its own units'
  }

  // to[r][at ..] = first + from[r]·W (or +=) over all panels of c; `padded` where the destination holds whole registers.
  void send_back(const Backward& f, const Columns& c, int64_t n, const T* first, int64_t at, bool padded, bool down = false) const {
    if (c.width == 0 || n == 0) return;
    const int64_t K = height(c);
    const Panels<T> p(c.width, 1, elements(K));
    const T* const* from = multiply.encode(K, n, f.from, f.encoded.numbers, f.encoded.rows);
    if (!c.packed) lines(f, c);
    if (!c.packed && multiply.few_combined(n, c.pitch)) {
      const T* a[COMBINED_ROWS];
      T* to[COMBINED_ROWS];
      for (int64_t r = 0; r < n; ++r) to[r] = f.to[r] + at;
      const int64_t block = most(8, least(n, 32));
      for (int64_t k = 0; k < K; k += block) {
        for (int64_t r = 0; r < n; ++r) a[r] = f.from[r] + k;
        combine_rows(n, a, 1, least(block, K - k), f.line + k, c.width, first && k == 0, false, to);
      }
      return;
    }
    const int64_t block = c.packed ? p.K : row_block(n), depth = multiply.exact() ? 1 : 2;
    const bool ahead = c.packed && p.fetch_ahead(n);
    int64_t k = 0;
    do {  // blocks outside: a row of the weights is read from one end to the other
      const int64_t end = least(p.K, k + block);
      for (int64_t i = 0; i < p.count(); ++i) {
        if (c.packed && multiply.abreast(n, p.K) && p.whole_abreast(i, down)) {
          const int64_t panel = down ? p.count() - ROW_PANELS - i : i;
          multiply.multiply_abreast(p.nv(panel), p.K, from, c.packed + p.at(panel), p.at(1), first, f.to, at + panel * MAX_NV * L,
                                    MAX_NV * L);
          i += ROW_PANELS - 1;
          continue;
        }
        const int64_t panel = down ? p.count() - 1 - i : i;
        if (!c.packed) multiply.rows(p, panel, least(K, end * depth) - k * depth, f.line + k * depth, f.panel);
        multiply.multiply(p.nv(panel), padded ? L : p.tail(panel), n, end - k, from, k, 1, c.packed ? c.packed + p.at(panel) : f.panel,
                          k == 0 ? first : nullptr, f.to, at + panel * MAX_NV * L, ahead ? p.next(c.packed, panel, down) : nullptr);
      }
      k = end;
    } while (k < p.K);
  }

  // Do the products over a chunk's tokens take da and the operands as they stand? What is there but once, as what `recompute` makes of
  // them, must not be needed when a worker that is ahead goes on to the next chunk.
  bool as_they_stand(int64_t tokens) const {
    const bool only_one = j.recompute || multiply.packs_columns();
    return multiply.few_combined(tokens, j.I) && multiply.few_combined(tokens, S) && (!only_one || tokens == j.start[j.T]);
  }

  // Side by side for the products over a chunk's tokens: the operands, and daᵀ where it is packed. Each worker packs its share.
  void gather(const Backward& f, int64_t t0, int64_t t1, int64_t tokens) const {
    const auto columns = [&](int64_t count, const T* from, int64_t pitch, T* to) {
      const Range own = share(ceil_div(count, PACKED_ROWS), w.id, w.count);
      multiply.columns(own.begin * PACKED_ROWS, least(own.end * PACKED_ROWS, count), count, tokens, from, pitch, to);
    };
    if (as_they_stand(tokens)) return;
    if (multiply.packs_columns()) {
      columns(PRE * H, f.da, da_pitch(), f.a_packed);
      if (j.projected) columns(j.R, f.dy_total, dy_pitch(), f.dy_packed);
    }
    int64_t turn = 0;  // panels of all operands in turn
    for (int i = 0; i < 4; ++i) {
      if (operand_width(i) == 0) continue;
      bool ready = false;
      const Panels<T> p(operand_width(i), 1, elements(tokens));
      for (int64_t panel = 0; panel < p.count(); ++panel) {
        if (turn++ % w.count != w.id) continue;
        if (!ready) operand_rows(f, i, t0, t1, f.from);
        ready = true;
        multiply.rows(p, panel, tokens, f.from, f.operand[i] + p.at(panel));
      }
    }
  }
  void operand_rows(const Backward& f, int i, int64_t t0, int64_t t1, const T** row) const {
    for (int64_t t = t0, k = 0; t < t1; ++t) {
      for (int64_t r = 0; r < j.active[t]; ++r, ++k)
        row[k] = i == 0 ? row_of(j.x, t, r) : i == 1 ? h_before(time(t), r) : kept_row(f, t, r) + (i == 2 ? Q_AT : HIDDEN_AT) * Hp;
    }
  }

  void input_gradient(const Backward& f, int64_t t0, int64_t t1, int64_t base, int64_t tokens) const {
    if (!j.dx.data) return;
    const int64_t all_blocks = ceil_div(j.I, L);
    const bool by_columns = !f.w_ih.packed && all_blocks >= w.count;  // so that weights as they stand are read once
    const Range own = by_columns ? Range{0, tokens} : share(tokens, w.id, w.count);
    const Range part = by_columns ? share(all_blocks, w.id, w.count) : Range{0, all_blocks};
    Columns columns = f.w_ih;
    columns.column = part.begin * L, columns.width = least(part.end * L, j.I) - columns.column;
    int64_t n = 0;
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t k = most(own.begin, j.start[t] - base); k < least(own.end, j.start[t + 1] - base); ++k, ++n) {
        f.from[n] = f.da + k * da_pitch();
        f.to[n] = out_row(j.dx, t, k - (j.start[t] - base));
      }
    send_back(f, columns, n, f.zeros, columns.column, false);
  }

  // db += Σ da and dp += Σ da·c: sums over a chunk's tokens, in their order; columns are split among the workers.
  void vector_gradients(const Backward& f, int64_t t0, int64_t t1, int64_t tokens, bool fresh) const {
    const auto add = [fresh](void* to, int64_t i, T value) { out(to)[i] = (fresh ? T(0) : out(to)[i]) + value; };
    if (j.db_ih || j.db_hh) {
      const Range m = column_sums(f, f.da, da_pitch(), PRE * H, tokens);
      for (int64_t i = m.begin; i < m.end; ++i) {
        const int64_t slot = i / H, at = Cell::GATE[slot] * H + i % H;
        if (j.db_ih && slot < X) add(j.db_ih, at, f.sums[i]);
        if (j.db_hh && slot >= EARLY) add(j.db_hh, at, f.sums[i]);
      }
    }
    if (j.db_hr) {
      const Range m = column_sums(f, f.dy_total, dy_pitch(), j.R, tokens);
      for (int64_t i = m.begin; i < m.end; ++i) add(j.db_hr, i, f.sums[i]);
    }
    if constexpr (Cell::PEEP > 0) {
      if (!j.dpeep) return;
      const Range own = share(ceil_div(H, L), w.id, w.count);
      for (int64_t b = own.begin; b < own.end; ++b) {
        const int m = lanes(b);
        V sum[Cell::PEEP];
        for (int i = 0; i < Cell::PEEP; ++i) sum[i] = fresh ? all(T(0)) : load(out(j.dpeep) + i * H + b * L, m);
        const T* da = f.da + b * L;
        for (int64_t t = t0; t < t1; ++t)
          for (int64_t r = 0; r < j.active[t]; ++r, da += da_pitch()) {
            V d[PRE], dp[Cell::PEEP];
            for (int k = 0; k < PRE; ++k) d[k] = load(da + k * H, m);
            Cell::template peephole_gradient<V>(d, load(c_before(time(t), r) + b * L, m), load(tape_c(t, r) + b * L), dp);
            for (int i = 0; i < Cell::PEEP; ++i) sum[i] = sum[i] + dp[i];
          }
        for (int i = 0; i < Cell::PEEP; ++i) store(out(j.dpeep) + i * H + b * L, sum[i], m);
      }
    }
  }
  Range column_sums(const Backward& f, const T* from, int64_t from_pitch, int64_t columns, int64_t tokens) const {
    const Range own = share(ceil_div(columns, L), w.id, w.count);
    const Range m = {own.begin * L, least(own.end * L, columns)};
    for (int64_t i = m.begin; i < m.end; ++i) f.sums[i] = T(0);
    for (int64_t k = 0; k < tokens; ++k)
      for (int64_t i = m.begin; i < m.end; i += L) {
        const int n = static_cast<int>(least(L, m.end - i));
        store(f.sums + i, load(f.sums + i) + load(from + k * from_pitch + i, n));
      }
    return m;
  }

  // dW += daᵀ·operand for slots [s0, s1): rows of the weights are split among the workers.
  void weight_gradient(const Backward& f, int operand, int64_t m0, int64_t m1, int64_t t0, int64_t t1, int64_t tokens, void* weights,
                       bool by_gate, bool fresh) const {
    const int64_t width = operand_width(operand);
    const Range tiles = share(ceil_div(m1 - m0, PACKED_ROWS), w.id, w.count);
    const int64_t begin = m0 + tiles.begin * PACKED_ROWS, end = least(m1, m0 + tiles.end * PACKED_ROWS);
    if (!weights || begin >= end) return;
    const T *const a = by_gate ? f.da : f.dy_total, *const packed = by_gate ? f.a_packed : f.dy_packed;
    const bool as_is = as_they_stand(tokens), packs = !as_is && multiply.packs_columns();
    const int64_t step = packs ? PACKED_ROWS : by_gate ? da_pitch() : dy_pitch();
    for (int64_t m = begin; m < end; ++m) {
      f.from[m - begin] = packs ? packed + m / PACKED_ROWS * PACKED_ROWS * elements(tokens) + m % PACKED_ROWS : a + m;
      f.to[m - begin] = out(weights) + (by_gate ? Cell::GATE[m / H] * H + m % H : m) * width;
    }
    if (as_is) {
      const T* row[COMBINED_ROWS];
      operand_rows(f, operand, t0, t1, row);
      return combine_rows(end - begin, f.from, step, tokens, row, width, fresh, fresh && j.around, f.to);
    }
    const Panels<T> p(width, 1, elements(tokens));
    const T* const first = fresh ? f.zeros : nullptr;
    // Where the operand stays in the second-level cache, a few rows after the other, so that each is written from one end to the other.
    const bool small = p.size() * static_cast<int64_t>(sizeof(T)) <= PANEL_BYTES;
    const int64_t height = small ? REGISTERS == 32 ? 4 : PACKED_ROWS : end - begin;
    for (int64_t m = 0; m < end - begin; m += height)
      for (int64_t panel = 0; panel < p.count(); ++panel)
        multiply.multiply(p.nv(panel), p.tail(panel), least(height, end - begin - m), p.K, f.from + m, 0, step,
                          f.operand[operand] + p.at(panel), first, f.to + m, panel * MAX_NV * L);
  }

  void parameter_gradients(const Backward& f, int64_t t0, int64_t t1, int64_t tokens, bool fresh) const {
    weight_gradient(f, 0, 0, X * H, t0, t1, tokens, j.dw_ih, true, fresh);
    weight_gradient(f, 1, EARLY * H, LATE * H, t0, t1, tokens, j.dw_hh, true, fresh);
    if constexpr (RESETS_FIRST) weight_gradient(f, 2, LATE * H, PRE * H, t0, t1, tokens, j.dw_hh, true, fresh);
    if (j.projected) weight_gradient(f, 3, 0, j.R, t0, t1, tokens, j.dw_hr, false, fresh);
  }
};

}  // namespace

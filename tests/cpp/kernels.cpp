// kernels.cpp: laws of the kernels, asked through the border (kernels.hpp) as any caller would, for every target that this machine can run.
//
//   integers are exact      an identity or relu RNN on small integers equals int64 loops, forward and backward, to the last bit: packing,
//                           tails, lengths, resets, projection, output taps, direction, threads
//   workers change nothing  every cell and dtype gives the same bits with 1, 2, 3 and 4 workers, however they share the job, with packs
//   kept
//                           or not and a long or a short tape; and so do products in bfloat16 and int8
//
// Every buffer is a heap block of exactly the size the border asks for, and inputs past a row's end are NaN, so that AddressSanitizer sees
// a step too far and a test sees a value that should not have been read. Knows the border alone.
#include "../../csrc/kernels.hpp"

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"

namespace {

using namespace rnnfast;

struct Shape {
  const char* why;
  int64_t T, B, I, H;
  int64_t R = 0;  // 0: not projected
  int64_t taps = 1;
  bool ragged = false, resets = false, reversed = false;
};

// Resets with output taps are not the kernels' business: their callers split the call there.
const Shape SHAPES[] = {
    {"smallest", 1, 1, 1, 1},
    {"no time", 0, 3, 2, 5},
    {"no batch", 4, 0, 2, 5},
    {"whole registers", 5, 8, 16, 64},
    {"unit tail", 6, 5, 7, 37},
    {"prime batch", 4, 31, 3, 17},
    {"one row", 9, 1, 33, 130},
    {"one step of one row", 1, 1, 70, 130},
    {"one step of few rows", 1, 7, 257, 66},
    {"one step, projected", 1, 5, 33, 70, 35},
    {"short chunks of many rows", 3, 300, 2, 9, 5, 1, true},
    {"long", 300, 5, 4, 40},
    {"reversed", 7, 4, 5, 19, 0, 1, false, false, true},
    {"ragged", 9, 13, 6, 21, 0, 1, true},
    {"resets", 8, 6, 5, 18, 0, 1, false, true},
    {"ragged, reset and reversed", 9, 11, 6, 20, 0, 1, true, true, true},
    {"projected", 6, 7, 5, 35, 19},
    {"projected wider", 4, 5, 3, 9, 21},
    {"projected, ragged, reset and reversed", 8, 9, 4, 23, 7, 1, true, true, true},
    {"taps", 10, 6, 3, 16, 0, 3},
    {"taps of one output", 30, 4, 5, 12, 1, 6},
    {"taps, ragged", 12, 7, 5, 18, 2, 4, true},
};

// What a job reads; the integers are chosen so that every sum stays exact in float32.
struct Problem {
  Shape s;
  int64_t G, S, R, events = 0;
  std::vector<int64_t> lengths, order, active, start, time, reset;
  std::vector<int64_t> w_ih, w_hh, b_ih, b_hh, peep, w_hr, b_hr, x, dy, h_0, c_0, fresh_h, fresh_c, dh_T, dc_T;

  Problem(const Shape& shape, int gate_count) : s(shape), G(gate_count), S(0), R(shape.R ? shape.R : shape.H) {
    std::mt19937 draw(20260101);
    auto integers = [&](int64_t n, int64_t bound) {
      std::vector<int64_t> v(static_cast<size_t>(n));
      for (int64_t& e : v) e = static_cast<int64_t>(draw() % static_cast<uint32_t>(2 * bound + 1)) - bound;
      return v;
    };
    // One ±1 a row, in different columns as far as they go: sums grow no faster than linearly in time.
    auto sparse = [&](int64_t rows, int64_t columns) {
      std::vector<int64_t> v(static_cast<size_t>(rows * columns), 0), at(static_cast<size_t>(columns));
      std::iota(at.begin(), at.end(), int64_t{0});
      std::shuffle(at.begin(), at.end(), draw);
      for (int64_t r = 0; r < rows; ++r) v[static_cast<size_t>(r * columns + at[static_cast<size_t>(r % columns)])] = draw() % 2 ? 1 : -1;
      return v;
    };
    S = R * s.taps;
    lengths.assign(static_cast<size_t>(s.B), s.T);
    if (s.ragged)
      for (size_t b = 0; b < lengths.size(); ++b) lengths[b] = static_cast<int64_t>(draw() % static_cast<uint32_t>(s.T + 1));
    order.resize(lengths.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return lengths[static_cast<size_t>(a)] > lengths[static_cast<size_t>(b)]; });
    start.push_back(0);
    for (int64_t t = 0; t < s.T; ++t) {
      active.push_back(std::count_if(lengths.begin(), lengths.end(), [&](int64_t length) { return length > t; }));
      start.push_back(start.back() + active.back());
      time.push_back(t);
    }
    reset.assign(static_cast<size_t>(s.T * s.B), -1);
    if (s.resets)
      for (int64_t t = 0; t < s.T; ++t)
        for (int64_t b = 0; b < s.B; ++b)
          if (draw() % 4 == 0 && t < lengths[static_cast<size_t>(b)]) reset[static_cast<size_t>(t * s.B + b)] = events++;

    for (int64_t g = 0; g < G; ++g) {
      const std::vector<int64_t> block = sparse(s.H, S);
      w_hh.insert(w_hh.end(), block.begin(), block.end());
    }
    w_ih = integers(G * s.H * s.I, 2), b_ih = integers(G * s.H, 3), b_hh = integers(G * s.H, 3), peep = integers(3 * s.H, 1);
    if (s.R) w_hr = sparse(R, s.H), b_hr = integers(R, 2);
    x = integers(s.T * s.B * s.I, 3), dy = integers(s.T * s.B * R, 3);
    h_0 = integers(s.B * S, 5), c_0 = integers(s.B * s.H, 5), fresh_h = integers(S, 5), fresh_c = integers(s.H, 5);
    dh_T = integers(s.B * S, 3), dc_T = integers(s.B * s.H, 3);
  }
  int64_t at(int64_t t, int64_t b) const { return t * s.B + b; }
};

// All that a job writes. Parameter gradients start at 1, because they are added to.
template <class T>
struct Results {
  std::vector<T> y, cells, h_T, c_T, dx, dh_0, dc_0, dreset_h, dreset_c, dw_ih, dw_hh, db_ih, db_hh, dpeep, dw_hr, db_hr;

  explicit Results(const Problem& p) {
    const Shape& s = p.s;
    auto fill = [](std::vector<T>& v, int64_t n, int value) { v.assign(static_cast<size_t>(n), static_cast<T>(value)); };
    fill(y, s.T * s.B * p.R, 0), fill(cells, s.T * s.B * s.H, 0), fill(h_T, s.B * p.S, 0), fill(c_T, s.B * s.H, 0);
    fill(dx, s.T * s.B * s.I, 0), fill(dh_0, s.B * p.S, 0), fill(dc_0, s.B * s.H, 0);
    fill(dreset_h, p.events * p.S, 0), fill(dreset_c, p.events * s.H, 0);
    fill(dw_ih, p.G * s.H * s.I, 1), fill(dw_hh, p.G * s.H * p.S, 1), fill(db_ih, p.G * s.H, 1), fill(db_hh, p.G * s.H, 1);
    fill(dpeep, 3 * s.H, 1), fill(dw_hr, s.R ? p.R * s.H : 0, 1), fill(db_hr, s.R ? p.R : 0, 1);
  }
  template <class F>
  void each(F f) const {
    f("y", y), f("cells", cells), f("h_T", h_T), f("c_T", c_T), f("dx", dx), f("dh_0", dh_0), f("dc_0", dc_0), f("dreset_h", dreset_h);
    f("dreset_c", dreset_c), f("dw_ih", dw_ih), f("dw_hh", dw_hh), f("db_ih", db_ih), f("db_hh", db_hh), f("dpeep", dpeep);
    f("dw_hr", dw_hr), f("db_hr", db_hr);
  }
};

class Barrier {
 public:
  explicit Barrier(int count_) : count(count_) {}
  static void wait(void* barrier) { static_cast<Barrier*>(barrier)->wait(); }

 private:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const int mine = round;
    if (++arrived == count) {
      arrived = 0, ++round;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return round != mine; });
    }
  }
  int count, arrived = 0, round = 0;
  std::mutex mutex;
  std::condition_variable all_here;
};

// A block of exactly this size, full of NaN: nobody may count on zeros.
struct Block {
  explicit Block(size_t bytes) {
    if (posix_memalign(&at, 64, std::max<size_t>(bytes, 64)) != 0) std::abort();
    std::memset(at, 0xff, bytes);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { std::free(at); }
  void* at = nullptr;
};

template <class F>
void with_workers(int count, int row_groups, const Block& packs, size_t scratch_bytes, F f) {
  const Block scratch(scratch_bytes);
  Barrier barrier(count);
  std::vector<std::thread> others;
  auto work = [&](int id) { f(Worker{id, count, row_groups, packs.at, scratch.at, Barrier::wait, &barrier}); };
  for (int id = 1; id < count; ++id) others.emplace_back(work, id);
  work(0);
  for (std::thread& thread : others) thread.join();
}

// What a caller may ask for beside the job itself.
struct Way {
  const char* name;
  Compute compute = OWN;
  bool recompute = false, kept = false;
  bool written = false;  // gradients are not added but written, around the caches, and h_0's is not asked for
};
const Way PLAIN = {"plain"}, WAYS[] = {{"short tape", OWN, true},
                                       {"kept packs", OWN, false, true},
                                       {"written", OWN, false, false, true},
                                       {"written, short tape", OWN, true, false, true},
                                       {"bfloat16", BFLOAT16},
                                       {"bfloat16, short tape, kept packs", BFLOAT16, true, true},
                                       {"int8", INT8},
                                       {"int8, kept packs", INT8, false, true}};

// `divisor` turns the integers into ordinary weights, for the cells that are no integer functions.
template <class T>
Results<T> run(const Kernels& k, CellKind kind, const Problem& p, int workers, int row_groups, int divisor, const Way& way = PLAIN) {
  const Shape& s = p.s;
  const Dtype dtype = sizeof(T) == 4 ? FLOAT32 : FLOAT64;
  std::vector<std::vector<T>> copies;
  copies.reserve(32);
  auto copy = [&](const std::vector<int64_t>& v, int64_t width = 0) -> T* {  // width: of a (T, B, width) array, NaN past each row's end
    std::vector<T> c(v.size());
    for (size_t i = 0; i < v.size(); ++i) c[i] = static_cast<T>(v[i]) / static_cast<T>(divisor);
    for (int64_t t = 0; width && t < s.T; ++t)
      for (int64_t b = 0; b < s.B; ++b)
        if (t >= p.lengths[static_cast<size_t>(b)]) std::fill_n(c.begin() + p.at(t, b) * width, width, std::numeric_limits<T>::quiet_NaN());
    copies.push_back(std::move(c));
    return copies.back().data();
  };
  Results<T> r(p);
  auto tokens = [&](T* data, int64_t width) { return Tokens{data, s.B * width, width}; };
  const bool lstm = kind == LSTM || kind == LSTM_PEEPHOLE, own_c = lstm || (s.R && carries(kind));
  Job j{};
  j.T = s.T, j.B = s.B, j.I = s.I, j.H = s.H, j.R = p.R, j.taps = s.taps, j.projected = s.R != 0, j.reversed = s.reversed;
  j.active = p.active.data(), j.start = p.start.data(), j.time = p.time.data(), j.index = p.order.data();
  j.reset = s.resets ? p.reset.data() : nullptr;
  j.w_ih = copy(p.w_ih), j.w_hh = copy(p.w_hh), j.b_ih = copy(p.b_ih), j.b_hh = copy(p.b_hh);
  if (kind == LSTM_PEEPHOLE) j.peep = copy(p.peep), j.dpeep = r.dpeep.data();
  if (s.R) j.w_hr = copy(p.w_hr), j.b_hr = copy(p.b_hr), j.dw_hr = r.dw_hr.data(), j.db_hr = r.db_hr.data();
  j.x = tokens(copy(p.x, s.I), s.I), j.dy = tokens(copy(p.dy, p.R), p.R);
  j.y = tokens(r.y.data(), p.R), j.dx = tokens(r.dx.data(), s.I);
  if (lstm) j.cells = tokens(r.cells.data(), s.H);
  j.h_0 = copy(p.h_0), j.fresh_h = copy(p.fresh_h), j.dh_T = copy(p.dh_T);
  j.h_T = r.h_T.data(), j.dh_0 = r.dh_0.data(), j.dreset_h = r.dreset_h.data();
  if (carries(kind)) {  // a GRU's c is its h, unless it is projected
    j.c_0 = own_c ? copy(p.c_0) : j.h_0, j.fresh_c = own_c ? copy(p.fresh_c) : j.fresh_h, j.dc_T = own_c ? copy(p.dc_T) : nullptr;
    j.c_T = r.c_T.data(), j.dc_0 = r.dc_0.data(), j.dreset_c = r.dreset_c.data();
  }
  j.dw_ih = r.dw_ih.data(), j.dw_hh = r.dw_hh.data(), j.db_ih = r.db_ih.data(), j.db_hh = r.db_hh.data();

  j.compute = way.compute, j.recompute = way.recompute, j.kept = way.kept;

  const Block packs(k.packs_size(kind, dtype, j, workers, row_groups));
  auto forward = [&](void* tape, bool packed) {
    j.tape = tape, j.packed = packed;
    with_workers(workers, row_groups, packs, k.scratch_size(kind, dtype, j, workers, row_groups, false),
                 [&](const Worker& w) { k.forward(kind, dtype, j, w); });
  };
  forward(nullptr, false);
  if (way.compute == INT8) {
    for (auto* gradient : {&r.dx, &r.dh_0, &r.dc_0, &r.dreset_h, &r.dreset_c}) std::fill(gradient->begin(), gradient->end(), T(0));
    return r;
  }
  const Results<T> inference = r;
  r.y.assign(r.y.size(), T(0));
  std::vector<T> tape(k.tape_size(kind, dtype, j));
  T nowhere = 0;
  forward(tape.empty() ? &nowhere : tape.data(), true);  // with a tape, and with the packs of the call before
  CHECK(r.y == inference.y && r.h_T == inference.h_T && r.c_T == inference.c_T && r.cells == inference.cells);
  const Block none(0);
  if (way.written) j.overwrite = j.around = true, j.dh_0 = nullptr;
  with_workers(workers, row_groups, none, k.scratch_size(kind, dtype, j, workers, row_groups, true),
               [&](const Worker& w) { k.backward(kind, dtype, j, w); });
  return r;
}

// The same in int64, one row and one unit after another.
Results<int64_t> by_hand(const Problem& p, bool relu) {
  const Shape& s = p.s;
  const size_t H = static_cast<size_t>(s.H), I = static_cast<size_t>(s.I), R = static_cast<size_t>(p.R), S = static_cast<size_t>(p.S);
  using Row = std::vector<int64_t>;
  struct Step {
    int64_t t;
    Row h, hidden;
  };
  Results<int64_t> r(p);
  for (int64_t b = 0; b < s.B; ++b) {
    const int64_t length = p.lengths[static_cast<size_t>(b)];
    Row h(p.h_0.begin() + b * p.S, p.h_0.begin() + (b + 1) * p.S);
    std::vector<Step> steps;
    for (int64_t n = 0; n < length; ++n) {
      const int64_t t = s.reversed ? length - 1 - n : n;
      if (p.reset[static_cast<size_t>(p.at(t, b))] >= 0) h = p.fresh_h;
      Row hidden(H), y(R);
      for (size_t u = 0; u < H; ++u) {
        int64_t a = p.b_ih[u] + p.b_hh[u];
        for (size_t i = 0; i < I; ++i) a += p.w_ih[u * I + i] * p.x[static_cast<size_t>(p.at(t, b)) * I + i];
        for (size_t i = 0; i < S; ++i) a += p.w_hh[u * S + i] * h[i];
        hidden[u] = relu ? std::max<int64_t>(a, 0) : a;
      }
      for (size_t o = 0; o < R; ++o) {
        y[o] = s.R ? p.b_hr[o] : hidden[o];
        for (size_t u = 0; s.R && u < H; ++u) y[o] += p.w_hr[o * H + u] * hidden[u];
        r.y[static_cast<size_t>(p.at(t, b)) * R + o] = y[o];
      }
      steps.push_back({t, h, hidden});
      h.insert(h.begin(), y.begin(), y.end());
      h.resize(S);
    }
    std::copy(h.begin(), h.end(), r.h_T.begin() + b * p.S);

    Row dh(p.dh_T.begin() + b * p.S, p.dh_T.begin() + (b + 1) * p.S);
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
      const size_t token = static_cast<size_t>(p.at(step->t, b));
      Row dy(R), before(S, 0);
      for (size_t o = 0; o < R; ++o) dy[o] = p.dy[token * R + o] + dh[o];
      for (size_t i = R; i < S; ++i) before[i - R] = dh[i];
      for (size_t o = 0; s.R && o < R; ++o) r.db_hr[o] += dy[o];
      for (size_t u = 0; u < H; ++u) {
        int64_t da = s.R ? 0 : dy[u];
        for (size_t o = 0; s.R && o < R; ++o) da += p.w_hr[o * H + u] * dy[o], r.dw_hr[o * H + u] += dy[o] * step->hidden[u];
        if (relu && step->hidden[u] <= 0) da = 0;
        r.db_ih[u] += da, r.db_hh[u] += da;
        for (size_t i = 0; i < I; ++i) {
          r.dw_ih[u * I + i] += da * p.x[token * I + i];
          r.dx[token * I + i] += da * p.w_ih[u * I + i];
        }
        for (size_t i = 0; i < S; ++i) r.dw_hh[u * S + i] += da * step->h[i], before[i] += da * p.w_hh[u * S + i];
      }
      dh = before;
      if (const int64_t event = p.reset[token]; event >= 0) {
        std::copy(dh.begin(), dh.end(), r.dreset_h.begin() + event * p.S);
        dh.assign(S, 0);
      }
    }
    std::copy(dh.begin(), dh.end(), r.dh_0.begin() + b * p.S);
  }
  return r;
}

struct Team {
  int workers, row_groups;
};
const Team TEAMS[] = {{1, 1}, {2, 1}, {2, 2}, {3, 1}, {3, 3}, {4, 2}};

template <class T>
void integers_are_exact(const Kernels& k) {
  for (const Shape& s : SHAPES) {
    const Problem p(s, 1);
    for (const CellKind kind : {RNN_IDENTITY, RNN_RELU}) {
      const Results<int64_t> expected = by_hand(p, kind == RNN_RELU);
      std::vector<const std::vector<int64_t>*> all;
      expected.each([&](const char*, const std::vector<int64_t>& v) {
        all.push_back(&v);
        CHECK(std::all_of(v.begin(), v.end(), [](int64_t value) { return std::abs(value) < (1 << 24); }));
      });
      for (const Team& team : TEAMS) {
        const Results<T> found = run<T>(k, kind, p, team.workers, team.row_groups, 1);
        size_t next = 0;
        found.each([&](const char* name, const std::vector<T>& v) {
          const std::vector<int64_t>& e = *all[next++];
          size_t wrong = 0;
          for (size_t i = 0; i < v.size(); ++i) wrong += v[i] != static_cast<T>(e[i]);
          if (!CHECK(v.size() == e.size() && wrong == 0))
            std::printf("  %s float%d, kind %d, %s, %d workers in %d row groups: %zu of %zu values of %s\n", k.target, int(8 * sizeof(T)),
                        kind, s.why, team.workers, team.row_groups, wrong, v.size(), name);
        });
      }
    }
  }
}

template <class T>
void same(const Kernels& k, CellKind kind, const Shape& s, const Team& team, const Way& way, const Results<T>& found,
          const Results<T>& expected) {
  std::vector<const std::vector<T>*> all;
  expected.each([&](const char*, const std::vector<T>& v) { all.push_back(&v); });
  size_t next = 0;
  found.each([&](const char* name, const std::vector<T>& v) {
    const std::vector<T>& e = *all[next++];
    const bool finite = std::none_of(v.begin(), v.end(), [](T value) { return value != value; });
    if (!CHECK(finite && (v.empty() || std::memcmp(v.data(), e.data(), v.size() * sizeof(T)) == 0)))
      std::printf("  %s float%d, kind %d, %s, %s, %d workers in %d row groups: %s%s\n", k.target, int(8 * sizeof(T)), kind, s.why, way.name,
                  team.workers, team.row_groups, name, finite ? "" : " is NaN");
  });
}

template <class T>
void workers_change_nothing(const Kernels& k) {
  for (int kind_number = 0; kind_number < CELL_KINDS; ++kind_number) {
    const CellKind kind = static_cast<CellKind>(kind_number);
    for (const Shape& s : SHAPES) {
      if (kind == GRU_RESET_BEFORE && (s.R || s.taps > 1)) continue;  // not defined: the candidate's operand is H wide
      if (kind != RNN_TANH && kind != RNN_SIGMOID && s.taps > 1) continue;
      const Problem p(s, gates(kind));
      const Results<T> one = run<T>(k, kind, p, 1, 1, 8);
      for (const Team& team : TEAMS) {
        if (team.workers == 1) continue;
        same(k, kind, s, team, PLAIN, run<T>(k, kind, p, team.workers, team.row_groups, 8), one);
      }
      for (const Way& way : WAYS) {
        if (way.compute != OWN && sizeof(T) == 8) continue;
        const bool as_plain = way.compute == OWN && !way.written;  // what is kept, and when, changes nothing
        const Results<T> alone = as_plain ? one : run<T>(k, kind, p, 1, 1, 8, way);
        for (const Team& team : {TEAMS[0], TEAMS[2], TEAMS[3]})
          same(k, kind, s, team, way, run<T>(k, kind, p, team.workers, team.row_groups, 8, way), alone);
      }
    }
  }
}

}  // namespace

int main() {
  for (int i = 0; i < target_count(); ++i) {
    const int before = test::failed;
    integers_are_exact<float>(target(i));
    integers_are_exact<double>(target(i));
    workers_change_nothing<float>(target(i));
    workers_change_nothing<double>(target(i));
    std::printf("%s: %s\n", target(i).target, test::failed == before ? "holds" : "FAILS");
  }
  return test::report();
}

// dual.cpp: every Cell::backward is the exact derivative of its Cell::forward.
//
// The number type is a dual number over the prime field of 2^61 − 1 elements, so that no rounding and no tolerance comes in. All that
// a derivative may use of sigmoid and tanh is σ' = σ (1 − σ) and tanh' = 1 − tanh²: here they are arbitrary functions that carry
// these slopes. forward and backward are then polynomials in random field elements, and two different polynomials of degree d agree
// at a random point with probability at most d / 2^61. Includes cells.hpp alone: these are the equations, not the kernels.
#include <cstdint>

#include "../../csrc/cells.hpp"
#include "check.hpp"

namespace {

constexpr std::uint64_t P = (std::uint64_t{1} << 61) - 1;

struct Field {
  std::uint64_t v = 0;  // 0 <= v < P
  friend Field operator+(Field x, Field y) {
    const std::uint64_t sum = x.v + y.v;
    return {sum >= P ? sum - P : sum};
  }
  friend Field operator-(Field x, Field y) { return {x.v >= y.v ? x.v - y.v : x.v + P - y.v}; }
  friend Field operator*(Field x, Field y) {
    __extension__ typedef unsigned __int128 Wide;
    const Wide product = static_cast<Wide>(x.v) * y.v;
    const std::uint64_t low = static_cast<std::uint64_t>(product & P), high = static_cast<std::uint64_t>(product >> 61);
    return Field{low >= P ? low - P : low} + Field{high};
  }
  friend bool operator==(Field x, Field y) { return x.v == y.v; }
};

std::uint64_t mix(std::uint64_t x) {  // splitmix64's finalizer
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

Field draw() {
  static std::uint64_t state = 1;
  return {mix(state += 0x9e3779b97f4a7c15u) % P};
}

// value + slope ε with ε² = 0
struct Dual {
  Field value, slope;
  friend Dual operator+(Dual x, Dual y) { return {x.value + y.value, x.slope + y.slope}; }
  friend Dual operator-(Dual x, Dual y) { return {x.value - y.value, x.slope - y.slope}; }
  friend Dual operator*(Dual x, Dual y) { return {x.value * y.value, x.value * y.slope + x.slope * y.value}; }
};

struct Mathematics {
  static constexpr Field one{1};
  static bool positive(Field x) { return x.v != 0 && x.v < P / 2; }

  static Field sigmoid(Field x) { return {mix(x.v + 1) % P}; }
  static Field tanh(Field x) { return {mix(x.v + 2) % P}; }
  static Field relu(Field x) { return positive(x) ? x : Field{}; }
  static Field where_positive(Field x, Field v) { return positive(x) ? v : Field{}; }

  static Dual sigmoid(Dual x) {
    const Field s = sigmoid(x.value);
    return {s, x.slope * (s * (one - s))};
  }
  static Dual tanh(Dual x) {
    const Field t = tanh(x.value);
    return {t, x.slope * (one - t * t)};
  }
  static Dual relu(Dual x) { return positive(x.value) ? x : Dual{}; }
  static Dual where_positive(Dual x, Dual v) { return positive(x.value) ? v : Dual{}; }
};

using M = Mathematics;

// What one unit reads in one step; `seed` is which of them carries slope 1: 0.. the a, then the p, then c_{t-1}.
template <class Cell>
struct Inputs {
  static constexpr int COUNT = Cell::PRE + Cell::PEEP + 1;
  Field a[Cell::PRE], p[Cell::PEEP + 1], c_prev;

  void randomize() {
    for (Field& x : a) x = draw();
    for (Field& x : p) x = draw();
    c_prev = draw();
  }
};

Dual lift(Field x, bool carries) { return {x, Field{carries ? 1u : 0u}}; }

// L = dh · h_t + dc · c_t, for any dh and dc. Backward's da, dp and dc_{t-1} against the slopes of L.
template <class Cell>
void backward_is_the_derivative_of_forward() {
  for (int trial = 0; trial < 1000; ++trial) {
    Inputs<Cell> in;
    in.randomize();
    const Field dh = draw(), dc_t = Cell::CARRIES ? draw() : Field{};

    Field a[Cell::PRE], kept[Cell::KEPT], c{}, h{};
    for (int s = 0; s < Cell::PRE; ++s) a[s] = in.a[s];
    Cell::template forward<M>(a, in.p, in.c_prev, kept, c, h);
    Field da[Cell::PRE], dc = dc_t;
    Cell::template backward<M>(kept, in.p, in.c_prev, c, dh, dc, da);
    Field dp[Cell::PEEP + 1] = {};
    if constexpr (Cell::PEEP > 0) Cell::peephole_gradient(da, in.c_prev, c, dp);

    for (int seed = 0; seed < Inputs<Cell>::COUNT; ++seed) {
      Dual a2[Cell::PRE], p2[Cell::PEEP + 1], kept2[Cell::KEPT], c2{}, h2{};
      for (int s = 0; s < Cell::PRE; ++s) a2[s] = lift(in.a[s], seed == s);
      for (int k = 0; k < Cell::PEEP; ++k) p2[k] = lift(in.p[k], seed == Cell::PRE + k);
      const Dual c_prev2 = lift(in.c_prev, seed == Cell::PRE + Cell::PEEP);
      Cell::template forward<M>(a2, p2, c_prev2, kept2, c2, h2);
      CHECK(h2.value == h && c2.value == c);
      const Field derivative = dh * h2.slope + dc_t * c2.slope;
      if (seed < Cell::PRE) {
        CHECK(da[seed] == derivative);
      } else if (seed < Cell::PRE + Cell::PEEP) {
        CHECK(dp[seed - Cell::PRE] == derivative);
      } else if (Cell::CARRIES) {
        CHECK(dc == derivative);
      }
    }
  }
}

// The reset-before GRU in full: q = reset(a, c_{t-1}), then a_n += u q, as the product with U_n does, then forward.
void reset_before_is_differentiated_through_the_reset() {
  using Cell = GruResetBefore;
  for (int trial = 0; trial < 1000; ++trial) {
    Inputs<Cell> in;
    in.randomize();
    const Field u = draw(), dh = draw(), dc_t = draw();

    Field a[Cell::PRE], kept[Cell::KEPT], c{}, h{}, q{};
    for (int s = 0; s < Cell::PRE; ++s) a[s] = in.a[s];
    Cell::reset<M>(a, in.c_prev, q);
    a[Cell::N] = a[Cell::N] + u * q;
    Cell::forward<M>(a, in.p, in.c_prev, kept, c, h);
    Field da[Cell::PRE], dc = dc_t;
    Cell::backward<M>(kept, in.p, in.c_prev, c, dh, dc, da);
    Cell::reset_backward<M>(kept, in.c_prev, u * da[Cell::N], dc, da);

    for (int seed = 0; seed <= Cell::PRE; ++seed) {
      Dual a2[Cell::PRE], p2[1] = {}, kept2[Cell::KEPT], c2{}, h2{}, q2{};
      for (int s = 0; s < Cell::PRE; ++s) a2[s] = lift(in.a[s], seed == s);
      const Dual c_prev2 = lift(in.c_prev, seed == Cell::PRE);
      Cell::reset<M>(a2, c_prev2, q2);
      a2[Cell::N] = a2[Cell::N] + lift(u, false) * q2;
      Cell::forward<M>(a2, p2, c_prev2, kept2, c2, h2);
      const Field derivative = dh * h2.slope + dc_t * c2.slope;
      CHECK((seed < Cell::PRE ? da[seed] : dc) == derivative);
    }
  }
}

// The slots that a cell declares name every row block of torch's weights, those of x once and those of h once.
template <class Cell>
void slots_cover_the_gates() {
  bool by_x[Cell::GATES] = {}, by_h[Cell::GATES] = {};
  for (int s = 0; s < Cell::PRE; ++s) {
    CHECK(Cell::GATE[s] >= 0 && Cell::GATE[s] < Cell::GATES);
    if (s < Cell::X_SLOTS) CHECK(!by_x[Cell::GATE[s]]), by_x[Cell::GATE[s]] = true;
    if (s >= Cell::H_FIRST) CHECK(!by_h[Cell::GATE[s]]), by_h[Cell::GATE[s]] = true;
  }
  for (int g = 0; g < Cell::GATES; ++g) CHECK(by_x[g] && by_h[g]);
}

template <class Cell>
void laws() {
  slots_cover_the_gates<Cell>();
  if constexpr (Cell::LATE == Cell::PRE) backward_is_the_derivative_of_forward<Cell>();
}

}  // namespace

int main() {
  laws<Rnn<Tanh>>();
  laws<Rnn<Relu>>();
  laws<Rnn<Sigmoid>>();
  laws<Rnn<Identity>>();
  laws<Lstm<false>>();
  laws<Lstm<true>>();
  laws<GruResetAfter>();
  laws<GruResetBefore>();
  reset_before_is_differentiated_through_the_reset();
  return test::report();
}

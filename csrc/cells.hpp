// The equations: one unit, one time step, forward and backward, each written once for every number type and device.
//
// V is a number: a SIMD register in the CPU kernels, a float on a GPU, a dual number or an integer in the tests.
// M is the mathematics: M::sigmoid, M::tanh, M::relu(x) = max(x, 0), M::where_positive(x, v) = 0 where x <= 0, else v.
//
//   a[PRE]      pre-activations, in the cell's own slot order   da[PRE]   their gradients
//   p[PEEP]     per-unit weights (peepholes i f o)
//   c           the state that a unit carries by itself: an LSTM's cell, a GRU's hidden value; unused by a plain RNN
//   h           what the unit shows to the others
//   kept[KEPT]  what backward needs of forward, beside c_{t-1} and c_t
//
// A slot holds one affine sum. Slots [0, X_SLOTS) read the input x; slots [H_FIRST, PRE) read the recurrent operand, which for slots from
// LATE on is not h_{t-1} but the q that `reset` makes of the earlier slots. GATE[slot] is that slot's row block in torch's weights.
// SHOWS_CARRY: h is c. backward takes dh and dc as dL/dh_t and dL/dc_t and leaves dL/dc_{t-1} in dc. This file includes nothing and knows
// no loop, no memory and no thread.
#pragma once

#ifdef __CUDACC__
#define RNNFAST_CELL __host__ __device__ static inline
#else
#define RNNFAST_CELL __attribute__((always_inline)) static inline
#endif

namespace {

// The outer functions of a plain RNN; the derivative is read off the value: f'(a) as a function of h = f(a).
struct Tanh {
  template <class M, class V>
  RNNFAST_CELL V value(V a) {
    return M::tanh(a);  // h = tanh a
  }
  template <class M, class V>
  RNNFAST_CELL V times_slope(V h, V dh) {
    return dh - dh * (h * h);  // da = dh (1 − h²)
  }
};
struct Relu {
  template <class M, class V>
  RNNFAST_CELL V value(V a) {
    return M::relu(a);  // h = max(a, 0)
  }
  template <class M, class V>
  RNNFAST_CELL V times_slope(V h, V dh) {
    return M::where_positive(h, dh);  // da = dh [h > 0], and dh where h is NaN
  }
};
struct Sigmoid {
  template <class M, class V>
  RNNFAST_CELL V value(V a) {
    return M::sigmoid(a);  // h = σ(a)
  }
  template <class M, class V>
  RNNFAST_CELL V times_slope(V h, V dh) {
    return dh * (h - h * h);  // da = dh h (1 − h)
  }
};
struct Identity {
  template <class M, class V>
  RNNFAST_CELL V value(V a) {
    return a;
  }
  template <class M, class V>
  RNNFAST_CELL V times_slope(V, V dh) {
    return dh;
  }
};

// Elman 1990.  h_t = f(W x_t + U h_{t-1} + b)
template <class F>
struct Rnn {
  static constexpr int GATES = 1, PRE = 1, X_SLOTS = 1, H_FIRST = 0, LATE = 1, PEEP = 0, KEPT = 1;
  static constexpr int GATE[PRE] = {0};
  static constexpr bool CARRIES = false, SHOWS_CARRY = false;

  template <class M, class V>
  RNNFAST_CELL void forward(const V* a, const V*, V, V* kept, V&, V& h) {
    h = F::template value<M>(a[0]);  // h_t = f(a)
    kept[0] = h;
  }
  template <class M, class V>
  RNNFAST_CELL void backward(const V* kept, const V*, V, V, V dh, V&, V* da) {
    da[0] = F::template times_slope<M>(kept[0], dh);  // da = dh f'(a)
  }
};

// Hochreiter & Schmidhuber 1997, forget gate of Gers et al. 2000, diagonal peepholes of Gers & Schmidhuber 2000.
template <bool PEEPHOLES>
struct Lstm {
  enum { I, F, G, O };
  static constexpr int GATES = 4, PRE = 4, X_SLOTS = 4, H_FIRST = 0, LATE = 4, PEEP = PEEPHOLES ? 3 : 0, KEPT = 4;
  static constexpr int GATE[PRE] = {I, F, G, O};
  static constexpr bool CARRIES = true, SHOWS_CARRY = false;

  template <class M, class V>
  RNNFAST_CELL void forward(const V* a, const V* p, V c_prev, V* kept, V& c, V& h) {
    V a_i = a[I], a_f = a[F];
    if constexpr (PEEPHOLES) a_i = a_i + p[0] * c_prev;  // a_i ← a_i + p_i c_{t-1}
    if constexpr (PEEPHOLES) a_f = a_f + p[1] * c_prev;  // a_f ← a_f + p_f c_{t-1}
    const V i = M::sigmoid(a_i);                         // i = σ(a_i)
    const V f = M::sigmoid(a_f);                         // f = σ(a_f)
    const V g = M::tanh(a[G]);                           // g = tanh(a_g)
    c = f * c_prev + i * g;                              // c_t = f c_{t-1} + i g
    V a_o = a[O];
    if constexpr (PEEPHOLES) a_o = a_o + p[2] * c;  // a_o ← a_o + p_o c_t
    const V o = M::sigmoid(a_o);                    // o = σ(a_o)
    h = o * M::tanh(c);                             // h_t = o tanh(c_t)
    kept[I] = i, kept[F] = f, kept[G] = g, kept[O] = o;
  }
  template <class M, class V>
  RNNFAST_CELL void backward(const V* kept, const V* p, V c_prev, V c, V dh, V& dc, V* da) {
    const V i = kept[I], f = kept[F], g = kept[G], o = kept[O];
    const V tanh_c = M::tanh(c);
    const V dho = dh * o;
    da[O] = (dho - dho * o) * tanh_c;                 // h_t = o tanh(c_t):  da_o = dh tanh(c_t) o (1 − o)
    dc = dc + (dho - dho * (tanh_c * tanh_c));        //                     dc_t += dh o (1 − tanh² c_t)
    if constexpr (PEEPHOLES) dc = dc + p[2] * da[O];  // a_o sees c_t:       dc_t += p_o da_o
    const V di = dc * i, df = dc * f;
    da[I] = (di - di * i) * g;                                       // c_t = f c_{t-1} + i g:  da_i = dc g i (1 − i)
    da[F] = (df - df * f) * c_prev;                                  //                         da_f = dc c_{t-1} f (1 − f)
    da[G] = di - di * (g * g);                                       //                         da_g = dc i (1 − g²)
    dc = df;                                                         //                         dc_{t-1} = dc f
    if constexpr (PEEPHOLES) dc = dc + p[0] * da[I] + p[1] * da[F];  // a_i, a_f see c_{t-1}:  dc_{t-1} += p_i da_i + p_f da_f
  }
  // dp of one step; the sum over time and batch is the caller's.
  template <class V>
  RNNFAST_CELL void peephole_gradient(const V* da, V c_prev, V c, V* dp) {
    dp[0] = da[I] * c_prev;  // dp_i = da_i c_{t-1}
    dp[1] = da[F] * c_prev;  // dp_f = da_f c_{t-1}
    dp[2] = da[O] * c;       // dp_o = da_o c_t
  }
};

// Cho et al. 2014 as cuDNN and torch compute it: r multiplies U_n h_{t-1} + b_hn, so that n has two sums, one of x and one of h.
struct GruResetAfter {
  enum { NX, R, Z, NH };  // slots; torch's rows are r z n
  enum { KR, KZ, KN, KNH };
  static constexpr int GATES = 3, PRE = 4, X_SLOTS = 3, H_FIRST = 1, LATE = 4, PEEP = 0, KEPT = 4;
  static constexpr int GATE[PRE] = {2, 0, 1, 2};
  static constexpr bool CARRIES = true, SHOWS_CARRY = true;

  template <class M, class V>
  RNNFAST_CELL void forward(const V* a, const V*, V c_prev, V* kept, V& c, V& h) {
    const V r = M::sigmoid(a[R]);            // r = σ(a_r)
    const V z = M::sigmoid(a[Z]);            // z = σ(a_z)
    const V n = M::tanh(a[NX] + r * a[NH]);  // n = tanh(a_nx + r a_nh)
    h = c = n + z * (c_prev - n);            // h_t = (1 − z) n + z h_{t-1}
    kept[KR] = r, kept[KZ] = z, kept[KN] = n, kept[KNH] = a[NH];
  }
  template <class M, class V>
  RNNFAST_CELL void backward(const V* kept, const V*, V c_prev, V, V dh, V& dc, V* da) {
    const V r = kept[KR], z = kept[KZ], n = kept[KN];
    const V d = dh + dc;                        // h_t and the carried c_t are one value
    const V dz = d * z, dn = d - dz;            // h_t = (1 − z) n + z h_{t-1}:  dn = d (1 − z)
    da[Z] = (dz - dz * z) * (c_prev - n);       //                               da_z = d (h_{t-1} − n) z (1 − z)
    da[NX] = dn - dn * (n * n);                 // n = tanh(a_nx + r a_nh):      da_nx = dn (1 − n²)
    da[NH] = da[NX] * r;                        //                               da_nh = da_nx r
    da[R] = (da[NH] - da[NH] * r) * kept[KNH];  //                               da_r = da_nx a_nh r (1 − r)
    dc = dz;                                    //                               dh_{t-1} = d z, beside U's part
  }
};

// Cho et al. 2014, the lecture and ONNX's default: r multiplies h_{t-1} before U_n, so that n's sum must wait for r.
struct GruResetBefore {
  enum { R, Z, N };
  enum { KR, KZ, KN };
  static constexpr int GATES = 3, PRE = 3, X_SLOTS = 3, H_FIRST = 0, LATE = 2, PEEP = 0, KEPT = 3;
  static constexpr int GATE[PRE] = {0, 1, 2};
  static constexpr bool CARRIES = true, SHOWS_CARRY = true;

  // The operand of the late slot; leaves r in a[R] for forward.
  template <class M, class V>
  RNNFAST_CELL void reset(V* a, V c_prev, V& q) {
    a[R] = M::sigmoid(a[R]);  // r = σ(a_r)
    q = a[R] * c_prev;        // q = r h_{t-1}
  }
  template <class M, class V>
  RNNFAST_CELL void forward(const V* a, const V*, V c_prev, V* kept, V& c, V& h) {
    const V z = M::sigmoid(a[Z]);  // z = σ(a_z)
    const V n = M::tanh(a[N]);     // n = tanh(W x + b + U q)
    h = c = n + z * (c_prev - n);  // h_t = (1 − z) n + z h_{t-1}
    kept[KR] = a[R], kept[KZ] = z, kept[KN] = n;
  }
  template <class M, class V>
  RNNFAST_CELL void backward(const V* kept, const V*, V c_prev, V, V dh, V& dc, V* da) {
    const V z = kept[KZ], n = kept[KN];
    const V d = dh + dc;                   // h_t and the carried c_t are one value
    const V dz = d * z, dn = d - dz;       // h_t = (1 − z) n + z h_{t-1}:  dn = d (1 − z)
    da[Z] = (dz - dz * z) * (c_prev - n);  //                               da_z = d (h_{t-1} − n) z (1 − z)
    da[N] = dn - dn * (n * n);             // n = tanh(a_n):                da_n = dn (1 − n²)
    dc = dz;                               //                               dh_{t-1} = d z, beside U's part and q's
  }
  template <class M, class V>
  RNNFAST_CELL void reset_backward(const V* kept, V c_prev, V dq, V& dc, V* da) {
    const V r = kept[KR];
    const V dr = dq * r;
    da[R] = (dr - dr * r) * c_prev;  // q = r h_{t-1}:  da_r = dq h_{t-1} r (1 − r)
    dc = dc + dr;                    //                 dh_{t-1} += dq r
  }
};

}  // namespace

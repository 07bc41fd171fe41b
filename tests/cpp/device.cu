// device.cu: cells.hpp compiles as device code, every cell, forward and backward. Compiled only: nothing here runs.
#include "../../csrc/cells.hpp"

namespace {

struct Mathematics {
  __device__ static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
  __device__ static float tanh(float x) { return tanhf(x); }
  __device__ static float relu(float x) { return x < 0.0f ? 0.0f : x; }
  __device__ static float where_positive(float x, float v) { return x <= 0.0f ? 0.0f : v; }
};

template <class Cell>
__global__ void step(float* io) {  // one unit a thread
  using M = Mathematics;
  float a[Cell::PRE], p[Cell::PEEP + 1], kept[Cell::KEPT], da[Cell::PRE];
  float c = 0, h = 0, q = 0;
  float* unit = io + threadIdx.x * 16;
  for (int s = 0; s < Cell::PRE; ++s) a[s] = unit[s];
  for (int k = 0; k <= Cell::PEEP; ++k) p[k] = unit[8 + k];
  const float c_prev = unit[15];
  if constexpr (Cell::LATE < Cell::PRE) Cell::template reset<M>(a, c_prev, q), a[Cell::LATE] += q;
  Cell::template forward<M>(a, p, c_prev, kept, c, h);
  float dc = c;
  Cell::template backward<M>(kept, p, c_prev, c, h, dc, da);
  if constexpr (Cell::LATE < Cell::PRE) Cell::template reset_backward<M>(kept, c_prev, da[Cell::LATE], dc, da);
  if constexpr (Cell::PEEP > 0) Cell::peephole_gradient(da, c_prev, c, p);
  for (int s = 0; s < Cell::PRE; ++s) unit[s] = da[s] + p[0];
  unit[15] = dc;
}

}  // namespace

void every_cell(float* io) {
  step<Rnn<Tanh>><<<1, 32>>>(io);
  step<Rnn<Relu>><<<1, 32>>>(io);
  step<Rnn<Sigmoid>><<<1, 32>>>(io);
  step<Rnn<Identity>><<<1, 32>>>(io);
  step<Lstm<false>><<<1, 32>>>(io);
  step<Lstm<true>><<<1, 32>>>(io);
  step<GruResetAfter><<<1, 32>>>(io);
  step<GruResetBefore><<<1, 32>>>(io);
}

// Cells times dtypes -> one exported table of function pointers, for the CPU target whose flags this file is compiled with
// (RNNFAST_TARGET_NAME).
//
// Everything but the table sits in an anonymous namespace, uses no std:: template and has no global constructor, so that no copy of an
// inline function compiled for one CPU can be taken by the linker for another.
#include "learning.hpp"
#include "sequence.hpp"

#define RNNFAST_STRING_(x) #x
#define RNNFAST_STRING(x) RNNFAST_STRING_(x)
#define RNNFAST_TABLE_(name) kernels_##name
#define RNNFAST_TABLE(name) RNNFAST_TABLE_(name)

namespace {

using namespace rnnfast;

// Calls f with the sequence of the cell and dtype. The list of cells.
template <class T, class F>
void visit_cell(CellKind kind, const Job& job, const Worker& worker, F f) {
  switch (kind) {
    case RNN_TANH:
      return f(Sequence<Rnn<Tanh>, T>(job, worker));
    case RNN_RELU:
      return f(Sequence<Rnn<Relu>, T>(job, worker));
    case RNN_SIGMOID:
      return f(Sequence<Rnn<Sigmoid>, T>(job, worker));
    case RNN_IDENTITY:
      return f(Sequence<Rnn<Identity>, T>(job, worker));
    case LSTM:
      return f(Sequence<Lstm<false>, T>(job, worker));
    case LSTM_PEEPHOLE:
      return f(Sequence<Lstm<true>, T>(job, worker));
    case GRU:
      return f(Sequence<GruResetAfter, T>(job, worker));
    case GRU_RESET_BEFORE:
      return f(Sequence<GruResetBefore, T>(job, worker));
    case CELL_KINDS:
      return;
  }
}
template <class F>
void visit(CellKind kind, Dtype dtype, const Job& job, const Worker& worker, F f) {
  if (dtype == FLOAT32)
    visit_cell<float>(kind, job, worker, f);
  else
    visit_cell<double>(kind, job, worker, f);
}

int lanes(Dtype dtype) { return dtype == FLOAT32 ? LANES<float> : LANES<double>; }

size_t tape_size(CellKind kind, Dtype dtype, const Job& job) {
  size_t size = 0;
  visit(kind, dtype, job, Worker{0, 1, 1, nullptr, nullptr, nullptr, nullptr},
        [&](const auto& s) { size = static_cast<size_t>(s.tape_size()); });
  return size;
}

size_t packs_size(CellKind kind, Dtype dtype, const Job& job, int workers, int row_groups) {
  Arena packs(nullptr), scratch(nullptr);
  visit(kind, dtype, job, Worker{0, workers, row_groups, nullptr, nullptr, nullptr, nullptr},
        [&](const auto& s) { s.plan_forward(packs, scratch); });
  return packs.used + 64;
}

size_t scratch_size(CellKind kind, Dtype dtype, const Job& job, int workers, int row_groups, bool backward) {
  Arena arena(nullptr);
  visit(kind, dtype, job, Worker{0, workers, row_groups, nullptr, nullptr, nullptr, nullptr}, [&](const auto& s) {
    Arena packs(nullptr);
    if (backward)
      s.plan_backward(arena);
    else
      s.plan_forward(packs, arena);
  });
  return arena.used + 64;
}

double peak(Dtype dtype, Compute compute, int64_t rounds) {
  if (dtype == FLOAT64) return multiply_in_registers<Exact<double>>(rounds);
  if (compute == BFLOAT16) return multiply_in_registers<Halves>(rounds);
  if (compute == INT8) return multiply_in_registers<Bytes>(rounds);
  return multiply_in_registers<Exact<float>>(rounds);
}

void forward(CellKind kind, Dtype dtype, const Job& job, const Worker& worker) {
  visit(kind, dtype, job, worker, [](const auto& s) { s.forward(); });
}
void backward(CellKind kind, Dtype dtype, const Job& job, const Worker& worker) {
  visit(kind, dtype, job, worker, [](const auto& s) { s.backward(); });
}

void softmax(Dtype dtype, const Softmax& s, int64_t begin, int64_t end) {
  dtype == FLOAT32 ? softmax_rows<float>(s, begin, end) : softmax_rows<double>(s, begin, end);
}
void scatter(Dtype dtype, const Scatter& s, int64_t begin, int64_t end) {
  dtype == FLOAT32 ? scatter_columns<float>(s, begin, end) : scatter_columns<double>(s, begin, end);
}
void adam(Dtype dtype, const Adam& u, int64_t begin, int64_t end) {
  dtype == FLOAT32 ? adam_numbers<float>(u, begin, end) : adam_numbers<double>(u, begin, end);
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) const rnnfast::Kernels RNNFAST_TABLE(RNNFAST_TARGET);
const rnnfast::Kernels RNNFAST_TABLE(RNNFAST_TARGET) = {
    RNNFAST_TARGET_NAME, lanes, tape_size, packs_size, scratch_size, forward, backward, peak, softmax, scatter, adam};

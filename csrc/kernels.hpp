// The border between the kernels and the rest: plain structs, no templates, no Python.
//
// Dims: T time, B batch, I input, H hidden, R output width (H, or proj_size), S operand width (R · taps), G gates. One job is one direction
// of one layer over a whole call. The batch is sorted by length, longest first, so that the rows that run at time t are the first
// active[t]; `index` leads back to the caller's order. A token is one (t, row) that runs; tokens are numbered start[t] + row. Pointers are
// to float or double, as the job's table entry says; null where the thing is absent. Parameter gradients are added to, every other output
// is overwritten.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace rnnfast {

enum CellKind { RNN_TANH, RNN_RELU, RNN_SIGMOID, RNN_IDENTITY, LSTM, LSTM_PEEPHOLE, GRU, GRU_RESET_BEFORE, CELL_KINDS };
enum Dtype { FLOAT32, FLOAT64, DTYPES };
// What products multiply: numbers of the job's dtype, or in float32 their roundings, to bytes forward only. Sums are of the dtype.
enum Compute { OWN, BFLOAT16, INT8 };

// An array of tokens: element (t, row, j) is data[time[t]·step + index[row]·row + j].
struct Tokens {
  void* data;
  int64_t step, row;
};

struct Job {
  int64_t T, B, I, H, R, taps;
  Compute compute;
  bool projected;         // y = W_hr·hidden + b_hr, R wide; else R = H
  bool reversed;          // time runs from T − 1 to 0
  const int64_t* active;  // (T)      rows that run at t, never growing with t
  const int64_t* start;   // (T + 1)  tokens before t
  const int64_t* time;    // (T)      where t lies in the callers' arrays
  const int64_t* index;   // (B)      where a row lies there
  const int64_t* reset;   // (T, B)   in the caller's order: number of the reset event before this step, or -1; null without resets

  const void* w_ih;  // (G·H, I)
  const void* w_hh;  // (G·H, S)
  const void* b_ih;  // (G·H)
  const void* b_hh;  // (G·H)
  const void* peep;  // (3, H)
  const void* w_hr;  // (R, H)
  const void* b_hr;  // (R)

  Tokens x;             // (T, B, I)
  Tokens y;             // (T, B, R)
  Tokens cells;         // (T, B, H)  every step's c on request
  const void* h_0;      // (B, S)
  const void* c_0;      // (B, H)     a GRU's is its h_0 again, unless it is projected
  const void* fresh_h;  // (S)        what a reset puts
  const void* fresh_c;  // (H)
  void* h_T;            // (B, S)
  void* c_T;            // (B, H)
  void* tape;           // tape_size elements; null in inference
  bool recompute;       // the tape holds c at most, and backward computes the rest again
  bool kept;            // forward: the packs will be used again
  bool packed;          // forward: packs still holds this job's weights, from a call with as many workers a row group

  Tokens dy;         // (T, B, R)
  Tokens dx;         // (T, B, I)
  const void* dh_T;  // (B, S)
  const void* dc_T;  // (B, H)
  void* dh_0;        // (B, S)     null spares the product that makes it
  void* dc_0;        // (B, H)
  void* dreset_h;    // (events, S)
  void* dreset_c;    // (events, H)
  void *dw_ih, *dw_hh, *db_ih, *db_hh, *dpeep, *dw_hr, *db_hr;
  bool overwrite;  // the parameters' gradients are written, not added to; where there is no token, not touched
  bool around;     // few tokens' gradients are written around the caches, since these cannot hold them
};

// One of the threads that carry out a job together; each calls the kernel with its own.
struct Worker {
  int id, count;        // 0 <= id < count
  int row_groups;       // the batch is split into so many parts, the units into count / row_groups
  void* packs;          // packs_size bytes, the same for all workers, 64-byte aligned: forward's weights in the kernels' order
  void* scratch;        // scratch_size bytes, likewise
  void (*wait)(void*);  // barrier for all of the job's threads
  void* waiter;
};

// What a training step does beside the recurrent layers; arrays are contiguous and of the table entry's dtype unless their type is given.
struct Softmax {
  int64_t V;
  const void* logits;      // (N, V)
  const int64_t* targets;  // (N)     in [0, V) where the weight is not 0
  const double* weights;   // (N)     of the rows; null: `weight` for each
  double weight;
  void* gradient;         // (N, V)  null, or where it goes: may be the logits
  double *sums, *picked;  // (N)     Σ_v e^{a_v − max} and a_target − max
};
struct Scatter {  // table[rows[n]] += values[n]
  int64_t N, width;
  void* table;          // (rows, width)
  const int64_t* rows;  // (N)
  const void* values;   // (N, width)
};
struct Adam {
  void* p;               // (N)
  const void* gradient;  // (N)
  void *mean, *square;   // (N)
  double rate, beta_1, beta_2, eps;
  double decay;  // of p that the gradient takes up
  double kept;   // of p itself, 1 without decoupled decay
};

// The kernels of one CPU target.
struct Kernels {
  const char* target;
  int (*lanes)(Dtype);
  // Elements of tape; bytes of forward's packs and of scratch for so many workers.
  size_t (*tape_size)(CellKind, Dtype, const Job&);
  size_t (*packs_size)(CellKind, Dtype, const Job&, int workers, int row_groups);
  size_t (*scratch_size)(CellKind, Dtype, const Job&, int workers, int row_groups, bool backward);
  void (*forward)(CellKind, Dtype, const Job&, const Worker&);
  void (*backward)(CellKind, Dtype, const Job&, const Worker&);
  // Multiplies and adds in registers, as products do, and returns how many operations that were: the most that any product can reach.
  double (*peak)(Dtype, Compute, int64_t rounds);
  // Rows, columns or numbers [begin, end) of these.
  void (*softmax)(Dtype, const Softmax&, int64_t begin, int64_t end);
  void (*scatter)(Dtype, const Scatter&, int64_t begin, int64_t end);
  void (*adam)(Dtype, const Adam&, int64_t begin, int64_t end);
};

int gates(CellKind kind);
bool carries(CellKind kind);  // has a state c beside h: LSTMs, and GRUs inside the kernels

// dispatch.cpp: the tables that this build has and this CPU can run, best first; the one in use.
int target_count();
const Kernels& target(int i);
const Kernels& kernels();
void use_target(int i);

}  // namespace rnnfast

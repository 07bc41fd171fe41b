// The border with Python: checks every array, fills a Job, releases the GIL and calls the table of the CPU target in use.
//
// Everything that can be wrong is said here, with the name, the symbolic shape and the numbers; below this file nothing throws. NumPy owns
// every array that the caller sees; scratch is reused from call to call.
#include <pthread.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kernels.hpp"
#include "threads.hpp"

namespace py = pybind11;
using namespace rnnfast;

namespace {

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

std::string tuple_text(const std::vector<py::ssize_t>& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (shape.size() == 1 ? ",)" : ")");
}
std::vector<py::ssize_t> shape_of(const py::array& a) { return {a.shape(), a.shape() + a.ndim()}; }

// The GIL let go for the length of a block. A thread that asks for it back while Python ends is unwound by pthread_exit, which no
// destructor lets through: the process would abort. Such a thread sleeps here until the process is gone, as in Python from 3.14 on.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  ~Unlocked() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

 private:
  PyThreadState* state_;
};

constexpr int ALL = 1 << 16;  // threads: as many as thread_count says

int threads_of(int most) { return most == ALL ? thread_count() : threads_for(most); }

constexpr int64_t GRAIN = 1 << 15;  // numbers that are worth a thread

// Calls f(begin, end) for parts of [0, n) on as many threads, `most` of them, as each gets `grain` of it.
template <class F>
void divide(int64_t n, int64_t grain, F f, int most = ALL) {
  struct Parts {
    int64_t n;
    F& f;
  } parts{n, f};
  const auto each = [](void* data, int id, int count, void (*)(void*), void*) {
    const Parts& p = *static_cast<Parts*>(data);
    p.f(p.n * id / count, p.n * (id + 1) / count);
  };
  const int64_t grains = n / std::max<int64_t>(grain, 1);
  const int threads = static_cast<int>(std::clamp<int64_t>(grains, 1, threads_of(most)));
  rnnfast::run(threads > 1 && grains < 8 && team_sleeps() ? 1 : threads, each, &parts, [](void*, int) {});
}

// ---- buffers that outlive a call: fresh pages cost several per cent --------------------------------------------------------------------

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : size_(bytes), data_(std::aligned_alloc(alignment(bytes), round_up(bytes, alignment(bytes)))) {
    if (!data_) throw std::bad_alloc();
#ifdef __linux__
    if (bytes >= HUGE_PAGE) madvise(data_, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);  // may fail: then they are small
#endif
  }
  Buffer(Buffer&& o) noexcept : size_(std::exchange(o.size_, 0)), data_(std::exchange(o.data_, nullptr)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(size_, o.size_);
    std::swap(data_, o.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  // Large buffers lie in huge pages where the system gives them to who asks: weights that stream through have more pages than a core
  // remembers the places of.
  static constexpr size_t HUGE_PAGE = size_t{2} << 20;
  static size_t alignment(size_t bytes) { return bytes >= HUGE_PAGE ? HUGE_PAGE : 64; }  // what size must be a multiple of, too
  static size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }
  size_t size_ = 0;
  void* data_ = nullptr;
};

// What Pool and Packs are guarded by, for moments. A fork takes it, so that no child inherits it from a thread that the child does not
// have.
std::mutex& shelf_lock() {
  static std::mutex* lock = [] {
    pthread_atfork([] { shelf_lock().lock(); }, [] { shelf_lock().unlock(); }, [] { shelf_lock().unlock(); });
    return new std::mutex;
  }();
  return *lock;
}

class Pool {  // leaked: calls may still run while static objects are destroyed
 public:
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }
  Buffer take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> hold(shelf_lock());
      auto best = free_.end();
      for (auto b = free_.begin(); b != free_.end(); ++b)  // the latest of the smallest: a cache may still hold it
        if (b->size() >= bytes && b->size() <= 2 * bytes + (1 << 16) && (best == free_.end() || b->size() <= best->size())) best = b;
      if (best != free_.end()) {
        Buffer found = std::move(*best);
        free_.erase(best);
        return found;
      }
    }
    return Buffer(bytes);
  }
  void give(Buffer b) {
    const std::lock_guard<std::mutex> hold(shelf_lock());
    if (free_.size() >= 24) free_.erase(free_.begin());
    free_.push_back(std::move(b));
  }

 private:
  std::vector<Buffer> free_;
};

class Lent {  // a buffer of the pool, given back in the end
 public:
  explicit Lent(size_t bytes) : buffer(Pool::get().take(std::max<size_t>(bytes, 64))) {}
  Lent(Lent&&) = default;
  ~Lent() {
    if (buffer.data()) Pool::get().give(std::move(buffer));
  }
  void* data() const { return buffer.data(); }

  Buffer buffer;
};

// ---- the cells by name -----------------------------------------------------------------------------------------------------------------

const char* const CELL_NAMES[CELL_KINDS] = {"rnn_tanh", "rnn_relu",      "rnn_sigmoid", "rnn_identity",
                                            "lstm",     "lstm_peephole", "gru",         "gru_reset_before"};

CellKind kind_of(const std::string& cell) {
  for (int i = 0; i < CELL_KINDS; ++i)
    if (cell == CELL_NAMES[i]) return static_cast<CellKind>(i);
  std::string known;
  for (int i = 0; i < CELL_KINDS; ++i) known += std::string(i ? ", " : "") + CELL_NAMES[i];
  fail("cell must be one of " + known + "; got '" + cell + "'");
}
const char* family(CellKind k) { return k < LSTM ? "rnn" : k < GRU ? "lstm" : "gru"; }
Compute compute_of(const std::string& name, Dtype dtype, const char* who) {
  if (name == (dtype == FLOAT32 ? "float32" : "float64")) return OWN;
  if (name == "bfloat16" && dtype == FLOAT32) return BFLOAT16;
  if (name == "int8" && dtype == FLOAT32) return INT8;
  fail(std::string(who) + ": compute_dtype must be the parameters' own dtype, or bfloat16 or int8 where that is float32; got '" + name +
       "'");
}

// Who runs when: `lengths` of a padded batch, or batch_sizes of packed rows.
struct Layout {
  int64_t T, B;
  bool packed = false, ragged = false;
  std::vector<int64_t> active, start, time, index;

  Layout(int64_t T_, int64_t B_, const std::optional<py::array_t<int64_t>>& lengths)
      : T(T_), B(B_), active(static_cast<size_t>(T_)), time(active) {
    std::vector<int64_t> length(static_cast<size_t>(B), T);
    if (lengths) {
      if (lengths->ndim() != 1 || lengths->size() != B)
        fail("lengths must have shape (B,) = " + tuple_text({B}) + ", got " + tuple_text(shape_of(*lengths)));
      for (int64_t b = 0; b < B; ++b) {
        const int64_t n = lengths->at(b);
        if (n < 0 || n > T)
          fail("lengths must lie in 0 .. T = " + std::to_string(T) + ", got " + std::to_string(n) + " at " + std::to_string(b));
        length[static_cast<size_t>(b)] = n;
        ragged = ragged || n != T;
      }
    }
    index.resize(static_cast<size_t>(B));
    for (size_t b = 0; b < index.size(); ++b) index[b] = static_cast<int64_t>(b);
    if (ragged)
      std::stable_sort(index.begin(), index.end(),
                       [&](int64_t a, int64_t b) { return length[static_cast<size_t>(a)] > length[static_cast<size_t>(b)]; });
    int64_t rows = B;
    for (int64_t t = 0; t < T; ++t) {
      while (rows > 0 && length[static_cast<size_t>(index[static_cast<size_t>(rows - 1)])] <= t) --rows;
      active[static_cast<size_t>(t)] = rows;
      time[static_cast<size_t>(t)] = t;
    }
    count();
  }
  static Layout from_batch_sizes(const py::array_t<int64_t>& sizes) {
    const py::array_t<int64_t, py::array::c_style> all(sizes);
    return from_batch_sizes(all.data(), all.ndim() == 1 ? all.size() : 0);
  }
  static Layout from_batch_sizes(const int64_t* sizes, int64_t T) {
    Layout l(0, 0, std::nullopt);
    l.packed = l.ragged = true;
    l.T = T;
    l.B = l.T ? sizes[0] : 0;
    for (int64_t t = 0; t < l.T; ++t) {
      const int64_t n = sizes[t];
      if (n < 1 || (t > 0 && n > l.active.back()))
        fail("batch_sizes must be positive and never grow, got " + std::to_string(n) + " at " + std::to_string(t));
      l.active.push_back(n);
    }
    for (int64_t b = 0; b < l.B; ++b) l.index.push_back(b);
    l.count();
    l.time.assign(l.start.begin(), l.start.end() - 1);
    return l;
  }
  int64_t tokens() const { return start.back(); }

 private:
  void count() {
    start.assign(1, 0);
    for (int64_t n : active) start.push_back(start.back() + n);
  }
};

// ---- arrays ----------------------------------------------------------------------------------------------------------------------------

using Array = std::optional<py::array>;

bool same(const py::dtype& a, const py::dtype& b) { return a.is(b) || a.equal(b); }  // an unpickled dtype is another object

Dtype dtype_of(const py::array& a, const char* who) {
  if (same(a.dtype(), py::dtype::of<float>())) return FLOAT32;
  if (same(a.dtype(), py::dtype::of<double>())) return FLOAT64;
  fail(std::string(who) + ": dtype must be float32 or float64, got " + std::string(py::str(a.dtype())));
}

template <class T>
void add(void* to, const void* from, int64_t n) {
  auto* a = static_cast<T*>(to);
  const auto* b = static_cast<const T*>(from);
  for (int64_t i = 0; i < n; ++i) a[i] += b[i];
}
void add(Dtype dtype, void* to, const void* from, int64_t n) { dtype == FLOAT32 ? add<float>(to, from, n) : add<double>(to, from, n); }

// What an array is called, spelled out only for a message.
struct Name {
  const char* text_ = nullptr;
  py::handle object{};    // a parameter's name
  bool gradient = false;  // the gradient of that parameter
  Name(const char* t) : text_(t) {}
  Name(py::handle o, bool g = false) : object(o), gradient(g) {}
  std::string text() const { return text_ ? text_ : (gradient ? "gradient of " : "") + std::string(py::str(object)); }
};

using Shape = std::initializer_list<py::ssize_t>;
bool has_shape(const py::array& a, Shape shape) { return std::equal(shape.begin(), shape.end(), a.shape(), a.shape() + a.ndim()); }

struct Checker {
  CellKind kind;
  py::dtype dtype;

  [[noreturn]] void refuse(const Name& name, const std::string& what) const { fail(who() + name.text() + what); }
  std::string who() const { return std::string(family(kind)) + ": "; }
  void type(const py::array& a, const Name& name) const {
    if (!same(a.dtype(), dtype))
      refuse(name, " must have dtype " + std::string(py::str(dtype)) + ", got " + std::string(py::str(a.dtype())));
  }
  // A C-contiguous array of this shape; `symbols` as in "(G*H, I)".
  const void* operator()(const Array& a, const Name& name, const char* symbols, Shape shape) const {
    if (!a) return nullptr;
    type(*a, name);
    if (!has_shape(*a, shape)) {
      std::string meaning = symbols;
      if (const size_t at = meaning.find("G*"); at != std::string::npos)
        meaning.replace(at, 2, gates(kind) == 1 ? "" : std::to_string(gates(kind)) + "*");
      refuse(name, " must have shape " + meaning + (std::strpbrk(symbols, "*BHIRST") ? " = " + tuple_text(shape) : "") + ", got " +
                       tuple_text(shape_of(*a)));
    }
    if (!(a->flags() & py::array::c_style)) refuse(name, " must be C-contiguous");
    return a->data();
  }
  void* out(Array& a, const Name& name, const char* symbols, Shape shape) const {
    (*this)(a, name, symbols, shape);
    return a ? a->mutable_data() : nullptr;  // raises where a is read-only
  }
  // (T, B, n) with any strides over T and B, or (tokens, n) for packed rows.
  Tokens tokens(const Array& a, const Name& name, const Layout& l, py::ssize_t n, bool writes) const {
    if (!a) return {nullptr, 0, 0};
    type(*a, name);
    const Shape padded{l.T, l.B, n}, packed{l.tokens(), n};
    const Shape& shape = l.packed ? packed : padded;
    if (!has_shape(*a, shape)) refuse(name, " must have shape " + tuple_text(shape) + ", got " + tuple_text(shape_of(*a)));
    if (a->size() == 0) return {const_cast<void*>(a->data()), 0, 0};
    const py::ssize_t item = a->itemsize(), inner = l.packed ? 1 : 2;
    if (n > 1 && a->strides(inner) != item) refuse(name, " must be contiguous in its last axis");
    for (py::ssize_t i = 0; i < inner; ++i)
      if (a->strides(i) % item) refuse(name, " must have strides that are multiples of its item size");
    if (writes && !a->writeable()) refuse(name, " is read-only");
    const py::ssize_t row = a->strides(inner - 1) / item;
    return {const_cast<void*>(a->data()), l.packed ? row : a->strides(0) / item, row};
  }
};

// ---- how many threads share, and how --------------------------------------------------------------------------------------------------

struct Plan {
  int workers, row_groups;
};

double flops(CellKind kind, const Job& j) {
  return static_cast<double>(j.start[j.T]) * 2.0 * gates(kind) * static_cast<double>(j.H) * static_cast<double>(j.I + j.R * j.taps);
}
// From how many flops on threads gain by sharing a job. kept: forward's packed weights outlive the call.
double least_flops(const Job& j, bool kept) { return kept ? 1.2e5 : j.T == 1 ? 2e5 : 3.5e5; }

// Is a job of so many flops better not shared? What takes as long as waking a thread, only with those that are awake.
bool stays_alone(double flops, double least, int threads) {
  return threads == 1 || flops < least || (flops < 8e6 && team_sleeps()) || (flops < 2e8 && cores_are_taken());
}

// How threads share a job that does not stay alone; busy: cores_are_busy().
Plan shared(CellKind kind, Dtype dtype, const Job& j, bool backward, bool kept, int threads, bool busy) {
  const double step =
      2.0 * gates(kind) * static_cast<double>(j.H * j.R * j.taps) * static_cast<double>(j.B);  // flops of one recurrent product
  const double all = flops(kind, j);
  const int64_t blocks = (j.H + kernels().lanes(dtype) - 1) / kernels().lanes(dtype);
  const bool by_units = blocks >= threads && (step >= 2e6 || !busy);
  // In one step each weight is used once. By rows, forward would pack them first, unless they are kept, and every thread read them all; by
  // units, every thread reads all rows.
  if (j.T == 1 && by_units) {
    const double weights = all / static_cast<double>(j.start[1]);  // flops of a row
    if (kept ? j.B < 2 * threads || (weights >= 1e7 && j.B < 32 * threads) : weights >= 4e6 || j.B <= (backward ? 16 : 64) * threads)
      return {threads, 1};
  }
  // So it is for a few steps, where packing still counts for more than that threads wait for each other.
  if (!kept && by_units && j.T > 1 && j.start[j.T] <= 50 * threads && step >= 7.5e3 * threads) return {threads, 1};
  // Weights that no cache holds are better read once by two halves than twice.
  if (by_units && step / static_cast<double>(j.B) > 1.6e7 && j.B < 16 * threads) return {threads, 1};
  if (j.B >= 4 * threads) return {threads, threads};
  if (step >= 2e5 && by_units) return {threads, 1};
  if (j.B >= 2 * threads) return {threads, threads};
  if (j.B >= threads && step < 7e4) return {threads, threads};   // rows, which never wait, though a row alone is slower than its share
  if (step >= 7.5e3 * threads && by_units) return {threads, 1};  // less would wait longer at each step than it computes
  return {1, 1};
}
Plan plan(CellKind kind, Dtype dtype, const Job& j, bool backward, bool kept, int most) {
  const int threads = threads_of(most);
  if (stays_alone(flops(kind, j), least_flops(j, kept), threads)) return {1, 1};
  return shared(kind, dtype, j, backward, kept, threads, cores_are_busy());
}

// Zeros around the caches: what is overwritten is not read first, and what they hold stays. In 16 bytes, aligned as they are, and with no
// ordinary store between, even of nothing, which made it ten times as slow. Before another thread may read them there must be a fence.
void zeros_around(char* to, size_t bytes) {
#ifdef __SSE2__
  for (size_t i = 0; i < bytes; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
#else
  std::memset(to, 0, bytes);
#endif
}
void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Are the weights' gradients better written around the caches? Where the last one does not hold them beside the weights, and tokens are so
// few that each is written but once. Operating systems tell of that cache what they like; this much is what a cluster of cores mostly
// shares.
bool goes_around(CellKind kind, Dtype dtype, const Job& j) {
  constexpr int64_t last_cache = 32 << 20;
  return j.overwrite && j.start[j.T] <= 8 && 2 * (dtype == FLOAT32 ? 4 : 8) * gates(kind) * j.H * (j.I + j.R * j.taps) > last_cache;
}

// Forward's packed weights of one job, kept from call to call: a snapshot, which no later write to the weights reaches. One for each way of
// sharing.
class Packs {
 public:
  using Held = std::shared_ptr<Buffer>;
  Held find(int units, Compute compute) {
    const std::lock_guard<std::mutex> hold(shelf_lock());
    for (const Entry& e : entries_)
      if (e.table == &kernels() && e.units == units && e.compute == compute) return e.held;
    return nullptr;
  }
  void keep(const Kernels& table, int units, Compute compute, Held held) {
    const std::lock_guard<std::mutex> hold(shelf_lock());
    entries_.push_back({&table, units, compute, std::move(held)});
  }

 private:
  struct Entry {
    const Kernels* table;
    int units;
    Compute compute;
    Held held;
  };
  std::vector<Entry> entries_;
};

struct Call {
  CellKind kind;
  Dtype dtype;
  Job& job;
  bool backward;
  int most = ALL;
  Packs* snapshot = nullptr;
  Packs::Held held{};
  Buffer packs{}, scratch{};
  int row_groups = 1;

  void run() {
    const Plan p = plan(kind, dtype, job, backward, snapshot, most);
    row_groups = p.row_groups;
    rnnfast::run(p.workers, task, this, prepare);
    give_back();
  }
  void give_back() {
    Pool::get().give(std::move(scratch));
    if (!backward && !held) Pool::get().give(std::move(packs));
  }
  static void prepare(void* data, int count) {
    Call& c = *static_cast<Call*>(data);
    if (count == 1) c.row_groups = 1;
    c.scratch = Pool::get().take(kernels().scratch_size(c.kind, c.dtype, c.job, count, c.row_groups, c.backward));
    if (c.backward) return;
    const int units = count / c.row_groups;
    c.job.kept = c.snapshot != nullptr;
    if (c.snapshot) c.held = c.snapshot->find(units, c.job.compute);
    c.job.packed = c.held != nullptr;
    if (c.held) return;
    if (c.snapshot) {
      c.held = std::make_shared<Buffer>(kernels().packs_size(c.kind, c.dtype, c.job, count, c.row_groups));
    } else {
      c.packs = Pool::get().take(kernels().packs_size(c.kind, c.dtype, c.job, count, c.row_groups));
    }
  }
  static void task(void* data, int id, int count, void (*wait)(void*), void* waiter) {
    Call& c = *static_cast<Call*>(data);
    const Worker worker{id, count, c.row_groups, c.held ? c.held->data() : c.packs.data(), c.scratch.data(), wait, waiter};
    if (c.backward)
      kernels().backward(c.kind, c.dtype, c.job, worker);
    else
      kernels().forward(c.kind, c.dtype, c.job, worker);
    if (id == 0 && c.snapshot && !c.job.packed)
      c.snapshot->keep(kernels(), count / c.row_groups, c.job.compute, c.held);  // its packs are whole: forward joined after packing
  }
};

// One job, or two that don't depend on each other, a layer's directions: a thread each where a job alone would not be split by rows, since
// then the threads need not wait for each other at every step.
void run_together(std::vector<Call>& calls) {
  if (calls.size() == 1) return calls[0].run();
  Call &a = calls[0], &b = calls[1];
  const Plan p = plan(a.kind, a.dtype, a.job, a.backward, a.snapshot, a.most);
  if (p.row_groups > 1 || (a.job.T == 1 && p.workers > 2) || stays_alone(flops(a.kind, a.job), 2e5, threads_of(a.most))) {
    a.run();
    b.run();
    return;
  }
  Call* both[2] = {&a, &b};
  const Task each = [](void* data, int id, int count, void (*)(void*), void*) {
    Call** calls = static_cast<Call**>(data);
    for (int i = id; i < 2; i += count) Call::task(calls[i], 0, 1, nullptr, nullptr);
  };
  rnnfast::run(2, each, both, [](void* data, int) {  // here, since what throws on another thread ends the process
    for (int i = 0; i < 2; ++i) Call::prepare(static_cast<Call**>(data)[i], 1);
  });
  a.give_back(), b.give_back();
}

// ---- one layer, in one direction or both ------------------------------------------------------------------------------------------------

using Weights = std::vector<Array>;  // w_ih, w_hh, b_ih, b_hh, peep, w_hr, b_hr
using Indices = py::array_t<int64_t, py::array::c_style>;

// Their names, which end in `suffix` as in weight_ih_l0_reverse.
py::tuple names_of(const std::string& suffix) {
  py::list names;
  for (const char* stem : {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_peep", "weight_hr", "bias_hr"})
    names.append(py::str(stem + suffix));
  return py::tuple(names);
}

// What a dict holds under these names, where it does.
Weights find(const py::dict& arrays, const py::tuple& names, const char* who) {
  Weights found;
  found.reserve(names.size());
  for (const py::handle name : names) {
    PyObject* value = PyDict_GetItemWithError(arrays.ptr(), name.ptr());
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    if (!value || value == Py_None) {
      found.emplace_back();
    } else if (py::isinstance<py::array>(value)) {
      found.emplace_back(py::reinterpret_borrow<py::array>(value));
    } else {
      throw py::type_error(std::string(who) + ": " + std::string(py::str(name)) + " must be an array, got " + Py_TYPE(value)->tp_name);
    }
  }
  return found;
}

// Sizes and weights of a job, checked.
Checker take_weights(Job& j, CellKind kind, const Weights& w, const py::tuple& names, int64_t taps) {
  const std::string who = std::string(family(kind)) + ": ";
  if (w.size() != 7 || names.size() != 7) fail(who + "weights must be 7 arrays or None");
  const auto name = [&](size_t i) { return Name(PyTuple_GET_ITEM(names.ptr(), static_cast<py::ssize_t>(i))); };
  for (size_t i : {0, 1})
    if (!w[i]) throw py::key_error(who + "params lacks '" + name(i).text() + "'");
  const Checker check{kind, w[0]->dtype()};
  const int64_t G = gates(kind);
  if (w[0]->ndim() != 2 || w[0]->shape(0) % G || w[0]->shape(0) == 0)
    check.refuse(name(0), " must have shape (" + std::to_string(G) + "*H, I), got " + tuple_text(shape_of(*w[0])));
  j.H = w[0]->shape(0) / G, j.I = w[0]->shape(1);
  j.projected = w[5].has_value();
  if (j.projected && w[5]->ndim() != 2) check.refuse(name(5), " must have shape (R, H), got " + tuple_text(shape_of(*w[5])));
  j.R = j.projected ? w[5]->shape(0) : j.H;
  j.taps = taps;
  const int64_t GH = G * j.H;
  const char* hh = j.projected ? (taps > 1 ? "(G*H, R*taps)" : "(G*H, R)") : (taps > 1 ? "(G*H, H*taps)" : "(G*H, H)");
  j.w_ih = check(w[0], name(0), "(G*H, I)", {GH, j.I});
  j.w_hh = check(w[1], name(1), hh, {GH, j.R * taps});
  j.b_ih = check(w[2], name(2), "(G*H,)", {GH});
  j.b_hh = check(w[3], name(3), "(G*H,)", {GH});
  j.peep = check(w[4], name(4), "(3, H)", {3, j.H});
  j.w_hr = check(w[5], name(5), "(R, H)", {j.R, j.H});
  j.b_hr = check(w[6], name(6), "(R,)", {j.R});
  if (w[6] && !j.projected) check.refuse(name(6), " goes with a projection, weight_hr, and only with it");
  if ((kind == LSTM_PEEPHOLE) != w[4].has_value()) check.refuse(name(4), " goes with the cell lstm_peephole, and only with it");
  if (kind == GRU_RESET_BEFORE && (j.projected || taps > 1))
    fail(who + "reset_after=False has no projection and no output taps: r multiplies an H-wide h");
  return check;
}

void take_layout(Job& j, const Layout& l, bool reversed) {
  j.T = l.T, j.B = l.B, j.reversed = reversed;
  j.active = l.active.data(), j.start = l.start.data(), j.time = l.time.data(), j.index = l.index.data();
}

// -> how many events there are.
int64_t take_reset(Job& j, const Checker& check, const Indices& reset) {
  if (reset.ndim() != 2 || reset.shape(0) != j.T || reset.shape(1) != j.B) fail(check.who() + "reset must have shape (T, B)");
  if (j.taps > 1) fail(check.who() + "reset inside a call with output taps must be split by the caller");
  j.reset = reset.data();
  return 1 + std::accumulate(j.reset, j.reset + j.T * j.B, int64_t{-1}, [](int64_t a, int64_t b) { return std::max(a, b); });
}

py::ssize_t tape_size(const std::string& cell, const Layout& layout, const Weights& weights) {
  Job j{};
  const CellKind kind = kind_of(cell);
  take_weights(j, kind, weights, names_of(""), 1);
  take_layout(j, layout, false);
  return static_cast<py::ssize_t>(kernels().tape_size(kind, dtype_of(*weights[0], family(kind)), j));
}

// What backward needs of a forward: its jobs, everything that they point to, and their tapes.
class Run {
 public:
  Run(CellKind kind_, const std::optional<std::string>& compute, int64_t taps, std::shared_ptr<const Layout> layout_,
      const py::dict& params, py::tuple names_, int64_t layer_)
      : layout(std::move(layout_)), names(std::move(names_)), layer(layer_), D(names.size()), jobs(D), check{kind_, {}} {
    if (D < 1 || D > 2 || layer < 0 || layer >= 1 << 20) fail(check.who() + "a layer has a number from 0 on, and one direction or two");
    kept_.reserve(7 * D + 6);
    for (size_t d = 0; d < D; ++d) {
      Job& j = jobs[d];
      const Weights weights = find(params, names[d], family(check.kind));
      const Checker own = take_weights(j, check.kind, weights, names[d], taps);
      if (d == 0) check.dtype = own.dtype, dtype = dtype_of(*weights[0], family(check.kind));
      if (!same(own.dtype, check.dtype) || j.H != jobs[0].H || j.I != jobs[0].I || j.R != jobs[0].R)
        fail(check.who() + "both directions of a layer must have the same sizes and dtype");
      take_layout(j, *layout, d == 1);
      if (compute) j.compute = compute_of(*compute, dtype, family(check.kind));
      for (const Array& w : weights) keep(w);
    }
  }
  Run(const Run&) = delete;

  size_t weights() const { return kept_.size(); }  // before forward keeps more
  size_t item() const { return dtype == FLOAT32 ? 4 : 8; }
  void* at(const void* p, int64_t element) const {
    return p ? const_cast<char*>(static_cast<const char*>(p)) + element * static_cast<int64_t>(item()) : nullptr;
  }
  // (tokens, D·n): the n columns of direction d.
  Tokens part(const Tokens& t, int64_t d, int64_t n) const { return {at(t.data, d * n), t.step, t.row}; }
  // Where this layer begins in an array (L*D, rows, n) of all layers.
  const void* slice(const Array& a, const char* name, const char* symbols, int64_t rows, int64_t n) const {
    const auto width = static_cast<int64_t>(D), first = layer * width;
    const int64_t all = a && a->ndim() == 3 ? std::max<int64_t>(a->shape(0), first + width) : first + width;
    return at(check(a, name, symbols, {all, rows, n}), first * rows * n);
  }
  void* slice(Array& a, const char* name, const char* symbols, int64_t rows, int64_t n) const {
    if (a) a->mutable_data();  // raises where a is read-only
    return const_cast<void*>(slice(std::as_const(a), name, symbols, rows, n));
  }
  // A new array for every token; 0 past a row's end.
  py::array fresh(int64_t n, int most) const {
    const Layout& l = *layout;
    py::array a = l.packed ? py::array(check.dtype, {l.tokens(), n}) : py::array(check.dtype, {l.T, l.B, n});
    if (!l.ragged || l.packed) return a;
    char* const first = static_cast<char*>(a.mutable_data());
    const size_t row = static_cast<size_t>(n) * item();
    // For arrays that a core's own caches do not hold, in rows of several whole lines, as zeros_around wants them.
    const bool around = a.nbytes() > 2 << 20 && row >= 256 && (reinterpret_cast<uintptr_t>(first) | row) % 16 == 0;
    std::vector<int64_t> place(static_cast<size_t>(l.B));
    for (int64_t r = 0; r < l.B; ++r) place[static_cast<size_t>(l.index[static_cast<size_t>(r)])] = r;
    const auto clear = [&](int64_t begin, int64_t end) {  // steps' places past the ends, in the order of memory
      for (int64_t t = 0; t < l.T; ++t) {
        const int64_t before = t * l.B - l.start[static_cast<size_t>(t)];
        if (before < begin || before >= end || l.active[static_cast<size_t>(t)] == l.B) continue;
        for (int64_t b = 0; b < l.B; ++b) {
          if (place[static_cast<size_t>(b)] < l.active[static_cast<size_t>(t)]) continue;
          char* const to = first + static_cast<size_t>(t * l.B + b) * row;
          if (around)
            zeros_around(to, row);
          else
            std::memset(to, 0, row);
        }
      }
      fence();
    };
    const Unlocked unlocked;
    divide(l.T * l.B - l.tokens(), GRAIN / std::max<int64_t>(n, 1), clear, most);
    return a;
  }

  // Keeps an array that backward will read again where forward has checked it.
  void keep(const Array& a) {
    if (a) kept_.push_back({*a, a->data(), a->nbytes()});
  }
  // numpy lets a caller who insists give an array other memory.
  void check_kept() const {
    for (const Kept& k : kept_)
      if (k.array.data() != k.data || k.array.nbytes() != k.bytes)
        fail(check.who() + "x or a parameter has been resized between forward and backward");
  }

  size_t tape_size(size_t d) const { return kernels().tape_size(check.kind, dtype, jobs[d]); }
  void compute(std::vector<Job>& now, bool backward, int most, const std::vector<Packs*>& snapshot) const {
    if (layout->B == 0) return;
    const Unlocked unlocked;
    std::vector<Call> calls;
    for (size_t d = 0; d < D; ++d)
      calls.push_back(Call{check.kind, dtype, now[d], backward, most, snapshot.empty() ? nullptr : snapshot[d]});
    run_together(calls);
  }

  std::shared_ptr<const Layout> layout;
  py::tuple names;  // of the weights, one tuple a direction
  int64_t layer;
  size_t D;
  std::vector<Job> jobs;  // of forward, one a direction
  Checker check;
  Dtype dtype{};
  std::vector<Indices> resets;
  std::optional<Lent> zeros;  // the state where none is given
  std::vector<Lent> tapes;
  std::vector<size_t> sizes;  // of the tapes, in elements

 private:
  struct Kept {
    py::array array;
    const void* data;
    py::ssize_t bytes;
  };
  std::vector<Kept> kept_;
};

int at_most(const std::optional<int>& threads) {
  if (threads && *threads < 1) fail("threads must be at least 1, got " + std::to_string(*threads));
  return threads.value_or(ALL);
}

// x, y and cells are of one layer, the states (L*D, B, ·) of all, zeros where null; y is new where null; resets and snapshot are absent or
// one a direction. -> y, run or None.
py::tuple compute_forward(std::unique_ptr<Run> run, const py::array& x, Array y, const Array& h_0, const Array& c_0, Array h_T, Array c_T,
                          std::vector<Indices> resets, const Array& fresh_h, const Array& fresh_c, const Array& cells, bool tape,
                          bool recompute, const std::vector<Packs*>& snapshot, int most) {
  const Layout& l = *run->layout;
  const Checker& check = run->check;
  const Job& first = run->jobs[0];
  const int64_t B = l.B, H = first.H, R = first.R, S = R * first.taps, D = static_cast<int64_t>(run->D);
  if (!y) y = run->fresh(D * R, most);
  const Tokens x_at = check.tokens(x, "x", l, first.I, false), y_at = check.tokens(y, "y", l, D * R, true),
               cells_at = check.tokens(cells, "cells", l, D * H, true);
  const void* h_0_at = run->slice(h_0, "h_0", "(L*D, B, R)", B, S);
  const void* c_0_at = run->slice(c_0, "c_0", "(L*D, B, H)", B, H);
  void* h_T_at = run->slice(h_T, "h_T", "(L*D, B, R)", B, S);
  void* c_T_at = run->slice(c_T, "c_T", "(L*D, B, H)", B, H);
  const void* fresh_h_at = run->slice(fresh_h, "fresh_h", "(L*D, 1, R)", 1, S);
  const void* fresh_c_at = run->slice(fresh_c, "fresh_c", "(L*D, 1, H)", 1, H);
  const bool carried = carries(check.kind);
  if (!h_0 || (carried && !c_0)) {
    const size_t bytes = static_cast<size_t>(B * std::max(S, H)) * run->item();
    std::memset(run->zeros.emplace(bytes).data(), 0, bytes);
  }
  if (!resets.empty() && (!fresh_h || (carried && !fresh_c))) fail(check.who() + "reset needs fresh states");
  if ((!resets.empty() && resets.size() != run->D) || (!snapshot.empty() && snapshot.size() != run->D))
    fail(check.who() + "resets and snapshot must be one a direction");
  if (tape && first.compute == INT8) fail(check.who() + "compute_dtype int8 is for inference: it keeps no tape");
  for (int64_t d = 0; d < D; ++d) {
    Job& j = run->jobs[static_cast<size_t>(d)];
    j.recompute = recompute;
    j.x = x_at, j.y = run->part(y_at, d, R), j.cells = run->part(cells_at, d, H);
    j.h_0 = h_0 ? run->at(h_0_at, d * B * S) : run->zeros->data();
    if (carried) j.c_0 = c_0 ? run->at(c_0_at, d * B * H) : run->zeros->data();
    j.h_T = run->at(h_T_at, d * B * S), j.fresh_h = run->at(fresh_h_at, d * S);
    j.c_T = run->at(c_T_at, d * B * H), j.fresh_c = run->at(fresh_c_at, d * H);
    if (!resets.empty()) take_reset(j, check, resets[static_cast<size_t>(d)]);
    if (!tape) continue;
    run->sizes.push_back(run->tape_size(static_cast<size_t>(d)));
    j.tape = run->tapes.emplace_back(run->sizes.back() * run->item()).data();
  }
  std::vector<Job> now = run->jobs;
  run->compute(now, false, most, snapshot);
  if (!tape) return py::make_tuple(*y, py::none());
  for (const Array& a : {Array(x), y, h_0, c_0, fresh_h, fresh_c}) run->keep(a);
  run->resets = std::move(resets);
  return py::make_tuple(*y, std::move(run));
}

// Every row at each of T steps. Calls in a row are mostly of one size.
std::shared_ptr<const Layout> plain_layout(int64_t T, int64_t B) {
  thread_local std::shared_ptr<const Layout> latest;
  if (latest && latest->T == T && latest->B == B) return latest;
  auto made = std::make_shared<const Layout>(T, B, std::nullopt);
  if (T + B <= 4096) latest = made;
  return made;
}

// A call that asks for nothing but one layer's outputs, in one direction, of whole rows, from the state zero, without its way through
// Python. -> y, the state, run or None, (L, D, B, H, R, S); or None where the arguments are not such a call's, or are wrong.
py::object forward_plain(const std::string& cell, const py::dict& params, const py::tuple& names, const py::array& x, bool tape) {
  if (x.ndim() != 3) return py::none();
  try {
    const CellKind kind = kind_of(cell);
    auto run = std::make_unique<Run>(kind, std::nullopt, 1, plain_layout(x.shape(0), x.shape(1)), params, names, 0);
    if (run->weights() != params.size()) return py::none();  // there is a state to start from
    const int64_t B = run->layout->B, H = run->jobs[0].H, R = run->jobs[0].R;
    py::array h_T(run->check.dtype, {int64_t{1}, B, R});
    Array c_T;
    if (gates(kind) == 4 || (carries(kind) && run->jobs[0].projected)) c_T = py::array(run->check.dtype, {int64_t{1}, B, H});
    const py::tuple done = compute_forward(std::move(run), x, {}, {}, {}, h_T, c_T, {}, {}, {}, {}, tape, false, {}, ALL);
    if (tape) py::detail::array_proxy(PyTuple_GET_ITEM(done.ptr(), 0))->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    const py::object state = c_T ? py::object(py::make_tuple(h_T, *c_T)) : py::object(h_T);
    return py::make_tuple(done[0], state, done[1], py::make_tuple(1, 1, B, H, R, R));
  } catch (const py::builtin_exception&) {
    return py::none();
  }
}

py::tuple forward(const std::string& cell, std::shared_ptr<const Layout> layout, const py::dict& params, const py::tuple& names,
                  int64_t layer, const std::optional<std::string>& compute, int64_t taps, const py::array& x, const Array& y,
                  const Array& h_0, const Array& c_0, const Array& h_T, const Array& c_T, const std::vector<Indices>& resets,
                  const Array& fresh_h, const Array& fresh_c, const Array& cells, bool tape, bool recompute,
                  const std::vector<Packs*>& snapshot, const std::optional<int>& threads) {
  const int most = at_most(threads);
  auto run = std::make_unique<Run>(kind_of(cell), compute, taps, std::move(layout), params, names, layer);
  return compute_forward(std::move(run), x, y, h_0, c_0, h_T, c_T, resets, fresh_h, fresh_c, cells, tape, recompute, snapshot, most);
}

// dy is of this layer, the states' gradients of all layers. -> dx or None, and for each direction with resets the gradients (events, R) and
// (events, H) of the states that they put.
py::tuple backward(const Run& run, const py::array& dy, const Array& dh_T, const Array& dc_T, bool need_dx, Array dh_0, Array dc_0,
                   const py::dict& gradients, bool accumulate, const std::optional<int>& threads) {
  const int most = at_most(threads);
  const Layout& l = *run.layout;
  const Checker& check = run.check;
  run.check_kept();
  std::vector<Job> jobs = run.jobs;
  const Job& first = jobs[0];
  const int64_t B = l.B, I = first.I, H = first.H, R = first.R, S = R * first.taps, GH = gates(check.kind) * H;
  const Tokens dy_at = check.tokens(dy, "dy", l, static_cast<int64_t>(run.D) * R, false);
  const void* dh_T_at = run.slice(dh_T, "dh_T", "(L*D, B, R)", B, S);
  const void* dc_T_at = run.slice(dc_T, "dc_T", "(L*D, B, H)", B, H);
  void* dh_0_at = run.slice(dh_0, "dh_0", "(L*D, B, R)", B, S);
  void* dc_0_at = run.slice(dc_0, "dc_0", "(L*D, B, H)", B, H);
  std::vector<Array> dx;
  std::vector<Weights> out_of;  // keeps what the dict holds now: another thread may change it during the call
  py::list dresets;
  out_of.reserve(run.D);
  for (size_t d = 0; d < run.D; ++d) {
    Job& j = jobs[d];
    const auto k = static_cast<int64_t>(d);
    j.dy = run.part(dy_at, k, R);
    if (need_dx) j.dx = check.tokens(dx.emplace_back(run.fresh(I, most)), "dx", l, I, true);
    j.dh_T = run.at(dh_T_at, k * B * S), j.dc_T = run.at(dc_T_at, k * B * H);
    j.dh_0 = run.at(dh_0_at, k * B * S), j.dc_0 = run.at(dc_0_at, k * B * H);
    if (!run.resets.empty()) {
      const int64_t events = take_reset(j, check, run.resets[d]);
      py::array dreset_h(check.dtype, {events, S}), dreset_c(check.dtype, {carries(check.kind) ? events : 0, H});
      j.dreset_h = dreset_h.mutable_data(), j.dreset_c = dreset_c.mutable_data();
      dresets.append(py::make_tuple(std::move(dreset_h), std::move(dreset_c)));
    }
    const py::tuple names = run.names[d];
    Weights& g = out_of.emplace_back(find(gradients, names, family(check.kind)));
    const auto out = [&](size_t i, const void* weight, const char* symbols, Shape shape) {
      if (!weight) g[i].reset();
      if (weight && !g[i])
        throw py::key_error(check.who() + "gradients lacks '" + Name(PyTuple_GET_ITEM(names.ptr(), static_cast<py::ssize_t>(i))).text() +
                            "'");
      return check.out(g[i], Name(PyTuple_GET_ITEM(names.ptr(), static_cast<py::ssize_t>(i)), true), symbols, shape);
    };
    j.dw_ih = out(0, j.w_ih, "(G*H, I)", {GH, I});
    j.dw_hh = out(1, j.w_hh, "(G*H, R)", {GH, S});
    j.db_ih = out(2, j.b_ih, "(G*H,)", {GH});
    j.db_hh = out(3, j.b_hh, "(G*H,)", {GH});
    j.dpeep = out(4, j.peep, "(3, H)", {3, H});
    j.dw_hr = out(5, j.w_hr, "(R, H)", {R, H});
    j.db_hr = out(6, j.b_hr, "(R,)", {R});
    j.overwrite = !accumulate;
    j.around = goes_around(check.kind, run.dtype, j);
    if (j.overwrite && l.tokens() == 0)
      for (Array& a : g)
        if (a) std::memset(a->mutable_data(), 0, static_cast<size_t>(a->nbytes()));
  }
  run.compute(jobs, true, most, {});
  if (dx.size() == 2) {
    void* const sum = dx[0]->mutable_data();
    const void* const other = dx[1]->data();
    const int64_t count = dx[0]->size();
    const Unlocked unlocked;
    add(run.dtype, sum, other, count);
  }
  return py::make_tuple(dx.empty() ? py::object(py::none()) : py::object(*dx[0]), std::move(dresets));
}

// ---- streaming: one step at a time over a snapshot of the weights ---------------------------------------------------------------------

class Stream {
 public:
  // One list of weights a layer; fresh_h (L, 1, S) and fresh_c (L, 1, H) are what reset() puts; zeros where None.
  Stream(std::string cell, std::vector<Weights> weights, std::string compute, int64_t batch, int64_t taps, bool skip, Array fresh_h,
         Array fresh_c, const Stream* twin = nullptr)
      : cell_(std::move(cell)),
        kind_(kind_of(cell_)),
        compute_(std::move(compute)),
        weights_(std::move(weights)),
        taps_(taps),
        skip_(skip),
        layout_(1, batch, std::nullopt),
        live_h_(std::move(fresh_h)),
        live_c_(std::move(fresh_c)) {
    if (weights_.empty()) fail("stream needs a layer");
    if (batch < 1) fail("stream: batch must be at least 1, got " + std::to_string(batch));
    table_ = twin ? twin->table_ : &kernels();
    build();
    if (twin)
      take(*twin);
    else
      refresh(), reset(std::nullopt);
  }

  py::array call(const py::array& x, Array out) {
    const Job& first = layers_.front().job;
    const std::vector<py::ssize_t> want{layout_.B, first.I};
    if (shape_of(x) != want) fail(who() + "stream: x must have shape (B, I) = " + tuple_text(want) + ", got " + tuple_text(shape_of(x)));
    check_->type(x, "stream: x");
    if (x.shape(1) > 1 && x.strides(1) != x.itemsize()) fail(who() + "stream: x must be contiguous in its last axis");
    if (x.strides(0) % x.itemsize()) fail(who() + "stream: x must have strides that are multiples of its item size");
    const py::ssize_t width = skip_ ? static_cast<py::ssize_t>(layers_.size()) * first.R : first.R;
    if (!out) {
      out = py::array(check_->dtype, {layout_.B, width});
    } else {
      (*check_)(out, "stream: out", "(B, R)", {layout_.B, width});
    }
    step(static_cast<const char*>(x.data()), x.strides(0), static_cast<char*>(out->mutable_data()));
    return *out;
  }

  // A whole x (T, B, I) -> (y (T, B, R), state), from `state` or the initial one; None where another call is at it, or x is unusual.
  py::object sequence(const py::array& x, const py::object& from, int threads) {
    const std::unique_lock<std::mutex> hold(busy_, std::try_to_lock);  // waiting with the GIL held might be for ever
    const Job& first = layers_.front().job;
    const int64_t T = x.ndim() == 3 ? x.shape(0) : 0, size = static_cast<int64_t>(item());
    if (!hold.owns_lock() || skip_ || T < 1 || x.shape(1) != layout_.B || x.shape(2) != first.I || !same(x.dtype(), check_->dtype) ||
        !(x.flags() & py::array::c_style))
      return py::none();
    if (!chunk_ || chunk_->T != T) {
      chunk_ = std::make_unique<Layout>(T, layout_.B, std::nullopt);
      for (size_t i = 1; i < layers_.size(); ++i) layers_[i].chunk_x = Buffer(static_cast<size_t>(T * layout_.B * first.R * size));
    }
    if (from.is_none())
      reset(std::nullopt);
    else
      set_state(from);
    py::array y(check_->dtype, std::vector<py::ssize_t>{T, layout_.B, first.R});
    void* const result = y.mutable_data();
    {
      const Unlocked unlocked;
      for (size_t i = 0; i < layers_.size(); ++i) {
        Layer& l = layers_[i];
        Job j = l.job;
        take_layout(j, *chunk_, false);
        j.packed = false;
        j.x = {i == 0 ? const_cast<void*>(x.data()) : l.chunk_x.data(), j.B * j.I, j.I};
        j.y = {i + 1 == layers_.size() ? result : layers_[i + 1].chunk_x.data(), j.B * j.R, j.R};
        Call{kind_, dtype_, j, false, threads, l.snapshot.get()}.run();
      }
    }
    return py::make_tuple(y, state());
  }

  py::object state() const {
    const auto L = static_cast<py::ssize_t>(layers_.size());
    const Job& j = layers_.front().job;
    py::array h(check_->dtype, std::vector<py::ssize_t>{L, layout_.B, j.R * taps_});
    for (size_t i = 0; i < layers_.size(); ++i) std::memcpy(h.mutable_data(static_cast<py::ssize_t>(i)), layers_[i].h.data(), h_bytes());
    if (!pair()) return h;
    py::array c(check_->dtype, std::vector<py::ssize_t>{L, layout_.B, j.H});
    for (size_t i = 0; i < layers_.size(); ++i) std::memcpy(c.mutable_data(static_cast<py::ssize_t>(i)), layers_[i].c.data(), c_bytes());
    return py::make_tuple(h, c);
  }
  void set_state(const py::object& state) {
    const auto L = static_cast<py::ssize_t>(layers_.size());
    const Job& j = layers_.front().job;
    Array h, c;
    if (pair()) {
      const py::sequence both = py::isinstance<py::sequence>(state) ? state.cast<py::sequence>() : py::sequence(py::list());
      if (both.size() != 2) fail(who() + "stream: state must be a pair (h, c)");
      h = both[0].cast<py::array>(), c = both[1].cast<py::array>();
    } else {
      h = state.cast<py::array>();
    }
    (*check_)(h, "stream: h", "(L, B, R)", {L, layout_.B, j.R * taps_});
    (*check_)(c, "stream: c", "(L, B, H)", {L, layout_.B, j.H});
    for (size_t i = 0; i < layers_.size(); ++i) {
      std::memcpy(layers_[i].h.data(), h->data(static_cast<py::ssize_t>(i)), h_bytes());
      if (c) std::memcpy(layers_[i].c.data(), c->data(static_cast<py::ssize_t>(i)), c_bytes());
    }
  }
  void reset(const std::optional<py::object>& which) {
    std::optional<py::array_t<bool>> mask;
    if (which) {
      const py::array given = py::array::ensure(*which);
      if (!given || given.dtype().kind() != 'b' || given.ndim() != 1 || given.shape(0) != layout_.B)
        fail(who() + "stream: mask must be bool of shape (B,) = " + tuple_text({layout_.B}));
      mask = given;
    }
    for (size_t i = 0; i < layers_.size(); ++i)
      for (int64_t b = 0; b < layout_.B; ++b) {
        if (mask && !mask->at(b)) continue;
        put(layers_[i].h, b, h_bytes() / static_cast<size_t>(layout_.B), fresh_h_, i);
        if (pair()) put(layers_[i].c, b, c_bytes() / static_cast<size_t>(layout_.B), fresh_c_, i);
      }
  }
  std::unique_ptr<Stream> copy() const {
    return std::make_unique<Stream>(cell_, weights_, compute_, layout_.B, taps_, skip_, live_h_, live_c_, this);
  }
  void refresh() {
    const auto copy = [](const Array& a) { return a ? Array(py::array(a->dtype(), shape_of(*a), a->data())) : Array(); };
    fresh_h_ = copy(live_h_), fresh_c_ = copy(live_c_);
    threads_ = thread_count();
    for (Layer& l : layers_) {
      l.snapshot = std::make_shared<Packs>();
      l.packs = pack(l, 1);
      l.shares = false;
      if (threads_ == 1 || flops(kind_, l.job) < least_flops(l.job, true) || table_ != &kernels()) continue;
      const Plan p = shared(kind_, dtype_, l.job, false, true, threads_, false);
      l.shares = p.workers > 1;
      if (p.workers > p.row_groups) pack(l, p.workers);
    }
  }

 private:
  struct Layer {
    Job job{};
    Buffer scratch, h, c, x, chunk_x;
    std::shared_ptr<Packs> snapshot;
    Packs::Held packs;    // of it, for one worker
    bool shares = false;  // may a step be worth several threads?
  };

  std::string who() const { return std::string(family(kind_)) + ": "; }
  bool pair() const { return kind_ == LSTM || kind_ == LSTM_PEEPHOLE || (kind_ == GRU && layers_.front().job.projected); }
  size_t item() const { return static_cast<size_t>(check_->dtype.itemsize()); }
  size_t h_bytes() const { return static_cast<size_t>(layout_.B * layers_.front().job.R * taps_) * item(); }
  size_t c_bytes() const { return static_cast<size_t>(layout_.B * layers_.front().job.H) * item(); }

  static void put(const Buffer& to, int64_t row, size_t bytes, const Array& from, size_t layer) {
    char* at = static_cast<char*>(to.data()) + static_cast<size_t>(row) * bytes;
    if (from)
      std::memcpy(at, static_cast<const char*>(from->data()) + layer * bytes, bytes);
    else
      std::memset(at, 0, bytes);
  }

  void build() {
    for (size_t i = 0; i < weights_.size(); ++i) {
      Layer l;
      const Checker check = take_weights(l.job, kind_, weights_[i], names_of("_l" + std::to_string(i)), taps_);
      if (i == 0) check_ = std::make_unique<Checker>(check), dtype_ = dtype_of(*weights_[0][0], family(kind_));
      l.job.compute = compute_of(compute_, dtype_, family(kind_));
      take_layout(l.job, layout_, false);
      layers_.push_back(std::move(l));
      const Job& first = layers_.front().job;
      Job& j = layers_.back().job;
      if (i > 0 && (j.H != first.H || j.R != first.R || j.I != first.R + (skip_ ? first.I : 0)))
        fail(who() + "stream: layers do not fit together");
    }
    const auto L = static_cast<py::ssize_t>(layers_.size());
    (*check_)(live_h_, "h_0", "(L, 1, R)", {L, 1, layers_[0].job.R * taps_});
    (*check_)(live_c_, "c_0", "(L, 1, H)", {L, 1, layers_[0].job.H});
    for (Layer& l : layers_) {
      l.h = Buffer(h_bytes());
      if (pair()) l.c = Buffer(c_bytes());
      Job& j = l.job;
      j.h_0 = j.h_T = l.h.data();
      if (pair())
        j.c_0 = j.c_T = l.c.data();
      else if (carries(kind_))
        j.c_0 = l.h.data();  // a GRU carries its h
      l.x = Buffer(static_cast<size_t>(layout_.B * j.I) * item());
      j.kept = j.packed = true;
      l.scratch = Buffer(table_->scratch_size(kind_, dtype_, j, 1, 1, false));
    }
  }
  // What a twin's snapshot and state are.
  void take(const Stream& twin) {
    fresh_h_ = twin.fresh_h_, fresh_c_ = twin.fresh_c_, threads_ = twin.threads_;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& from = twin.layers_[i];
      Layer& to = layers_[i];
      to.snapshot = from.snapshot, to.packs = from.packs, to.shares = from.shares;
      std::memcpy(to.h.data(), from.h.data(), h_bytes());
      if (pair()) std::memcpy(to.c.data(), from.c.data(), c_bytes());
    }
  }
  // The weights as so many workers over units read them, put into the snapshot.
  Packs::Held pack(const Layer& l, int units) const {
    Job no_steps = l.job;
    no_steps.T = 0, no_steps.packed = false, no_steps.h_T = no_steps.c_T = nullptr;
    auto held = std::make_shared<Buffer>(table_->packs_size(kind_, dtype_, no_steps, units, 1));
    const Lent scratch(table_->scratch_size(kind_, dtype_, no_steps, units, 1, false));
    for (int id = 0; id < units; ++id)  // one after the other, who then have nobody to wait for
      table_->forward(kind_, dtype_, no_steps, Worker{id, units, 1, held->data(), scratch.data(), [](void*) {}, nullptr});
    l.snapshot->keep(*table_, units, l.job.compute, held);
    return held;
  }
  // A layer's step. By several threads only where the snapshot holds the weights for them: the live ones may have changed.
  void advance(Layer& l) {
    if (l.shares && table_ == &kernels() && thread_count() == threads_)
      Call{kind_, dtype_, l.job, false, ALL, l.snapshot.get()}.run();
    else
      table_->forward(kind_, dtype_, l.job, Worker{0, 1, 1, l.packs->data(), l.scratch.data(), nullptr, nullptr});
  }

  void step(const char* x, py::ssize_t stride, char* out) {
    const int64_t B = layout_.B, R = layers_.front().job.R, I = layers_.front().job.I;
    const auto L = static_cast<int64_t>(layers_.size());
    const int64_t size = static_cast<int64_t>(item());
    for (int64_t i = 0; i < L; ++i) {
      Layer& l = layers_[static_cast<size_t>(i)];
      Job& j = l.job;
      if (i == 0)
        j.x = {const_cast<char*>(x), 0, stride / size};
      else
        j.x = {l.x.data(), 0, j.I};
      const bool to_out = skip_ || i == L - 1;
      if (to_out) {
        j.y = {out + (skip_ ? i * R * size : 0), 0, skip_ ? L * R : R};
      } else {
        j.y = {layers_[static_cast<size_t>(i + 1)].x.data(), 0, R};
      }
      advance(l);
      if (skip_ && i + 1 < L) {
        char* next = static_cast<char*>(layers_[static_cast<size_t>(i + 1)].x.data());
        for (int64_t b = 0; b < B; ++b) {
          std::memcpy(next + b * (I + R) * size, x + b * stride, static_cast<size_t>(I * size));
          std::memcpy(next + (b * (I + R) + I) * size, out + (b * L + i) * R * size, static_cast<size_t>(R * size));
        }
      }
    }
  }

  std::string cell_;
  CellKind kind_;
  std::string compute_;
  Dtype dtype_ = FLOAT32;
  std::vector<Weights> weights_;
  int64_t taps_;
  bool skip_;
  Layout layout_;
  std::unique_ptr<Layout> chunk_;              // of sequence()'s latest x
  std::mutex busy_;                            // of sequence(), which many threads may call
  Array live_h_, live_c_, fresh_h_, fresh_c_;  // the layer's h_0 and c_0, and what they were at the snapshot
  std::unique_ptr<Checker> check_;
  std::vector<Layer> layers_;
  const Kernels* table_ = nullptr;
  int threads_ = 1;  // at the snapshot
};

// ---- a whole stack of layers over another library's tensors -----------------------------------------------------------------------------
//
// DLPack's C exchange reads a tensor in tens of nanoseconds and makes new ones, without linking to the library. What these two functions
// cannot take (another device, layout, dtype or shape) they decline by returning None: the caller then lets the library itself compute or
// complain.

namespace tensors {

struct DLTensor {
  void* data;
  int32_t device, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // in elements
  uint64_t offset;
};
struct Managed {
  uint32_t major, minor;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  DLTensor tensor;
};
struct Exchange {
  uint32_t major, minor;
  void* previous;
  int (*allocate)(DLTensor*, Managed**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from)(void*, Managed**);
  int (*to_object)(Managed*, void**);
  int (*borrow)(void*, DLTensor*);
  int (*stream)(int32_t, int32_t, void**);
};
constexpr int32_t CPU = 1;
constexpr uint8_t INTEGER = 0, FLOAT = 2;

const Exchange* exchange = nullptr;
PyObject* plain_types[2] = {};  // no subclass: it may mean anything by its data
PyObject* requires_grad_name = nullptr;

void open(const py::capsule& capsule, const py::sequence& types) {
  const auto* api = capsule.get_pointer<const Exchange>();
  if (api->major != 1 || !api->borrow) fail("this version of DLPack's exchange is not known");
  for (size_t i = 0; i < 2; ++i) plain_types[i] = py::object(types[i]).release().ptr();
  requires_grad_name = PyUnicode_InternFromString("requires_grad");
  exchange = api;
}

struct Declined {};  // thrown and caught in this section

DLTensor borrow(PyObject* o) {
  DLTensor t;
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(o));
  if (type != plain_types[0] && type != plain_types[1]) throw Declined{};
  if (exchange->borrow(o, &t) != 0) {
    PyErr_Clear();
    throw Declined{};
  }
  if (t.device != CPU || t.lanes != 1) throw Declined{};
  int64_t numbers = 1;
  for (int32_t i = 0; i < t.ndim; ++i) numbers *= t.shape[i];
  if (!t.data && numbers != 0) throw Declined{};  // torch has tensors of zeros without memory
  t.data = static_cast<char*>(t.data) + t.offset;
  return t;
}
void must(bool condition) {
  if (!condition) throw Declined{};
}
bool is_contiguous(const DLTensor& t) {
  int64_t step = 1;
  for (int32_t i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] == 0) return true;
    if (t.shape[i] != 1 && t.strides[i] != step) return false;
    step *= t.shape[i];
  }
  return true;
}
bool needs_grad(PyObject* o) {
  const py::object flag = py::reinterpret_steal<py::object>(PyObject_GetAttr(o, requires_grad_name));
  return flag.ptr() == Py_True;
}

// What both functions are told: stack_*(cell, layers, directions, batch_first, low, threads, grad, x, batch_sizes, h, c, weights, ...),
// where low allows products in bfloat16: where the CPU has instructions for it, they are faster.
enum Argument { CELL, LAYERS, DIRECTIONS, BATCH_FIRST, LOW, THREADS, GRAD, X, BATCH_SIZES, H_0, C_0, WEIGHTS, TAPE, DY, DH_T, DC_T, NEEDS };

struct Stack {
  CellKind kind{};
  Dtype dtype{};
  DLTensor x{}, h{}, c{};
  std::vector<Job> jobs;  // layer by layer, direction by direction
  Layout layout;
  int64_t L, D, B, T, H{}, R{}, I{}, tokens;
  bool batch_first, low, single, grad = false;  // single: one step of x (B, I), h (B, H)
  int threads;
  PyObject* const* args;

  explicit Stack(PyObject* const* a) : layout(0, 0, std::nullopt), args(a) {
    kind = static_cast<CellKind>(number(a[CELL]));
    L = number(a[LAYERS]), D = number(a[DIRECTIONS]), batch_first = number(a[BATCH_FIRST]), threads = static_cast<int>(number(a[THREADS]));
    must(kind >= 0 && kind < CELL_KINDS && L > 0 && (D == 1 || D == 2));
    x = borrow(a[X]);
    must(x.code == FLOAT && (x.bits == 32 || x.bits == 64));
    dtype = x.bits == 32 ? FLOAT32 : FLOAT64;
    low = a[LOW] == Py_True && dtype == FLOAT32 && std::strstr(kernels().target, "bf16");
    if (a[BATCH_SIZES] != Py_None) {
      const DLTensor sizes = borrow(a[BATCH_SIZES]);
      must(sizes.ndim == 1 && sizes.code == INTEGER && sizes.bits == 64 && is_contiguous(sizes) && sizes.shape[0] > 0 && x.ndim == 2);
      try {
        layout = Layout::from_batch_sizes(static_cast<const int64_t*>(sizes.data), sizes.shape[0]);
      } catch (const py::value_error&) {
        throw Declined{};
      }
      must(layout.tokens() == x.shape[0]);
      single = false;
    } else {
      single = x.ndim == 2;
      must(single ? L * D == 1 : x.ndim == 3);
      const int64_t rows = x.shape[single || batch_first ? 0 : 1];
      layout = Layout(single ? 1 : x.shape[batch_first ? 1 : 0], rows, std::nullopt);
    }
    T = layout.T, B = layout.B, tokens = layout.tokens(), I = x.shape[x.ndim - 1];
    must(T > 0 && I > 0 && (tokens == 0 || I == 1 || x.strides[x.ndim - 1] == 1));
    h = state(a[H_0]);
    R = h.shape[h.ndim - 1];
    if (a[C_0] != Py_None) c = state(a[C_0]);
    must((kind == LSTM) == (a[C_0] != Py_None));
    H = kind == LSTM ? c.shape[c.ndim - 1] : R;
    must(H > 0 && R > 0);
    weights();
    if (a[GRAD] == Py_True && !grad) grad = needs_grad(a[X]) || needs_grad(a[H_0]) || (kind == LSTM && needs_grad(a[C_0]));
  }

  static int64_t number(PyObject* o) { return PyLong_AsLongLong(o); }
  size_t item() const { return x.bits / 8; }
  char* at(void* p, int64_t element) const { return static_cast<char*>(p) + element * static_cast<int64_t>(item()); }
  DLTensor floats(PyObject* o) const {
    const DLTensor t = borrow(o);
    must(t.code == FLOAT && t.bits == x.bits);
    return t;
  }
  DLTensor state(PyObject* o) const {
    const DLTensor t = floats(o);
    must(is_contiguous(t) && (single ? t.ndim == 2 && t.shape[0] == B : t.ndim == 3 && t.shape[0] == L * D && t.shape[1] == B));
    return t;
  }
  const void* weight(PyObject* o, int32_t ndim, int64_t rows, int64_t columns) {
    if (o == Py_None) return nullptr;
    const DLTensor t = floats(o);
    must(t.ndim == ndim && t.shape[0] == rows && (ndim == 1 || t.shape[1] == columns) && is_contiguous(t));
    if (args[GRAD] == Py_True && !grad) grad = needs_grad(o);
    return t.data;
  }
  PyObject* weight_object(int64_t i) const { return PySequence_Fast_GET_ITEM(args[WEIGHTS], i); }
  int64_t each() const { return PySequence_Fast_GET_SIZE(args[WEIGHTS]) / (L * D); }  // w_ih w_hh [b_ih b_hh] [w_hr]

  void weights() {
    must(PyList_Check(args[WEIGHTS]) || PyTuple_Check(args[WEIGHTS]));
    const int64_t n = each(), G = gates(kind);
    must(n >= 2 && n <= 5 && PySequence_Fast_GET_SIZE(args[WEIGHTS]) == n * L * D);
    const bool projected = n % 2 == 1;
    must(projected ? kind == LSTM : R == H);
    for (int64_t k = 0; k < L * D; ++k) {
      Job j{};
      take_layout(j, layout, k % D == 1);
      j.H = H, j.R = R, j.taps = 1, j.projected = projected;
      j.I = k < D ? I : D * R;
      j.compute = low ? BFLOAT16 : OWN;
      j.w_ih = weight(weight_object(k * n), 2, G * H, j.I);
      j.w_hh = weight(weight_object(k * n + 1), 2, G * H, R);
      must(j.w_ih && j.w_hh);
      if (n >= 4) {
        j.b_ih = weight(weight_object(k * n + 2), 1, G * H, 0);
        j.b_hh = weight(weight_object(k * n + 3), 1, G * H, 0);
        must(!j.b_ih == !j.b_hh);
      }
      if (projected) j.w_hr = weight(weight_object(k * n + n - 1), 2, R, H);
      j.h_0 = at(h.data, k * B * R);
      j.c_0 = kind == LSTM ? at(c.data, k * B * H) : carries(kind) ? j.h_0 : nullptr;
      jobs.push_back(j);
    }
  }

  Tokens side_by_side(void* data, int64_t width, bool first) const {  // (T, B, width), (B, T, width) or (tokens, width)
    if (layout.packed) return {data, width, width};
    return first ? Tokens{data, width, T * width} : Tokens{data, B * width, width};
  }
  Tokens strided(const DLTensor& t) const {
    if (layout.packed) return {t.data, t.strides[0], t.strides[0]};
    if (single) return {t.data, 0, t.strides[0]};
    return batch_first ? Tokens{t.data, t.strides[1], t.strides[0]} : Tokens{t.data, t.strides[0], t.strides[1]};
  }
  Tokens part(Tokens t, int64_t column) const { return {at(t.data, column), t.step, t.row}; }

  // The tape holds each layer's y, then each direction's own tape: elements from the beginning.
  static int64_t rounded(int64_t n) { return (n + 15) / 16 * 16; }
  int64_t y_at(int64_t layer) const { return layer * rounded(tokens * D * R); }
  int64_t tape_at(int64_t k) const { return y_at(L) + (k == 0 ? 0 : tapes_[static_cast<size_t>(k - 1)]); }
  int64_t tape_elements() {
    tapes_.clear();
    int64_t sum = 0;
    for (const Job& j : jobs) tapes_.push_back(sum += rounded(static_cast<int64_t>(kernels().tape_size(kind, dtype, j))));
    return y_at(L) + sum;
  }

  void run(int64_t layer, bool backward) {
    if (tokens == 0) return;
    std::vector<Call> calls;
    for (int64_t d = 0; d < D; ++d) {
      calls.push_back(Call{kind, dtype, jobs[static_cast<size_t>(layer * D + d)], backward, threads});
    }
    run_together(calls);
  }

 private:
  std::vector<int64_t> tapes_;  // where each one ends
};

// A new tensor of the library's own; swapped: the first two of its three axes change places, while it lies in memory as they are given.
py::object fresh(const Stack& s, std::initializer_list<int64_t> shape, void** data, bool swapped = false) {
  DLTensor like{};
  like.device = CPU, like.ndim = static_cast<int32_t>(shape.size());
  like.code = FLOAT, like.bits = s.x.bits, like.lanes = 1;
  like.shape = const_cast<int64_t*>(shape.begin());
  Managed* made = nullptr;
  void* object = nullptr;
  const auto no_memory = [](void*, const char*, const char*) {};
  if (exchange->allocate(&like, &made, nullptr, no_memory) != 0) throw std::bad_alloc();
  *data = static_cast<char*>(made->tensor.data) + made->tensor.offset;
  int64_t seen[3], steps[3];  // read once, by to_object
  if (swapped) {
    const int64_t* n = shape.begin();
    seen[0] = n[1], seen[1] = n[0], seen[2] = n[2];
    steps[0] = n[2], steps[1] = n[1] * n[2], steps[2] = 1;
    made->tensor.shape = seen, made->tensor.strides = steps;
  }
  if (exchange->to_object(made, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

// A tensor (n,) over a buffer that goes back to the pool with it.
py::object pooled(const Stack& s, int64_t n, void** data) {
  struct Holder {
    Managed managed{};
    int64_t shape = 0, stride = 1;
    Buffer buffer;
  };
  auto* holder = new Holder;
  holder->buffer = Pool::get().take(static_cast<size_t>(std::max<int64_t>(n, 1)) * s.item());
  holder->shape = n;
  Managed& m = holder->managed;
  m.major = 1, m.context = holder;
  m.deleter = [](Managed* managed) {
    auto* mine = static_cast<Holder*>(managed->context);
    Pool::get().give(std::move(mine->buffer));
    delete mine;
  };
  m.tensor.data = *data = holder->buffer.data();
  m.tensor.device = CPU, m.tensor.ndim = 1, m.tensor.code = FLOAT, m.tensor.bits = s.x.bits, m.tensor.lanes = 1;
  m.tensor.shape = &holder->shape, m.tensor.strides = &holder->stride;
  void* object = nullptr;
  if (exchange->to_object(&m, &object) != 0) {
    m.deleter(&m);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

// -> y, h_T, c_T or None, tape or None. One step (x (B, I)): y is h_T, and h_T is None.
py::object forward(Stack& s) {
  void *y = nullptr, *h_T = nullptr, *c_T = nullptr, *tape = nullptr;
  const int64_t width = s.D * s.R;
  const bool packed = s.layout.packed;
  py::object y_object =
      packed || s.single ? fresh(s, {s.tokens, width}, &y) : fresh(s, {s.T, s.B, width}, &y, s.batch_first);  // as torch's
  py::object h_object = s.single ? py::none() : fresh(s, {s.L * s.D, s.B, s.R}, &h_T);
  py::object c_object = s.kind != LSTM ? py::none() : s.single ? fresh(s, {s.B, s.H}, &c_T) : fresh(s, {s.L * s.D, s.B, s.H}, &c_T);
  py::object tape_object = s.grad ? pooled(s, s.tape_elements(), &tape) : py::none();
  const auto bytes = static_cast<size_t>(s.tokens * width) * s.item();
  const bool between = s.L > 1 && !tape;
  {
    const Unlocked unlocked;
    const Lent first(between ? bytes : 0), second(between && s.L > 2 ? bytes : 0);
    Tokens below = s.strided(s.x);
    for (int64_t l = 0; l < s.L; ++l) {
      Tokens out = s.side_by_side(y, width, false);
      if (l < s.L - 1) out = s.side_by_side(tape ? s.at(tape, s.y_at(l)) : (l % 2 ? second : first).buffer.data(), width, false);
      for (int64_t d = 0; d < s.D; ++d) {
        const int64_t k = l * s.D + d;
        Job& j = s.jobs[static_cast<size_t>(k)];
        j.x = below, j.y = s.part(out, d * s.R);
        if (h_T) j.h_T = s.at(h_T, k * s.B * s.R);
        if (c_T) j.c_T = s.at(c_T, k * s.B * s.H);
        if (tape) j.tape = s.at(tape, s.tape_at(k));
      }
      s.run(l, false);
      below = out;
    }
    if (tape && bytes) std::memcpy(s.at(tape, s.y_at(s.L - 1)), y, bytes);  // the caller may write into its own
  }
  return py::make_tuple(y_object, h_object, c_object, tape_object);
}

// -> dx, dh_0, dc_0, then one gradient a weight; None where not needed.
py::object backward(Stack& s, Py_ssize_t count) {
  const DLTensor tape = s.floats(s.args[TAPE]);
  must(tape.ndim == 1 && is_contiguous(tape) && tape.shape[0] == s.tape_elements());
  PyObject* needs = s.args[NEEDS];  // bool for x, h, c and each weight
  const int64_t n = s.each();
  must(count == NEEDS + 1 && PyTuple_Check(needs) && PyTuple_GET_SIZE(needs) == 3 + n * s.L * s.D);
  const auto needed = [&](int64_t i) { return PyTuple_GET_ITEM(needs, i) == Py_True; };
  const int64_t width = s.D * s.R, below_width = std::max(s.I, s.L > 1 ? width : 0);
  const auto row = static_cast<size_t>(width) * s.item();

  const Lent zero(row);
  std::memset(zero.buffer.data(), 0, row);
  Tokens dy{zero.buffer.data(), 0, 0};
  if (s.args[DY] != Py_None) {
    const DLTensor t = s.floats(s.args[DY]);
    must(t.ndim == s.x.ndim && t.shape[t.ndim - 1] == width && (s.tokens == 0 || width == 1 || t.strides[t.ndim - 1] == 1));
    for (int32_t i = 0; i + 1 < t.ndim; ++i) must(t.shape[i] == s.x.shape[i]);
    dy = s.strided(t);
  }
  void *dh_T = nullptr, *dc_T = nullptr;
  if (s.args[DH_T] != Py_None) {
    const DLTensor t = s.state(s.args[DH_T]);
    must(t.shape[t.ndim - 1] == s.R);
    dh_T = t.data;
  }
  if (s.args[DC_T] != Py_None) {
    const DLTensor t = s.state(s.args[DC_T]);
    must(t.shape[t.ndim - 1] == s.H);
    dc_T = t.data;
  }

  void *dx = nullptr, *dh = nullptr, *dc = nullptr;
  py::list result;
  if (needed(0)) {
    result.append(s.layout.packed || s.single ? fresh(s, {s.tokens, s.I}, &dx)
                  : s.batch_first             ? fresh(s, {s.B, s.T, s.I}, &dx)
                                              : fresh(s, {s.T, s.B, s.I}, &dx));
  } else {
    result.append(py::none());
  }
  const auto fresh_state = [&](int64_t width_, void** to) {
    result.append(s.single ? fresh(s, {s.B, width_}, to) : fresh(s, {s.L * s.D, s.B, width_}, to));
  };
  needed(1) ? fresh_state(s.R, &dh) : result.append(py::none());
  s.kind == LSTM&& needed(2) ? fresh_state(s.H, &dc) : result.append(py::none());
  for (int64_t k = 0; k < s.L * s.D; ++k) {
    Job& j = s.jobs[static_cast<size_t>(k)];
    const int64_t GH = gates(s.kind) * s.H;
    j.overwrite = true;
    // New memory of such a size comes from the operating system, which has just written zeros into the caches.
    j.around = goes_around(s.kind, s.dtype, j) && GH * std::max(j.I, s.R) * static_cast<int64_t>(s.item()) < 32 << 20;
    void** const to[] = {&j.dw_ih, &j.dw_hh, n >= 4 ? &j.db_ih : &j.dw_hr, &j.db_hh, &j.dw_hr};
    for (int64_t i = 0; i < n; ++i) {
      PyObject* weight = s.weight_object(k * n + i);
      if (weight == Py_None || !needed(3 + k * n + i)) {
        result.append(py::none());
        continue;
      }
      void*& p = *to[i];
      const bool last = j.projected && i == n - 1;
      const int64_t rows = last ? s.R : GH, columns = i == 0 ? j.I : i == 1 ? s.R : last ? s.H : 1;
      result.append(columns == 1 && i >= 2 && !last ? fresh(s, {rows}, &p) : fresh(s, {rows, columns}, &p));
      if (s.tokens == 0) std::memset(p, 0, static_cast<size_t>(rows * columns) * s.item());  // else written
    }
  }
  if (s.tokens == 0) return py::tuple(result);  // B = 0
  {
    const Unlocked unlocked;
    const auto bytes = static_cast<size_t>(s.tokens * below_width) * s.item();
    const Lent one(s.L > 1 ? bytes : 0), two(s.L > 1 ? bytes : 0), other(s.D > 1 ? bytes : 0);
    const bool carried_by_h = dh && s.kind != LSTM && carries(s.kind);  // a GRU carries its own h
    const Lent carried(carried_by_h ? static_cast<size_t>(s.D * s.B * s.H) * s.item() : 0);
    for (int64_t l = s.L - 1; l >= 0; --l) {
      const int64_t in = s.jobs[static_cast<size_t>(l * s.D)].I;
      void* below = l == 0 ? dx : (l % 2 ? one : two).buffer.data();
      const bool first = l == 0 && s.batch_first;
      for (int64_t d = 0; d < s.D; ++d) {
        const int64_t k = l * s.D + d;
        Job& j = s.jobs[static_cast<size_t>(k)];
        j.x = l == 0 ? s.strided(s.x) : s.side_by_side(s.at(tape.data, s.y_at(l - 1)), width, false);
        j.y = s.part(s.side_by_side(s.at(tape.data, s.y_at(l)), width, false), d * s.R);
        j.tape = s.at(tape.data, s.tape_at(k));
        j.dy = s.part(dy, d * s.R);
        if (below) j.dx = s.side_by_side(d == 0 ? below : other.buffer.data(), in, first);
        if (dh_T) j.dh_T = s.at(dh_T, k * s.B * s.R);
        if (dc_T) j.dc_T = s.at(dc_T, k * s.B * s.H);
        if (dh) j.dh_0 = s.at(dh, k * s.B * s.R);
        if (dc) j.dc_0 = s.at(dc, k * s.B * s.H);
        if (carried_by_h) j.dc_0 = s.at(carried.buffer.data(), d * s.B * s.H);
      }
      s.run(l, true);
      for (int64_t d = 0; d < s.D; ++d) {
        const Job& j = s.jobs[static_cast<size_t>(l * s.D + d)];
        if (carried_by_h) add(s.dtype, j.dh_0, j.dc_0, s.B * s.H);
      }
      if (below && s.D == 2) add(s.dtype, below, other.buffer.data(), s.tokens * in);
      dy = s.side_by_side(below, width, false);
    }
  }
  return py::tuple(result);
}

template <bool BACKWARD>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    if (!exchange || count < (BACKWARD ? NEEDS + 1 : WEIGHTS + 1)) fail("stack: call exchange first, and give every argument");
    Stack s(args);
    py::object result = BACKWARD ? backward(s, count) : forward(s);
    return result.release().ptr();
  } catch (const Declined&) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  }
  return nullptr;
}

PyMethodDef FUNCTIONS[] = {
    {"stack_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<false>)), METH_FASTCALL,
     "stack_forward(cell, layers, directions, batch_first, low, threads, grad, x, batch_sizes, h, c, weights) -> (y, h_T, c_T, tape) or "
     "None"},
    {"stack_backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<true>)), METH_FASTCALL,
     "stack_backward(..., weights, tape, dy, dh_T, dc_T, needs) -> (dx, dh_0, dc_0, *dweights) or None"},
};

}  // namespace tensors

// ---- beside the recurrent layers: rnnfast.losses, .dense and .optim have checked what comes here --------------------------------------

// Of one dtype, contiguous, of n numbers.
Dtype alike(const char* who, py::ssize_t n, std::initializer_list<const py::array*> arrays) {
  const py::array& first = **arrays.begin();
  for (const py::array* a : arrays)
    if (!same(a->dtype(), first.dtype()) || !(a->flags() & py::array::c_style) || a->size() != n)
      fail(std::string(who) + ": expected contiguous arrays of one dtype with " + std::to_string(n) + " numbers each");
  return dtype_of(first, who);
}

using Doubles = py::array_t<double, py::array::c_style>;

// (Σ_v e^{a_v − max}, a_target − max) of every row; the gradient goes to `gradient`.
std::pair<Doubles, Doubles> softmax(const py::array& logits, const Indices& targets, const std::optional<Doubles>& weights, double weight,
                                    std::optional<py::array> gradient) {
  const int64_t n = targets.size(), V = n ? logits.size() / n : 0;
  const Dtype dtype = alike("softmax", logits.size(), {&logits, gradient ? &*gradient : &logits});
  if (n * V != logits.size() || (weights && weights->size() != n)) fail("softmax: expected a target and a weight for every row");
  for (int64_t i = 0; i < n; ++i)
    if (targets.data()[i] < 0 || targets.data()[i] >= V) fail("softmax: targets must lie in [0, " + std::to_string(V) + ")");
  Doubles sums(n), picked(n);
  const Softmax s{V,
                  logits.data(),
                  targets.data(),
                  weights ? weights->data() : nullptr,
                  weight,
                  gradient ? gradient->mutable_data() : nullptr,
                  sums.mutable_data(),
                  picked.mutable_data()};
  {
    const Unlocked unlocked;
    divide(n, GRAIN / std::max<int64_t>(V, 1), [&](int64_t begin, int64_t end) { kernels().softmax(dtype, s, begin, end); });
  }
  return {sums, picked};
}

void scatter(py::array table, const Indices& rows, const py::array& values) {
  const int64_t n = rows.size(), width = table.ndim() == 2 ? table.shape(1) : 0;
  const Dtype dtype = alike("scatter", table.size(), {&table});
  if (!same(values.dtype(), table.dtype()) || !(values.flags() & py::array::c_style) || values.size() != n * width)
    fail("scatter: expected a contiguous row of values for each of rows");
  for (int64_t i = 0; i < n; ++i)
    if (rows.data()[i] < 0 || rows.data()[i] >= table.shape(0)) fail("scatter: rows must lie in the table");
  const Scatter s{n, width, table.mutable_data(), rows.data(), values.data()};
  const Unlocked unlocked;
  divide(width, std::max<int64_t>(64, GRAIN / std::max<int64_t>(n, 1)),
         [&](int64_t begin, int64_t end) { kernels().scatter(dtype, s, begin, end); });
}

void adam(py::array p, const py::array& gradient, py::array mean, py::array square, double rate, double beta_1, double beta_2, double eps,
          double decay, double kept) {
  const Dtype dtype = alike("adam", p.size(), {&p, &gradient, &mean, &square});
  const Adam u{p.mutable_data(), gradient.data(), mean.mutable_data(), square.mutable_data(), rate, beta_1, beta_2, eps, decay, kept};
  const int64_t n = p.size();
  const Unlocked unlocked;
  divide(n, GRAIN, [&](int64_t begin, int64_t end) { kernels().adam(dtype, u, begin, end); });
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "rnnfast's kernels; rnnfast.functional is the way in.";
  py::class_<Layout, std::shared_ptr<Layout>>(m, "Layout")
      .def(py::init<int64_t, int64_t, const std::optional<py::array_t<int64_t>>&>(), py::arg("T"), py::arg("B"),
           py::arg("lengths") = py::none())
      .def_static("from_batch_sizes", py::overload_cast<const py::array_t<int64_t>&>(&Layout::from_batch_sizes), py::arg("batch_sizes"))
      .def_readonly("T", &Layout::T)
      .def_readonly("B", &Layout::B)
      .def_readonly("packed", &Layout::packed)
      .def_readonly("ragged", &Layout::ragged)
      .def_property_readonly("tokens", &Layout::tokens);
  py::class_<Packs>(m, "Packs").def(py::init<>());
  py::class_<Run>(m, "Run").def("check_kept", &Run::check_kept).def_property_readonly("tapes", [](const py::object& self) {
    const auto& run = self.cast<const Run&>();
    py::list tapes;
    for (size_t d = 0; d < run.D; ++d) tapes.append(py::array(run.check.dtype, {run.sizes[d]}, run.tapes[d].data(), self));
    return tapes;
  });
  m.def("tape_size", &tape_size, py::arg("cell"), py::arg("layout"), py::arg("weights"));
  m.def("forward", &forward, py::arg("cell"), py::arg("layout"), py::arg("params"), py::arg("names"), py::arg("layer"), py::arg("compute"),
        py::arg("taps"), py::arg("x"), py::arg("y"), py::arg("h_0"), py::arg("c_0"), py::arg("h_T"), py::arg("c_T"), py::arg("resets"),
        py::arg("fresh_h"), py::arg("fresh_c"), py::arg("cells"), py::arg("tape"), py::arg("recompute"), py::arg("snapshot"),
        py::arg("threads"));
  m.def("forward_plain", &forward_plain, py::arg("cell"), py::arg("params"), py::arg("names"), py::arg("x"), py::arg("tape"));
  m.def("backward", &backward, py::arg("run"), py::arg("dy"), py::arg("dh_T"), py::arg("dc_T"), py::arg("need_dx"), py::arg("dh_0"),
        py::arg("dc_0"), py::arg("gradients"), py::arg("accumulate"), py::arg("threads"));
  py::class_<Stream>(m, "Stream")
      .def(py::init<std::string, std::vector<Weights>, std::string, int64_t, int64_t, bool, Array, Array>(), py::arg("cell"),
           py::arg("weights"), py::arg("compute"), py::arg("batch"), py::arg("taps"), py::arg("skip"), py::arg("fresh_h"),
           py::arg("fresh_c"))
      .def("__call__", &Stream::call, py::arg("x"), py::arg("out") = py::none(),
           "y (B, R), one step on: x (B, I) -> y; `out` receives y where given.")
      .def("sequence", &Stream::sequence, py::arg("x"), py::arg("state"), py::arg("threads") = ALL)
      .def_property("state", &Stream::state, &Stream::set_state, "h (L, B, R), for an LSTM (h, c): a copy; assign to set it.")
      .def("reset", &Stream::reset, py::arg("mask") = py::none(),
           "Puts rows (all, or those where mask (B,) is true) back to the initial state.")
      .def("copy", &Stream::copy, "A stream of its own from here on, with the same snapshot and state.")
      .def("refresh", &Stream::refresh, "Reads the layer's weights anew.");
  m.def("exchange", &tensors::open, py::arg("capsule"), py::arg("types"),
        "Names the tensor library whose tensors stack_forward and stack_backward take.");
  for (PyMethodDef& f : tensors::FUNCTIONS) m.add_object(f.ml_name, py::reinterpret_steal<py::object>(PyCFunction_New(&f, nullptr)));
  m.def("targets", [] {
    std::vector<std::string> names;
    for (int i = 0; i < target_count(); ++i) names.emplace_back(target(i).target);
    return names;
  });
  m.def("target", [] { return std::string(kernels().target); });
  m.def("use_target", [](const std::string& name) {
    std::string known;
    for (int i = 0; i < target_count(); ++i) {
      if (name == target(i).target) return use_target(i);
      known += std::string(i ? ", " : "") + target(i).target;
    }
    fail("target must be one of " + known + "; got '" + name + "'");
  });
  m.def(
      "peak",
      [](const std::string& compute, int64_t rounds) {
        const Dtype dtype = compute == "float64" ? FLOAT64 : FLOAT32;
        const Compute products = compute_of(compute, dtype, "peak");
        const Unlocked unlocked;
        return kernels().peak(dtype, products, rounds);
      },
      py::arg("compute"), py::arg("rounds"));
  m.def("softmax", &softmax, py::arg("logits"), py::arg("targets"), py::arg("weights"), py::arg("weight"), py::arg("gradient"));
  m.def("scatter", &scatter, py::arg("table"), py::arg("rows"), py::arg("values"));
  m.def("adam", &adam, py::arg("p"), py::arg("gradient"), py::arg("mean"), py::arg("square"), py::arg("rate"), py::arg("beta_1"),
        py::arg("beta_2"), py::arg("eps"), py::arg("decay"), py::arg("kept"));
  m.def("get_num_threads", &thread_count);
  m.def("share_small_jobs", &share_small_jobs, py::arg("always"));
  m.def("lend_threads", [](uintptr_t parallel, uintptr_t number, uintptr_t count) {
    lend_threads(
        {reinterpret_cast<decltype(OpenMP::parallel)>(parallel), reinterpret_cast<int (*)()>(number), reinterpret_cast<int (*)()>(count)});
  });
  m.def("set_num_threads", [](int n) {
    if (n < 1) fail("n must be at least 1, got " + std::to_string(n));
    set_thread_count(n);
  });
}

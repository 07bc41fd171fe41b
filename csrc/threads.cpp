// The team of threads.hpp: persistent threads that wait for a new generation number, and a barrier that counts arrivals; or a team that is
// lent.
#include "threads.hpp"

#include <pthread.h>
#include <stdlib.h>
#include <sys/types.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnfast {
namespace {

constexpr int SPINS = 4000;           // some 20 to 60 microseconds before a waiting thread sleeps
constexpr int64_t SLICE = 1'000'000;  // nanoseconds: waking takes less, another program's turn on a core longer
constexpr int64_t CLOSE = 30'000;     // nanoseconds between jobs, in which it does not yet sleep
constexpr int64_t PAYS = 200'000;     // of jobs so close, after which waking it, some 50 microseconds, counts for little
constexpr int LATE = 500;  // of them that threads with equal shares of a step need not wait; sched_yield from then on was no help

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Nanoseconds of some clock.
int64_t now() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// How the waits of a job went.
struct Waits {
  std::atomic<unsigned> late{0};   // that outlast LATE
  std::atomic<int64_t> asleep{0};  // nanoseconds of all of them together
};

// Waits until `value` differs from `old` and returns it.
unsigned wait_while(const std::atomic<unsigned>& value, unsigned old, Waits* waits = nullptr, std::atomic<int>* awake = nullptr) {
  for (int i = 0; i < SPINS; ++i) {
    const unsigned now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    relax();
    if (i == LATE && waits) waits->late.fetch_add(1, std::memory_order_relaxed);
  }
  const int64_t start = waits ? now() : 0;
  if (awake) awake->fetch_sub(1, std::memory_order_relaxed);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
  if (awake) awake->fetch_add(1, std::memory_order_relaxed);
  if (waits) waits->asleep.fetch_add(now() - start, std::memory_order_relaxed);
  return value.load(std::memory_order_acquire);
}

struct Barrier {
  std::atomic<unsigned> arrived{0}, round{0};
  Waits waits;
  unsigned count = 1;
  static void wait(void* p) {
    Barrier& b = *static_cast<Barrier*>(p);
    const unsigned round = b.round.load(std::memory_order_relaxed);
    if (b.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == b.count) {
      b.arrived.store(0, std::memory_order_relaxed);
      b.round.store(round + 1, std::memory_order_release);
      b.round.notify_all();
    } else {
      wait_while(b.round, round, &b.waits);
    }
  }
};

// On that clock, until when a core is held to be busy with something else: ten times as long as the job took that showed it.
std::atomic<int64_t> busy_until{0}, taken_until{0};  // see cores_are_busy and cores_are_taken

// When the last job ended, and since when jobs have been CLOSE.
std::atomic<int64_t> last_end{0}, close_since{0};
std::atomic<bool> always_shared{false};

// What a job's meetings say: more than a quarter of them late, and threads that meet often had better not.
void remember(int64_t start, int64_t end, unsigned meetings, unsigned late) {
  if (meetings >= 4 && late > meetings / 4) busy_until.store(end + 10 * (end - start), std::memory_order_relaxed);
}

OpenMP lent{};
std::atomic<bool> is_lent{false};

// One fork and join of the lent team.
struct Region {
  Task task;
  void* data;
  int count;
  Barrier barrier{};
  bool is_whole = false;
  int64_t done = 0;  // when the caller had finished its part
  static void enter(void* p) {
    Region& r = *static_cast<Region*>(p);
    if (lent.count() != r.count) return;  // fewer than wanted: nobody begins
    const int id = lent.number();
    if (id == 0) r.is_whole = true;
    r.task(r.data, id, r.count, Barrier::wait, &r.barrier);
    if (id == 0) r.done = now();
  }
  bool run() {
    const int64_t start = now();
    barrier.count = static_cast<unsigned>(count);
    lent.parallel(enter, this, static_cast<unsigned>(count), 0);
    const int64_t end = now(), all = end - start;
    if (is_whole && end - done > (done - start) / 2 + 2 * SLICE)
      taken_until.store(end + std::min<int64_t>(10 * all, 200 * SLICE), std::memory_order_relaxed);
    last_end.store(end, std::memory_order_relaxed);
    remember(start, end, barrier.round.load(std::memory_order_relaxed), barrier.waits.late.load(std::memory_order_relaxed));
    return is_whole;
  }
};

class Team {
 public:
  // Are there so many threads, the caller counted? The system may refuse to start one.
  bool grow(int count) {
    try {
      while (static_cast<int>(threads_.size()) < count - 1) {
        const int id = static_cast<int>(threads_.size()) + 1;
        threads_.emplace_back([this, id, seen = generation_.load()] { work(id, seen); });
      }
    } catch (const std::system_error&) {
      return false;
    }
    return true;
  }
  void run(int count, Task task, void* data) {
    task_ = task, data_ = data, count_ = count;
    barrier_.count = static_cast<unsigned>(count);
    running_.store(static_cast<unsigned>(threads_.size()), std::memory_order_relaxed);
    const unsigned round = barrier_.round.load(std::memory_order_relaxed);
    const int64_t start = now();
    Waits& waits = barrier_.waits;
    waits.late.store(0, std::memory_order_relaxed), waits.asleep.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    task(data, 0, count, Barrier::wait, &barrier_);
    const unsigned meetings = barrier_.round.load(std::memory_order_relaxed) - round, late = waits.late.load(std::memory_order_relaxed);
    for (unsigned left = running_.load(std::memory_order_acquire); left != 0;) left = wait_while(running_, left, &waits);
    const int64_t end = now(), all = end - start, asleep = waits.asleep.load(std::memory_order_relaxed) / (count - 1);
    if (asleep > SLICE && asleep > all / 3 * 2) taken_until.store(start + 11 * all, std::memory_order_relaxed);
    last_end.store(end, std::memory_order_relaxed);
    remember(start, end, meetings, late);
  }
  bool is_awake() const { return awake_.load(std::memory_order_relaxed) > 0; }

 private:
  void work(int id, unsigned seen) {
    awake_.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      seen = wait_while(generation_, seen, nullptr, &awake_);
      if (id < count_) task_(data_, id, count_, Barrier::wait, &barrier_);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_all();
    }
  }
  std::vector<std::thread> threads_;
  std::atomic<unsigned> generation_{0}, running_{0};
  std::atomic<int> awake_{0};  // workers that run or spin
  Barrier barrier_;
  Task task_ = nullptr;
  void* data_ = nullptr;
  int count_ = 1;
};

// The one team of the process and the lock of whoever uses it. Both are leaked on purpose: threads may outlive static destructors, and a
// fork's child must not touch what its parent's threads held.
struct Shared {
  std::mutex busy;
  Team team;
};
std::atomic<Shared*> shared{nullptr};
std::once_flag at_fork;

void forget() {
  shared.store(nullptr);
  is_lent.store(false);
}

Shared& the_team() {
  std::call_once(at_fork, [] { pthread_atfork(nullptr, nullptr, forget); });
  Shared* now = shared.load();
  if (!now) {
    Shared* fresh = new Shared;
    if (shared.compare_exchange_strong(now, fresh)) return *fresh;
    delete fresh;
  }
  return *now;
}

int positive(const char* name) {
  const char* text = getenv(name);
  const int n = text ? atoi(text) : 0;
  return n > 0 ? n : 0;
}

std::atomic<int> wanted{0}, bound{0};

}  // namespace

int hardware_threads() {
  int n = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    long long quota = 0, period = 0;
    if (std::fscanf(file, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
      const int cpus = static_cast<int>((quota + period - 1) / period);
      if (cpus < n) n = cpus;
    }
    std::fclose(file);
  }
#endif
  return n > 0 ? n : 1;
}

int thread_count() {
  int n = wanted.load();
  if (n > 0) return n;
  n = positive("RNNFAST_NUM_THREADS");
  int unset = 0;  // unless another thread has set it meanwhile
  bound.compare_exchange_strong(unset, n > 0 ? n : hardware_threads());
  if (n == 0) n = positive("OMP_NUM_THREADS");
  if (n == 0) n = hardware_threads();
  unset = 0;
  return wanted.compare_exchange_strong(unset, n) ? n : unset;
}

bool cores_are_busy() { return now() < busy_until.load(std::memory_order_relaxed); }
bool cores_are_taken() { return now() < taken_until.load(std::memory_order_relaxed); }

void share_small_jobs(bool always) { always_shared.store(always, std::memory_order_relaxed); }

bool team_sleeps() {
  if (always_shared.load(std::memory_order_relaxed)) return false;
  if (is_lent.load(std::memory_order_acquire)) return false;  // its owner's regions keep it awake, of which we know nothing
  const Shared* s = shared.load();
  if (s && s->team.is_awake()) return false;
  const int64_t t = now();
  if (t - last_end.load(std::memory_order_relaxed) > CLOSE) close_since.store(t, std::memory_order_relaxed);
  return t - close_since.load(std::memory_order_relaxed) < PAYS;
}

int threads_for(int asked) {
  thread_count();  // has read the environment
  return std::min(asked, bound.load());
}

void set_thread_count(int n) {
  if (n > 0) bound.store(n);
  wanted.store(n > 0 ? n : 0);
}

void lend_threads(OpenMP team) {
  // The team of this process, even where it never ran: a fork's child must forget the loan.
  const std::lock_guard<std::mutex> hold(the_team().busy);
  lent = team;
  is_lent.store(team.parallel != nullptr, std::memory_order_release);
}

void run(int most, Task task, void* data, void (*prepare)(void*, int)) {
  if (most > 1) {
    Shared& s = the_team();
    if (s.busy.try_lock()) {
      const std::lock_guard<std::mutex> hold(s.busy, std::adopt_lock);
      const bool by_lent = is_lent.load(std::memory_order_acquire);
      if (by_lent || s.team.grow(most)) {
        prepare(data, most);
        if (!by_lent) {
          s.team.run(most, task, data);
          return;
        }
        if (Region{task, data, most}.run()) return;
      }
    }
  }
  Barrier alone;
  prepare(data, 1);
  task(data, 0, 1, Barrier::wait, &alone);
  last_end.store(now(), std::memory_order_relaxed);
}

}  // namespace rnnfast

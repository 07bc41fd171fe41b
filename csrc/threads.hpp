// A fork-safe team of threads: run(count, fn) calls fn(worker) once on each, the caller being the first.
//
// One fork and join a call. A caller that finds the team busy runs alone instead of queueing. Waiting threads spin briefly and then sleep,
// so that other libraries are not starved. Where another library's OpenMP keeps a team that spins between its own regions, as torch's does,
// ours would find its cores taken: lent that team, we use it instead. After a fork the child forgets both and starts a new one when it
// needs it. Knows no kernel.
#pragma once

namespace rnnfast {

int hardware_threads();              // what affinity and the cgroup leave us
int thread_count();                  // set_thread_count, else RNNFAST_NUM_THREADS, else OMP_NUM_THREADS, else hardware_threads
int threads_for(int asked);          // for a call that says how many it may take: OMP_NUM_THREADS speaks to those that don't
bool cores_are_busy();               // of late, threads that met often kept each other waiting: something else runs where they would
bool cores_are_taken();              // of late, one was not let run at all for a while
bool team_sleeps();                  // and jobs have not followed each other for long enough to wake it for a small one
void share_small_jobs(bool always);  // as if the team never slept, for tests
void set_thread_count(int n);

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of whoever lends; null takes the loan back.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned count, unsigned flags);
  int (*number)();
  int (*count)();
};
void lend_threads(OpenMP team);

// Calls fn(data, id, count, wait, waiter) for id = 0 .. count − 1, count <= most; wait(waiter) is a barrier for these threads.
using Task = void (*)(void* data, int id, int count, void (*wait)(void*), void* waiter);
// prepare(data, count) comes first, once it is known whether the team is free (count = most) or taken (1).
void run(int most, Task task, void* data, void (*prepare)(void* data, int count));

}  // namespace rnnfast

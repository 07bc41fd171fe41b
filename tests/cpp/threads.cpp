// threads.cpp: laws of the thread team, asked through threads.hpp. Small enough for ThreadSanitizer to see every interleaving that matters.
//
//   everyone once     run calls the task once for each id, and returns when all have finished
//   barrier           no one passes the n-th wait before all have reached it
//   no queueing       callers that find the team busy run alone, at once
//   fork              a child forgets the team and starts its own
//   sleep             a team that sleeps says so, until jobs have followed each other for long enough to wake it
#include "../../csrc/threads.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "check.hpp"

namespace {

struct Round {
  int prepared = 0;
  std::atomic<int> calls{0}, out_of_step{0};
  std::vector<int> visits;  // one writer each
  std::vector<int> shared;  // written by worker n % count, read by all after the barrier
};

void prepare(void* data, int count) {
  Round& round = *static_cast<Round*>(data);
  round.prepared = count;
  round.visits.assign(static_cast<size_t>(count), 0);
  round.shared.assign(20, -1);
}

void task(void* data, int id, int count, void (*wait)(void*), void* waiter) {
  Round& round = *static_cast<Round*>(data);
  round.calls += 1;
  round.visits[static_cast<size_t>(id)] += 1;
  for (int n = 0; n < 20; ++n) {
    if (id == n % count) round.shared[static_cast<size_t>(n)] = n;
    if (count > 1) wait(waiter);
    if (round.shared[static_cast<size_t>(n)] != n) round.out_of_step += 1;
  }
}

bool holds(const Round& round, int most) {
  bool good = (round.prepared == most || round.prepared == 1) && round.calls == round.prepared && round.out_of_step == 0;
  for (const int visits : round.visits) good = good && visits == 1;
  return good;
}

void everyone_once() {
  for (int repeat = 0; repeat < 30; ++repeat)
    for (const int most : {1, 2, 3, 5}) {
      Round round;
      rnnfast::run(most, task, &round, prepare);
      CHECK(holds(round, most) && round.prepared == most);
    }
}

void callers_do_not_queue() {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 30; ++repeat) {
        Round round;
        rnnfast::run(3, task, &round, prepare);
        if (!holds(round, 3)) wrong += 1;
      }
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

void a_child_starts_its_own_team() {
#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer does not follow a fork of a process with threads
  const pid_t child = fork();
  if (child == 0) {
    Round round;
    rnnfast::run(3, task, &round, prepare);
    _exit(holds(round, 3) && round.prepared == 3 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
#endif
}

// Asks until the answer comes, for at most five seconds: a core may be busy with something else.
template <class Answers>
bool in_time(Answers answers) {
  const auto start = std::chrono::steady_clock::now();
  while (!answers())
    if (std::chrono::steady_clock::now() - start > std::chrono::seconds(5)) return false;
  return true;
}

void a_team_that_sleeps_is_woken_for_many_jobs() {
  const auto job = [](int most) {
    Round round;
    rnnfast::run(most, task, &round, prepare);
    return holds(round, most);
  };
  CHECK(in_time([&] { return job(2) && !rnnfast::team_sleeps(); }));
  const auto rest = [] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
  CHECK(in_time([&] {  // a pause between jobs: not worth it, every time
    bool slept = true;
    for (int repeat = 0; repeat < 5; ++repeat) rest(), slept = slept && rnnfast::team_sleeps() && job(1);
    return slept;
  }));
  CHECK(in_time([&] { return job(1) && !rnnfast::team_sleeps(); }));  // none: soon
}

void counts() {
  CHECK(rnnfast::hardware_threads() >= 1);
  rnnfast::set_thread_count(3);
  CHECK(rnnfast::thread_count() == 3);
}

}  // namespace

int main() {
  counts();
  everyone_once();
  callers_do_not_queue();
  a_child_starts_its_own_team();
  everyone_once();
  a_team_that_sleeps_is_woken_for_many_jobs();
  return test::report();
}

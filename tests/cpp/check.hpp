// check.hpp: what every C++ test needs and no more: CHECK counts and reports, report() closes. Knows nothing of rnnfast.
#pragma once

#include <cstdio>

namespace test {

inline int passed = 0, failed = 0;

inline bool check(bool holds, const char* what, const char* file, int line) {
  if (holds) {
    ++passed;
  } else if (++failed <= 20) {
    std::printf("%s:%d: does not hold: %s\n", file, line, what);
  }
  return holds;
}

inline int report() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace test

#define CHECK(condition) test::check((condition), #condition, __FILE__, __LINE__)

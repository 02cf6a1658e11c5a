// Which processors there are, and threads that stay on one.
#pragma once

#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace pellucid {

// How many processors the calling thread may run on; 0 where that is not known.
int usable_processors();

// A processor for each of a number of threads, where that is how many are usable; otherwise none. With fewer threads
// the system has room to place them, and knows better who else is there.
std::vector<int> processor_of_each(int num_threads);

// Keeps the calling thread on one processor as long as this lives, if it may run there.
class Pinned {
  public:
    Pinned(const std::vector<int>& processors, int thread);  // none: nothing changes
    ~Pinned();
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;

#if defined(__linux__)
  private:
    bool is_pinned_ = false;
    cpu_set_t before_, one_;
#endif
};

}  // namespace pellucid

#include "processors.h"

#include <thread>

namespace pellucid {

#if defined(__linux__)

namespace {

// Empty where it cannot be told.
cpu_set_t usable() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) CPU_ZERO(&set);
    return set;
}

}  // namespace

int usable_processors() {
    const cpu_set_t set = usable();
    const int count = CPU_COUNT(&set);
    return count > 0 ? count : static_cast<int>(std::thread::hardware_concurrency());
}

std::vector<int> processor_of_each(int num_threads) {
    const cpu_set_t set = usable();
    std::vector<int> processors;
    if (num_threads < 2 || CPU_COUNT(&set) != num_threads) return processors;
    for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
        if (CPU_ISSET(processor, &set)) processors.push_back(processor);
    }
    return processors;
}

Pinned::Pinned(const std::vector<int>& processors, int thread) {
    if (processors.empty()) return;
    before_ = usable();
    if (!CPU_ISSET(processors[thread], &before_)) return;
    CPU_ZERO(&one_);
    CPU_SET(processors[thread], &one_);
    is_pinned_ = sched_setaffinity(0, sizeof one_, &one_) == 0;
}

Pinned::~Pinned() {
    if (!is_pinned_) return;
    const cpu_set_t now = usable();
    if (CPU_EQUAL(&now, &one_)) sched_setaffinity(0, sizeof before_, &before_);  // else somebody else has changed it
}

#else

int usable_processors() { return static_cast<int>(std::thread::hardware_concurrency()); }

std::vector<int> processor_of_each(int) { return {}; }

Pinned::Pinned(const std::vector<int>&, int) {}

Pinned::~Pinned() = default;

#endif

}  // namespace pellucid

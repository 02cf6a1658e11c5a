#include "thread_pool.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "float_state.h"
#include "processors.h"

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace pellucid {

namespace {

constexpr auto kSpinInRun = std::chrono::microseconds(200);
// A decode step follows the one before within some 160 us (sampling, scheduling); waking a sleeper takes about 100.
constexpr auto kSpinBetweenRuns = std::chrono::microseconds(300);
constexpr int kPausesPerClockRead = 64;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int64_t current_process() {
#if __has_include(<unistd.h>)
    return getpid();
#else
    return 1;
#endif
}

// Waits until `value` is no longer `old`: spins up to `limit`, then sleeps.
void wait_while_equal(const std::atomic<uint32_t>& value, uint32_t old, bool spins, std::chrono::microseconds limit) {
    if (!spins) {
        value.wait(old, std::memory_order_acquire);
        return;
    }
    for (int i = 0; i < kPausesPerClockRead; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    const auto deadline = std::chrono::steady_clock::now() + limit;
    do {
        for (int i = 0; i < kPausesPerClockRead; ++i) {
            if (value.load(std::memory_order_acquire) != old) return;
            pause();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads),
      spins_(num_threads <= std::max(usable_processors(), 1)),
      states_(new ThreadState[num_threads]),
      counters_(new Counter[kCounterSets * num_threads]) {
    start();
}

ThreadPool::~ThreadPool() {
    if (process_ == current_process()) {
        stop();
    } else {
        abandon_workers();
    }
}

void ThreadPool::start() {
    processors_ = processor_of_each(num_threads_);
    stopping_ = false;
    arrived_ = 0;
    sense_ = 0;
    generation_ = 0;
    for (int thread = 0; thread < num_threads_; ++thread) states_[thread] = {};
    for (uint32_t i = 0; i < kCounterSets * num_threads_; ++i) counters_[i].value = 0;
    try {
        for (int thread = 1; thread < num_threads_; ++thread) workers_.emplace_back([this, thread] { worker(thread); });
    } catch (...) {
        stop();
        throw;
    }
    process_ = current_process();
}

void ThreadPool::stop() {
    stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (std::thread& thread : workers_) thread.join();
    workers_.clear();
}

// In a forked child: handles of threads that are not there can be neither joined nor detached, so they are leaked.
void ThreadPool::abandon_workers() { new std::vector<std::thread>(std::exchange(workers_, {})); }

void ThreadPool::run_erased(Task task, void* context) {
    const FloatState state(Subnormals::kFlushed);
    if (num_threads_ == 1) {
        task(context, 0);
        return;
    }
    if (process_ != current_process()) {
        abandon_workers();
        start();
    }
    const Pinned pinned(processors_, 0);
    task_ = task;
    context_ = context;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    task(context, 0);
    barrier(0);
}

void ThreadPool::worker(int thread) {
    const FloatState state(Subnormals::kFlushed);
    const Pinned pinned(processors_, thread);
    uint32_t seen = 0;
    for (;;) {
        wait_while_equal(generation_, seen, spins_, kSpinBetweenRuns);
        ++seen;
        if (stopping_) return;
        task_(context_, thread);
        barrier(thread);
    }
}

void ThreadPool::barrier(int thread) {
    if (num_threads_ == 1) return;
    const uint32_t sense = states_[thread].barrier_sense++;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        sense_.store(sense + 1, std::memory_order_release);
        sense_.notify_all();
    } else {
        wait_while_equal(sense_, sense, spins_, kSpinInRun);
    }
}

ThreadPool::Counter* ThreadPool::take_counters(int thread) {
    const uint32_t loop = states_[thread].loops++;
    counters_[(loop + 2) % kCounterSets * num_threads_ + thread].value.store(0, std::memory_order_relaxed);
    return &counters_[loop % kCounterSets * num_threads_];
}

}  // namespace pellucid

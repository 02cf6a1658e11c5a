// A team of persistent threads: the caller and its workers run one function together, meeting at barriers.
//
// Inside a run threads wait by spinning for a bounded time and then sleep; between runs workers spin at most 0.3 ms
// and then sleep, so an idle engine uses no processor. Where there are more threads than processors nobody spins:
// whoever is waited for may need the processor. Where there are just as many, each has a processor of its own, the
// caller for the time of a run: two that share one wait for each other at every barrier. Every thread of a run works
// with the same floating-point state: round to nearest, subnormals flushed to zero; the caller's own is restored.
//
// Workers do not survive a fork. A child process starts its own with its first run.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace pellucid {

class ThreadPool {
  public:
    explicit ThreadPool(int num_threads);  // throws std::system_error where threads cannot be started
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int num_threads() const { return num_threads_; }

    // Runs fn(thread) for thread = 0 .. num_threads - 1, the caller being 0, and returns when all are done. `fn` must
    // not throw and every thread must meet the same barriers and loops in the same order. Throws std::system_error
    // where this is the first run after a fork and threads cannot be started.
    template <class Fn>
    void run(Fn& fn) {
        run_erased([](void* context, int thread) { (*static_cast<Fn*>(context))(thread); }, &fn);
    }

    // Within a run: waits for all threads.
    void barrier(int thread);

    // Within a run: fn(begin, end) over chunks of `grain` that cover [0, count), then a barrier. Each thread goes
    // through a stretch of its own from the front, so that its memory streams on, and then helps with the others'.
    template <class Fn>
    void parallel_for(int thread, int count, int grain, Fn fn) {
        if (num_threads_ == 1) {
            if (count > 0) fn(0, count);
            return;
        }
        Counter* counters = take_counters(thread);
        const int chunks = (count + grain - 1) / grain;
        for (int i = 0; i < num_threads_; ++i) {
            const int owner = (thread + i) % num_threads_;
            const int first = static_cast<int>(int64_t{chunks} * owner / num_threads_);
            const int size = static_cast<int>(int64_t{chunks} * (owner + 1) / num_threads_) - first;
            for (int taken = counters[owner].take(); taken < size; taken = counters[owner].take()) {
                const int begin = (first + taken) * grain;
                fn(begin, count - begin < grain ? count : begin + grain);
            }
        }
        barrier(thread);
    }

  private:
    using Task = void (*)(void* context, int thread);

    struct alignas(64) Counter {
        std::atomic<int> value{0};
        int take() { return value.fetch_add(1, std::memory_order_relaxed); }
    };
    struct alignas(64) ThreadState {
        uint32_t barrier_sense = 0;
        uint32_t loops = 0;
    };
    // A loop's counters are cleared two loops before they are used again, with barriers in between.
    static constexpr uint32_t kCounterSets = 4;

    void run_erased(Task task, void* context);
    void start();
    void stop();
    void abandon_workers();
    void worker(int thread);
    Counter* take_counters(int thread);

    const int num_threads_;
    const bool spins_;
    std::vector<int> processors_;  // of the threads; empty where they are not pinned
    int64_t process_ = 0;          // whose threads the workers are
    std::vector<std::thread> workers_;
    std::unique_ptr<ThreadState[]> states_;
    std::unique_ptr<Counter[]> counters_;  // [kCounterSets][num_threads]
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> sense_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
    bool stopping_ = false;
};

}  // namespace pellucid

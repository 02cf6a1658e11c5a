// A team of persistent threads: the caller and its workers run one function together, meeting at barriers.
//
// Inside a run threads wait by spinning for a bounded time and then sleep; between runs workers spin at most 50 us and
// then sleep, so an idle engine uses no processor. Every thread of a run works with the same floating-point state:
// round to nearest, subnormals flushed to zero; the caller's own is restored.
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
    // not throw and every thread must meet the same barriers and loops in the same order.
    template <class Fn>
    void run(Fn& fn) {
        run_erased([](void* context, int thread) { (*static_cast<Fn*>(context))(thread); }, &fn);
    }

    // Within a run: waits for all threads.
    void barrier(int thread);

    // Within a run: fn(begin, end) over chunks of [0, count) that threads take as they come, then a barrier. Chunks
    // are multiples of `grain` but for the last.
    template <class Fn>
    void parallel_for(int thread, int count, int grain, Fn fn) {
        if (num_threads_ == 1) {
            if (count > 0) fn(0, count);
            return;
        }
        std::atomic<int>& next = take_counter(thread);
        for (int begin = next.fetch_add(grain, std::memory_order_relaxed); begin < count;
             begin = next.fetch_add(grain, std::memory_order_relaxed)) {
            fn(begin, begin + grain < count ? begin + grain : count);
        }
        barrier(thread);
    }

  private:
    using Task = void (*)(void* context, int thread);

    struct alignas(64) Counter {
        std::atomic<int> value{0};
    };
    struct alignas(64) ThreadState {
        uint32_t barrier_sense = 0;
        uint32_t loops = 0;
    };
    // A loop's counter is cleared two loops before it is used again, with barriers in between.
    static constexpr uint32_t kCounters = 4;

    void run_erased(Task task, void* context);
    void worker(int thread);
    std::atomic<int>& take_counter(int thread);

    const int num_threads_;
    std::vector<std::thread> workers_;
    std::unique_ptr<ThreadState[]> states_;
    Counter counters_[kCounters];
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> sense_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
    bool stopping_ = false;
};

}  // namespace pellucid

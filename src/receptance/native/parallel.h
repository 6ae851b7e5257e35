// One thread pool per process: torch's own OpenMP runtime when it can be found, else plain threads.
//
// A second OpenMP pool would spin against torch's for the same cores, so this module links none
// and asks the process for GOMP_parallel, the entry point that GCC's and LLVM's runtimes share.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace receptance {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpNumber = int (*)();

inline void* process_symbol(const char* name) {
#if defined(__unix__) || defined(__APPLE__)
    return dlsym(RTLD_DEFAULT, name);
#else
    (void)name;
    return nullptr;
#endif
}

inline GompParallel shared_openmp() {
    static const auto found = reinterpret_cast<GompParallel>(process_symbol("GOMP_parallel"));
    return found;
}

// Calls work(i) for every i in [0, tasks), on at most `threads` threads. Which thread takes which
// task is not fixed, so results must not depend on it.
template <class Work>
void parallel_for(int64_t tasks, int threads, const Work& work) {
    if (threads > tasks) threads = static_cast<int>(tasks);
    if (threads <= 1) {
        for (int64_t i = 0; i < tasks; ++i) work(i);
        return;
    }
    struct Job {
        const Work& work;
        int64_t tasks;
        std::atomic<int64_t> next{0};
        void run() {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(i);
        }
    } job{work, tasks};
    auto entry = [](void* data) { static_cast<Job*>(data)->run(); };
    if (GompParallel parallel = shared_openmp()) {
        parallel(entry, &job, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back(entry, &job);
    job.run();
    for (auto& helper : helpers) helper.join();
}

// ---- teams --------------------------------------------------------------------------------------

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Lets `count` threads wait for each other any number of times. Threads spin while they wait,
// because the work between two waits takes microseconds. A thread that has spun long yields its
// core, since the thread it waits for may have none.
class Barrier {
public:
    explicit Barrier(int count) : count_(count) {}
    void wait() {
        const unsigned round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < kSpins) pause();
            else std::this_thread::yield();
        }
    }

private:
    static constexpr int kSpins = 4000;
    const int count_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

struct Range {
    int64_t begin, end;
};

// One of `count` threads that run the same function side by side.
struct Member {
    int id, count;
    Barrier* barrier;

    void wait() const {
        if (count > 1) barrier->wait();
    }
    // Returns this member's share of [0, total), cut at multiples of `step`.
    Range share(int64_t total, int64_t step = 1) const {
        const int64_t pieces = (total + step - 1) / step;
        const int64_t begin = pieces * id / count * step, end = pieces * (id + 1) / count * step;
        return {begin < total ? begin : total, end < total ? end : total};
    }
};

// Calls work(member) on at most `threads` threads at once. Results must not depend on how many.
template <class Work>
void run_team(int threads, const Work& work) {
    static const auto thread_num = reinterpret_cast<OmpNumber>(process_symbol("omp_get_thread_num"));
    static const auto num_threads =
        reinterpret_cast<OmpNumber>(process_symbol("omp_get_num_threads"));
    if (threads <= 1) return work(Member{0, 1, nullptr});
    if (shared_openmp() && thread_num && num_threads) {
        // The runtime may give fewer threads than asked for; the first to arrive says how many.
        struct Job {
            const Work& work;
            int asked;
            std::atomic<Barrier*> barrier{nullptr};
        } job{work, threads};
        auto entry = [](void* data) {
            Job& j = *static_cast<Job*>(data);
            const int count = num_threads();
            Barrier* barrier = j.barrier.load(std::memory_order_acquire);
            if (!barrier) {
                auto* mine = new Barrier(count);
                if (j.barrier.compare_exchange_strong(barrier, mine)) barrier = mine;
                else delete mine;
            }
            j.work(Member{thread_num(), count, barrier});
        };
        shared_openmp()(entry, &job, static_cast<unsigned>(threads), 0);
        delete job.barrier.load();
        return;
    }
    Barrier barrier(threads);
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i)
        helpers.emplace_back([&, i] { work(Member{i, threads, &barrier}); });
    work(Member{0, threads, &barrier});
    for (auto& helper : helpers) helper.join();
}

}  // namespace receptance

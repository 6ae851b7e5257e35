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

inline GompParallel shared_openmp() {
#if defined(__unix__) || defined(__APPLE__)
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

// Calls work(i) for i in [0, tasks), on at most `threads` threads. Which thread takes which task
// is not fixed, so results must not depend on it.
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

}  // namespace receptance

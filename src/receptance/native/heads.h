// What the kernels of versions with heads share: where the numbers of a head are, how threads share
// heads, and decays. A task is one head of one row of the batch; nothing is summed over tasks, so
// that the number of threads changes no bit of a result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "memory.h"
#include "panel.h"
#include "parallel.h"

namespace receptance {
namespace {

constexpr int64_t kAhead = 2;  // How many tokens ahead numbers are asked for.

// Where the numbers of one head of one row of the batch are.
template <class F>
struct Head {
    const F& f;
    int64_t b, h, side;

    Head(const F& f, int64_t task)
        : f(f), b(task / f.heads), h(task % f.heads), side(padded_side(f.size)) {}

    int64_t tokens() const { return f.lengths ? f.lengths[b] : f.time; }
    bool reset(int64_t t) const { return f.resets && f.resets[b * f.time + t]; }
    // Where the token's N numbers begin in an array [B,T,H,N].
    int64_t at(int64_t t) const { return ((b * f.time + t) * f.heads + h) * f.size; }
    // Where the state begins in an array [B,H,N,N], and in one [K,B,H,N,N].
    int64_t state() const { return (b * f.heads + h) * f.size * f.size; }
    int64_t start(int64_t chunk) const {
        return ((chunk * f.batch + b) * f.heads + h) * f.size * f.size;
    }

    template <class S>
    void load_state(const void* from, int64_t offset, S* to) const {
        // What pads a state is zero times what is beside it, which may have been infinite.
        if (side != f.size) std::memset(to, 0, side * side * sizeof(S));
        for (int64_t i = 0; i < f.size; ++i)
            std::memcpy(to + i * side, (const S*)from + offset + i * f.size, f.size * sizeof(S));
    }
    template <class S>
    void store_state(const S* from, void* to, int64_t offset) const {
        for (int64_t i = 0; i < f.size; ++i)
            std::memcpy((S*)to + offset + i * f.size, from + i * side, f.size * sizeof(S));
    }
    // A token's numbers, and a request for those of a token that comes soon: in memory it is as far
    // away as all heads are long, too far for the processor to foresee it.
    template <class V, class T, class S>
    void load_vector(const void* from, int64_t t, S* to, int64_t ahead = kAhead) const {
        const T* const x = (const T*)from + at(t);
        prefetch<0>(x, t + ahead, ahead);
        for (int64_t c = 0; c < f.size; c += RECEPTANCE_LANES)
            store(to + c, load<V>(x + c, std::min<int64_t>(RECEPTANCE_LANES, f.size - c)));
    }
    template <class V, class T, class S>
    void store_vector(const S* from, void* to, int64_t t, int64_t ahead = kAhead) const {
        T* const x = (T*)to + at(t);
        prefetch<1>(x, t + ahead, ahead);
        for (int64_t c = 0; c < f.size; c += RECEPTANCE_LANES)
            store(x + c, load<V>(from + c), std::min<int64_t>(RECEPTANCE_LANES, f.size - c));
    }
    template <class T>
    void clear_vector(void* to, int64_t t) const {
        std::memset((T*)to + at(t), 0, f.size * sizeof(T));
    }

private:
    // x has the numbers of the token that is `ahead` tokens before t, if there is a token t.
    template <int kWrite, class T>
    void prefetch(T* x, int64_t t, int64_t ahead) const {
        if (t < 0 || t >= f.time) return;
        const char* const soon = (const char*)(x + ahead * f.heads * f.size);
        for (size_t i = 0; i < f.size * sizeof(T); i += 64) __builtin_prefetch(soon + i, kWrite);
    }
};

// Calls work(task, room) for every head of every row, where a thread has one Room for all its tasks.
template <class Room, class F, class Work>
void for_each_head(const F& f, int threads, const Work& work) {
    const int64_t side = padded_side(f.size), tasks = f.batch * f.heads;
    Memory measure(nullptr);
    (void)Room(measure, side);
    const int64_t workers = std::min<int64_t>(threads, tasks);
    std::atomic<int64_t> next{0};
    parallel_for(workers, threads, [&](int64_t) {
        std::vector<char> bytes(measure.used());
        Memory memory(bytes.data());
        const Room room(memory, side);
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
            work(Head<F>(f, task), room);
    });
}

// Turns the logarithms of decays, in `fade`, into base and fade, of which w is the sum: fade alone
// has more digits than w where w is close to 1. Returns whether the base is 0 anywhere, as it is
// where w can be less than 1/2.
template <class V, class S>
bool split_decay(int64_t side, S* fade, S* base) {
    constexpr S kStrong = -0.6875;  // A little less than log(1/2), so that 1 + fade is exact.
    V lowest{};
    for (int64_t c = 0; c < side; c += RECEPTANCE_LANES) {
        const V x = load<V>(fade + c);
        lowest = x < lowest ? x : lowest;
        store(base + c, x < kStrong ? V{} : V{} + 1);
        store(fade + c, x < kStrong ? exp_nonpositive(x) : expm1_nonpositive(x));
    }
    for (int i = 0; i < RECEPTANCE_LANES; ++i)
        if (lowest[i] < kStrong) return true;
    return false;
}

}  // namespace
}  // namespace receptance

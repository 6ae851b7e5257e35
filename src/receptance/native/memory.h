// Memory to work in, divided into pieces that are aligned to cache lines.
#pragma once

#include <cstdint>

namespace receptance {
namespace {

// Hands out pieces of memory. One that begins at null only measures how much they take.
class Memory {
public:
    explicit Memory(char* base) : base_((uintptr_t)base), at_(base_) {}
    template <class T>
    T* take(int64_t count) {
        at_ = (at_ + 63) / 64 * 64;
        T* const taken = (T*)at_;
        at_ += count * sizeof(T);
        return taken;
    }
    // The bytes that the pieces so far need, wherever the memory begins.
    int64_t used() const { return (int64_t)(at_ - base_) + 64; }

private:
    uintptr_t base_, at_;
};

}  // namespace
}  // namespace receptance

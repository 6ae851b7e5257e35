// Exact sums of products of 4-bit codes with 16-bit activations, in what the instruction set
// multiplies best.
//
// A word holds 8 codes, the first in its lowest bits. It is taken apart into kParts vectors, and as
// many factors hold the activations. x86 multiplies bytes: an activation is 256 high + low, where
// high is signed and low is not, and codes are both, so that either byte can be multiplied with
// them. Elsewhere pairs of 16-bit integers are multiplied.
#pragma once

#include "vector.h"

namespace receptance {
namespace {

// The number of products that a CodeSum adds.
constexpr int kCodes = 32;

#if defined(__AVX2__)

constexpr int kParts = 2, kUnrolled = 4;  // Words are unrolled where additions stay in place.

inline Word part_of(Word word, int i) { return word >> (4 * i) & 0x0F0F0F0F; }

// The low and the high bytes of four activations.
struct Factors {
    Word low, high;
};

inline Factors load_factors(const int16_t* from) {
    return {(Word)broadcast_pair(from), (Word)broadcast_pair(from + 2)};
}

// Writes 8 activations as kParts factors: the even ones, and the odd ones.
inline void store_factors(const int32_t* x, int16_t* to) {
    uint8_t bytes[16];
    for (int i = 0; i < 8; ++i) {
        bytes[i % 2 * 8 + i / 2] = (uint8_t)x[i];
        bytes[i % 2 * 8 + 4 + i / 2] = (uint8_t)(x[i] >> 8);
    }
    std::memcpy(to, bytes, sizeof bytes);
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// The sum of up to kCodes products for every lane.
struct CodeSum {
    Word low{}, high{};

    void add(Word codes, Factors x) {
        low = add_bytes(low, x.low, codes);
        high = add_bytes(high, codes, x.high);
    }
    Int total() const { return (Int)(low + (high << 8)); }
};

#else

// So many products fit into sums of 16 bits, two in a lane: 16 high bytes add up to at most
// 15 * 128 * 16 = 30,720. 16 low bytes make up to 61,200; they are counted from -32,768 on.
struct CodeSum {
    Shorts low = Shorts{} + 0x8000, high{};

    void add(Word codes, Factors x) {
        low = add_bytes(low, x.low, codes);
        high = add_bytes(high, codes, x.high);
    }
    Int total() const {
        const Int sum = add_products(Int{} + 65536, (Pairs)low, Pairs{} + 1);
        return add_products(sum, (Pairs)high, Pairs{} + 256);
    }
};

#endif

#else

constexpr int kParts = 4, kUnrolled = 1;

inline Word part_of(Word word, int i) { return word >> (4 * i) & 0x000F000F; }

using Factors = Pairs;

inline Factors load_factors(const int16_t* from) { return broadcast_pair(from); }

// Writes 8 activations as kParts factors: pairs of those that are four apart.
inline void store_factors(const int32_t* x, int16_t* to) {
    for (int i = 0; i < 8; ++i) to[i % 4 * 2 + i / 4] = (int16_t)x[i];
}

struct CodeSum {
    Int sum{};

    void add(Word codes, Factors x) { sum = add_products(sum, (Pairs)codes, x); }
    Int total() const { return sum; }
};

#endif

}  // namespace
}  // namespace receptance

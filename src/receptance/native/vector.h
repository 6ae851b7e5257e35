// Vectors of RECEPTANCE_LANES numbers in GCC/Clang vector extensions: arithmetic, exp, loads,
// stores.
//
// The sources that include this are compiled once per instruction set (see CMakeLists.txt).
// Everything is in an anonymous namespace, so that code compiled for one is never linked into
// another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace receptance {
namespace {

using Float = float __attribute__((vector_size(4 * RECEPTANCE_LANES)));
using Int = int32_t __attribute__((vector_size(4 * RECEPTANCE_LANES)));
using Word = uint32_t __attribute__((vector_size(4 * RECEPTANCE_LANES)));
using Half = uint16_t __attribute__((vector_size(2 * RECEPTANCE_LANES)));
using Pairs = int16_t __attribute__((vector_size(4 * RECEPTANCE_LANES)));  // Two in each lane.
using Shorts = uint16_t __attribute__((vector_size(4 * RECEPTANCE_LANES)));
using Double = double __attribute__((vector_size(8 * RECEPTANCE_LANES)));
using Long = int64_t __attribute__((vector_size(8 * RECEPTANCE_LANES)));

struct bfloat16 {
    uint16_t bits;
};

struct float16 {
    uint16_t bits;
};

// Returns the larger number, or b if either is NaN. GCC compiles the comparison to no maximum
// instruction.
inline Float max(Float a, Float b) {
#if defined(__AVX512F__)
    return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline Double max(Double a, Double b) { return a > b ? a : b; }

inline Float minus_abs(Float x) { return (Float)((Int)x | INT32_MIN); }

inline Double minus_abs(Double x) { return x > 0 ? -x : x; }

constexpr float kLowestPower = -87.0f;  // e to less than this is subnormal in float32.

// e^x as scale * p, for base = 1, or e^x - 1 as scale * p + (scale - 1), for base = 0.
struct Power {
    Float scale, p;
};

// Takes e^x apart for x <= 0; what is lower than kLowestPower counts as that, and a NaN stays NaN.
// The range is reduced by ln 2 in two parts; the coefficients are those of Cephes' expf. They are
// summed in pairs, because the loops that use this are limited by the length of the chain of
// operations and not by their number.
inline Power power_of_e(Float x, float base) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23; adding it rounds to an integer.
    const Float clamped = max(Float{} + kLowestPower, x);
    const Float shifted = clamped * 1.44269504088896341f + kShift;
    const Float n = shifted - kShift;
    const Float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    const Float r2 = r * r;
    const Float low = r * 1.6666665459e-1f + 5.0000001201e-1f;
    const Float middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
    const Float high = r * 1.9875691500e-4f + 1.3981999507e-3f;
    const Float p = (high * (r2 * r2) + (middle * r2 + low)) * r2 + (r + base);
    return {(Float)(((Int)shifted - (0x4B400000 - 127)) << 23), p};
}

// Returns e^x for x <= 0, accurate to 2 units in the last place, and 0 where float32 would be
// subnormal. A NaN stays NaN.
inline Float exp_nonpositive(Float x) {
    const Power e = power_of_e(x, 1.0f);
    return x < kLowestPower ? Float{} : e.p * e.scale;
}

inline Double exp_nonpositive(Double x) {
    for (int i = 0; i < RECEPTANCE_LANES; ++i) x[i] = std::exp(x[i]);
    return x;
}

// Returns e^x - 1 for x <= 0, with as many digits where x is close to 0. A NaN stays NaN.
inline Float expm1_nonpositive(Float x) {
    const Power e = power_of_e(x, 0.0f);
    return e.p * e.scale + (e.scale - 1);
}

inline Double expm1_nonpositive(Double x) {
    for (int i = 0; i < RECEPTANCE_LANES; ++i) x[i] = std::expm1(x[i]);
    return x;
}

// The number that a vector holds in every lane, and the vector of places that shuffles its lanes.
template <class V>
struct Scalar;
template <>
struct Scalar<Float> {
    using type = float;
    using Places = Int;
};
template <>
struct Scalar<Double> {
    using type = double;
    using Places = Long;
};

// Copies a vector of T, or only its first elements. Whole vectors have a copy of their own, because
// a copy whose size is not a constant calls the function memcpy.
template <class T>
inline void copy_some(void* to, const void* from, int64_t count) {
    if (count == RECEPTANCE_LANES) std::memcpy(to, from, RECEPTANCE_LANES * sizeof(T));
    else std::memcpy(to, from, count * sizeof(T));
}

// Loads up to one vector from any element type, as `store` below stores it.
template <class V, class T>
inline V load(const T* from, int64_t count = RECEPTANCE_LANES) {
    if constexpr (sizeof(T) == 2) {
        Half raw{};
        copy_some<T>(&raw, from, count);
        return (V)(__builtin_convertvector(raw, Word) << 16);
    } else {
        V raw{};
        copy_some<T>(&raw, from, count);
        return raw;
    }
}

template <class V, class T>
inline void store(T* to, V x, int64_t count = RECEPTANCE_LANES) {
    if constexpr (sizeof(T) == 2) {
        Word bits = (Word)x;
        Word rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        Word raw = x == x ? rounded : (Word{} + 0x7FC0);
        Half half = __builtin_convertvector(raw, Half);
        copy_some<T>(to, &half, count);
    } else {
        copy_some<T>(to, &x, count);
    }
}

// ---- what the matrices need ---------------------------------------------------------------------

// Returns sum + a * b, rounded once if the processor can fuse them. Saying so here makes the
// rounding independent of the code around it.
inline Float add_product(Float sum, Float a, Float b) {
#if defined(__AVX512F__)
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (Float)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

inline Double add_product(Double sum, Double a, Double b) { return sum + a * b; }

// Returns sum plus, in every lane, the products of the two pairs of integers there.
inline Int add_products(Int sum, Pairs a, Pairs b) {
#if defined(__AVX512VNNI__)
    return (Int)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (Int)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX512BW__)
    return sum + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    const int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
    return sum + (Int)vpaddq_s32(low, vmull_high_s16((int16x8_t)a, (int16x8_t)b));
#else
    const Int low = ((Int)a << 16 >> 16) * ((Int)b << 16 >> 16);
    return sum + low + ((Int)a >> 16) * ((Int)b >> 16);
#endif
}


#if defined(__AVX2__)
// Returns a + b, just where it is written. Where sums are unrolled, GCC would reorder a plain
// addition and put it off until all products are there, for which there are not enough registers.
inline Shorts add_now(Shorts a, Shorts b) {
    Shorts sum;
    asm("vpaddw %2, %1, %0" : "=v"(sum) : "v"(a), "v"(b));
    return sum;
}

// Returns sum plus, in every lane, the products of four unsigned bytes a with four signed bytes b:
// in 32 bits where an instruction adds them so, else in 16 bits the first two and the last two.
#if defined(__AVX512VNNI__)
inline Word add_bytes(Word sum, Word a, Word b) {
    return (Word)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#elif defined(__AVXVNNI__)
inline Word add_bytes(Word sum, Word a, Word b) {
    return (Word)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
}
#elif defined(__AVX512BW__)
inline Shorts add_bytes(Shorts sum, Word a, Word b) {
    return add_now(sum, (Shorts)_mm512_maddubs_epi16((__m512i)a, (__m512i)b));
}
#else
inline Shorts add_bytes(Shorts sum, Word a, Word b) {
    return add_now(sum, (Shorts)_mm256_maddubs_epi16((__m256i)a, (__m256i)b));
}
#endif
#endif

// Returns a bit for each of 8 numbers, which says that it is not zero; a NaN is not zero.
inline unsigned not_zero(const float* x) {
#if defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_NEQ_UQ));
#else
    unsigned bits = 0;
    for (int i = 0; i < 8; ++i) bits |= (unsigned)(x[i] != 0) << i;
    return bits;
#endif
}

inline Float to_float(Int x) { return __builtin_convertvector(x, Float); }

// Rounds to the nearest integer, ties to even, for |x| < 2^22.
inline Int to_nearest(Float x) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
    return (Int)(x + kShift) - 0x4B400000;
}

// Subtracting zero changes no number, and so the compiler omits it; adding zero would change -0.
inline Float broadcast(float x) { return x - Float{}; }
inline Double broadcast(double x) { return x - Double{}; }

inline Pairs broadcast_pair(const int16_t* two) {
    int32_t both;
    std::memcpy(&both, two, sizeof both);
    return (Pairs)(Int{} + both);
}

// Loads RECEPTANCE_LANES weights of any type as float32.
inline Float widen(const float* from) { return load<Float>(from); }
inline Float widen(const bfloat16* from) {
#if defined(__AVX512F__)
    return (Float)((Word)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)) << 16);
#elif defined(__AVX2__)
    return (Float)((Word)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)) << 16);
#else
    return load<Float>(from);
#endif
}
inline Float widen(const float16* from) {
#if defined(__AVX512F__)
    return (Float)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    return (Float)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    // A multiplication moves exponents from a bias of 15 to one of 127; it also normalizes numbers
    // that are subnormal in float16.
    Half raw;
    std::memcpy(&raw, from, sizeof raw);
    const Word bits = __builtin_convertvector(raw, Word);
    const Float size = (Float)((bits & 0x7FFF) << 13) * 0x1p112f;
    return (Float)((Word)size | (bits & 0x8000) << 16);
#endif
}

}  // namespace
}  // namespace receptance

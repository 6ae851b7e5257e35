// Square matrices of one head: their padding, and sums over the lanes of their rows.
#pragma once

#include <utility>

#include "vector.h"

namespace receptance {
namespace {

// The number of rows that are summed at a time, and of lanes of a sum before they are added. The
// sides of a state are padded with zeros to a multiple of it.
constexpr int64_t kPanel = 16;
constexpr int64_t kPanelVectors = kPanel / RECEPTANCE_LANES;

constexpr int64_t padded_side(int64_t size) { return (size + kPanel - 1) / kPanel * kPanel; }

// ---- sums over lanes ----------------------------------------------------------------------------

// One number for every row of a panel, as vectors.
template <class V>
using PanelVectors = V[kPanelVectors];

// kPanel lanes for every row of a panel, to be added.
template <class V>
using PanelSums = PanelVectors<V>[kPanel];

// Takes the parts of several rows from two vectors, 2 * kHalf lanes each, and adds the second half
// of every part to the first.
template <int kHalf, class V, int... P>
inline V fold(V a, V b, std::integer_sequence<int, P...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (P / kHalf * 2 * kHalf + P % kHalf)...) +
           __builtin_shufflevector(a, b, (P / kHalf * 2 * kHalf + P % kHalf + kHalf)...);
#else
    using Places = typename Scalar<V>::Places;
    return __builtin_shuffle(a, b, Places{(P / kHalf * 2 * kHalf + P % kHalf)...}) +
           __builtin_shuffle(a, b, Places{(P / kHalf * 2 * kHalf + P % kHalf + kHalf)...});
#endif
}

// Adds the lanes of 2 * kHalf vectors; the sum of vector i becomes lane i of x[0].
template <int kHalf, class V>
inline void fold_all(V* x) {
    if constexpr (kHalf > 0) {
        for (int i = 0; i < kHalf; ++i)
            x[i] = fold<kHalf>(x[2 * i], x[2 * i + 1],
                               std::make_integer_sequence<int, RECEPTANCE_LANES>{});
        fold_all<kHalf / 2>(x);
    }
}

// Adds the lanes of every row: lane i + 8 to lane i, then 4, 2 and 1.
template <class V>
inline void add_lanes(const PanelSums<V>& rows, PanelVectors<V>& out) {
    for (int64_t v = 0; v < kPanelVectors; ++v) {
        V x[RECEPTANCE_LANES];
        for (int i = 0; i < RECEPTANCE_LANES; ++i) {
            PanelVectors<V> lanes;
            for (int64_t j = 0; j < kPanelVectors; ++j)
                lanes[j] = rows[v * RECEPTANCE_LANES + i][j];
            for (int64_t half = kPanelVectors / 2; half; half /= 2)
                for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
            x[i] = lanes[0];
        }
        fold_all<RECEPTANCE_LANES / 2>(x);
        out[v] = x[0];
    }
}

// ---- rows ---------------------------------------------------------------------------------------

// Vectors of the axis of columns, which all rows of a state meet: in registers where the compiler
// knows that there are kBlocks blocks of kPanel of them and has as many registers, else in memory.
template <class V, int kBlocks, class S>
class ColumnAxis {
public:
    explicit ColumnAxis(const S* from) : from_(from) {
        if constexpr (kHeld)
            for (int64_t i = 0; i < kBlocks * kPanelVectors; ++i)
                held_[i] = load<V>(from + i * RECEPTANCE_LANES);
    }
    V operator[](int64_t i) const {
        if constexpr (kHeld) return held_[i];
        else return load<V>(from_ + i * RECEPTANCE_LANES);
    }

private:
    static constexpr bool kHeld = kBlocks > 0 && sizeof(V) == 64;
    const S* __restrict const from_;
    V held_[kHeld ? kBlocks * kPanelVectors : 1];
};

// Calls step(v, i, c) for vector i of a row, which begins at column c; v is i modulo kPanelVectors.
template <int kBlocks, class Step>
inline __attribute__((always_inline)) void for_columns(int64_t side, const Step& step) {
    const int64_t blocks = kBlocks ? kBlocks : side / kPanel;
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t v = 0; v < kPanelVectors; ++v)
            step(v, block * kPanelVectors + v, block * kPanel + v * RECEPTANCE_LANES);
}

#define RECEPTANCE_COLUMN [&](int64_t v, int64_t i, int64_t c) __attribute__((always_inline))

// x (base + fade), rounded as if base + fade were exact.
template <bool kBase, class V, class Axis>
inline V faded(V x, int64_t i, const Axis& base, const Axis& fade) {
    return add_product(kBase ? x * base[i] : x, x, fade[i]);
}

}  // namespace
}  // namespace receptance

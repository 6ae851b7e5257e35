// One token of the memory of RWKV-5 and RWKV-6, for one head:
//
//     y = (S + diag(u) k v^T)^T r        S <- diag(w) S + k v^T
//
// The rows of S belong to keys. The lanes of a vector are columns of S, so y is summed over rows, in
// one order for every width of vectors, and lanes are never added.
#pragma once

#include "panel.h"

namespace receptance {
namespace {

// The number of vectors of columns that go through the rows side by side.
constexpr int kFadingVectors = 4;

// What a token brings: vectors of one head, padded like the sides of the state.
template <class S>
struct FadingToken {
    const S* receptance;
    const S* fade;  // w is 1 + fade, or base + fade (see split_decay in heads.h)
    const S* base;  // null where it is 1 everywhere
    const S *key, *value;
};

// The step for kWide vectors of columns from `first` on. `own` is r . (u k).
template <class V, bool kOut, bool kBase, int kWide, class S>
inline void fade_columns(const S* from, S* to, int64_t side, const FadingToken<S>& x, S own,
                         int64_t first, S* out) {
    // Copies, because a store of floats could change pointers that lie in memory.
    const S *const receptance = x.receptance, *const key = x.key, *const fade = x.fade;
    const S* const base = x.base;
    V y[kWide], value[kWide];
    for (int j = 0; j < kWide; ++j) {
        value[j] = load<V>(x.value + first + j * RECEPTANCE_LANES);
        y[j] = V{};
    }
    for (int64_t row = 0; row < side; ++row) {
        const V r = broadcast(receptance[row]), k = broadcast(key[row]);
        const V faded = broadcast(fade[row]), kept = broadcast(kBase ? base[row] : S(1));
        for (int j = 0; j < kWide; ++j) {
            const int64_t at = row * side + first + j * RECEPTANCE_LANES;
            const V s = load<V>(from + at);
            if constexpr (kOut) y[j] = add_product(y[j], s, r);
            store(to + at, add_product(add_product(kBase ? s * kept : s, s, faded), value[j], k));
        }
    }
    if constexpr (kOut)
        for (int j = 0; j < kWide; ++j)
            store(out + first + j * RECEPTANCE_LANES, add_product(y[j], value[j], broadcast(own)));
}

template <class V, bool kOut, bool kBase, class S>
inline void fade_by(const S* from, S* to, int64_t side, const FadingToken<S>& x, S own, S* out) {
    int64_t c = 0;
    for (; c + kFadingVectors * RECEPTANCE_LANES <= side; c += kFadingVectors * RECEPTANCE_LANES)
        fade_columns<V, kOut, kBase, kFadingVectors>(from, to, side, x, own, c, out);
    for (; c < side; c += RECEPTANCE_LANES)
        fade_columns<V, kOut, kBase, 1>(from, to, side, x, own, c, out);
}

// Reads a state and writes the next one, [side][side] each, which may be the same memory. With kOut
// y goes to out[side].
template <class V, bool kOut, class S>
inline void fade_and_add(const S* from, S* to, int64_t side, const FadingToken<S>& x, S own, S* out) {
    if (x.base) fade_by<V, kOut, true>(from, to, side, x, own, out);
    else fade_by<V, kOut, false>(from, to, side, x, own, out);
}

}  // namespace
}  // namespace receptance

// One token of the generalized delta rule of RWKV-7, for one head:
//
//     S <- S diag(w) + (S a) b^T + v k^T        y = S r
//
// The lanes of a vector are columns of S. A row meets vectors of the key axis, so what is summed
// over columns, S a and S r, is summed lane by lane first and over the lanes last, in one order
// for every width of vectors. Sixteen rows at a time exchange lanes for that.
#pragma once

#include "panel.h"

namespace receptance {
namespace {

// What a token brings: vectors of one head, padded like the sides of the state.
template <class S>
struct Token {
    const S* receptance;
    // What is kept of the state at a token, w, is 1 + fade: close to 1 this has more digits than w.
    // Only where w can be less than 1/2 it is base + fade, with a base of 0 in those channels.
    const S* fade;
    const S* base;  // null where it is 1 everywhere
    const S *key, *value, *removal, *replacement;
};

// ---- a step -------------------------------------------------------------------------------------

// Reads a state and writes the next one, [side][side] each, which may be the same memory. S a goes
// to removed[side] and, with kOut, y to out[side].
template <class V, bool kOut, bool kBase, int kBlocks, class S>
void advance_by(const S* from, S* to, int64_t side, const Token<S>& x, S* removed, S* out) {
    PanelSums<V> sums;
    PanelVectors<V> total;
    for (int64_t first = 0; first < side; first += kPanel) {
        const ColumnAxis<V, kBlocks, S> removal(x.removal);
        for (int64_t row = 0; row < kPanel; ++row) {
            const S* s = from + (first + row) * side;
            PanelVectors<V> sum{};
            for_columns<kBlocks>(side, RECEPTANCE_COLUMN {
                sum[v] = add_product(sum[v], load<V>(s + c), removal[i]);
            });
            for (int64_t v = 0; v < kPanelVectors; ++v) sums[row][v] = sum[v];
        }
        add_lanes<V>(sums, total);
        for (int64_t v = 0; v < kPanelVectors; ++v)
            store(removed + first + v * RECEPTANCE_LANES, total[v]);

        const ColumnAxis<V, kBlocks, S> receptance(x.receptance), fade(x.fade), key(x.key),
            replacement(x.replacement), base(kBase ? x.base : x.fade);
        for (int64_t row = 0; row < kPanel; ++row) {
            const S* s = from + (first + row) * side;
            S* next = to + (first + row) * side;
            const V put_back = broadcast(removed[first + row]), added = broadcast(x.value[first + row]);
            PanelVectors<V> sum{};
            for_columns<kBlocks>(side, RECEPTANCE_COLUMN {
                V now = faded<kBase>(load<V>(s + c), i, base, fade);
                now = add_product(now, put_back, replacement[i]);
                now = add_product(now, added, key[i]);
                store(next + c, now);
                if constexpr (kOut) sum[v] = add_product(sum[v], now, receptance[i]);
            });
            for (int64_t v = 0; v < kPanelVectors; ++v) sums[row][v] = sum[v];
        }
        if constexpr (kOut) {
            add_lanes<V>(sums, total);
            for (int64_t v = 0; v < kPanelVectors; ++v)
                store(out + first + v * RECEPTANCE_LANES, total[v]);
        }
    }
}

// The same for any side and base. Heads of 64 channels, which almost all models have, have code of
// their own.
template <class V, bool kOut, class S>
inline void advance(const S* from, S* to, int64_t side, const Token<S>& x, S* removed, S* out) {
    if (x.base) advance_by<V, kOut, true, 0>(from, to, side, x, removed, out);
    else if (side == 64) advance_by<V, kOut, false, 4>(from, to, side, x, removed, out);
    else advance_by<V, kOut, false, 0>(from, to, side, x, removed, out);
}

}  // namespace
}  // namespace receptance

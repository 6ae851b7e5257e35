// Products with the last matrix of channel mixing, most of whose inputs are zero and skipped: its
// layout is "rows" of engine/packing.py.
//
// Every output is summed piece by piece of the inputs, and within a piece over those that are not
// zero, one after another: whatever the number of rows, columns at a time and threads.
#pragma once

#include "product.h"

namespace receptance {
namespace {

constexpr int64_t kColumns = 64;     // outputs at a time, and inputs of a piece: as floats they fill
constexpr int64_t kPiece = 64;       // half of a first-level cache
constexpr int64_t kTogether = 4;     // inputs at a time for one row
constexpr int64_t kPieces = 128;     // whose nonzero inputs are listed for one row
constexpr int64_t kFew = 4;          // up to so many rows go one after another through as many
constexpr int64_t kNear = 256;       // inputs as a second-level cache keeps
constexpr int64_t kSparseRows = 32;  // of more rows so many at a time

// For every set of 8 bits the places of those that are 1, in order.
struct Places {
    uint16_t of[256][8] = {};
    constexpr Places() {
        for (int bits = 0; bits < 256; ++bits)
            for (int bit = 0, n = 0; bit < 8; ++bit)
                if (bits >> bit & 1) of[bits][n++] = (uint16_t)bit;
    }
};
constexpr Places kPlaces;

// Writes `first` plus the places of those of x[0, count) that are not zero, and up to 8 numbers more;
// returns how many they are. Adds x to sum.
inline int64_t find_nonzero(const float* x, int64_t count, int64_t first, uint16_t* to,
                            float& sum) {
    int64_t n = 0;
    Tile sums = {};
    const auto take = [&](const float* from, int64_t k) {
        for (int64_t i = 0; i < kOutputs; i += 8) {
            const unsigned bits = not_zero(from + i);
            for (int j = 0; j < 8; ++j)
                to[n + j] = (uint16_t)(kPlaces.of[bits][j] + (uint16_t)(first + k + i));
            n += __builtin_popcount(bits);
        }
        for (int v = 0; v < kVectors; ++v) sums[v] += load<Float>(from + v * RECEPTANCE_LANES);
    };
    int64_t k = 0;
    for (; k + kOutputs <= count; k += kOutputs) take(x + k, k);
    if (k < count) {
        float rest[kOutputs] = {};
        std::memcpy(rest, x + k, (count - k) * sizeof(float));
        take(rest, k);
    }
    sum += sum_of(sums);
    return n;
}

constexpr int kRowVectors = kColumns / RECEPTANCE_LANES;
using RowVectors = Float[kRowVectors];

// Weights of one input and kColumns outputs: each(from, put) calls put(v, weights as floats) for
// every vector of outputs. What is summed up of them has to be multiplied by unit(v).
template <class T>
struct Row {
    static constexpr int64_t kBytes = kColumns * sizeof(T);
    static constexpr float unit(int) { return 1; }
    template <class Put>
    static inline void each(const char* from, const Put& put) {
        for (int v = 0; v < kRowVectors; ++v) put(v, widen((const T*)from + v * RECEPTANCE_LANES));
    }
};

// Codes lie in words of 32 bits, and become floats at their place in the word: times a power of 2,
// which spares shifting them.
template <>
struct Row<int8_t> {
    static constexpr int64_t kBytes = kColumns;
    static constexpr int kWords = 16 / RECEPTANCE_LANES;
    static constexpr float unit(int v) { return v < 3 * kWords ? 0x1p-24f : 1; }
    template <class Put>
    static inline void each(const char* from, const Put& put) {
        for (int h = 0; h < kWords; ++h) {
            Int words;
            std::memcpy(&words, from + h * sizeof words, sizeof words);
            put(h, to_float(words << 24));
            put(kWords + h, to_float((words << 16) & INT32_C(-0x1000000)));
            put(2 * kWords + h, to_float((words << 8) & INT32_C(-0x1000000)));
            put(3 * kWords + h, to_float(words >> 24));
        }
    }
};

struct FourBitRow {
    static constexpr int64_t kBytes = kColumns / 2;
#if RECEPTANCE_LANES == 16
    // Two of the eight codes of 8 words at a time.
    static constexpr float unit(int) { return 1; }
    template <class Put>
    static inline void each(const char* from, const Put& put) {
        Word words, shift;
        for (int half = 0; half < 2; ++half) std::memcpy((char*)&words + 32 * half, from, 32);
        for (int i = 0; i < 16; ++i) shift[i] = i / 8 * 4;
        for (int v = 0; v < kRowVectors; ++v)
            put(v, to_float((Int)(words >> (shift + 8 * v) & 15)));
    }
#else
    static constexpr int kWords = 8 / RECEPTANCE_LANES;
    static constexpr float unit(int v) {
        return v < 7 * kWords ? 1 / (float)(1 << 4 * (v / kWords)) : 1;
    }
    template <class Put>
    static inline void each(const char* from, const Put& put) {
        for (int h = 0; h < kWords; ++h) {
            Word words;
            std::memcpy(&words, from + h * sizeof words, sizeof words);
            for (int code = 0; code < 7; ++code)
                put(code * kWords + h, to_float((Int)(words & (15u << 4 * code))));
            put(7 * kWords + h, to_float((Int)(words >> 28)));
        }
    }
#endif
};

template <class R>
inline void add_row(RowVectors& sum, float factor, const char* from) {
    const Float x = broadcast(factor);
    R::each(from, [&](int v, Float weights) { sum[v] = add_product(sum[v], x, weights); });
}

// Calls work(row) with the type of a matrix's rows.
template <class Work>
inline void with_rows(const Matrix& w, const Work& work) {
    switch (w.kind) {
        case Weight::float32: return work(Row<float>{});
        case Weight::bfloat16: return work(Row<bfloat16>{});
        case Weight::float16: return work(Row<float16>{});
        case Weight::int8: return work(Row<int8_t>{});
        case Weight::int4: return work(FourBitRow{});
    }
}

inline void prefetch(const char* from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

// At most kPiece inputs [first, first + count), all of one group that shares its parameters.
struct Piece {
    int64_t first, count;
    bool begins, ends;                // the group
    const bfloat16 *scale, *minimum;  // of all outputs; null where there are none
};

// What the group of a piece has summed up to here for kColumns outputs from `column` on.
inline void begin_sums(RowVectors& sum, bool begins, const float* partial, int64_t column) {
    for (int v = 0; v < kRowVectors; ++v)
        sum[v] = begins ? Float{} : load<Float>(partial + column + v * RECEPTANCE_LANES);
}

// Keeps it, or adds it to the outputs y; `total` is the sum of the group's activations.
template <class R>
inline void end_sums(const RowVectors& sum, const Piece& p, bool ends, float total, int64_t column,
                     float* partial, float* y) {
    const auto each = [&](float* to, const auto& next) {
        for (int v = 0; v < kRowVectors; ++v) {
            const int64_t n = column + v * RECEPTANCE_LANES;
            store(to + n, next(v, n));
        }
    };
    if (!ends) return each(partial, [&](int v, int64_t) { return sum[v]; });
    if (!p.scale) return each(y, [&](int v, int64_t n) { return load<Float>(y + n) + sum[v]; });
    const auto scaled = [&](int v, int64_t n) {
        return add_product(load<Float>(y + n), widen(p.scale + n), sum[v] * R::unit(v));
    };
    if (!p.minimum) return each(y, scaled);
    const Float all = broadcast(total);
    each(y, [&](int v, int64_t n) {
        return add_product(scaled(v, n), widen(p.minimum + n), all);
    });
}

// The piece that begins with input `first`.
inline Piece piece_at(const Matrix& w, int64_t first) {
    const int64_t group_size = w.group ? w.group : kPiece, group = first / group_size;
    const int64_t inside = first - group * group_size;
    const int64_t left = std::min(group_size - inside, w.inputs - first);
    const int64_t count = std::min(kPiece, left), stride = round_up(w.outputs, kColumns);
    const bool four = w.kind == Weight::int4;
    const bfloat16* params = (const bfloat16*)w.params + group * stride * (four ? 2 : 1);
    return {first, count, inside == 0, count == left,
            w.params ? params : nullptr, four ? params + stride : nullptr};
}

// One row: a few inputs that are not zero at a time, over all columns. So whole stretches of memory
// are left out; gaps between short ones the processor would fetch unasked.
template <class R>
int64_t sparse_row(const Matrix& w, Range inputs, Range columns, const float* x, float* y,
                   float* partial) {
    uint16_t which[kPieces * kPiece + 8];
    Piece pieces[kPieces];
    int64_t ends[kPieces], nonzero = 0;
    float totals[kPieces];
    const int64_t run = (columns.end - columns.begin) / kColumns * R::kBytes;
    const int64_t stride = round_up(w.outputs, kColumns) / kColumns * R::kBytes;
    const int64_t ahead = std::max(kTogether, kPrefetch / std::max<int64_t>(run, 1));
    for (int64_t first = inputs.begin; first < inputs.end;) {
        const char* base =
            (const char*)w.data + first * stride + columns.begin / kColumns * R::kBytes;
        const float* values = x + first;
        int64_t n = 0, found = 0;
        for (const int64_t begin = first; n < kPieces && first < inputs.end; ++n) {
            const Piece p = pieces[n] = piece_at(w, first);  // the first of them begins a group
            totals[n] = p.begins ? 0 : totals[n - 1];
            found += find_nonzero(x + first, p.count, first - begin, which + found, totals[n]);
            ends[n] = found;
            first += p.count;
        }
        nonzero += found;
        for (int64_t i = 0, at = 0; i < n; ++i)
            for (bool begins = true, last = false; !last; begins = false) {
                const int64_t count = std::min(kTogether, ends[i] - at);
                const int64_t coming = std::min(kTogether, found - at - ahead);
                const char *from[kTogether], *then[kTogether];
                float factors[kTogether];
                for (int64_t j = 0; j < count; ++j) {
                    from[j] = base + which[at + j] * stride;
                    factors[j] = values[which[at + j]];
                }
                for (int64_t j = 0; j < coming; ++j)
                    then[j] = base + which[at + ahead + j] * stride;
                at += count;
                last = at == ends[i];
                for (int64_t c = columns.begin, offset = 0; c < columns.end;
                     c += kColumns, offset += R::kBytes) {
                    RowVectors sum;
                    begin_sums(sum, pieces[i].begins && begins, partial, c);
                    for (int64_t j = 0; j < count; ++j)
                        add_row<R>(sum, factors[j], from[j] + offset);
                    for (int64_t j = 0; j < coming; ++j) prefetch(then[j] + offset, R::kBytes);
                    end_sums<R>(sum, pieces[i], pieces[i].ends && last, totals[i], c, partial, y);
                }
            }
    }
    return nonzero;
}

// Several rows: the weights of a piece are made floats once for all, some columns at a time.
template <class R>
int64_t sparse_rows(const Matrix& w, Range columns, const float* x, int64_t x_stride, int64_t count,
                    float* y, float* partial, int64_t y_stride) {
    uint16_t which[kSparseRows][kPiece + 8];
    int64_t found[kSparseRows], nonzero = 0;
    float totals[kSparseRows];
    alignas(64) float widened[kPiece * kColumns];
    const int64_t stride = round_up(w.outputs, kColumns) / kColumns * R::kBytes;
    const int64_t run = (columns.end - columns.begin) / kColumns * R::kBytes;
    for (int64_t first = 0; first < w.inputs;) {
        const Piece p = piece_at(w, first);
        const float* values = x + first;
        for (int64_t m = 0; m < count; ++m) {
            if (p.begins) totals[m] = 0;
            found[m] = find_nonzero(values + m * x_stride, p.count, 0, which[m], totals[m]);
            nonzero += found[m];
        }
        const char* base = (const char*)w.data + first * stride;
        first += p.count;
        for (int64_t c = columns.begin; c < columns.end; c += kColumns) {
            const bool last = c + kColumns >= columns.end;
            const int64_t ahead = last ? p.count * stride + R::kBytes - run : R::kBytes;
            const char* from = base + c / kColumns * R::kBytes;
            for (int64_t k = 0; k < p.count; ++k, from += stride) {
                prefetch(from + ahead, R::kBytes);
                R::each(from, [&](int v, Float weights) {
                    store(widened + k * kColumns + v * RECEPTANCE_LANES, weights);
                });
            }
            for (int64_t m = 0; m < count; ++m) {
                RowVectors sum;
                begin_sums(sum, p.begins, partial + m * y_stride, c);
                for (int64_t i = 0; i < found[m]; ++i)
                    add_row<Row<float>>(sum, values[m * x_stride + which[m][i]],
                                        (const char*)(widened + which[m][i] * kColumns));
                end_sums<R>(sum, p, p.ends, totals[m], c, partial + m * y_stride, y + m * y_stride);
            }
        }
    }
    return nonzero;
}

// y[m][n] for rows [0, count) and the outputs of `columns` (multiples of kColumns), of x[m] without
// its zeros; returns how many inputs were not zero. `partial` is memory like y.
inline int64_t sparse_product(const Matrix& w, Range columns, const float* x, int64_t x_stride,
                              int64_t count, float* y, float* partial, int64_t y_stride) {
    for (int64_t m = 0; m < count; ++m)
        std::memset(y + m * y_stride + columns.begin, 0,
                    (columns.end - columns.begin) * sizeof(float));
    int64_t nonzero = 0;
    with_rows(w, [&](auto row) {
        using R = decltype(row);
        if (count > kFew) {
            for (int64_t m = 0; m < count; m += kSparseRows)
                nonzero += sparse_rows<R>(w, columns, x + m * x_stride, x_stride,
                                          std::min(kSparseRows, count - m), y + m * y_stride,
                                          partial + m * y_stride, y_stride);
            return;
        }
        const int64_t step = count == 1 ? w.inputs : kNear;
        for (int64_t first = 0; first < w.inputs; first += step)
            for (int64_t m = 0; m < count; ++m)
                nonzero += sparse_row<R>(w, {first, std::min(first + step, w.inputs)}, columns,
                                         x + m * x_stride, y + m * y_stride,
                                         partial + m * y_stride);
    });
    return nonzero;
}

}  // namespace
}  // namespace receptance

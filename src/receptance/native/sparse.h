// Products with the last matrix of channel mixing, most of whose inputs are zero. Its layout is
// "rows" of quantize/packing.py.
//
// The inputs are divided into segments, and these into pieces; an output is the sum over the pieces
// of each segment, and then over the segments. With integers a piece is a group that shares its
// parameters, and its sum is exact: it is the same with and without the zeros, and in any order.
// With floats a piece is kPiece inputs, and those of them that are not zero are added one after
// another. So the result is the same for any number of rows, of columns at a time and of threads.
#pragma once

#include <type_traits>

#include "product.h"

namespace receptance {
namespace {

constexpr int64_t kColumns = 64;   // The number of outputs at a time.
constexpr int64_t kPiece = 64;     // The number of inputs of a piece of floats.
constexpr int64_t kSegments = 4;   // The number of segments of the inputs, which threads share.
constexpr int64_t kFew = 4;        // Up to so many rows skip zeros row by row.
constexpr int64_t kListed = 4096;  // One row lists what is not zero of so many inputs at a time.
constexpr int64_t kNear = 256;     // Several rows do so: these weights fit a second-level cache.
constexpr int64_t kSparseRows = 32;  // Of more rows so many are multiplied at a time.

// For every set of 8 bits: the places of those that are 1, in order.
struct Places {
    uint16_t of[256][8] = {};
    constexpr Places() {
        for (int bits = 0; bits < 256; ++bits)
            for (int bit = 0, n = 0; bit < 8; ++bit)
                if (bits >> bit & 1) of[bits][n++] = (uint16_t)bit;
    }
};
constexpr Places kPlaces;

// Writes `first` plus the place of every number of x[0, count) that is not zero, and up to 8
// numbers beyond; returns how many numbers are not zero.
inline int64_t find_nonzero(const float* x, int64_t count, int64_t first, uint16_t* to) {
    int64_t n = 0, k = 0;
    const auto take = [&](const float* from) {
        const unsigned bits = not_zero(from);
        for (int j = 0; j < 8; ++j)
            to[n + j] = (uint16_t)(kPlaces.of[bits][j] + (uint16_t)(first + k));
        n += __builtin_popcount(bits);
    };
    for (; k + 8 <= count; k += 8) take(x + k);
    if (k < count) {
        float rest[8] = {};
        std::memcpy(rest, x + k, (count - k) * sizeof(float));
        take(rest);
    }
    return n;
}

inline int64_t count_nonzero(const float* x, int64_t count) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) n += x[i] != 0;
    return n;
}

constexpr int kRowVectors = kColumns / RECEPTANCE_LANES;
using RowVectors = Float[kRowVectors];

// ---- weights of one or a few inputs and kColumns outputs ----------------------------------------
//
// add(sums, from, offset, x) adds the products of kTogether inputs: their weights are `offset`
// bytes behind from[i], and x[i] are their activations. Sums are loaded and stored once for kSet
// inputs. total(sums) converts the sums of integers to floats.

template <class V, class S, int Count, int Together, int Set>
struct Rows {
    using Value = V;
    using Sum = S;
    using Sums = S[Count];
    static constexpr int kSums = Count, kTogether = Together, kSet = Set;
    static const V* values(const Activations& a) {
        if constexpr (std::is_same_v<V, float>)
            return a.values;
        else
            return a.codes;
    }
};

template <class T>
struct FloatRows : Rows<float, Float, kRowVectors, 1, 4> {
    static constexpr int64_t kBytes = kColumns * sizeof(T);
    static inline void add(Sums& sums, const char* const* from, int64_t offset, const float* x) {
        const Float factor = broadcast(*x);
        const T* weights = (const T*)(*from + offset);
        for (int v = 0; v < kRowVectors; ++v)
            sums[v] = add_product(sums[v], factor, widen(weights + v * RECEPTANCE_LANES));
    }
};

// The low and the high halves of the words of two inputs, paired to be multiplied by a pair of
// activations.
struct Halves {
    Word low, high;
    Halves(Word a, Word b) : low((a & 0xFFFF) | b << 16), high(a >> 16 | (b & 0xFFFF0000)) {}
};

// pairs(a, b, put) unpacks the words of two inputs and calls put(v, weights) for every vector of
// outputs.
struct Int8Pairs {
    static constexpr int64_t kBytes = kColumns;
    static constexpr int kWords = 16 / RECEPTANCE_LANES;
    template <class Put>
    static inline void pairs(const char* a, const char* b, const Put& put) {
        for (int h = 0; h < kWords; ++h) {
            Word first, second;
            std::memcpy(&first, a + h * sizeof first, sizeof first);
            std::memcpy(&second, b + h * sizeof second, sizeof second);
            const Halves both(first, second);
            put(h, (Pairs)both.low << 8 >> 8);
            put(kWords + h, (Pairs)both.low >> 8);
            put(2 * kWords + h, (Pairs)both.high << 8 >> 8);
            put(3 * kWords + h, (Pairs)both.high >> 8);
        }
    }
};

struct Int4Pairs {
    static constexpr int64_t kBytes = kColumns / 2;
    template <class Put>
    static inline void pairs(const char* a, const char* b, const Put& put) {
#if RECEPTANCE_LANES == 16
        // A vector holds the 8 words twice, so that one shift unpacks two sets of codes.
        const Halves both(twice(a), twice(b));
        Word shift;
        for (int i = 0; i < 16; ++i) shift[i] = i / 8 * 4;
        for (int v = 0; v < kRowVectors; ++v) {
            const Word half = v < 2 ? both.low : both.high;
            put(v, (Pairs)(half >> (shift + v % 2 * 8) & 0x000F000F));
        }
    }
    static inline Word twice(const char* from) {
        return (Word)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)from));
    }
#else
        constexpr int kWords = 8 / RECEPTANCE_LANES;
        for (int h = 0; h < kWords; ++h) {
            Word first, second;
            std::memcpy(&first, a + h * sizeof first, sizeof first);
            std::memcpy(&second, b + h * sizeof second, sizeof second);
            const Halves both(first, second);
            for (int c = 0; c < 4; ++c) {
                put(c * kWords + h, (Pairs)(both.low >> 4 * c & 0x000F000F));
                put((4 + c) * kWords + h, (Pairs)(both.high >> 4 * c & 0x000F000F));
            }
        }
    }
#endif
};

template <class Layout>
struct IntRows : Layout, Rows<int16_t, Int, kRowVectors, 2, 4> {
    static inline void add(Sums& sums, const char* const* from, int64_t offset, const int16_t* x) {
        const Pairs factors = broadcast_pair(x);
        Layout::pairs(from[0] + offset, from[1] + offset, [&](int v, Pairs weights) {
            sums[v] = add_products(sums[v], weights, factors);
        });
    }
    static inline void total(const Sums& sums, RowVectors& to) {
        for (int v = 0; v < kRowVectors; ++v) to[v] = to_float(sums[v]);
    }
};

#if RECEPTANCE_LANES == 16
// Adds four inputs at a time, two in either half of a vector. The sums of the two halves, 8 outputs
// each, are added in the end.
template <>
struct IntRows<Int4Pairs> : Int4Pairs, Rows<int16_t, Int, 8, 4, 8> {
    static inline void add(Sums& sums, const char* const* from, int64_t offset, const int16_t* x) {
        const Halves both(joined(load8(from[0] + offset), load8(from[2] + offset)),
                          joined(load8(from[1] + offset), load8(from[3] + offset)));
        int32_t factors[2];
        std::memcpy(factors, x, sizeof factors);
        const Pairs all = (Pairs)joined(_mm256_set1_epi32(factors[0]), _mm256_set1_epi32(factors[1]));
        for (int c = 0; c < 4; ++c) {
            sums[c] = add_products(sums[c], (Pairs)(both.low >> 4 * c & 0x000F000F), all);
            sums[4 + c] = add_products(sums[4 + c], (Pairs)(both.high >> 4 * c & 0x000F000F), all);
        }
    }
    static inline void total(const Sums& sums, RowVectors& to) {
        for (int v = 0; v < kRowVectors; ++v) {
            const __m512i first = (__m512i)sums[2 * v], second = (__m512i)sums[2 * v + 1];
            const Int one = (Int)_mm512_shuffle_i64x2(first, second, 0x44);
            to[v] = to_float(one + (Int)_mm512_shuffle_i64x2(first, second, 0xEE));
        }
    }

private:
    static inline __m256i load8(const char* from) { return _mm256_loadu_si256((const __m256i*)from); }
    static inline Word joined(__m256i low, __m256i high) {
        return (Word)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
};
#endif

// The number of bytes of the sums of kColumns outputs: those of int4 are the largest.
constexpr int64_t kPartial = 2 * kColumns * sizeof(float);

// Calls work(rows) with an object of the type that multiplies this kind of matrix.
template <class Work>
inline void with_rows(const Matrix& w, const Work& work) {
    switch (w.kind) {
        case Kind::float32: return work(FloatRows<float>{});
        case Kind::bfloat16: return work(FloatRows<bfloat16>{});
        case Kind::float16: return work(FloatRows<float16>{});
        case Kind::int8: return work(IntRows<Int8Pairs>{});
        case Kind::int4: return work(IntRows<Int4Pairs>{});
    }
}

inline void prefetch(const char* from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

// The memory that the threads of one product work in.
struct Scratch {
    float* sums;    // [kSparseRows][stride]
    char* partial;  // kPartial bytes for every thread and every kColumns outputs.
    int64_t stride;

    float* sum(int64_t row) const { return sums + row * stride; }
};
static_assert(kSegments * kFew <= kSparseRows, "the segments of few rows have their sums there");

inline void clear(float* y, int64_t y_stride, int64_t count, Range columns) {
    for (int64_t m = 0; m < count; ++m)
        std::memset(y + m * y_stride + columns.begin, 0,
                    (columns.end - columns.begin) * sizeof(float));
}

// y[c] += x[c].
inline void add_columns(float* y, const float* x, Range columns) {
    for (int64_t c = columns.begin; c < columns.end; c += RECEPTANCE_LANES)
        store(y + c, load<Float>(y + c) + load<Float>(x + c));
}

// A piece of the inputs: which ones they are, and where their weights begin.
template <class R>
struct Piece {
    const Matrix& w;
    int64_t number, first, count, stride;
    const char* base;

    static int64_t inputs(const Matrix& w) { return w.group ? w.group : kPiece; }
    static Range segment(const Matrix& w, int64_t s) {
        const int64_t pieces = (w.inputs + inputs(w) - 1) / inputs(w);
        return {pieces * s / kSegments, pieces * (s + 1) / kSegments};
    }

    Piece(const Matrix& w, int64_t number)
        : w(w),
          number(number),
          first(number * inputs(w)),
          count(std::min(inputs(w), w.inputs - first)),
          stride(round_up(w.outputs, kColumns) / kColumns * R::kBytes),
          base((const char*)w.data + first * stride) {}

    const char* at(int64_t input, int64_t column) const {
        return base + input * stride + column / kColumns * R::kBytes;
    }
    // Adds the sums of one row to y[column, column + kColumns).
    void finish(const typename R::Sums& sums, const Activations& row, int64_t column, float* y) const {
        if constexpr (std::is_same_v<typename R::Value, float>) {
            y += column;
            for (int v = 0; v < kRowVectors; ++v, y += RECEPTANCE_LANES)
                store(y, load<Float>(y) + sums[v]);
        } else {
            RowVectors exact;
            R::total(sums, exact);
            add(exact, row, column, y);
        }
    }
    void add(const RowVectors& exact, const Activations& row, int64_t column, float* y) const {
        const bool four = w.kind == Kind::int4;
        const int64_t outputs = round_up(w.outputs, kColumns);
        const bfloat16* scale = (const bfloat16*)w.params + number * outputs * (four ? 2 : 1) + column;
        const Float unit = broadcast(row.scales[first / kBlock]);
        const Float sum = broadcast(four ? row.sums[number] : 0.0f);
        y += column;
        // The parameters of the next piece are too few cache lines in a row for hardware
        // prefetching.
        for (int64_t n = 2 * outputs; four && n <= 3 * outputs; n += outputs)
            prefetch((const char*)(scale + n), kColumns * sizeof(bfloat16));
        for (int v = 0, n = 0; v < kRowVectors; ++v, n += RECEPTANCE_LANES) {
            Float to = add_product(load<Float>(y + n), exact[v], unit * widen(scale + n));
            if (four) to = add_product(to, widen(scale + outputs + n), sum);
            store(y + n, to);
        }
    }
};

// ---- few rows: without what is zero -------------------------------------------------------------

// Lists the inputs of some pieces that are not zero in one row.
template <class R>
struct Picked {
    uint16_t which[kListed + 8];  // Inputs, counted from the first input of the first piece.
    int64_t ends[kListed / 32], count = 0;  // ends[i]: where the list of piece i ends.

    Picked(const Matrix& w, Range pieces, const float* values) {
        const int64_t begin = Piece<R>(w, pieces.begin).first;
        for (int64_t number = pieces.begin; number < pieces.end; ++number) {
            const Piece<R> piece(w, number);
            count += find_nonzero(values + piece.first, piece.count, piece.first - begin,
                                  which + count);
            ends[number - pieces.begin] = count;
        }
    }
};

// Multiplies a few inputs at a time with all columns, so that each skipped input spares a long
// stretch of memory: short gaps would be fetched by the hardware prefetcher all the same.
template <class R>
void one_row(const Matrix& w, Range pieces, Range columns, const Activations& row, float* y,
             typename R::Sums* partial) {
    const Picked<R> picked(w, pieces, row.values);
    const int64_t run = (columns.end - columns.begin) / kColumns * R::kBytes;
    const int64_t ahead = std::max<int64_t>(R::kSet, kPrefetch / std::max<int64_t>(run, 1));
    const Piece<R> start(w, pieces.begin);
    const char* base = start.at(0, columns.begin);
    const typename R::Value* x = R::values(row) + start.first;
    for (int64_t number = pieces.begin, at = 0; number < pieces.end; ++number) {
        const Piece<R> piece(w, number);
        const int64_t end = picked.ends[number - pieces.begin];
        for (bool begins = true; at < end; begins = false) {
            const int64_t found = std::min<int64_t>(R::kSet, end - at);
            const int64_t count = round_up(found, R::kTogether);
            const int64_t coming = std::min<int64_t>(R::kSet, picked.count - at - ahead);
            const char *from[R::kSet], *then[R::kSet];
            typename R::Value values[R::kSet];
            for (int64_t j = 0; j < found; ++j) {
                from[j] = base + picked.which[at + j] * piece.stride;
                values[j] = x[picked.which[at + j]];
            }
            for (int64_t j = found; j < count; ++j) from[j] = from[0], values[j] = 0;
            for (int64_t j = 0; j < coming; ++j)
                then[j] = base + picked.which[at + ahead + j] * piece.stride;
            at += found;
            typename R::Sums* kept = partial + columns.begin / kColumns;
            for (int64_t c = columns.begin; c < columns.end; c += kColumns, ++kept) {
                // Sums are copied vector by vector: the compiler would leave a copied array in
                // memory.
                typename R::Sums sums;
                for (int v = 0; v < R::kSums; ++v) sums[v] = begins ? typename R::Sum{} : (*kept)[v];
                const int64_t offset = (c - columns.begin) / kColumns * R::kBytes;
                for (int64_t j = 0; j < count; j += R::kTogether)
                    R::add(sums, from + j, offset, values + j);
                for (int64_t j = 0; j < coming; ++j) prefetch(then[j] + offset, R::kBytes);
                if (at == end) piece.finish(sums, row, c, y);
                else
                    for (int v = 0; v < R::kSums; ++v) (*kept)[v] = sums[v];
            }
        }
    }
}

// Each thread multiplies some columns of some segments: it reads long stretches of memory if there
// are no more threads than segments. The rows take turns, so that the next row finds weights in the
// cache.
template <class R>
void few_rows(const Matrix& w, Member me, const Activations& a, int64_t count, float* y,
              int64_t y_stride, const Scratch& scratch) {
    const int64_t outputs = round_up(w.outputs, kColumns);
    const int64_t step = (count == 1 ? kListed : kNear) / Piece<R>::inputs(w);
    const auto partial = (typename R::Sums*)(scratch.partial + me.id * (outputs / kColumns) * kPartial);
    const Range mine = me.share(kSegments * outputs, kColumns);
    for (int64_t s = 0; s < kSegments; ++s) {
        const Range columns{std::max(mine.begin - s * outputs, (int64_t)0),
                            std::min(mine.end - s * outputs, outputs)};
        if (columns.begin >= columns.end) continue;
        clear(scratch.sum(s * kFew), scratch.stride, count, columns);
        const Range pieces = Piece<R>::segment(w, s);
        for (int64_t first = pieces.begin; first < pieces.end; first += step)
            for (int64_t m = 0; m < count; ++m)
                one_row<R>(w, {first, std::min(first + step, pieces.end)}, columns, a.row(m),
                           scratch.sum(s * kFew + m), partial);
    }
    me.wait();
    const Range columns = me.share(outputs, kColumns);
    clear(y, y_stride, count, columns);
    for (int64_t m = 0; m < count; ++m)
        for (int64_t s = 0; s < kSegments; ++s)
            add_columns(y + m * y_stride, scratch.sum(s * kFew + m), columns);
}

// ---- many rows ----------------------------------------------------------------------------------

// Prefetches the next columns of this piece or, after its last ones, the first of the next piece.
template <class R>
inline void prefetch_next(const Piece<R>& piece, Range columns, int64_t column, int64_t input) {
    const bool last = column + kColumns >= columns.end;
    if (!last) prefetch(piece.at(input, column + kColumns), R::kBytes);
    else if (piece.first + piece.count + input < piece.w.inputs)
        prefetch(piece.at(piece.count + input, columns.begin), R::kBytes);
}

// Multiplies floats: the weights of a piece are widened once for all rows, some columns at a time,
// and every row skips the inputs that are zero.
template <class T>
void many_rows(FloatRows<T>, const Matrix& w, Range pieces, Range columns, const Activations& a,
               int64_t count, float* y, int64_t y_stride) {
    using R = FloatRows<T>;
    uint16_t which[kSparseRows][kPiece + 8];
    int64_t found[kSparseRows];
    alignas(64) float widened[kPiece * kColumns];
    for (int64_t number = pieces.begin; number < pieces.end; ++number) {
        const Piece<R> piece(w, number);
        for (int64_t m = 0; m < count; ++m)
            found[m] = find_nonzero(a.row(m).values + piece.first, piece.count, 0, which[m]);
        for (int64_t c = columns.begin; c < columns.end; c += kColumns) {
            for (int64_t k = 0; k < piece.count; ++k) {
                prefetch_next(piece, columns, c, k);
                const T* from = (const T*)piece.at(k, c);
                for (int64_t n = 0; n < kColumns; n += RECEPTANCE_LANES)
                    store(widened + k * kColumns + n, widen(from + n));
            }
            for (int64_t m = 0; m < count; ++m) {
                RowVectors sums = {};
                const float* x = a.row(m).values + piece.first;
                for (int64_t i = 0; i < found[m]; ++i) {
                    const char* from = (const char*)(widened + which[m][i] * kColumns);
                    FloatRows<float>::add(sums, &from, 0, x + which[m][i]);
                }
                piece.finish(sums, a.row(m), c, y + m * y_stride);
            }
        }
    }
}

// The number of rows and of vectors that are summed side by side: as many as there are registers
// for.
constexpr int kDenseRows = RECEPTANCE_LANES == 16 ? 6 : RECEPTANCE_LANES == 8 ? 3 : 2;
constexpr int kDenseVectors = 4;

// Sums R rows and kDenseVectors vectors of outputs over the pairs of weights of a piece.
template <int R>
__attribute__((noinline)) void dense_product(const Pairs* weights, int64_t pairs,
                                             const int16_t* codes, int64_t stride, Int* out) {
    Int sums[R][kDenseVectors] = {};
    for (int64_t p = 0; p < pairs; ++p, weights += kRowVectors)
        for (int m = 0; m < R; ++m) {
            const Pairs x = broadcast_pair(codes + m * stride + 2 * p);
            for (int v = 0; v < kDenseVectors; ++v)
                sums[m][v] = add_products(sums[m][v], weights[v], x);
        }
    for (int m = 0; m < R; ++m) std::memcpy(out + m * kRowVectors, sums[m], sizeof sums[m]);
}

template <int R>
inline void some_dense(int64_t rows, const Pairs* weights, int64_t pairs, const int16_t* codes,
                       int64_t stride, Int* out) {
    if (rows == R) dense_product<R>(weights, pairs, codes, stride, out);
    else if constexpr (R > 1) some_dense<R - 1>(rows, weights, pairs, codes, stride, out);
}

// Multiplies integers: a piece is unpacked once for all rows, some columns at a time. Zeros are
// multiplied too, because finding them costs more.
template <class R>
void many_rows(R, const Matrix& w, Range pieces, Range columns, const Activations& a,
               int64_t count, float* y, int64_t y_stride) {
    Pairs weights[kBlock / 2][kRowVectors];
    for (int64_t number = pieces.begin; number < pieces.end; ++number) {
        const Piece<R> piece(w, number);
        const int64_t pairs = (piece.count + 1) / 2;
        for (int64_t c = columns.begin; c < columns.end; c += kColumns) {
            for (int64_t p = 0; p < pairs; ++p) {
                const int64_t k = 2 * p, last = std::min(k + 1, piece.count - 1);
                for (int64_t i = k; i <= last; ++i) prefetch_next(piece, columns, c, i);
                R::pairs(piece.at(k, c), piece.at(last, c),
                         [&](int v, Pairs both) { weights[p][v] = both; });
            }
            const int64_t blocks = (count + kDenseRows - 1) / kDenseRows;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t m = count * block / blocks, n = count * (block + 1) / blocks - m;
                const int16_t* codes = a.row(m).codes + piece.first;
                Int sums[kDenseRows][kRowVectors];
                for (int v = 0; v < kRowVectors; v += kDenseVectors)
                    some_dense<kDenseRows>(n, weights[0] + v, pairs, codes, a.stride, sums[0] + v);
                for (int64_t i = 0; i < n; ++i) {
                    RowVectors exact;
                    for (int v = 0; v < kRowVectors; ++v) exact[v] = to_float(sums[i][v]);
                    piece.add(exact, a.row(m + i), c, y + (m + i) * y_stride);
                }
            }
        }
    }
}

// Computes y[m][n] for rows [0, count) and the outputs of this thread: its share of all, cut at
// multiples of kColumns.
inline void sparse_product(const Matrix& w, Member me, const Activations& a, int64_t count, float* y,
                           int64_t y_stride, const Scratch& scratch) {
    with_rows(w, [&](auto rows) {
        using R = decltype(rows);
        if (count <= kFew) return few_rows<R>(w, me, a, count, y, y_stride, scratch);
        const Range columns = me.share(round_up(w.outputs, kColumns), kColumns);
        for (int64_t first = 0; first < count; first += kSparseRows)
            for (int64_t s = 0; s < kSegments; ++s) {
                const int64_t some = std::min(kSparseRows, count - first);
                float *const total = y + first * y_stride, *const sums = s ? scratch.sums : total;
                const int64_t stride = s ? scratch.stride : y_stride;
                clear(sums, stride, some, columns);
                many_rows(rows, w, Piece<R>::segment(w, s), columns, a.row(first), some, sums, stride);
                for (int64_t m = 0; s && m < some; ++m)
                    add_columns(total + m * y_stride, sums + m * stride, columns);
            }
    });
}

}  // namespace
}  // namespace receptance

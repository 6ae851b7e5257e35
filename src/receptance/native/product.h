// Products of activations with packed matrices: y[m] = W x[m] for rows m of a batch.
//
// The lanes of a vector are outputs, and every output is summed over its inputs in one fixed order,
// whatever the number of rows and threads: a row's result does not depend, to the bit, on the rows
// beside it. quantize/packing.py describes the layouts.
//
// With integer weights the activations are 16-bit integers too, with one scale for every kBlock of
// them. Products of integers are exact, and rounding activations to 15 bits costs little more
// accuracy than float32 does.
#pragma once

#include <algorithm>

#include "codes.h"
#include "model.h"
#include "parallel.h"
#include "vector.h"

namespace receptance {
namespace {

constexpr int64_t kBlock = 128;   // The number of inputs that share a scale of activations.
constexpr int64_t kOutputs = 16;  // The number of outputs of a tile.
constexpr int64_t kVectors = kOutputs / RECEPTANCE_LANES;
constexpr int64_t kRows = 128;       // Activations of so many rows stay in the second-level cache.
constexpr int64_t kPrefetch = 4096;  // Weights are prefetched so many bytes ahead.

// The number of rows of a tile that are summed side by side: as many as there are registers for.
constexpr int kIntRows = RECEPTANCE_LANES == 16 ? 8 : RECEPTANCE_LANES == 8 ? 4 : 2;
constexpr int kCodeRows = RECEPTANCE_LANES == 16 ? 8 : 2;  // Sums of bytes take two registers.
constexpr int kFloatRows = RECEPTANCE_LANES == 16 ? 12 : RECEPTANCE_LANES == 8 ? 6 : 2;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How many rows of a kind are summed side by side.
constexpr int most_rows(Kind kind) {
    return kind == Kind::int4 ? kCodeRows : kind == Kind::int8 ? kIntRows : kFloatRows;
}

inline bool is_integer(Kind kind) { return kind == Kind::int8 || kind == Kind::int4; }

// Rows of activations, ready to be multiplied. Strides are numbers of elements; the elements
// between the number of inputs and the next multiple of kBlock are zero.
struct Activations {
    float* values;   // [rows][stride]
    int16_t* codes;  // [rows][stride], in the order in which the matrices' words are unpacked
    float* scales;   // [rows][stride / kBlock]
    float* sums;     // [rows][stride / 32], for every group of an int4 matrix
    int64_t stride;

    Activations row(int64_t m) const {
        return {values + m * stride, codes + m * stride, scales + m * (stride / kBlock),
                sums + m * (stride / 32), stride};
    }
};

// One number for every output of a tile, as vectors.
using OutputVectors = Float[kVectors];

// Adds all numbers in one order, whatever the width of a vector.
inline float sum_of(const OutputVectors& sums) {
    alignas(64) float lanes[kOutputs];
    for (int v = 0; v < kVectors; ++v) store(lanes + v * RECEPTANCE_LANES, sums[v]);
    for (int64_t half = kOutputs / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// Rounds kBlock values to 16-bit integers; returns their scale, which is NaN if a value is not
// finite.
inline float round_block(const float* from, int32_t* codes) {
    Float most{}, finite{};
    for (int64_t i = 0; i < kBlock; i += RECEPTANCE_LANES) {
        const Float x = load<Float>(from + i);
        most = max(most, -minus_abs(x));
        finite += x * 0;
    }
    float largest = 0, zero = 0;
    for (int i = 0; i < RECEPTANCE_LANES; ++i) {
        largest = most[i] > largest ? most[i] : largest;
        zero += finite[i];
    }
    const float scale = largest / 32767 + zero, inverse = scale > 0 ? 1 / scale : 0;
    for (int64_t i = 0; i < kBlock; i += RECEPTANCE_LANES)
        store(codes + i, to_nearest(load<Float>(from + i) * inverse));
    return scale;
}

// Computes codes, scales and sums of one row's values; order(codes, to) writes the codes of a block
// in the order that the matrix wants.
template <class Order>
inline void encode(const Activations& a, int64_t inputs, const Matrix& like, const Order& order) {
    alignas(64) int32_t codes[kBlock];
    for (int64_t block = 0; block * kBlock < inputs; ++block) {
        const float scale = a.scales[block] = round_block(a.values + block * kBlock, codes);
        order(codes, a.codes + block * kBlock);
        if (like.kind != Kind::int4) continue;
        for (int64_t i = 0; i < kBlock; i += like.group) {
            int32_t sum = 0;
            for (int64_t j = i; j < i + like.group; ++j) sum += (int16_t)codes[j];
            a.sums[(block * kBlock + i) / like.group] = (float)sum * scale;
        }
    }
}

// Encodes activations for a matrix of the layout "tiles": in the pairs in which its words are
// unpacked.
inline void encode_for_tiles(const Activations& a, int64_t inputs, const Matrix& like) {
    if (like.kind == Kind::int8)
        encode(a, inputs, like, [](const int32_t* codes, int16_t* to) {
            for (int64_t i = 0; i < kBlock; i += 4) {
                to[i] = (int16_t)codes[i];
                to[i + 1] = (int16_t)codes[i + 2];
                to[i + 2] = (int16_t)codes[i + 1];
                to[i + 3] = (int16_t)codes[i + 3];
            }
        });
    if (like.kind == Kind::int4)
        encode(a, inputs, like, [](const int32_t* codes, int16_t* to) {
            for (int64_t i = 0; i < kBlock; i += 8) store_factors(codes + i, to + i);
        });
}

// Encodes activations for a matrix of the layout "rows": one input after another.
inline void encode_for_rows(const Activations& a, int64_t inputs, const Matrix& like) {
    if (is_integer(like.kind))
        encode(a, inputs, like, [](const int32_t* codes, int16_t* to) {
            for (int64_t i = 0; i < kBlock; ++i) to[i] = (int16_t)codes[i];
        });
}

// ---- tiles: every matrix but the last of channel mixing -----------------------------------------

// Sums of G tiles, kOutputs outputs each, for R rows. The functions below add up in a local array,
// which the compiler keeps in registers.
template <int R, int G>
using Sums = Float[G][R][kVectors];

// With few rows every addition waits for the one before it in the same sum, so several tiles are
// summed side by side: as many as make kChains independent chains of additions.
constexpr int kChains = 4;
template <int R>
constexpr int kTiles = R * kVectors < kChains ? kChains / (R * kVectors) : 1;

// G tiles as G streams of memory, each of `bytes`.
template <int G>
struct Streams {
    const char* at;
    int64_t bytes, left;

    Streams(const void* data, int64_t tile, int64_t bytes)
        : at((const char*)data + tile * bytes), bytes(bytes), left(bytes) {}
    const char* operator[](int g) const { return at + g * bytes; }
    // Prefetches what the streams together read kPrefetch bytes later. A stream that would end
    // before that goes on where the last of them ends, which is where the next tiles begin.
    void prefetch(int g) const {
        constexpr int64_t ahead = kPrefetch / G;
        __builtin_prefetch(at + g * bytes + ahead + (left > ahead ? 0 : (G - 1) * bytes));
    }
    void advance(int64_t n) {
        at += n;
        left -= n;
    }
};

template <int R, int G, class T>
__attribute__((noinline)) void tile_product(const Matrix& w, int64_t tile, const Activations& a, Sums<R, G>& out) {
    Sums<R, G> sums = {};
    Streams<G> from(w.data, tile, w.inputs * kOutputs * sizeof(T));
    for (int64_t k = 0; k < w.inputs; ++k, from.advance(kOutputs * sizeof(T))) {
        Float weights[G][kVectors];
        for (int g = 0; g < G; ++g) {
            from.prefetch(g);
            for (int v = 0; v < kVectors; ++v)
                weights[g][v] = widen((const T*)from[g] + v * RECEPTANCE_LANES);
        }
        for (int m = 0; m < R; ++m) {
            const Float x = broadcast(a.values[m * a.stride + k]);
            for (int g = 0; g < G; ++g)
                for (int v = 0; v < kVectors; ++v)
                    sums[g][m][v] = add_product(sums[g][m][v], weights[g][v], x);
        }
    }
    std::memcpy(out, sums, sizeof sums);
}

// Loads one bfloat16 parameter for each output of a tile.
inline void load_params(Float (&to)[kVectors], const uint16_t* from) {
    for (int v = 0; v < kVectors; ++v)
        to[v] = widen((const bfloat16*)from + v * RECEPTANCE_LANES);
}

template <int R, int G>
__attribute__((noinline)) void tile_product_int8(const Matrix& w, int64_t tile, const Activations& a, Sums<R, G>& out) {
    std::memset(out, 0, sizeof out);
    const int64_t blocks = round_up(w.inputs, kBlock) / kBlock;
    Streams<G> from(w.data, tile, blocks * kBlock * kOutputs);
    const uint16_t* params = w.params + tile * blocks * kOutputs;
    for (int64_t block = 0; block < blocks; ++block, params += kOutputs) {
        const int16_t* codes = a.codes + block * kBlock;
        Int exact[G][R][kVectors] = {};
        for (int64_t k = 0; k < kBlock; k += 4, from.advance(4 * kOutputs)) {
            Pairs even[G][kVectors], odd[G][kVectors];
            for (int g = 0; g < G; ++g) {
                from.prefetch(g);
                for (int v = 0; v < kVectors; ++v) {
                    Pairs both;
                    std::memcpy(&both, from[g] + v * sizeof both, sizeof both);
                    even[g][v] = both << 8 >> 8;
                    odd[g][v] = both >> 8;
                }
            }
            for (int m = 0; m < R; ++m) {
                const Pairs x = broadcast_pair(codes + m * a.stride + k);
                const Pairs y = broadcast_pair(codes + m * a.stride + k + 2);
                for (int g = 0; g < G; ++g)
                    for (int v = 0; v < kVectors; ++v) {
                        exact[g][m][v] = add_products(exact[g][m][v], even[g][v], x);
                        exact[g][m][v] = add_products(exact[g][m][v], odd[g][v], y);
                    }
            }
        }
        for (int g = 0; g < G; ++g) {
            Float scale[kVectors];
            load_params(scale, params + g * blocks * kOutputs);
            for (int m = 0; m < R; ++m) {
                const Float s = broadcast(a.scales[m * (a.stride / kBlock) + block]);
                for (int v = 0; v < kVectors; ++v)
                    out[g][m][v] = add_product(out[g][m][v], to_float(exact[g][m][v]), s * scale[v]);
            }
        }
    }
}

template <int R, int G>
__attribute__((noinline)) void tile_product_int4(const Matrix& w, int64_t tile, const Activations& a, Sums<R, G>& out) {
    std::memset(out, 0, sizeof out);
    const int64_t blocks = round_up(w.inputs, kBlock) / kBlock, groups = blocks * (kBlock / w.group);
    Streams<G> from(w.data, tile, blocks * kBlock * (kOutputs / 2));
    const uint16_t* params = w.params + tile * groups * 2 * kOutputs;
    const int16_t* codes = a.codes;
    const float* group_sums = a.sums;
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t group = 0; group < kBlock; group += w.group, params += 2 * kOutputs, ++group_sums) {
            Int exact[G][R][kVectors] = {};
            for (int64_t k = 0; k < w.group; k += kCodes, codes += kCodes) {
                CodeSum sums[G][R][kVectors];
#pragma GCC unroll kUnrolled
                for (int i = 0; i < kCodes; i += 8, from.advance(4 * kOutputs)) {
                    for (int g = 0; g < G; ++g) from.prefetch(g);
                    for (int part = 0; part < kParts; ++part) {
                        Word weights[G][kVectors];
                        // Vectors are loaded one by one: a copy of several into the array goes
                        // through memory.
                        for (int g = 0; g < G; ++g)
                            for (int v = 0; v < kVectors; ++v)
                                weights[g][v] = part_of(
                                    load<Word>((const uint32_t*)from[g] + v * RECEPTANCE_LANES), part);
                        for (int m = 0; m < R; ++m) {
                            const Factors x =
                                load_factors(codes + m * a.stride + i + part * (8 / kParts));
                            for (int g = 0; g < G; ++g)
                                for (int v = 0; v < kVectors; ++v)
                                    sums[g][m][v].add(weights[g][v], x);
                        }
                    }
                }
                for (int g = 0; g < G; ++g)
                    for (int m = 0; m < R; ++m)
                        for (int v = 0; v < kVectors; ++v) exact[g][m][v] += sums[g][m][v].total();
            }
            for (int g = 0; g < G; ++g) {
                const uint16_t* own = params + g * groups * 2 * kOutputs;
                __builtin_prefetch((const char*)own + kPrefetch / 4);
                Float scale[kVectors], minimum[kVectors];
                load_params(scale, own);
                load_params(minimum, own + kOutputs);
                for (int m = 0; m < R; ++m) {
                    const Float s = broadcast(a.scales[m * (a.stride / kBlock) + block]);
                    const Float sum = broadcast(group_sums[m * (a.stride / 32)]);
                    for (int v = 0; v < kVectors; ++v) {
                        out[g][m][v] = add_product(out[g][m][v], to_float(exact[g][m][v]), s * scale[v]);
                        out[g][m][v] = add_product(out[g][m][v], minimum[v], sum);
                    }
                }
            }
        }
}

// Hands the sums of R rows and G tiles to put(m, first output, vector), one vector at a time.
template <int R, int G, class Put>
void tile_rows(const Matrix& w, int64_t tile, const Activations& a, int64_t m, const Put& put) {
    Sums<R, G> sums;
    const Activations rows = a.row(m);
    switch (w.kind) {
        case Kind::float32: tile_product<R, G, float>(w, tile, rows, sums); break;
        case Kind::bfloat16: tile_product<R, G, bfloat16>(w, tile, rows, sums); break;
        case Kind::float16: tile_product<R, G, float16>(w, tile, rows, sums); break;
        case Kind::int8:
            if constexpr (R <= kIntRows) tile_product_int8<R, G>(w, tile, rows, sums);
            break;
        case Kind::int4:
            if constexpr (R <= kCodeRows) tile_product_int4<R, G>(w, tile, rows, sums);
            break;
    }
    for (int g = 0; g < G; ++g)
        for (int i = 0; i < R; ++i)
            for (int v = 0; v < kVectors; ++v)
                put(m + i, (tile + g) * kOutputs + v * RECEPTANCE_LANES, sums[g][i][v]);
}

// Calls tile_rows on all tiles for n rows, a number up to R that only the running program knows.
template <int R, class Put>
void some_rows(int64_t n, const Matrix& w, Range tiles, const Activations& a, int64_t m,
               const Put& put) {
    if (n == R) {
        int64_t tile = tiles.begin;
        for (; tile + kTiles<R> <= tiles.end; tile += kTiles<R>)
            tile_rows<R, kTiles<R>>(w, tile, a, m, put);
        for (; tile < tiles.end; ++tile) tile_rows<R, 1>(w, tile, a, m, put);
    } else if constexpr (R > 1) {
        some_rows<R - 1>(n, w, tiles, a, m, put);
    }
}

// Calls put(m, first output, vector) for rows [0, count) and every output of `tiles`.
template <class Put>
void product(const Matrix& w, Range tiles, const Activations& a, int64_t count, const Put& put) {
    const int64_t most = most_rows(w.kind);
    for (int64_t first = 0; first < count; first += kRows) {
        const int64_t rows = std::min(kRows, count - first), pieces = (rows + most - 1) / most;
        if (pieces == 1) {
            some_rows<kFloatRows>(rows, w, tiles, a, first, put);
            continue;
        }
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int64_t m = rows * piece / pieces, n = rows * (piece + 1) / pieces - m;
                some_rows<kFloatRows>(n, w, {tile, tile + 1}, a, first + m, put);
            }
    }
}

// ---- embedding ----------------------------------------------------------------------------------

// Writes row `token` of the embedding as float32.
inline void look_up(const Matrix& w, int64_t token, float* to) {
    const int64_t width = w.inputs;
    if (!is_integer(w.kind)) {
        const int64_t whole = width / RECEPTANCE_LANES * RECEPTANCE_LANES;
        // The last vector of the last row would reach beyond the matrix, so rests are copied first.
        float tail[RECEPTANCE_LANES];
        const int64_t size = w.kind == Kind::float32 ? 4 : 2;
        const char* row = (const char*)w.data + token * width * size;
        char rest[4 * RECEPTANCE_LANES] = {};
        std::memcpy(rest, row + whole * size, (width - whole) * size);
        const auto from = [&](const void* p) {
            if (w.kind == Kind::float32) return widen((const float*)p);
            if (w.kind == Kind::bfloat16) return widen((const bfloat16*)p);
            return widen((const float16*)p);
        };
        for (int64_t c = 0; c < whole; c += RECEPTANCE_LANES) store(to + c, from(row + c * size));
        store(tail, from(rest));
        std::memcpy(to + whole, tail, (width - whole) * sizeof(float));
        return;
    }
    const bool four = w.kind == Kind::int4;
    const int64_t groups = (width + w.group - 1) / w.group;
    const bfloat16* params = (const bfloat16*)w.params + token * groups * (four ? 2 : 1);
    const auto number = [](bfloat16 x) {
        const uint32_t bits = (uint32_t)x.bits << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    };
    for (int64_t c = 0; c < width; ++c) {
        const int64_t group = c / w.group;
        if (four) {
            const uint8_t byte = ((const uint8_t*)w.data)[token * ((width + 1) / 2) + c / 2];
            to[c] = number(params[2 * group]) * (float)(c % 2 ? byte >> 4 : byte & 15) +
                    number(params[2 * group + 1]);
        } else {
            to[c] = number(params[group]) * (float)((const int8_t*)w.data)[token * width + c];
        }
    }
}

}  // namespace
}  // namespace receptance

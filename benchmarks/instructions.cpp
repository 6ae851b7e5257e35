// Multiplies rows of activations with one packed matrix, some number of times:
//
//     instructions LAYOUT KIND ROWS INPUTS OUTPUTS REPEATS
//
// LAYOUT is tiles, rows (half of the activations are zero) or encode (no product: only activations
// become integers). Prints a checksum of the outputs and the least microseconds of a repeat.
// instructions.py compiles this for one instruction set and counts what it executes.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "pass.h"

using namespace receptance;

namespace {

// A small generator: what is counted must not be the standard library's.
struct Random {
    uint32_t state = 1;
    uint32_t next() { return state = state * 1664525u + 1013904223u; }
    float normal() {
        float sum = 0;
        for (int i = 0; i < 4; ++i) sum += (float)(next() >> 8) / (1 << 24) - 0.5f;
        return sum;
    }
};

Kind kind_of(const std::string& name) {
    const char* names[] = {"float32", "bfloat16", "float16", "int8", "int4"};
    for (int i = 0; i < 5; ++i)
        if (name == names[i]) return (Kind)i;
    std::exit(2);
}

int bits(Kind kind) {
    const int of[] = {32, 16, 16, 8, 4};
    return of[(int)kind];
}

}  // namespace

int main(int, char** words) {
    const std::string layout = words[1];
    const Kind kind = kind_of(words[2]);
    const int64_t rows = std::atoi(words[3]), inputs = std::atoi(words[4]);
    const int64_t outputs = std::atoi(words[5]), repeats = std::atoi(words[6]);
    Random random;

    // Packed matrices begin at a cache line.
    struct alignas(64) Line {
        uint32_t words[16];
    };
    const int64_t weights = round_up(inputs, kBlock) * round_up(outputs, kColumns);
    std::vector<Line> data(weights * bits(kind) / 512 + 64), params(weights / 1024 + 256);
    const bool half = kind == Kind::bfloat16 || kind == Kind::float16;
    for (Line& line : data)
        for (uint32_t& word : line.words) {
            word = random.next() ^ random.next() >> 16;
            if (kind == Kind::float32) word = (word & 0x807FFFFF) | 0x3C000000;
            if (half) word = (word & 0x80FF80FF) | 0x3C003C00;
        }
    for (Line& line : params)
        for (uint32_t& word : line.words) word = 0x3A003A00 | (random.next() >> 9 & 0x7F007F);
    const int64_t group = kind == Kind::int8 ? 128 : kind == Kind::int4 ? 64 : 0;
    const Matrix w{kind, outputs, inputs, group, data.data(), (const uint16_t*)params.data()};

    const int64_t stride = round_up(inputs, kBlock), wide = round_up(outputs, kColumns);
    const auto take = [&](Memory memory) {
        const Activations a = take_activations(memory, rows, stride);
        const Scratch scratch{memory.take<float>(kSparseRows * wide),
                              memory.take<char>(wide / kColumns * kPartial), wide};
        float* y = memory.take<float>(rows * wide);
        return std::make_tuple(a, scratch, y, memory.used());
    };
    std::vector<char> room(std::get<3>(take(Memory(nullptr))));
    const auto [a, scratch, y, used] = take(Memory(room.data()));
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t k = 0; k < inputs; ++k)
            a.values[m * stride + k] = layout == "rows" && k * 7919 % 2 ? 0 : random.normal();

    const auto encode_all = [&, a = a] {
        for (int64_t m = 0; m < rows; ++m)
            layout == "rows" ? encode_for_rows(a.row(m), inputs, w)
                             : encode_for_tiles(a.row(m), inputs, w);
    };
    encode_all();
    double least = 1e9;
    for (int64_t i = 0; i < repeats; ++i) {
        const auto began = std::chrono::steady_clock::now();
        if (layout == "encode") encode_all();
        if (layout == "rows") sparse_product(w, {0, 1, nullptr}, a, rows, y, wide, scratch);
        if (layout == "tiles")
            product(w, {0, round_up(outputs, kOutputs) / kOutputs}, a, rows,
                    [&, y = y](int64_t m, int64_t n, Float x) { store(y + m * wide + n, x); });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        least = std::min(least, took.count());
    }
    uint64_t sum = 14695981039346656037u;
    for (int64_t i = 0; i < rows * wide; ++i) {
        uint32_t number;
        std::memcpy(&number, y + i, sizeof number);
        sum = (sum ^ number) * 1099511628211u;
    }
    std::printf("%016llx %.3f\n", (unsigned long long)sum, least * 1e6);
}

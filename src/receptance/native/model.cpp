// What the models of all versions do alike outside a pass: the head, and reading memory.

#include "model.h"

#include "kernels.h"
#include "pass.h"

namespace receptance {
namespace {

void head(const OuterWeights& w, const float* features, int64_t count, float* logits,
          Workspace& workspace, int threads) {
    const int64_t stride = round_up(w.width, kBlock);
    Memory measure(nullptr);
    (void)take_activations(measure, count, stride);
    Memory memory(reserve(workspace, measure.used(), count, 1));
    const Activations a = take_activations(memory, count, stride);
    run_team(threads, [&](Member me) {
        const Range mine = me.share(count);
        for (int64_t m = mine.begin; m < mine.end; ++m) {
            const Activations row = a.row(m);
            std::memset(row.values, 0, stride * sizeof(float));
            std::memcpy(row.values, features + m * w.width, w.width * sizeof(float));
            encode_for_tiles(row, w.width, w.head);
        }
        me.wait();
        const int64_t vocab = w.vocab_size;
        product(w.head, me.share(round_up(vocab, kOutputs) / kOutputs), a, count,
                [&](int64_t m, int64_t n, Float x) {
                    const int64_t left = std::min<int64_t>(RECEPTANCE_LANES, vocab - n);
                    if (left > 0) store(logits + m * vocab + n, x, left);
                });
    });
}

uint32_t read(const char* data, int64_t bytes, int threads) {
    constexpr int kStep = 8 * sizeof(Word);
    std::atomic<uint32_t> total{0};
    run_team(threads, [&](Member me) {
        const Range mine = me.share(bytes / kStep);
        Word sums[8] = {};
        for (int64_t i = mine.begin; i < mine.end; ++i) {
            const char* from = data + i * kStep;
            for (int line = 0; line < kStep; line += 64) __builtin_prefetch(from + line + 4096);
            for (int j = 0; j < 8; ++j) {
                Word word;
                std::memcpy(&word, from + j * sizeof word, sizeof word);
                sums[j] += word;
            }
        }
        for (const Word& sum : sums) total += sum[0];
    });
    return total;
}

}  // namespace

extern const ModelKernels RECEPTANCE_TABLE(model_) = {head, read};

}  // namespace receptance

// The Python module receptance._native: raw addresses in, nothing of torch's ABI.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"
#include "wkv4.h"

namespace nb = nanobind;
using namespace receptance;

namespace {

// Instruction sets this machine can run, the fastest first.
std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> found;
#if defined(RECEPTANCE_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        found.push_back(&wkv4_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back(&wkv4_avx2);
#endif
    found.push_back(&wkv4_portable);
    return found;
}

const Kernels& kernels(const std::string& instruction_set) {
    static const auto available = runnable();
    if (instruction_set.empty()) return *available.front();
    for (const Kernels* k : available)
        if (instruction_set == k->name) return *k;
    throw std::invalid_argument("instruction set " + instruction_set + " is not available here");
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Addresses = std::vector<uintptr_t>;

void forward(int64_t batch, int64_t time, int64_t width, int element, int threads,
             const std::string& instruction_set, const Addresses& p) {
    Forward f{batch, time, width, pointer<void>(p[0]), pointer<void>(p[1]), pointer<void>(p[2]),
              pointer<void>(p[3]), pointer<void>(p[4]), pointer<void>(p[5]), pointer<void>(p[6]),
              pointer<bool>(p[7]), pointer<int64_t>(p[8]), pointer<void>(p[9]),
              pointer<void>(p[10]), pointer<void>(p[11]), pointer<void>(p[12]),
              pointer<void>(p[13])};
    const Kernels& k = kernels(instruction_set);
    nb::gil_scoped_release release;
    k.forward(f, static_cast<Element>(element), threads);
}

void backward(int64_t batch, int64_t time, int64_t width, int element, int threads,
              const std::string& instruction_set, const Addresses& p) {
    Backward f{batch, time, width, pointer<void>(p[0]), pointer<void>(p[1]), pointer<void>(p[2]),
               pointer<void>(p[3]), pointer<void>(p[4]), pointer<void>(p[5]), pointer<void>(p[6]),
               pointer<void>(p[7]), pointer<bool>(p[8]), pointer<int64_t>(p[9]),
               pointer<double>(p[10]), pointer<double>(p[11]), pointer<void>(p[12]),
               pointer<void>(p[13]), pointer<void>(p[14]), pointer<void>(p[15])};
    const Kernels& k = kernels(instruction_set);
    nb::gil_scoped_release release;
    k.backward(f, static_cast<Element>(element), threads);
}

}  // namespace

NB_MODULE(_native, m) {
    m.attr("CHUNK") = kChunk;
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* k : runnable()) names.emplace_back(k->name);
        return names;
    });
    m.def("shares_torch_threads", [] { return shared_openmp() != nullptr; });
    m.def("wkv4_forward", &forward);
    m.def("wkv4_backward", &backward);
}

// What the sources that are compiled once per instruction set share besides their vectors.
//
// CMakeLists.txt defines RECEPTANCE_KERNELS as the instruction set's name, for example avx2.
#pragma once

namespace receptance {

// The exponent of a state that has seen no token: EMPTY_EXPONENT in ops/reference.py.
constexpr float kEmptyExponent = -1e30f;

}  // namespace receptance

#define RECEPTANCE_JOIN_OF(a, b) a##b
#define RECEPTANCE_JOIN(a, b) RECEPTANCE_JOIN_OF(a, b)

// `prefix` followed by the instruction set's name.
#define RECEPTANCE_TABLE(prefix) RECEPTANCE_JOIN(prefix, RECEPTANCE_KERNELS)

// Neighbouring channels, stored as T and computed in FP32; the same on a GPU and on a CPU.
//
// Needs no header on a GPU, so that NVRTC compiles it as it is.
#pragma once

#ifndef __CUDACC_RTC__
#include <cmath>
#include <cstring>
#include <limits>
#endif

#ifdef __CUDACC__
#define LITEFRAME_INLINE __host__ __device__ __forceinline__
#else
#define LITEFRAME_INLINE inline __attribute__((always_inline))
#endif

#ifdef __CUDA_ARCH__
#define LITEFRAME_UNROLL _Pragma("unroll")
#else
#define LITEFRAME_UNROLL
#endif

namespace liteframe {

struct Half {  // IEEE binary16
    unsigned short bits;
};

struct Brain {  // bfloat16
    unsigned short bits;
};

LITEFRAME_INLINE float to_float(float value) { return value; }

LITEFRAME_INLINE void from_float(float value, float& out) { out = value; }

#ifdef __CUDA_ARCH__

LITEFRAME_INLINE float infinity() { return __int_as_float(0x7f800000); }

LITEFRAME_INLINE float to_float(Brain value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

LITEFRAME_INLINE float to_float(Half value) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
    return out;
}

LITEFRAME_INLINE void from_float(float value, Half& out) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
}

LITEFRAME_INLINE void from_float(float value, Brain& out) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
}

#else

#if defined(__aarch64__)
using Binary16 = __fp16;
#else
using Binary16 = _Float16;
#endif

LITEFRAME_INLINE float infinity() { return std::numeric_limits<float>::infinity(); }

LITEFRAME_INLINE float to_float(Brain value) {
    const unsigned bits = static_cast<unsigned>(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

LITEFRAME_INLINE float to_float(Half value) {
    Binary16 half;
    std::memcpy(&half, &value, sizeof half);
    return static_cast<float>(half);
}

LITEFRAME_INLINE void from_float(float value, Half& out) {
    const Binary16 half = static_cast<Binary16>(value);
    std::memcpy(&out, &half, sizeof half);
}

// To the nearest, ties to even. A NaN stays one.
LITEFRAME_INLINE void from_float(float value, Brain& out) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    const unsigned rounded = bits + 0x7fff + ((bits >> 16) & 1);
    out.bits = static_cast<unsigned short>((value != value ? bits | 0x400000 : rounded) >> 16);
}

#endif

// What lies at one address and is moved at once: 16 bytes, or twice as many, or one channel.
template <class T, int W>
struct alignas(W == 1 ? sizeof(T) : 16) Lanes {
    T lane[W];

    LITEFRAME_INLINE float operator[](int i) const { return to_float(lane[i]); }
};

#ifdef __CUDA_ARCH__

// In pairs, as registers have them: taken apart when loaded, they would be put together again where branches meet.
template <class T, int W>
struct alignas(16) Pairs {
    unsigned pairs[W / 2];

    LITEFRAME_INLINE float operator[](int i) const {
        return to_float(T{static_cast<unsigned short>(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff)});
    }
};

template <>
struct Lanes<Half, 8> : Pairs<Half, 8> {};

template <>
struct Lanes<Brain, 8> : Pairs<Brain, 8> {};

#endif

template <int W, class T>
LITEFRAME_INLINE Lanes<T, W> load(const T* address) {
    return *reinterpret_cast<const Lanes<T, W>*>(address);
}

template <class T, int W>
struct alignas(W == 1 ? sizeof(T) : 16) Stored {
    T lane[W];
};

template <int W, class T>
LITEFRAME_INLINE void store(T* address, const float (&values)[W]) {
    Stored<T, W> out;
    LITEFRAME_UNROLL
    for (int i = 0; i < W; i++) from_float(values[i], out.lane[i]);
    *reinterpret_cast<Stored<T, W>*>(address) = out;
}

}  // namespace liteframe

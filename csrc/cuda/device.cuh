// What every .cu shares: conversion to the accumulation type, a trap that says why, a run over
// dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "../launchers.h"

namespace rmega {

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ double load(double x) { return x; }
__device__ __forceinline__ float load(__half x) { return __half2float(x); }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// 16 bytes as one store. From an assignment of a struct that was filled in a loop the compiler
// makes a store per element, or per two.
__device__ __forceinline__ void store_16(void* p, uint4 x) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
#else
  *static_cast<uint4*>(p) = x;
#endif
}

// The type that sums over elements of T are kept in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// An index outside its tensor ends the program with the numbers, as an assert would.
__device__ __forceinline__ void require_row(int64_t row, int64_t rows, const char* what) {
  if (row < 0 || row >= rows) {
    printf("rmega: %s: row %lld of %lld\n", what, static_cast<long long>(row),
           static_cast<long long>(rows));
    __trap();
  }
}

// Calls f(T*(nullptr)) with the element type of dtype.
template <typename F>
void for_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      f(static_cast<float*>(nullptr));
      break;
    case DType::f64:
      f(static_cast<double*>(nullptr));
      break;
    case DType::f16:
      f(static_cast<__half*>(nullptr));
      break;
    case DType::bf16:
      f(static_cast<__nv_bfloat16*>(nullptr));
      break;
  }
}

// The widest of 16, 8, 4, 2, 1 bytes that divides the given bits (addresses and sizes or-ed
// together).
inline int copy_width(uint64_t bits) {
  int width = 16;
  while (bits % width != 0) {
    width /= 2;
  }
  return width;
}

// Calls f(Unit*(nullptr)) with an unsigned type of that width.
template <typename F>
void for_copy_width(int width, F f) {
  switch (width) {
    case 16:
      f(static_cast<uint4*>(nullptr));
      break;
    case 8:
      f(static_cast<uint2*>(nullptr));
      break;
    case 4:
      f(static_cast<uint32_t*>(nullptr));
      break;
    case 2:
      f(static_cast<uint16_t*>(nullptr));
      break;
    default:
      f(static_cast<uint8_t*>(nullptr));
      break;
  }
}

// V elements of T, moved as one where they are 16 bytes.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Lane {
  T at[V];
};

template <int V, typename T>
__device__ __forceinline__ Lane<T, V> read(const T* p) {
  return *reinterpret_cast<const Lane<T, V>*>(p);
}

template <typename T, int V>
__device__ __forceinline__ void write(T* p, const Lane<T, V>& lane) {
  if constexpr (sizeof(lane) == 16) {
    uint4 whole;
    memcpy(&whole, &lane, sizeof(whole));
    store_16(p, whole);
  } else {
    *reinterpret_cast<Lane<T, V>*>(p) = lane;
  }
}

template <int n>
using Number = std::integral_constant<int, n>;

// Calls f(Number<V>()) with the lanes of 16 bytes where `bits` (addresses and byte counts or-ed
// together) allow, else 1.
template <typename T, typename F>
void with_lanes(uint64_t bits, F f) {
  if (bits % 16 == 0) {
    f(Number<16 / sizeof(T)>());
  } else {
    f(Number<1>());
  }
}

template <typename... P>
inline uint64_t bits_of(P... p) {
  return (reinterpret_cast<uint64_t>(p) | ...);
}

// Calls f(number) with 32 bits where they count to `count`, because a division of 64 is a call.
template <typename F>
void for_index(int64_t count, F f) {
  if (count <= INT32_MAX) {
    f(uint32_t(0));
  } else {
    f(int64_t(0));
  }
}

}  // namespace rmega

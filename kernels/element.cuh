// The type of a number in memory, T, and the type of sums, Acc.
//
// Every kernel is written once and compiled for each type of element:
//
//     -DELEMENT=float      T float32     Acc float32
//     -DELEMENT=double     T float64     Acc float64
//     -DELEMENT=float16    T 2 bytes     Acc float32     1 sign bit,  5 of exponent, 10 of fraction
//     -DELEMENT=bfloat16   T 2 bytes     Acc float32     1 sign bit,  8 of exponent,  7 of fraction
//
// Half precision is only a storage format: a number is widened when it is read and rounded when it is written, so a
// sum of a thousand numbers is as accurate as a sum in float32.
#pragma once
#include "ptx.cuh"

struct float16  { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

template <typename Element> struct Wide         { using type = float; };
template <>                 struct Wide<double> { using type = double; };

#ifndef ELEMENT
#define ELEMENT float
#endif
using T = ELEMENT;
using Acc = Wide<T>::type;

// Four neighbouring numbers, read or written by one instruction: 16 bytes for float32, 8 for half precision.
struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) Four { T at[4]; };

__device__ __forceinline__ double wide(double x)   { return x; }
__device__ __forceinline__ float  wide(float x)    { return x; }
__device__ __forceinline__ float  wide(float16 x)  { return float16_value(x.bits); }
__device__ __forceinline__ float  wide(bfloat16 x) { return __int_as_float(int(unsigned(x.bits) << 16)); }

__device__ __forceinline__ void narrow(Acc x, double* to)   { *to = x; }
__device__ __forceinline__ void narrow(Acc x, float* to)    { *to = float(x); }
__device__ __forceinline__ void narrow(Acc x, float16* to)  { to->bits = float16_bits(float(x)); }
__device__ __forceinline__ void narrow(Acc x, bfloat16* to) { to->bits = bfloat16_bits(float(x)); }
__device__ __forceinline__ T narrow(Acc x) { T y; narrow(x, &y); return y; }

#define NEG_INF (__int_as_float(int(0xff800000)))           // NVRTC has no INFINITY
#define POS_INF (__int_as_float(0x7f800000))

__device__ __forceinline__ float  exp_(float x)   { return __expf(x); }
__device__ __forceinline__ double exp_(double x)  { return exp(x); }
__device__ __forceinline__ float  log_(float x)   { return logf(x); }
__device__ __forceinline__ double log_(double x)  { return log(x); }
__device__ __forceinline__ float  rsqrt_(float x)  { return rsqrtf(x); }
__device__ __forceinline__ double rsqrt_(double x) { return rsqrt(x); }

// 1 / sqrt(v), and NaN if v is infinite: a norm whose squares overflowed would otherwise quietly be a constant.
__device__ __forceinline__ Acc rstd_of_variance(Acc v) { return 1 / sqrt(v) + (v - v); }

// __fdividef has no branches, unlike an exact division; for a divisor above 2^126 it returns 0.
__device__ __forceinline__ float  sigmoid(float x)  { return __fdividef(1.f, 1.f + __expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }
__device__ __forceinline__ Acc silu(Acc x)    { return x * sigmoid(x); }

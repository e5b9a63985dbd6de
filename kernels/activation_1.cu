// GELU and SiLU of an array, and the ways back, in one launch each.
//
//     gelu    y = x (1 + tanh u) / 2,     u = c (x + k x^3),   c = sqrt(2 / pi),  k = 0.044715
//             dx = dy (1 + tanh u + x (1 - tanh^2 u) du) / 2,  du = c (1 + 3 k x^2)
//     silu    y = x s,                    s = sigmoid(x)
//             dx = dy s (1 + x (1 - s))
//
// Written with an array library, each of these lines is a launch for every operation in it, and an array for every
// intermediate result: about ten for GELU's way back.  Here a thread computes one element, and stores only the result.
// Half precision is widened when it is read.
//
//     (1 + tanh u) / 2 = sigmoid(2 u),  which keeps most of its digits where 1 + tanh u would cancel to 0
//
// Bytes    forward: x and y, 2 elements each; back: x, dy, dx, 3.  Limited by memory or, for a small array, the launch.
// Work     about 10 operations forward and 20 back, one exponential each.
// Speed    measured  not yet
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;

// sigmoid(2 u) and its derivative by x; beyond |x| = 10 the sigmoid is 0 or 1, and x^3 or the product might overflow
__device__ __forceinline__ Acc half_tanh(Acc x, Acc& slope) {
    const Acc c = Acc(0.7978845608028654), k = Acc(0.044715), z = min(max(x, Acc(-10)), Acc(10));
    const Acc s = sigmoid(2 * c * z * (1 + k * z * z));
    slope = x == z ? 2 * s * (1 - s) * c * (1 + 3 * k * z * z) : Acc(0);
    return x < z ? Acc(0) : s;
}

extern "C" __global__ void __launch_bounds__(THREADS) gelu(const T* x, T* y, int n) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    Acc slope;
    const Acc z = wide(x[i]);
    y[i] = narrow(z * half_tanh(z, slope));
}

extern "C" __global__ void __launch_bounds__(THREADS) gelu_backward(const T* x, const T* dy, T* dx, int n) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    Acc slope;
    const Acc z = wide(x[i]), s = half_tanh(z, slope);
    dx[i] = narrow(wide(dy[i]) * (s + z * slope));
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_forward(const T* x, T* y, int n) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < n) y[i] = narrow(silu(wide(x[i])));
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_backward(const T* x, const T* dy, T* dx, int n) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    const Acc z = wide(x[i]), s = sigmoid(z);
    dx[i] = narrow(wide(dy[i]) * s * (1 + z * (1 - s)));
}

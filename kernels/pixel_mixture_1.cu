// v of a pixel that is black, white or between, and the ways back (minidiff/nn/pixel_mixture.py).
//
//     log w_k = log pi_k - log(V_k) / 2 - (x - a m_k)^2 / 2 V_k,   V_k = a^2 s_k^2 + sigma^2    a: alpha of the sample
//     x0_hat  = w_2 - w_1 + w_3 x0_3,                              x0_3 = m + a s^2 / V e,      e = x - a m
//     v_hat   = (a x - x0_hat) / sigma
//
// A thread computes one number of x from its four numbers of the network, which lie side by side: one load.  The way
// back computes the same once more and needs no intermediate result in memory.
//
// Bytes    forward: 4 + 1 elements in, 1 out; back: 6 in, 5 out.  Limited by memory or, for small images, the launch.
// Work     about 60 operations forward and 110 back, six exponentials or logarithms.
// Speed    measured  not yet
//
// takes   float32, float64
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;

struct Mixture { Acc a, s, m, s2, V, e, w[3], between, x0_hat; };

// number i of x, of the sample i / per
__device__ __forceinline__ Mixture mixture(const T* out, Acc x, const T* alpha, const T* sigma, int i, int per) {
    const Four numbers = reinterpret_cast<const Four*>(out)[i];
    Mixture p;
    p.a = wide(alpha[i / per]), p.s = wide(sigma[i / per]);
    p.m = 2 * sigmoid(2 * wide(numbers.at[2])) - 1, p.s2 = sigmoid(wide(numbers.at[3]));
    p.V = p.a * p.a * p.s2 + p.s * p.s, p.e = x - p.a * p.m;
    const Acc black = (x + p.a) / p.s, white = (x - p.a) / p.s, log_s = log_(p.s);
    p.w[0] = wide(numbers.at[0]) - log_s - black * black / 2;
    p.w[1] = wide(numbers.at[1]) - log_s - white * white / 2;
    p.w[2] = -log_(p.V) / 2 - p.e * p.e / (2 * p.V);
    const Acc most = max(p.w[0], max(p.w[1], p.w[2]));
    for (int k = 0; k < 3; ++k) p.w[k] = exp_(p.w[k] - most);
    const Acc sum = p.w[0] + p.w[1] + p.w[2];
    for (int k = 0; k < 3; ++k) p.w[k] /= sum;
    p.between = p.m + p.a * p.s2 / p.V * p.e;
    p.x0_hat = p.w[1] - p.w[0] + p.w[2] * p.between;
    return p;
}

extern "C" __global__ void __launch_bounds__(THREADS)
mixture_forward(const T* out, const T* x, const T* alpha, const T* sigma, T* y, int per, int n) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    const Mixture p = mixture(out, wide(x[i]), alpha, sigma, i, per);
    y[i] = narrow((p.a * wide(x[i]) - p.x0_hat) / p.s);
}

extern "C" __global__ void __launch_bounds__(THREADS)
mixture_backward(const T* out, const T* x, const T* alpha, const T* sigma, const T* dy, T* dout, T* dx, int per,
                 int n) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    const Mixture p = mixture(out, wide(x[i]), alpha, sigma, i, per);
    const Acc s_2 = p.s * p.s, d = -wide(dy[i]) / p.s, off = p.between - p.x0_hat;
    // d m and d s^2; then through m = tanh(.) and s^2 = sigmoid(.)
    const Acc dm = p.w[2] * (off * p.a * p.e / p.V + s_2 / p.V);
    const Acc ds2 = p.w[2] * (off * (p.e * p.e / p.V - 1) * p.a * p.a / (2 * p.V) + p.a * s_2 * p.e / (p.V * p.V));
    Four back;
    back.at[0] = narrow(p.w[0] * (-1 - p.x0_hat) * d);
    back.at[1] = narrow(p.w[1] * (1 - p.x0_hat) * d);
    back.at[2] = narrow(dm * (1 - p.m * p.m) * d);
    back.at[3] = narrow(ds2 * p.s2 * (1 - p.s2) * d);
    reinterpret_cast<Four*>(dout)[i] = back;
    // Var[x_0 | x]
    const Acc variance = p.w[0] * (1 + p.x0_hat) * (1 + p.x0_hat) + p.w[1] * (1 - p.x0_hat) * (1 - p.x0_hat)
        + p.w[2] * (off * off + p.s2 * s_2 / p.V);
    dx[i] = narrow(p.a / p.s * wide(dy[i]) + d * p.a * variance / s_2);
}

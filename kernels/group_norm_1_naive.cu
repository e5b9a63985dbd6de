// Group norm, version 1: one thread normalises one whole group of one image.
//
//     x_hat = (x - mean) / sqrt(var + eps)        mean, var over the N pixels and C/G channels of the group
//     z     = gamma x_hat + beta                  y = z,  or silu(z) = z sigmoid(z)
//
// The variance is summed about the mean, in a separate pass: if the mean is large, E[x^2] - E[x]^2 subtracts two
// large numbers, and may lose all digits.  The mean is summed relative to the group's first element, sum(x - x_0):
// then the mean of a constant input is exact, and its variance is 0.
//
// Which thread does what.  x is (B, N, C), channels last; thread b G + g takes group g of image b:
//
//                 channels  0 .. C/G-1 | C/G .. 2C/G-1 |            (here G = 4)
//     pixel 0                thread 0  |   thread 1    |  thread 2  |  thread 3  |
//     pixel 1                thread 0  |   thread 1    |  thread 2  |  thread 3  |
//     ...
//
// The backward pass, with dz = dy silu'(z) (or dy) and means over the group:
//
//     dgamma = sum_pixels dz x_hat     dbeta = sum_pixels dz
//     dx     = rstd (gamma dz - mean(gamma dz) - x_hat mean(gamma dz x_hat))
//
// It uses only mean and rstd from the forward pass: z is computed again from x, which takes no memory.
//
// Bytes    forward: x is read three times and y written once, 4 B N C elements; backward: x and dy twice, dx once, 5.
//          128 images of 14 x 14 x 64 in float32 (6.4 MB): 26 and 32 MB; reading and writing each array
//          once would be 13 and 19 MB.
// Work     about 8 operations an element forward and 20 backward (30 more with a SiLU).
// Speed    measured  not yet (benchmarks/kernels.py)
//
// What limits it.  There are only B G threads: 1024 for that shape, which is 8 for each multiprocessor of an H100, and
// hiding the latency of memory takes about a thousand.  Each thread reads its group one element after another, and
// waits for each.  Neighbouring threads read addresses C/G elements apart, so one load of a warp touches up to 32 lines
// and uses 4 bytes of each.
//
// row      numbers from one image's gamma (and beta) to the next: C or more, or 0 if all images share them
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 32;

extern "C" __global__ void __launch_bounds__(THREADS) group_norm_forward(
        const T* x, const T* gamma, const T* beta, T* y, Acc* mean, Acc* rstd,
        int B, int N, int C, int groups, int row, int with_silu, Acc eps) {
    // Every thread of the grid runs this.  Its number in the grid is THREADS for each earlier block, plus its number in
    // its own block.  The last block may have spare threads.
    const int thread = blockIdx.x * THREADS + threadIdx.x;
    if (thread >= B * groups) return;
    const int b = thread / groups, g = thread % groups, size = C / groups;
    const Acc n = Acc(N) * size;                            // elements of the group
    x += b * N * C + g * size;                              // (N, size), rows C apart
    y += b * N * C + g * size;
    gamma += b * row + g * size;                            // (size)
    beta  += b * row + g * size;

    const Acc first = wide(x[0]);
    Acc sum = 0;
    for (int p = 0; p < N; p++)
        for (int c = 0; c < size; c++) sum += wide(x[p * C + c]) - first;
    const Acc m = first + sum / n;

    sum = 0;
    for (int p = 0; p < N; p++)
        for (int c = 0; c < size; c++) {
            const Acc centred = wide(x[p * C + c]) - m;
            sum += centred * centred;
        }
    const Acc r = rstd_of_variance(sum / n + eps);
    mean[thread] = m;
    rstd[thread] = r;

    for (int p = 0; p < N; p++)
        for (int c = 0; c < size; c++) {
            const Acc z = wide(gamma[c]) * r * (wide(x[p * C + c]) - m) + wide(beta[c]);
            y[p * C + c] = narrow(with_silu ? silu(z) : z);
        }
}

// dz, from dy:  d silu(z) / dz = s (1 + z (1 - s)),  s = sigmoid(z)
__device__ __forceinline__ Acc before_silu(Acc dy, Acc z) {
    const Acc s = sigmoid(z);
    return dy * s * (1 + z * (1 - s));
}

// dgamma and dbeta are halves of an array (B, 2, C): one row of both for each image.  plus: null, or an array of
// x's shape, which is added to dx.
extern "C" __global__ void __launch_bounds__(THREADS) group_norm_backward(
        const T* x, const T* dy, const T* gamma, const T* beta, const Acc* mean, const Acc* rstd,
        const T* plus, T* dx, Acc* dgamma, Acc* dbeta, int B, int N, int C, int groups, int row, int with_silu) {
    const int thread = blockIdx.x * THREADS + threadIdx.x;
    if (thread >= B * groups) return;
    const int b = thread / groups, g = thread % groups, size = C / groups;
    const Acc n = Acc(N) * size;
    x  += b * N * C + g * size;                             // (N, size), rows C apart
    dy += b * N * C + g * size;
    dx += b * N * C + g * size;
    if (plus) plus += b * N * C + g * size;
    gamma  += b * row + g * size;                           // (size)
    beta   += b * row + g * size;
    dgamma += b * 2 * C + g * size;
    dbeta  += b * 2 * C + g * size;
    const Acc m = mean[thread], r = rstd[thread];

    Acc m0 = 0, m1 = 0;                                     // mean(gamma dz), mean(gamma dz x_hat)
    for (int c = 0; c < size; c++) {
        const Acc a = wide(gamma[c]) * r, shift = wide(beta[c]);
        Acc sum = 0, sum_xhat = 0;
        for (int p = 0; p < N; p++) {
            const Acc centred = wide(x[p * C + c]) - m;
            Acc dz = wide(dy[p * C + c]);
            if (with_silu) dz = before_silu(dz, a * centred + shift);
            sum += dz;
            sum_xhat += dz * centred;
        }
        sum_xhat *= r;
        dgamma[c] = sum_xhat;
        dbeta[c] = sum;
        m0 += wide(gamma[c]) * sum / n;
        m1 += wide(gamma[c]) * sum_xhat / n;
    }

    for (int p = 0; p < N; p++)
        for (int c = 0; c < size; c++) {
            const Acc a = wide(gamma[c]) * r;
            const Acc centred = wide(x[p * C + c]) - m;
            Acc dz = wide(dy[p * C + c]);
            if (with_silu) dz = before_silu(dz, a * centred + wide(beta[c]));
            dx[p * C + c] = narrow(a * dz - r * m0 - r * r * m1 * centred + (plus ? wide(plus[p * C + c]) : Acc(0)));
        }
}

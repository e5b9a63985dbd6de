// Group norm, version 2: one block of 256 threads normalises one group of one image.
//
// Each thread of a block sums a part, and then the threads add their sums.  Within a warp they exchange them by
// shuffles, from register to register: in 5 rounds each thread adds the number of the thread 16, 8, 4, 2 and 1 places
// away, and then all 32 have the whole sum.  Each warp writes its sum to shared memory, and every thread adds these
// 8 sums.
//
//     thread      0  1  2  3  4  5  6  7          (8 of the 32)
//     sums        a  b  c  d  e  f  g  h
//     xor 4       a+e  b+f  c+g  d+h  a+e ...
//     xor 2       a+e+c+g  b+f+d+h    ...
//     xor 1       the sum, in all of them
//
// Which thread does what.  Forward, the threads take the group's elements in order, so the threads of a warp read
// neighbours, as far as the group has them.  Such reads are coalesced: they need few sectors (here C/G = 8; a warp
// reads 4 pixels):
//
//     pixel 0     threads  0 ..  7        pixel 32    threads  0 ..  7
//     pixel 1     threads  8 .. 15        ...
//     ...                                 (256 threads = 32 pixels)
//
// Backward, the sums of each channel come first: one warp for each channel, whose threads take 32 pixels at a time.
//
// Bytes    as version 1, forward 4 B N C elements and backward 5; but the same block has just read the group, so the
//          later passes mostly find it in the L1 or L2 cache.
//          128 images of 14 x 14 x 64 in float32: 1024 blocks of 256 threads, each with 6 KB of x.
// Work     as version 1, and an integer division for each element.
// Speed    measured  not yet (benchmarks/kernels.py)
//
// What limits it.  A group's channels are C/G neighbours, and the next pixel is C elements further: memory comes in
// sectors of 32 bytes, of which 10 channels of float16 use 20.  Each load reads one element, 4 or 2 bytes.  Backward, a
// warp reads one channel, C elements apart: each sector is fetched once for every channel in it, and only the cache
// saves the memory from that.
//
// row      numbers from one image's gamma (and beta) to the next: C or more, or 0 if all images share them
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

__device__ __forceinline__ Acc warp_sum(Acc x) {
    for (int away = 16; away > 0; away /= 2) x += __shfl_xor_sync(0xffffffffu, x, away);
    return x;
}

// The sum over the block, the same in every thread.  of_warps is __shared__: all threads of the block share the array,
// while every other variable belongs to one thread.  __syncthreads is a barrier: each thread waits until all threads of
// the block have arrived, and can then read what the others wrote before.
__device__ __forceinline__ Acc block_sum(Acc x, Acc* of_warps) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < WARPS; w++) x += of_warps[w];
    __syncthreads();                                        // before the next sum writes there
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) group_norm_forward(
        const T* x, const T* gamma, const T* beta, T* y, Acc* mean, Acc* rstd,
        int B, int N, int C, int groups, int row, int with_silu, Acc eps) {
    __shared__ Acc of_warps[WARPS];
    const int b = blockIdx.x / groups, g = blockIdx.x % groups, size = C / groups, n = N * size;
    x += b * N * C + g * size;                              // (N, size), rows C apart
    y += b * N * C + g * size;
    gamma += b * row + g * size;                            // (size)
    beta  += b * row + g * size;

    const Acc first = wide(x[0]);
    Acc sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += wide(x[i / size * C + i % size]) - first;
    const Acc m = first + block_sum(sum, of_warps) / n;

    sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const Acc centred = wide(x[i / size * C + i % size]) - m;
        sum += centred * centred;
    }
    const Acc r = rstd_of_variance(block_sum(sum, of_warps) / n + eps);
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = m;
        rstd[blockIdx.x] = r;
    }

    for (int i = threadIdx.x; i < n; i += THREADS) {
        const int p = i / size, c = i % size;
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
    __shared__ Acc of_warps[WARPS];
    const int b = blockIdx.x / groups, g = blockIdx.x % groups, size = C / groups, n = N * size;
    x  += b * N * C + g * size;                             // (N, size), rows C apart
    dy += b * N * C + g * size;
    dx += b * N * C + g * size;
    if (plus) plus += b * N * C + g * size;
    gamma  += b * row + g * size;                           // (size)
    beta   += b * row + g * size;
    dgamma += b * 2 * C + g * size;
    dbeta  += b * 2 * C + g * size;
    const Acc m = mean[blockIdx.x], r = rstd[blockIdx.x];

    Acc m0 = 0, m1 = 0;                                     // mean(gamma dz), mean(gamma dz x_hat)
    for (int c = threadIdx.x / 32; c < size; c += WARPS) {
        const Acc a = wide(gamma[c]) * r, shift = wide(beta[c]);
        Acc sum = 0, sum_xhat = 0;
        for (int p = threadIdx.x % 32; p < N; p += 32) {
            const Acc centred = wide(x[p * C + c]) - m;
            Acc dz = wide(dy[p * C + c]);
            if (with_silu) dz = before_silu(dz, a * centred + shift);
            sum += dz;
            sum_xhat += dz * centred;
        }
        sum = warp_sum(sum);
        sum_xhat = warp_sum(sum_xhat) * r;
        if (threadIdx.x % 32 == 0) {
            dgamma[c] = sum_xhat;
            dbeta[c] = sum;
            m0 += wide(gamma[c]) * sum / n;
            m1 += wide(gamma[c]) * sum_xhat / n;
        }
    }
    m0 = block_sum(m0, of_warps);
    m1 = block_sum(m1, of_warps);

    for (int i = threadIdx.x; i < n; i += THREADS) {
        const int p = i / size, c = i % size;
        const Acc a = wide(gamma[c]) * r;
        const Acc centred = wide(x[p * C + c]) - m;
        Acc dz = wide(dy[p * C + c]);
        if (with_silu) dz = before_silu(dz, a * centred + wide(beta[c]));
        dx[p * C + c] = narrow(a * dz - r * m0 - r * r * m1 * centred + (plus ? wide(plus[p * C + c]) : Acc(0)));
    }
}

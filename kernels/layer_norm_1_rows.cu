// Layer norm, version 1: one warp normalises one row, the C channels of one token.
//
//     x_hat = (x - mean) / sqrt(var + eps)        mean, var over the row
//     y     = gamma x_hat + beta
//
// A row is short (256 channels are 1 KB) and contiguous, so a warp sums it by shuffles, without shared memory or
// barriers.  As in group norm, the mean is summed relative to the row's first element, and the variance about the mean;
// these later passes read what the warp has just read, from the L1 cache.
//
// Which thread does what.  8 warps to a block; lane l of a warp takes 4 neighbouring channels at a time:
//
//     channels       0..3    4..7   ..  124..127 | 128..131  ..            (1 at a time if 4 does not divide C)
//     row 0 (warp 0) lane 0  lane 1 ..  lane 31  | lane 0    ..
//     row 1 (warp 1) lane 0  lane 1 ..
//
// The backward pass, with means over the row, is one launch, whose first blocks compute dx and the others the sums:
//
//     dx     = rstd (gamma dy - mean(gamma dy) - x_hat mean(gamma dy x_hat)) + plus      one warp per row, as above
//     dgamma = sum_rows dy x_hat     dbeta = sum_rows dy                                 32 channels per block:
//
//     channels   0 .. 31 | 32 .. 63 |             blocks (channels, part); in a block, warp w takes every 8th row, lane l
//     rows       0, 0    |  1, 0    |             one channel; then the warps' sums are added in shared memory, and the
//     part ..    0, 1    |  1, 1    |             sums of the parts, in order, by the block that finishes last, as in
//                                                 last_block.cuh.
//
// Bytes    forward: x once and y once, 2 M C elements; backward: x and dy twice, dx once, 5.
//          128 captions of 77 tokens of 256 channels in float32 (10 MB): 20 and 50 MB, a part of which is in L2.
// Work     about 8 operations an element forward and 15 backward.
// Speed    measured  not yet (benchmarks/kernels.py)
//
// What limits it.  Few tokens make few blocks, of 8 rows each.  Backward reads x and dy twice, as dx needs sums along
// rows and dgamma along columns.  A warp that kept the sums of all channels in registers, over many rows, would read
// them once, if C were known at compile time.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "last_block.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = 8;
constexpr int CHANNELS = 32;                                // of a block that sums over rows

__device__ __forceinline__ Acc warp_sum(Acc x) {
    for (int away = 16; away > 0; away /= 2) x += __shfl_xor_sync(0xffffffffu, x, away);
    return x;
}

// V neighbouring elements, read or written by one instruction.
template <int V> struct alignas(V == 4 ? alignof(Four) : alignof(T)) Piece { T at[V]; };

template <int V> __device__ __forceinline__ Piece<V> read(const T* from) {
    return *reinterpret_cast<const Piece<V>*>(from);
}

template <int V> __device__ __forceinline__ void write(T* to, const Piece<V>& piece) {
    *reinterpret_cast<Piece<V>*>(to) = piece;
}

__device__ __forceinline__ bool in_fours(const T* x, int C) {
    return C % 4 == 0 && reinterpret_cast<unsigned long long>(x) % alignof(Four) == 0;
}

// x and y point to the warp's row, mean and rstd to its own.
template <int V> __device__ __forceinline__ void forward(
        const T* x, const T* gamma, const T* beta, T* y, Acc* mean, Acc* rstd, int C, Acc eps) {
    const int lane = threadIdx.x % 32;
    const Acc first = wide(x[0]);
    Acc sum = 0;
    for (int c = lane * V; c < C; c += 32 * V) {
        const Piece<V> piece = read<V>(x + c);
        for (int k = 0; k < V; k++) sum += wide(piece.at[k]) - first;
    }
    const Acc m = first + warp_sum(sum) / C;

    sum = 0;
    for (int c = lane * V; c < C; c += 32 * V) {
        const Piece<V> piece = read<V>(x + c);
        for (int k = 0; k < V; k++) sum += (wide(piece.at[k]) - m) * (wide(piece.at[k]) - m);
    }
    const Acc r = rstd_of_variance(warp_sum(sum) / C + eps);
    if (lane == 0) {
        *mean = m;
        *rstd = r;
    }

    for (int c = lane * V; c < C; c += 32 * V) {
        Piece<V> piece = read<V>(x + c);
        for (int k = 0; k < V; k++)
            piece.at[k] = narrow(wide(gamma[c + k]) * r * (wide(piece.at[k]) - m) + wide(beta[c + k]));
        write<V>(y + c, piece);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm_forward(
        const T* x, const T* gamma, const T* beta, T* y, Acc* mean, Acc* rstd, int M, int C, Acc eps) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= M) return;                                   // the whole warp
    x += row * C;
    y += row * C;
    if (in_fours(x, C) && in_fours(y, C)) forward<4>(x, gamma, beta, y, mean + row, rstd + row, C, eps);
    else                                  forward<1>(x, gamma, beta, y, mean + row, rstd + row, C, eps);
}

template <int V> __device__ __forceinline__ void backward(
        const T* x, const T* dy, const T* gamma, Acc mean, Acc rstd, const T* plus, T* dx, int C) {
    const int lane = threadIdx.x % 32;
    Acc m0 = 0, m1 = 0;                                     // mean(gamma dy), mean(gamma dy x_hat)
    for (int c = lane * V; c < C; c += 32 * V) {
        const Piece<V> piece = read<V>(x + c), piece_dy = read<V>(dy + c);
        for (int k = 0; k < V; k++) {
            const Acc dx_hat = wide(gamma[c + k]) * wide(piece_dy.at[k]);
            m0 += dx_hat;
            m1 += dx_hat * (wide(piece.at[k]) - mean) * rstd;
        }
    }
    m0 = warp_sum(m0) / C;
    m1 = warp_sum(m1) / C;

    for (int c = lane * V; c < C; c += 32 * V) {
        const Piece<V> piece = read<V>(x + c);
        Piece<V> piece_dy = read<V>(dy + c);
        for (int k = 0; k < V; k++) {
            const Acc dx_hat = wide(gamma[c + k]) * wide(piece_dy.at[k]);
            const Acc d = rstd * (dx_hat - m0 - (wide(piece.at[k]) - mean) * rstd * m1);
            piece_dy.at[k] = narrow(plus ? d + wide(plus[c + k]) : d);
        }
        write<V>(dx + c, piece_dy);
    }
}

__device__ __forceinline__ void backward_row(
        const T* x, const T* dy, const T* gamma, const Acc* mean, const Acc* rstd, const T* plus, T* dx,
        int row, int C) {
    x  += row * C;
    dy += row * C;
    dx += row * C;
    if (plus) plus += row * C;
    if (in_fours(x, C) && in_fours(dy, C) && in_fours(dx, C))
        backward<4>(x, dy, gamma, mean[row], rstd[row], plus, dx, C);
    else
        backward<1>(x, dy, gamma, mean[row], rstd[row], plus, dx, C);
}

// grid    M / WARPS blocks of rows, then C / CHANNELS times splits of the sums, rounded up
// summed  (2, C), dgamma and dbeta
// found   (splits, 2, C), those of `part` rows each;   done: a zero for each group of channels
// plus    null, or an array of x's shape, which is added to dx
extern "C" __global__ void __launch_bounds__(THREADS) layer_norm_backward(
        const T* x, const T* dy, const T* gamma, const Acc* mean, const Acc* rstd, const T* plus, T* dx,
        Acc* found, unsigned int* done, T* summed, int M, int C, int part) {
    __shared__ Acc of_warps[2][WARPS][CHANNELS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int of_rows = (M + WARPS - 1) / WARPS, block = int(blockIdx.x) - of_rows;
    if (block < 0) {                                        // the whole block
        const int row = blockIdx.x * WARPS + warp;
        if (row < M) backward_row(x, dy, gamma, mean, rstd, plus, dx, row, C);
        return;
    }
    const int columns = (C + CHANNELS - 1) / CHANNELS, splits = (gridDim.x - of_rows) / columns;
    const int column = block % columns, split = block / columns, c = column * CHANNELS + lane;
    const int from = split * part, to = min(M, from + part);
    Acc dgamma = 0, dbeta = 0;
    for (int row = from + warp; row < to && c < C; row += WARPS) {
        const Acc d = wide(dy[row * C + c]);
        dgamma += d * (wide(x[row * C + c]) - mean[row]) * rstd[row];
        dbeta += d;
    }
    of_warps[0][warp][lane] = dgamma;
    of_warps[1][warp][lane] = dbeta;
    __syncthreads();
    if (warp < 2 && c < C) {                                // one warp for dgamma, one for dbeta
        Acc sum = 0;
        for (int w = 0; w < WARPS; w++) sum += of_warps[warp][w][lane];
        found[(split * 2 + warp) * C + c] = sum;
    }
    if (!is_last(done + column, splits) || warp >= 2 || c >= C) return;
    Acc sum = 0;
    for (int s = 0; s < splits; s++) sum += *(volatile Acc*)(found + (s * 2 + warp) * C + c);
    summed[warp * C + c] = narrow(sum);
}

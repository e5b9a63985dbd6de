// A sum that several blocks share, completed by the block that finishes last.
//
// Each block writes its part to memory and is then counted.  The block that finds all others counted adds the parts,
// from the first to the last.  So the order of the additions is fixed, and the result is the same, bit for bit, every
// time, whichever block is last; and no second launch is needed.
#pragma once
#include "element.cuh"

// Whether all other blocks that share the counter are done.  Every thread of the block calls it, after it has written
// its share of the block's part.  *done is 0 before and after the launch.
__device__ __forceinline__ bool is_last(unsigned int* done, int blocks) {
    __shared__ bool last;
    __threadfence();                                        // the part is visible before the block is counted
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(done, 1u) == blocks - 1;
        if (last) *done = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// V neighbouring sums of a tile's parts, plus bias, through SiLU if asked.
template <int V>
__device__ __forceinline__ void add_neighbours(const Acc* from, int n, int parts, const T* bias, T* y, int activate) {
    struct alignas(V * sizeof(Acc) >= 16 ? 16 : sizeof(Acc)) Sums { Acc at[V]; };
    Acc sum[V] = {};
    #pragma unroll 16
    for (int part = 0; part < parts; ++part) {              // the reads do not wait for each other
        const Sums more = *reinterpret_cast<const Sums*>(from + part * n);
        for (int v = 0; v < V; ++v) sum[v] += more.at[v];
    }
    for (int v = 0; v < V; ++v) {
        if (bias) sum[v] += wide(bias[v]);
        y[v] = narrow(activate ? silu(sum[v]) : sum[v]);
    }
}

// y = the sum of a tile's parts:  rows m0 .. of `rows`, columns n0 .. of N.
// partial (parts, n).  at(m): the row of y in which the tile's row m lies.
template <int TILE_M, int TILE_N, typename Row>
__device__ __forceinline__ void add_parts(const Acc* partial, int n, int parts, const T* bias, T* y, int m0, int n0,
                                          int rows, int N, int activate, Row at) {
    const int V = N % 4 == 0 ? 4 : 1;                       // neighbours that one read brings
    for (int i = threadIdx.x * V; i < TILE_M * TILE_N; i += blockDim.x * V) {
        const int m = m0 + i / TILE_N, column = n0 + i % TILE_N;
        if (m >= rows || column >= N) continue;
        const int place = at(m) * N + column;
        const T* column_bias = bias ? bias + column : nullptr;
        if (V == 4) add_neighbours<4>(partial + place, n, parts, column_bias, y + place, activate);
        else        add_neighbours<1>(partial + place, n, parts, column_bias, y + place, activate);
    }
}

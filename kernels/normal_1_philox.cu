// Standard normal numbers made on the device: Philox4x32-10, then Box and Muller's transform.
//
// A counter-based generator has no state: it encrypts a counter, and the output of the cipher is the random number.  So
// each thread can compute any number of any stream, and a sample's numbers do not depend on the batch around it.
//
//     key     = the stream's seed                                           64 bits
//     counter = (element / 4, call, place of the sample)                    32 + 32 + 64 bits
//     philox(counter, key) = 10 rounds of  (L, R) -> (mulhi(R, M) ^ key ^ L', mullo(R, M)),  on two halves, crossed
//                                                                           Salmon et al. 2011
//     u_0, u_1 = (word + 1/2) / 2^32                                        in (0, 1]
//     z_0, z_1 = sqrt(-2 ln u_0) (cos, sin)(2 pi u_1)                       Box & Muller 1958
//
// Which thread does what.  z is (samples, n); a thread turns one counter, four words, into four neighbouring numbers:
//
//                       elements  0 1 2 3 | 4 5 6 7 | ...             quads = ceil(n / 4) threads to a sample
//     sample 0   streams[0]       thread 0  thread 1                  all of them read (seed, place, call)
//     sample 1   streams[1]       thread quads ...
//
// The table of streams is an argument of the kernel, passed by value, so no copy to the card precedes the launch.
//
// Bytes    4 written for a float32, none read except a stream's 24, which stay in the cache.
//          128 images of 28 x 28 in float32: 0.4 MB.
// Work     40 integer products and about 80 other integer operations for 4 numbers, 2 logarithms, roots, sines and
//          cosines: 35 operations for each number, so arithmetic limits it, at any size.
// Speed    measured  not yet (benchmarks/kernels.py)
//
// What limits it.  mulhi runs at a quarter to a half of the speed of additions.  If n is not a multiple of four, the
// last thread of each sample discards some words; and since rows may then start anywhere, the four numbers are written
// one by one.  float64 also uses 32-bit uniforms: there are 4 10^9 different radii, none above 6.8.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int MOST = 160;                                   // samples of a launch: a kernel takes 4 KB of arguments

struct Streams { unsigned long long at[MOST][3]; };         // seed, place and call of each sample

struct Words { unsigned x, y, z, w; };

__device__ __forceinline__ Words philox(Words c, unsigned key_0, unsigned key_1) {
    #pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high_0 = __umulhi(0xD2511F53u, c.x), low_0 = 0xD2511F53u * c.x;
        const unsigned high_1 = __umulhi(0xCD9E8D57u, c.z), low_1 = 0xCD9E8D57u * c.z;
        c = {high_1 ^ c.y ^ key_0, low_1, high_0 ^ c.w ^ key_1, low_0};
        key_0 += 0x9E3779B9u;                               // the golden ratio
        key_1 += 0xBB67AE85u;                               // sqrt(3) - 1
    }
    return c;
}

// In (0, 1]: never 0, whose logarithm is infinite.
__device__ __forceinline__ Acc uniform(unsigned word) { return (Acc(word) + Acc(0.5)) * Acc(1.0 / 4294967296.0); }

__device__ __forceinline__ void sine_and_cosine(float half_turns, float* s, float* c)    { sincospif(half_turns, s, c); }
__device__ __forceinline__ void sine_and_cosine(double half_turns, double* s, double* c) { sincospi(half_turns, s, c); }

__device__ __forceinline__ void box_muller(unsigned word_0, unsigned word_1, Acc* z) {
    const Acc radius = sqrt(-2 * log_(uniform(word_0)));
    Acc sine, cosine;
    sine_and_cosine(2 * uniform(word_1), &sine, &cosine);
    z[0] = radius * cosine;
    z[1] = radius * sine;
}

extern "C" __global__ void __launch_bounds__(THREADS) normal(
        const Streams streams, T* z, int samples, int n) {
    const int quads = (n + 3) / 4;
    const int thread = blockIdx.x * THREADS + threadIdx.x;
    if (thread >= samples * quads) return;
    const int sample = thread / quads, quad = thread % quads;
    const unsigned long long seed = streams.at[sample][0], place = streams.at[sample][1];
    const unsigned call = unsigned(streams.at[sample][2]);

    const Words words = philox({unsigned(quad), call, unsigned(place), unsigned(place >> 32)},
                               unsigned(seed), unsigned(seed >> 32));
    Acc four[4];
    box_muller(words.x, words.y, four);
    box_muller(words.z, words.w, four + 2);
    z += sample * n + 4 * quad;
    #pragma unroll
    for (int i = 0; i < 4; i++)
        if (4 * quad + i < n) z[i] = narrow(four[i]);
}

// The cipher alone, for the tests: words (n, 4) of counters (n, 4) and keys (n, 2).
extern "C" __global__ void __launch_bounds__(THREADS) philox_words(
        const unsigned int* counters, const unsigned int* keys, unsigned int* words, int n) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    const unsigned int* c = counters + 4 * i;
    const Words w = philox({c[0], c[1], c[2], c[3]}, keys[2 * i], keys[2 * i + 1]);
    words[4 * i] = w.x, words[4 * i + 1] = w.y, words[4 * i + 2] = w.z, words[4 * i + 3] = w.w;
}

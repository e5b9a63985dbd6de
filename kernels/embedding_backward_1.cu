// The way back of an embedding: the gradient of a table of V rows, of which N were looked up.
//
//     dtable[v] = sum of dy[n] over the n with ids[n] = v
//
// A thread for each looked-up row would have to add atomically, where an id occurs twice, and the order of the additions
// would differ each time.  So each row of the table looks for its own uses: a warp for each row v reads all ids, 32 at a
// time, and adds the rows of dy whose id is v, in the order of n.
//
//     ids   7 0 3 7 | 7 1 ..         lane l compares ids[n + l] with v; the vote of the warp is one bit for each lane
//     v = 7 1 0 0 1 | 1 0 ..         the bits are taken from the lowest: rows 0, 3, 4 of dy, lane l adding column l
//
// Bytes    ids ceil(C / 32) times for each warp, from the L1 and L2 caches; dy and dtable once.
// Work     V N ceil(C / 32) comparisons, 32 in one instruction.  512 rows, 600 ids and 64 columns: 600,000.
//          49,408 rows, 2,464 ids and 768 columns: 2.9 billion.
// Speed    measured  not yet
//
// What limits it: the comparisons.  Sorted ids would need no search.
//
// takes   float32, float64, float16, bfloat16
// needs   sm_75
#include "element.cuh"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(256)
embedding_backward(const int* ids, const T* dy, T* dtable, int N, int V, int C) {
    const int lane = threadIdx.x % 32, v = blockIdx.x * WARPS + threadIdx.x / 32;
    if (v >= V) return;
    for (int first = 0; first < C; first += 32) {           // columns
        const int c = first + lane;
        Acc sum = 0;
        for (int n = 0; n < N; n += 32) {
            unsigned used = __ballot_sync(0xffffffffu, n + lane < N && ids[n + lane] == v);
            for (; used; used &= used - 1) {
                const int row = n + __ffs(int(used)) - 1;
                if (c < C) sum += wide(dy[row * C + c]);
            }
        }
        if (c < C) dtable[v * C + c] = narrow(sum);
    }
}

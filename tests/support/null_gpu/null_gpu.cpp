// A GPU that does not exist: CUDA's driver and runtime, as the real CuPy calls them.
//
// Memory is the host's and starts as zeros.  Copies and fills are real.  A launch is checked and told to a listener, and
// no kernel runs.  What CuPy does not need here is missing: the runtime's other functions answer "not supported".
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <elf.h>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <utility>

// --- the card: an H100, unless NULL_GPU_CAPABILITY or NULL_GPU_SHARED says otherwise --------------------------------

static int number(const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}

static const int CAPABILITY = number("NULL_GPU_CAPABILITY", 90);
static const unsigned SHARED = number("NULL_GPU_SHARED", 232448);       // bytes that a block may ask for
static const unsigned WITHOUT_ASKING = 48 << 10;                        // bytes that it gets by default
enum { OK, INVALID_VALUE, NO_MEMORY, INVALID_IMAGE = 200, NO_FILE = 301, NOT_FOUND = 500, NOT_SUPPORTED = 801,
       NOT_IN_A_CAPTURE = 900, CAPTURE_FAILED = 901 };

static const char* reason_of(int error, const std::string& refused) {
    return error == INVALID_VALUE || error == NOT_IN_A_CAPTURE ? refused.c_str()
         : error == CAPTURE_FAILED ? "the capture failed: a call in it was refused" : error == NO_MEMORY ? "out of memory"
         : error == NOT_FOUND ? "the module has no such kernel" : "not supported by the null GPU";
}

static thread_local std::string refused = "invalid argument";
static int refuse(const std::string& why) {
    refused = why;
    return INVALID_VALUE;
}

// --- a capture: what a stream is asked to do becomes a graph, which can be launched again and again ------------------
//
// Refused in it is what waits, and what a graph would not repeat rightly: a copy from or to the host, whose memory CuPy
// gives to other arrays before the graph runs; new or freed memory of the card, whose addresses a graph must keep; work
// on another stream, which would not be in the graph.  CUDA itself allows some of these in CuPy's mode of capture.

static void* capturing = nullptr;                           // the stream
static bool capture_failed = false;

static int not_in_a_capture(const std::string& what) {
    refused = what + " while a stream is captured";
    capture_failed = true;
    return NOT_IN_A_CAPTURE;
}

// --- the listener ---------------------------------------------------------------------------------------------------

using Listener = void (*)(const char*);
static Listener listener = nullptr;

static void tell(const char* kind, const std::string& what) {
    if (listener)
        listener((kind + (" " + what)).c_str());
}

extern "C" {
void null_gpu_listen(Listener f) { listener = f; }

// cuBLAS's functions, which null_gpu.py writes, call this
int null_gpu_library(const char* name) {
    tell(std::strstr(name, "emm") ? "product" : "library", name);
    return OK;
}

// --- the driver: modules and their kernels --------------------------------------------------------------------------

struct Kernel {
    std::string name;
    unsigned shared = 0, threads = 1024, dynamic = WITHOUT_ASKING;      // declared; __launch_bounds__; granted
};
struct Module {
    std::map<std::string, Kernel> kernels;
};

static unsigned launch_bounds(const unsigned char* at, const unsigned char* end) {
    while (at + 4 <= end) {                         // entries of .nv.info.NAME: form, attribute, a value or its size
        const unsigned size = at[0] == 4 ? at[2] | at[3] << 8 : 0;
        if (at[0] == 4 && at[1] == 5 && size == 12) {                   // EIATTR_MAX_THREADS
            unsigned xyz[3];
            std::memcpy(xyz, at + 4, sizeof xyz);
            return xyz[0] * xyz[1] * xyz[2];
        }
        at += 4 + size;
    }
    return 1024;
}

// A compiled module is an ELF file.  Its sections are named after the kernels: .text.NAME, .nv.shared.NAME, .nv.info.NAME
int cuModuleLoadData(Module** made, const void* image) {
    const char* at = static_cast<const char*>(image);
    if (std::memcmp(at, ELFMAG, SELFMAG))
        return INVALID_IMAGE;
    const auto* elf = reinterpret_cast<const Elf64_Ehdr*>(at);
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(at + elf->e_shoff);
    const char* names = at + sections[elf->e_shstrndx].sh_offset;
    auto* module = new Module;
    auto each = [&](const char* prefix, auto f) {
        for (int i = 0; i < elf->e_shnum; i++)
            if (const std::string name = names + sections[i].sh_name; name.rfind(prefix, 0) == 0)
                f(name.substr(std::strlen(prefix)), sections[i]);
    };
    each(".text.", [&](const std::string& name, const Elf64_Shdr&) { module->kernels[name].name = name; });
    each(".nv.shared.", [&](const std::string& name, const Elf64_Shdr& s) {
        const unsigned reserved = CAPABILITY >= 90 && s.sh_size >= 1024 ? 1024 : 0;     // a Hopper keeps 1 KiB itself
        module->kernels[name].shared = s.sh_size - reserved;
    });
    each(".nv.info.", [&](const std::string& name, const Elf64_Shdr& s) {
        const auto* from = reinterpret_cast<const unsigned char*>(at + s.sh_offset);
        module->kernels[name].threads = launch_bounds(from, from + s.sh_size);
    });
    *made = module;
    return OK;
}

int cuModuleLoad(Module** made, const char* path) {
    std::ifstream file(path, std::ios::binary);
    const std::string image{std::istreambuf_iterator<char>(file), {}};
    return image.size() < sizeof(Elf64_Ehdr) ? NO_FILE : cuModuleLoadData(made, image.data());
}

int cuModuleUnload(Module* module) { return delete module, OK; }

int cuModuleGetFunction(Kernel** kernel, Module* module, const char* name) {
    const auto found = module->kernels.find(name);
    if (found == module->kernels.end())
        return NOT_FOUND;
    *kernel = &found->second;
    (*kernel)->dynamic = WITHOUT_ASKING - std::min(WITHOUT_ASKING, (*kernel)->shared);
    return OK;
}

enum { MAX_THREADS = 0, DECLARED = 1, DYNAMIC = 8 };                    // CUfunction_attribute

int cuFuncGetAttribute(int* value, int attribute, Kernel* kernel) {
    *value = attribute == MAX_THREADS ? kernel->threads : attribute == DECLARED ? kernel->shared
           : attribute == DYNAMIC ? kernel->dynamic : 0;
    return OK;
}

int cuFuncSetAttribute(Kernel* kernel, int attribute, int value) {
    if (attribute != DYNAMIC)
        return OK;
    if (value < 0 || value + kernel->shared > SHARED)
        return refuse(kernel->name + " wants " + std::to_string(value) + " bytes of dynamic shared memory beside "
                      + std::to_string(kernel->shared) + ", and the card has " + std::to_string(SHARED));
    kernel->dynamic = value;
    return OK;
}

static int checked_launch(const std::string& name, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared,
                          unsigned threads, unsigned dynamic, void* stream) {
    if (capturing && stream != capturing)
        return not_in_a_capture(name + " is launched on another stream");
    const unsigned most_blocks[] = {0x7fffffff, 65535, 65535}, most_threads[] = {1024, 1024, 64};
    for (int i = 0; i < 3; i++)
        if (!grid[i] || grid[i] > most_blocks[i] || !block[i] || block[i] > most_threads[i])
            return refuse(name + ": a side of the grid or of the block is too large, or 0");
    if (block[0] * block[1] * block[2] > threads)
        return refuse(name + ": a block has more than " + std::to_string(threads) + " threads");
    if (shared > dynamic)
        return refuse(name + " wants " + std::to_string(shared) + " bytes of dynamic shared memory, and may have "
                      + std::to_string(dynamic));
    tell("launch", name);
    return OK;
}

int cuLaunchKernel(Kernel* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void**, void**) {
    return checked_launch(kernel->name, {gx, gy, gz}, {bx, by, bz}, shared, kernel->threads, kernel->dynamic, stream);
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads, size_t) {
    return *blocks = 2048 / std::max(threads, 1), OK;
}

int cuInit(unsigned) { return OK; }
int cuDriverGetVersion(int* version) { return *version = 13000, OK; }
int cuGetExportTable(const void** table, const void*) { return *table = nullptr, INVALID_VALUE; }     // NVRTC asks
int cuCtxGetCurrent(void** context) { return *context = &listener, OK; }
int cuCtxGetDevice(int* device) { return *device = 0, OK; }
int cuGetErrorName(int error, const char** text) { return *text = error == INVALID_VALUE ? "invalid" : "CUDA", OK; }
int cuGetErrorString(int error, const char** text) { return *text = reason_of(error, refused), OK; }

// --- the runtime ----------------------------------------------------------------------------------------------------

int null_gpu_unsupported() { return NOT_SUPPORTED; }

const char* cudaGetErrorName(int error) { return error ? "cudaError" : "cudaSuccess"; }
const char* cudaGetErrorString(int error) { return reason_of(error, refused); }
int cudaPeekAtLastError() { return OK; }
int cudaGetLastError() { return OK; }
int cudaDriverGetVersion(int* version) { return cuDriverGetVersion(version); }
int cudaRuntimeGetVersion(int* version) { return cuDriverGetVersion(version); }
int cudaGetDeviceCount(int* count) { return *count = 1, OK; }
int cudaGetDevice(int* device) { return *device = 0, OK; }
int cudaSetDevice(int device) { return device ? refuse("there is one device, 0") : OK; }

int cudaDeviceGetAttribute(int* value, int attribute, int) {
    static const std::map<int, int> attributes = {                      // enum cudaDeviceAttr
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},                       // threads of a block; its x, y and z
        {5, 0x7fffffff}, {6, 65535}, {7, 65535},                        // blocks of a grid, x, y and z
        {8, WITHOUT_ASKING}, {81, SHARED + 1024}, {97, SHARED},         // shared memory: default, all, on asking
        {10, 32}, {12, 65536}, {16, 132}, {39, 2048},                   // warp; registers; multiprocessors; their threads
        {75, CAPABILITY / 10}, {76, CAPABILITY % 10},
    };
    const auto found = attributes.find(attribute);
    return *value = found == attributes.end() ? 0 : found->second, OK;
}

int cudaMalloc(void** memory, size_t size) {
    if (capturing)
        return not_in_a_capture(std::to_string(size) + " new bytes");
    return (*memory = std::calloc(size, 1)) ? OK : NO_MEMORY;
}
int cudaFree(void* memory) { return capturing ? not_in_a_capture("memory is freed") : (std::free(memory), OK); }
int cudaHostAlloc(void** memory, size_t size, unsigned) { return (*memory = std::calloc(size, 1)) ? OK : NO_MEMORY; }
int cudaFreeHost(void* memory) { return std::free(memory), OK; }
int cudaMemGetInfo(size_t* available, size_t* total) { return *available = *total = size_t(80) << 30, OK; }

int cudaPointerGetAttributes(void* attributes, const void*) {
    struct {                                                            // the head of struct cudaPointerAttributes
        int type = 0, device = 0;                                       // 0: memory that CUDA does not know
        const void *on_device = nullptr, *on_host = nullptr;
    } of_all;
    return std::memcpy(attributes, &of_all, sizeof of_all), OK;
}
int cudaMemcpyAsync(void* to, const void* from, size_t size, int kind, void* stream) {
    const char* ways[] = {"copy", "upload", "download", "copy", "copy"};
    if (capturing && (kind == 1 || kind == 2 || stream != capturing))
        return not_in_a_capture(std::string(ways[kind]) + " of " + std::to_string(size) + " bytes");
    tell(ways[kind], std::to_string(size));
    std::memmove(to, from, size);
    if (kind == 2 && size == 1)                     // a question to the device, such as "is all of it finite?": yes
        *static_cast<char*>(to) = 1;
    return OK;
}
int cudaMemcpy(void* to, const void* from, size_t size, int kind) { return cudaMemcpyAsync(to, from, size, kind, nullptr); }
int cudaMemsetAsync(void* to, int value, size_t size, void* stream) {
    if (capturing && stream != capturing)
        return not_in_a_capture("a fill on another stream");
    tell("fill", std::to_string(size));
    return std::memset(to, value, size), OK;
}
int cudaMemset(void* to, int value, size_t size) { return cudaMemsetAsync(to, value, size, nullptr); }

static int wait(const char* what) {
    return capturing ? not_in_a_capture(std::string("a wait for the ") + what) : (tell("wait", what), OK);
}
int cudaStreamSynchronize(void*) { return wait("stream"); }
int cudaDeviceSynchronize() { return wait("device"); }
int cudaEventSynchronize(void*) { return wait("event"); }

int cudaStreamCreateWithPriority(void** stream, unsigned, int) { return *stream = new char, OK; }
int cudaStreamDestroy(void* stream) { return delete static_cast<char*>(stream), OK; }
int cudaStreamIsCapturing(void* stream, int* status) { return *status = capturing && stream == capturing, OK; }
int cudaStreamBeginCapture(void* stream, int) {
    if (!stream || capturing)
        return not_in_a_capture(stream ? "a second capture" : "the default stream");
    return capturing = stream, capture_failed = false, OK;
}
int cudaStreamEndCapture(void* stream, void** graph) {
    if (stream != capturing)
        return refuse("the stream is not captured");
    return capturing = nullptr, *graph = &listener, capture_failed ? CAPTURE_FAILED : OK;
}
int cudaGraphInstantiate(void** ready, void* graph) { return *ready = graph, OK; }
int cudaGraphUpload(void*, void*) { return OK; }
int cudaGraphLaunch(void*, void*) { return tell("graph", "launched"), OK; }
int cudaGraphDestroy(void*) { return OK; }
int cudaGraphExecDestroy(void*) { return OK; }
int cudaEventCreateWithFlags(void** event, unsigned) { return *event = &listener, OK; }
int cudaEventRecord(void*, void*) { return OK; }
int cudaEventDestroy(void*) { return OK; }

// Kernels that CuPy's wheel brings compiled, of Thrust and CUB.  A call a<<<grid, block, shared, stream>>>() pushes
// its configuration and pops it again.
struct Sizes {
    unsigned x, y, z;
};
static thread_local struct {
    Sizes grid, block;
    size_t shared;
    void* stream;
} pushed;

int __cudaPushCallConfiguration(Sizes grid, Sizes block, size_t shared, void* stream) {
    return pushed = {grid, block, shared, stream}, OK;
}
int __cudaPopCallConfiguration(Sizes* grid, Sizes* block, size_t* shared, void** stream) {
    return *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream, OK;
}
int __cudaGetKernel(const void** kernel, const void* function) { return *kernel = function, OK; }
int cudaLaunchKernel(const void*, Sizes grid, Sizes block, void**, size_t shared, void* stream) {
    return checked_launch("of CuPy's wheel", {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, 1024, SHARED,
                          stream);
}
int __cudaLaunchKernel(const void* kernel, Sizes grid, Sizes block, void** arguments, size_t shared, void* stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
int cudaLaunchKernelExC(const void* sizes, const void* kernel, void** arguments) {
    struct {                                                            // the head of struct cudaLaunchConfig_t
        Sizes grid, block;
        size_t shared;
        void* stream;
    } c;
    return std::memcpy(&c, sizes, sizeof c), cudaLaunchKernel(kernel, c.grid, c.block, arguments, c.shared, c.stream);
}
int cudaFuncGetAttributes(void* attributes, const void*) {
    const struct {                                                      // the head of struct cudaFuncAttributes
        size_t shared, constant, local;
        int threads, registers, ptx, binary;
    } of_all = {0, 0, 0, 1024, 32, CAPABILITY, CAPABILITY};
    return std::memcpy(attributes, &of_all, sizeof of_all), OK;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
    return *blocks = 2, OK;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) { return *blocks = 2, OK; }
}
